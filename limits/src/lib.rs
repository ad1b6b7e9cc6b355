//! Rate limits, quotas and credits that count over all Envoys: exact, and mostly without a call on the request path.
//!
//! Each rate limit, quota or balance is a [`pool`] of tokens, which the control plane keeps in a [`ledger`]. Each Envoy spends
//! from its *allowance*: tokens of the pool that the control plane granted it. See [`holding`]. A request that the allowance
//! does not cover waits while the Envoy asks for more; [`asking`] says what a worker asks for and when. The sums in the
//! [`message`]s only grow, so a lost, repeated or late message does no harm.
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

/// Time between two ticks of a worker, in milliseconds. Demand is measured for each tick.
pub const TICK_MS: u64 = 250;

/// An Envoy that has not used a pool for this long hands its allowance back, in milliseconds.
pub const IDLE_MS: u64 = 300_000;

/// An Envoy that has not used a pool for this long starts a new session with the next use, in milliseconds. The control plane
/// forgets a session that was not used for 900,000 ms.
pub const FORGOTTEN_MS: u64 = 750_000;

/// An Envoy whose last answer from the control plane is older than this stops spending its allowances, in milliseconds.
pub const VOID_AFTER_MS: u64 = 50_000;

/// When an Envoy has been silent for this long, in milliseconds, the tokens that it holds return to their pools. The difference
/// to [`VOID_AFTER_MS`] is the tolerance for clocks that run at different speeds and for messages that are under way.
pub const EXPIRES_AFTER_MS: u64 = 60_000;

/// An Envoy that calls for allowances is live until this long after its last call, in milliseconds. An Envoy without such calls
/// is live while it polls for keys.
pub const LIVE_MS: u64 = 10_000;

/// The control plane lets the only live Envoy decide by itself for this many milliseconds after the Envoy sent its call.
pub const ALONE_MS: u64 = 400;

/// How long the control plane waits after [`ALONE_MS`] for usage that the Envoy has not reported yet, in milliseconds: every
/// worker reports its usage on each tick.
pub const ALONE_GRACE_MS: u64 = 350;

/// While requests wait for tokens that other Envoys hold, a worker asks again this often, in milliseconds.
pub const AGAIN_MS: u64 = 25;

/// The longest time that a request waits for an allowance, in milliseconds.
pub const LONGEST_WAIT_MS: u64 = 800;
