//! How long a refused client should wait before it tries again.

use contract::record::RateLimit;

use super::limiter::Refused;

/// How long a client should wait while a lease is being renewed, in seconds.
pub const RETRY_RENEWAL_S: u64 = 1;

/// How long a refused client should wait, where that depends on more than the outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// The usual time of the outcome.
    #[default]
    Usual,
    /// Until a lease is renewed: something is left, but not at this Envoy.
    Renewal,
    /// Waiting does not help: the request costs more credits than the owner has.
    Hopeless,
    /// This many seconds.
    Seconds(u64),
    /// Until one of these limits admits a request. They are all limits of the request.
    Limits(Vec<RateLimit>, Refused),
}
