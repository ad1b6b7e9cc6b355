//! How all Envoys together keep rate limits, quotas and credits, exactly and mostly without a call for a request.
//!
//! What a limit allows is a [`pool`] of tokens, one for each rate limit, quota or balance. The control plane keeps it in a
//! [`ledger`]. Each Envoy holds an *allowance* of the pool, tokens that the control plane granted it, and spends from it: see
//! [`holding`]. A request that finds no allowance waits while the Envoy asks for more; [`asking`] says what a worker asks
//! for and when. The [`message`]s carry sums that only grow, so that a lost, repeated or late message does no harm.
//!
//! All functions are pure: no clock, no shared data, no SQL. `tests/simulation` runs both sides against one exact pool.

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

pub mod asking;
pub mod contact;
pub mod holding;
pub mod ledger;
pub mod message;
pub mod pool;

/// Time between two ticks of a worker, in milliseconds. Demand is measured by the tick.
pub const TICK_MS: u64 = 250;

/// An Envoy that has not used a pool for this long hands its allowance back, in milliseconds.
pub const IDLE_MS: u64 = 300_000;

/// An Envoy that has not used a pool for this long starts a new session with the next use, in milliseconds. The control plane
/// forgets a session that was not used for 900,000 ms.
pub const FORGOTTEN_MS: u64 = 750_000;

/// An Envoy whose last answer from the control plane is older than this stops spending its allowances, in milliseconds.
pub const VOID_AFTER_MS: u64 = 50_000;

/// The control plane takes back what an Envoy holds that has been silent for this long, in milliseconds. The difference to
/// [`VOID_AFTER_MS`] is the tolerance for clocks that run at different speeds and for messages that are under way.
pub const EXPIRES_AFTER_MS: u64 = 60_000;

/// An Envoy that has been silent for this long does not count as live, in milliseconds.
pub const LIVE_MS: u64 = 10_000;

/// The control plane lets the only live Envoy decide by itself for this many milliseconds after the Envoy sent its call.
pub const ALONE_MS: u64 = 400;

/// How long the control plane waits after [`ALONE_MS`] for the usage that the Envoy did not tell yet, in milliseconds: every
/// worker tells its usage on each tick.
pub const ALONE_GRACE_MS: u64 = 350;

/// While requests wait for tokens that other Envoys hold, a worker asks again this often, in milliseconds.
pub const AGAIN_MS: u64 = 25;

/// The longest time that a request waits for an allowance, in milliseconds.
pub const LONGEST_WAIT_MS: u64 = 800;
