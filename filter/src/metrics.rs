//! Envoy statistics of the filter. Envoy shows them as `wasmcustom.portcullis_…`, one value for the whole process.

use std::cell::Cell as Slot;
use std::num::NonZeroU64;

use contract::outcome::Outcome;

use crate::host::{self, Metric};
use filter_core::recent::Writes;

/// All of them, defined once for each VM.
pub(crate) struct Metrics {
    decisions: Vec<Added>,
    /// One for each outcome that refuses; nothing in the places of the others.
    shadow: Vec<Added>,
    /// Raised with each write of the store.
    pub(crate) store_writes: Raised,
    /// The revision that the store holds.
    pub(crate) store_version: Gauge,
    /// Keys in the store.
    pub(crate) keys: Gauge,
    /// Seconds since the control plane last answered.
    pub(crate) sync_age: Gauge,
    /// Requests counted and not yet acknowledged.
    pub(crate) usage_pending: Gauge,
    /// Polls without a usable answer.
    pub(crate) sync_failures: Counter,
    /// Usage reports without an acknowledgement.
    pub(crate) report_failures: Counter,
}

/// A gauge, or nothing where Envoy would not define it.
pub(crate) struct Gauge(Option<Metric>);

/// A counter that is added up in the VM and told on each tick, or nothing where Envoy would not define it.
struct Added {
    metric: Option<Metric>,
    untold: Slot<u64>,
}

/// A gauge that only rises.
pub(crate) struct Raised(Option<Metric>);

/// A counter, or nothing where Envoy would not define it.
pub(crate) struct Counter(Option<Metric>);

impl Metrics {
    pub(crate) fn define() -> Self {
        let added = |metric| Added { metric, untold: Slot::new(0) };
        let decision =
            |outcome: Outcome| added(Metric::counter(&format!("portcullis_decisions_{}_total", outcome.name())));
        let shadow = |outcome: Outcome| {
            added(
                outcome.refusal().and_then(|_| Metric::counter(&format!("portcullis_shadow_{}_total", outcome.name()))),
            )
        };
        let gauge = |name| Gauge(Metric::gauge(name));
        let counter = |name| Counter(Metric::counter(name));
        Self {
            decisions: Outcome::ALL.into_iter().map(decision).collect(),
            shadow: Outcome::ALL.into_iter().map(shadow).collect(),
            store_writes: Raised(Metric::gauge("portcullis_store_writes")),
            store_version: gauge("portcullis_store_version"),
            keys: gauge("portcullis_keys"),
            sync_age: gauge("portcullis_sync_age_seconds"),
            usage_pending: gauge("portcullis_usage_pending_requests"),
            sync_failures: counter("portcullis_sync_failures_total"),
            report_failures: counter("portcullis_report_failures_total"),
        }
    }

    /// Counts a decision; `shadowed` if it was told and not enforced. Envoy hears of it with [`Metrics::tell`].
    pub(crate) fn decided(&self, outcome: Outcome, shadowed: bool) {
        let counters = if shadowed { &self.shadow } else { &self.decisions };
        if let Some(counter) = counters.get(usize::from(outcome.code())) {
            counter.untold.set(counter.untold.get().saturating_add(1));
        }
    }

    /// Tells Envoy of the decisions since the last time.
    pub(crate) fn tell(&self) {
        for counter in self.decisions.iter().chain(&self.shadow) {
            match (counter.metric, counter.untold.take()) {
                (None, _) | (_, 0) => {}
                (Some(metric), more) => metric.add(more),
            }
        }
    }
}

impl Writes for Raised {
    /// Envoy shows 0 for a gauge that it was told not to keep, and nobody may rely on that one.
    fn number(&self) -> Option<NonZeroU64> {
        self.0.and_then(|metric| NonZeroU64::new(metric.value()))
    }

    /// By a random number. On a hot restart, Envoy adds the old process's value to the new one's for a while: in steps of
    /// one, the sum could come to a value that it had before.
    fn raise(&self) {
        let [low, high] = host::random_bytes().unwrap_or([1, 0]);
        if let Some(metric) = self.0 {
            metric.add(u64::from(u16::from_le_bytes([low, high])).saturating_add(1));
        }
    }
}

impl Gauge {
    pub(crate) fn set(&self, value: u64) {
        if let Some(metric) = self.0 {
            metric.record(value);
        }
    }
}

impl Counter {
    pub(crate) fn increment(&self) {
        if let Some(metric) = self.0 {
            metric.add(1);
        }
    }
}
