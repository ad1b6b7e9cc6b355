//! Everything that the filter does, for any host: Envoy runs it as WebAssembly through a thin shell, tests run it on a mock.
//!
//! [`filter`] has the callbacks of a host, and [`host`] the traits that a shell implements. A request is one walk in
//! [`request`]: [`extract`] finds and hashes its key, [`keys`] looks the key up in the [`store`], `contract::decision` decides, [`limits`]
//! takes tokens or lets the request wait, [`reply`] refuses, [`usage`] counts. Between requests, [`vm`] publishes what a VM counted, and the [`leader`] syncs
//! the store and reports usage. [`setup`] and [`config`] read what the operator chose.
//!
//! VMs of one Envoy share cells of bytes only, see [`shared`].

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

pub mod filter;
pub mod host;

pub mod config;
pub mod identity;
pub mod setup;

pub mod request;

pub mod extract;

pub mod keys;
pub mod store;

pub mod address;
pub mod limits;
pub mod metadata;
pub mod reply;

pub mod sightings;
pub mod usage;

pub mod vm;

pub mod leader;

pub mod shared;
pub mod stats;
pub mod time;

#[cfg(test)]
mod mock;
