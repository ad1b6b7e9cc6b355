//! How far the limits that Envoys share are used, over all of them: what Envoys have admitted comes in, what one whose share
//! grows is told goes out.
//!
//! An Envoy remembers what it has admitted itself. If the load moves to another, that one would begin with nothing used, and
//! a limit of 1,000 an hour would be used anew wherever the load goes. So the control plane runs each limit as a whole, by
//! the same algorithm, on what is reported.

use std::collections::BTreeMap;

use contract::budget::Stock;
use contract::rate::{Rate, WHOLE, tag};
use contract::record::RateLimit;
use contract::time::NS_PER_MS;
use contract::usage::Grant;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Limits whose burst comes back in less are not told of: before an answer is heard, it has.
const SHORT_NS: u64 = 2_000_000_000;

const MS_PER_HUNDREDTH: i64 = 10;

/// Until when each limit of a key is used, in milliseconds of Unix time, by its tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used(BTreeMap<u64, i64>);

impl Used {
    /// Whether no limit is used, or none that is told of.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Counts requests that Envoys have admitted of the key's shared limits, and forgets limits that are not used any longer.
    pub fn count<'a>(&mut self, limits: impl IntoIterator<Item = &'a RateLimit>, requests: u64, now_ms: i64) {
        let now_ns = ns(now_ms);
        for limit in limits {
            let rate = Rate::of(limit, WHOLE);
            if rate.tolerance_ns() < SHORT_NS {
                continue;
            }
            let arrival = self.0.entry(tag(&limit.name)).or_insert(now_ms);
            let next_ns = rate.count(Some(ns(*arrival)), requests, now_ns);
            // Rounded up: of a fast limit, a request takes less than a millisecond.
            *arrival = i64::try_from(next_ns.div_ceil(NS_PER_MS)).unwrap_or(i64::MAX);
        }
        self.0.retain(|_, arrival| *arrival > now_ms);
    }

    /// What an Envoy is told of them, behind its share.
    #[must_use]
    pub fn grants(&self, key: Uuid, now_ms: i64) -> Vec<Grant> {
        let grant = |(tag, arrival): (&u64, &i64)| {
            let ahead = arrival.saturating_sub(now_ms).max(0) / MS_PER_HUNDREDTH;
            let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
            Grant { stock: Stock::Used.code(), of: key.into_bytes(), amount: *tag, turn: ahead }
        };
        self.0.iter().map(grant).filter(|grant| grant.turn > 0).collect()
    }
}

fn ns(ms: i64) -> u64 {
    u64::try_from(ms).unwrap_or_default().saturating_mul(NS_PER_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000;

    fn limit(name: &str, requests: u32, window_s: u32) -> RateLimit {
        RateLimit { name: name.into(), requests, window_s, burst: requests, shared: true }
    }

    #[test]
    fn long_limits_are_counted_and_come_back_with_time() {
        let limits = [limit("second", 10, 1), limit("hour", 1_000, 3_600)];
        let mut used = Used::default();
        used.count(&limits, 10, NOW);
        let key = Uuid::from_u128(7);
        let told = |used: &Used, now_ms| used.grants(key, now_ms).iter().map(|grant| grant.turn).collect::<Vec<_>>();
        // Ten intervals of 3.6 seconds.
        assert_eq!(told(&used, NOW), [3_600]);
        assert_eq!(told(&used, NOW + 6_000), [3_000]);
        used.count(&limits, 5_000, NOW + 6_000);
        assert_eq!(told(&used, NOW + 6_000), [360_000]);
        used.count(&limits, 0, NOW + 6_000 + 3_600_000);
        assert!(used.is_empty());
        let grant = Grant { stock: 3, of: key.into_bytes(), amount: tag("hour"), turn: 1 };
        let fast = [limit("fast", 10_000_000, 3_600)];
        (0..20).for_each(|_| used.count(&fast, 1, NOW));
        assert_eq!(told(&used, NOW), [2]);
        used = Used::default();
        used.count(&limits[1..], 1, NOW);
        assert_eq!(used.grants(key, NOW + 3_590), [grant]);
    }

    #[test]
    fn the_json_of_the_database_leads_back() {
        let mut used = Used::default();
        used.count(&[limit("day", 1, 86_400)], 1, NOW);
        let json = serde_json::to_value(&used).unwrap();
        assert_eq!(json, serde_json::json!({tag("day").to_string(): NOW + 86_400_000}));
        assert_eq!(serde_json::from_value::<Used>(json).unwrap(), used);
    }
}
