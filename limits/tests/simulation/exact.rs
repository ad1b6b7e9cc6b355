//! One exact pool that admitted requests are taken from, at the moment when they are admitted.

use contract::rate::Rate;
use limits::pool::Terms;

/// What is exactly used of one pool.
#[derive(Clone, Debug)]
pub enum Exact {
    Rate { rate: Rate, arrival_ns: u64 },
    Stock { left: i64 },
}

impl Exact {
    pub fn new(terms: &Terms) -> Self {
        match terms {
            Terms::Rate(rate) => Self::Rate { rate: *rate, arrival_ns: 0 },
            Terms::Stock { left, .. } => Self::Stock { left: *left },
        }
    }

    /// Tokens that are left.
    pub fn left(&self, now_ns: u64) -> i64 {
        match self {
            Self::Rate { rate, arrival_ns } => i64::try_from(rate.room(*arrival_ns, now_ns)).unwrap(),
            Self::Stock { left } => *left,
        }
    }

    /// Takes tokens of an admitted request. Returns how many were not there.
    pub fn take(&mut self, cost: u64, now_ns: u64) -> u64 {
        match self {
            Self::Rate { rate, arrival_ns } => {
                *arrival_ns = (*arrival_ns).max(now_ns) + rate.interval_ns() * cost;
                arrival_ns.saturating_sub(now_ns + rate.tolerance_ns()).div_ceil(rate.interval_ns())
            }
            Self::Stock { left } => {
                *left -= i64::try_from(cost).unwrap();
                u64::try_from(-*left).unwrap_or(0).min(cost)
            }
        }
    }

    /// The use of an Envoy that ended is lost.
    pub fn give_back(&mut self, tokens: u64) {
        match self {
            Self::Rate { rate, arrival_ns } => *arrival_ns -= rate.interval_ns() * tokens,
            Self::Stock { left } => *left += i64::try_from(tokens).unwrap(),
        }
    }

    /// The rate limit changes. What is used stays used, but for what is beyond the burst.
    pub fn change(&mut self, new: &Rate, now_ns: u64) {
        if let Self::Rate { rate, arrival_ns } = self {
            let used_ns = u128::from(arrival_ns.saturating_sub(now_ns));
            let used_ns = used_ns * u128::from(new.interval_ns()) / u128::from(rate.interval_ns());
            *arrival_ns = new.within_reach(now_ns + u64::try_from(used_ns).unwrap(), now_ns);
            *rate = *new;
        }
    }

    /// Use of a rate limit beyond the burst counts as the burst.
    pub fn clamp(&mut self, now_ns: u64) {
        if let Self::Rate { rate, arrival_ns } = self {
            *arrival_ns = rate.within_reach(*arrival_ns, now_ns);
        }
    }

    /// A quota is changed, or a balance topped up.
    pub fn add(&mut self, more: i64) {
        if let Self::Stock { left } = self {
            *left += more;
        }
    }
}
