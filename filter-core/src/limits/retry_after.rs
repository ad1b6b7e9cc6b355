//! How long a refused client should wait before it tries again.

use contract::record::RateLimit;

/// How long a refused client should wait, where that depends on more than the outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RetryAfter {
    /// The usual time of the outcome.
    #[default]
    Usual,
    /// Waiting does not help: the request costs more credits than the owner has.
    Hopeless,
    /// This many seconds.
    Seconds(u64),
    /// Until one of these limits admits a request. They are all limits of the request.
    Limits(Vec<RateLimit>, Exceeded),
}

/// A limit that refused a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// Which of the limits, by place.
    pub limit: usize,
    /// After how many seconds, rounded up, a request will be admitted if none comes before.
    pub retry_after_s: u64,
}
