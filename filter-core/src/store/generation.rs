//! The generation of the key store, by which every VM knows when its cache is outdated.

use std::num::NonZeroU64;

use crate::host::{Host, MetricId, random_bytes};

/// The generation of the key store: a number that changes with every write of the store. It is the value of a gauge, which
/// every VM of the process reads faster than a cell.
#[derive(Debug)]
pub struct Generation<H> {
    host: H,
    gauge: Option<MetricId>,
}

impl<H: Host> Generation<H> {
    /// Defines the gauge.
    pub fn define(host: &H) -> Self {
        Self { host: host.clone(), gauge: host.define_gauge("portcullis.internal.store_generation") }
    }

    /// The present generation. `None` before the first: a host that is configured not to keep the gauge shows 0 too.
    pub fn current(&self) -> Option<NonZeroU64> {
        self.gauge.and_then(|gauge| NonZeroU64::new(self.host.value(gauge)))
    }

    /// Begins a generation, with a random step. During a hot restart Envoy adds the gauges of both processes: with steps of
    /// one, the sum could take an earlier value again.
    pub fn raise(&self) {
        let [low, high] = random_bytes(&self.host).unwrap_or([1, 0]);
        if let Some(gauge) = self.gauge {
            self.host.add(gauge, u64::from(u16::from_le_bytes([low, high])).saturating_add(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::MockHost;

    #[test]
    fn a_generation_is_seen_by_all_and_never_comes_back() {
        let host = MockHost::default();
        let (one, other) = (Generation::define(&host), Generation::define(&host));
        assert_eq!(one.current(), None);
        let mut seen = Vec::new();
        for _ in 0..100 {
            one.raise();
            assert_eq!(one.current(), other.current());
            assert!(!seen.contains(&one.current()));
            seen.push(one.current());
        }
        host.without_randomness(true);
        one.raise();
        assert!(!seen.contains(&one.current()));
    }
}
