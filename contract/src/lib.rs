//! What the filter and the control plane must agree on, and nothing else: no HTTP, no SQL, no Envoy.
//!
//! In reading order: a [`key`] is presented, its [`hash`] names a [`record`], records travel in a [`page`], the [`decision`]
//! turns record and request into an [`outcome`], and outcomes are counted into a [`usage`] report. Pages and reports are
//! sealed by the [`codec`].
//!
//! Everything here is pure: bytes, values and `now` come in, values go out. The crate runs natively in the control plane
//! and as WebAssembly in Envoy, and is tested as both.

#![forbid(unsafe_code)]
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
pub mod hash;
pub mod id;
pub mod key;
pub mod outcome;
pub mod page;
pub mod record;
pub mod usage;
