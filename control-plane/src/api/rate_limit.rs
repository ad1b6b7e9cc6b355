//! The rate limit of the REST API, per caller.

use std::net::IpAddr;
use std::num::NonZeroU32;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use uuid::Uuid;

use crate::error::ApiError;
use crate::net::network_of;

/// What a limit applies to: the owner of an admitted key, or the network of a caller without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Limited {
    Owner(Uuid),
    Network(IpAddr),
}

/// The rate limit of the REST API, for each caller by itself. The keys of one owner share a limit.
///
/// Holds one cell for each owner and each address seen since the last [`CallerRateLimiter::tidy`], which drops those that are idle.
/// IPv6 addresses count by their /64, which is what one client has at will.
#[derive(Debug)]
pub struct CallerRateLimiter {
    limiter: DefaultKeyedRateLimiter<Limited>,
    clock: DefaultClock,
}

impl CallerRateLimiter {
    /// A limit of so many calls per second, of which `burst` may come at once.
    pub fn new(per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        let quota = Quota::per_second(per_second).allow_burst(burst);
        Self { limiter: RateLimiter::keyed(quota), clock: DefaultClock::default() }
    }

    /// Forgets callers that have been idle for so long that they start afresh anyway. To be called now and then.
    pub fn tidy(&self) {
        self.limiter.retain_recent();
        self.limiter.shrink_to_fit();
    }

    /// Counts a call with an admitted key of an owner.
    pub fn count_owner(&self, owner: Uuid) -> Result<(), ApiError> {
        self.count(Limited::Owner(owner))
    }

    /// Counts a call without a good key from an address.
    pub fn count_address(&self, address: IpAddr) -> Result<(), ApiError> {
        self.count(Limited::Network(network_of(address)))
    }

    fn count(&self, caller: Limited) -> Result<(), ApiError> {
        self.limiter.check_key(&caller).map_err(|not_until| {
            let wait = not_until.wait_time_from(self.clock.now());
            let started = u64::from(wait.subsec_nanos() > 0);
            ApiError::TooMany { retry_after_s: wait.as_secs().saturating_add(started).max(1) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_are_limited_each_by_itself_and_told_whole_seconds() {
        let limiter = CallerRateLimiter::new(NonZeroU32::MIN, NonZeroU32::MIN);
        assert!(limiter.count_owner(Uuid::nil()).is_ok());
        assert!(limiter.count_owner(Uuid::max()).is_ok());
        let refused = limiter.count_owner(Uuid::nil());
        assert!(matches!(refused, Err(ApiError::TooMany { retry_after_s: 1 })), "{refused:?}");
    }

    #[test]
    fn an_ipv6_client_counts_by_its_network() {
        let limiter = CallerRateLimiter::new(NonZeroU32::MIN, NonZeroU32::MIN);
        let counted = |address: &str| limiter.count_address(address.parse().unwrap()).is_ok();
        assert!(counted("2001:db8:1:2:3:4:5:6") && !counted("2001:db8:1:2::9"));
        assert!(counted("2001:db8:1:3::1") && counted("192.0.2.1") && counted("192.0.2.2"));
        assert!(!counted("::ffff:192.0.2.1") && counted("::ffff:192.0.2.3") && !counted("192.0.2.3"));
    }
}
