//! Envoy statistics of the filter. Envoy shows them as `wasmcustom.portcullis_…`, one value for the whole process.

use contract::outcome::Outcome;

use crate::host::Metric;

/// All of them, defined once for each VM.
pub(crate) struct Metrics {
    decisions: Vec<Option<Metric>>,
    /// One for each outcome that refuses; nothing in the places of the others.
    shadow: Vec<Option<Metric>>,
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

/// A counter, or nothing where Envoy would not define it.
pub(crate) struct Counter(Option<Metric>);

impl Metrics {
    pub(crate) fn define() -> Self {
        let decision = |outcome: Outcome| Metric::counter(&format!("portcullis_decisions_{}", outcome.name()));
        let shadow = |outcome: Outcome| {
            outcome.refusal().and_then(|_| Metric::counter(&format!("portcullis_shadow_{}", outcome.name())))
        };
        let gauge = |name| Gauge(Metric::gauge(name));
        let counter = |name| Counter(Metric::counter(name));
        Self {
            decisions: Outcome::ALL.into_iter().map(decision).collect(),
            shadow: Outcome::ALL.into_iter().map(shadow).collect(),
            store_version: gauge("portcullis_store_version"),
            keys: gauge("portcullis_keys"),
            sync_age: gauge("portcullis_sync_age_seconds"),
            usage_pending: gauge("portcullis_usage_pending_requests"),
            sync_failures: counter("portcullis_sync_failures"),
            report_failures: counter("portcullis_report_failures"),
        }
    }

    /// Counts a decision; `shadowed` if it was told and not enforced.
    pub(crate) fn decided(&self, outcome: Outcome, shadowed: bool) {
        let counters = if shadowed { &self.shadow } else { &self.decisions };
        if let Some(Some(metric)) = counters.get(usize::from(outcome.code())) {
            metric.increment();
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
            metric.increment();
        }
    }
}
