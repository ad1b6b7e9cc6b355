//! Limits on how often a key or a client is served: rate limits, quotas and credits.
//!
//! [`limiter`] and [`stock`] keep what was used in shared data; [`mod@slice`] takes requests of busy keys from a rate limit ahead
//! of time; [`grants`] applies what the control plane leases to this Envoy.

pub mod grants;
pub mod limiter;
pub mod slice;
pub mod stock;
pub mod wait;
