//! The filter: a stock Envoy runs it as WebAssembly and asks it about every request. It answers from its own copy of the
//! key store and never waits for anybody.
//!
//! Reading order, the way of a request first: [`config`] is what the operator chose; [`credential`] finds the key on the
//! request; [`store`] finds its record; `contract::decision` decides; [`limiter`] remembers rates; [`reply`] says what is
//! answered or sent upstream; [`usage`] counts. Then what happens between requests: [`lease`] settles which VM speaks
//! with the control plane, [`sync`] keeps the store up to date, `core` does each on time. `root` and `request` are
//! Envoy's callbacks, `metrics` its statistics, and `host` is the only file that names hostcalls.
//!
//! The VMs of one Envoy share nothing but Envoy's shared data, seen here as [`cells`]. Everything but the last four
//! modules is free of Envoy and tested natively.

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
#![forbid(unsafe_code)]

pub mod cells;
pub mod config;
pub mod credential;
pub mod lease;
pub mod limiter;
pub mod reply;
pub mod store;
pub mod sync;
pub mod usage;

#[cfg(target_arch = "wasm32")]
mod core;
#[cfg(target_arch = "wasm32")]
mod host;
#[cfg(target_arch = "wasm32")]
mod metrics;
#[cfg(target_arch = "wasm32")]
mod request;
#[cfg(target_arch = "wasm32")]
mod root;

/// Where Envoy enters: it starts each VM with this.
#[cfg(target_arch = "wasm32")]
mod entry;
