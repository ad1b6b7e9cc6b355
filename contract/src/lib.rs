//! Everything that the filter and the control plane share: keys, records, policies, the decision, limits, and their messages.
//!
//! In reading order: a request has a [`key`]. Its [`hash`], with or without a [`pepper`], finds its [`record`], which may be
//! bound to a [`network`] and reference a [`definition`]. The [`policy`] of the route, which the route names or one of the
//! [`rules`] picks, says what is required. The [`decision`]
//! on record and request is an [`outcome`]; [`rate`] limits how often. Outcomes are counted in [`usage`]
//! reports.
//!
//! An [`update`] brings records and definitions to a filter. Updates and reports have the envelope of the [`codec`]. Reports
//! in a log are signed as in [`usage_log`]. Input in JSON is read by [`json`].
//!
//! All functions are pure: no HTTP, no SQL, no Envoy, no clock. The crate runs natively in the control plane and as
//! WebAssembly in Envoy, and is tested as both.

#![forbid(unsafe_code)]
#![warn(missing_docs)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod codec;
pub mod decision;
pub mod definition;
pub mod hash;
pub mod id;
pub mod json;
pub mod key;
pub mod network;
pub mod outcome;
pub mod pepper;
pub mod policy;
pub mod rate;
pub mod record;
pub mod rules;
pub mod sightings;
pub mod time;
pub mod update;
pub mod usage;
pub mod usage_log;
