//! The filter: a stock Envoy runs it as WebAssembly and asks it about every request. It answers from its own copy of the
//! key store and never waits for anybody.
//!
//! Reading order, the way of a request first: [`config`] is what the operator chose; [`credential`] looks for the key in
//! each [`source`], with [`query`] and [`cookie`] for two of them; [`recent`] remembers what [`store`] said of it, which finds
//! its record, and [`definitions`], what that refers to; [`judge`] lets `contract::decision` decide, with [`address`] where it matters, and then asks [`mod@slice`] and
//! [`limiter`], which remember how often, and [`stock`]; [`reply`] says what is answered; [`identity`] lists the
//! headers that say who calls; [`usage`] counts. Then what happens between
//! requests: [`lease`] settles which VM speaks with the control plane, [`sync`] keeps the store up to date, [`reports`] says
//! when usage is told, [`grants`] takes what is leased in return, `conversation` does each on time. `core` is what one VM
//! knows, `root` and `request` are Envoy's callbacks, `metrics` its statistics, and `host` is the only file that names
//! hostcalls.
//!
//! The VMs of one Envoy share nothing but Envoy's shared data, seen here as [`cells`]. Everything but the modules for Envoy
//! itself is tested natively.

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

pub mod address;
pub mod cookie;
pub mod credential;
pub mod identity;
pub mod query;
pub mod source;

pub mod definitions;
pub mod judge;
pub mod limiter;
pub mod mixed;
pub mod recent;
pub mod reply;
pub mod slice;
pub mod stock;
pub mod store;
pub mod usage;

pub mod grants;
pub mod lease;
pub mod reports;
pub mod sync;

#[cfg(target_arch = "wasm32")]
mod conversation;
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
#[cfg(all(target_arch = "wasm32", feature = "trap"))]
mod trap;

/// Where Envoy enters: it starts each VM with this.
#[cfg(target_arch = "wasm32")]
mod entry;
