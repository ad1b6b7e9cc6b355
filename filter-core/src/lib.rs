//! Everything that the filter does, without a host.

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
