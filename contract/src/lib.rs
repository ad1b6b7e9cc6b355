//! What the filter and the control plane must agree on, and nothing else: no HTTP, no SQL, no Envoy.
//!
//! In reading order: a [`key`] is presented, its [`hash`], with a [`pepper`] or without, names a [`record`], which may be bound to a [`network`] and refer
//! to a [`definition`]; all of that travels in a [`page`]. The [`policy`] of a route says what is asked of a request, the
//! [`decision`] turns record and request into an [`outcome`], [`rate`] and [`budget`] bound how often, and outcomes are
//! counted into a [`usage`] report. Pages and reports are sealed by the [`codec`]. Reports in a log are signed as
//! [`usage_log`] says. What people write as JSON is read by [`json`].
//!
//! Everything here is pure: bytes, values and `now` come in, values go out. The crate runs natively in the control plane
//! and as WebAssembly in Envoy, and is tested as both.

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

pub mod budget;
pub mod codec;
pub mod decision;
pub mod definition;
pub mod hash;
pub mod id;
pub mod json;
pub mod key;
pub mod network;
pub mod outcome;
pub mod page;
pub mod pepper;
pub mod policy;
pub mod rate;
pub mod record;
pub mod usage;
pub mod usage_log;
