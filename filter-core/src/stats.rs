//! The statistics of the filter. Envoy shows them as `wasmcustom.portcullis.…`, one value for the whole process.
//!
//! Names have dots, as all of Envoy's, and a counter ends with `_total`, as Prometheus wants it. The tag extractor of the
//! files in `envoy/` takes the outcome out of a name and leaves `portcullis.decisions_total`.

use std::cell::Cell as Slot;

use contract::outcome::Outcome;

use crate::host::{Host, MetricId};

/// All statistics, defined once for each VM. A metric that the host refuses to define is left out.
#[derive(Debug)]
pub struct Statistics<H> {
    host: H,
    decisions: Vec<DecisionCounter>,
    /// One for each outcome that refuses; without a metric in the places of the others.
    shadow: Vec<DecisionCounter>,
    store_revision: Option<MetricId>,
    keys: Option<MetricId>,
    sync_age: Option<MetricId>,
    usage_pending: Option<MetricId>,
    sync_failures: Option<MetricId>,
    report_failures: Option<MetricId>,
    allowance_calls: Option<MetricId>,
    allowance_failures: Option<MetricId>,
    allowance_waits: Option<MetricId>,
    live_envoys: Option<MetricId>,
}

/// A counter that is added up in the VM and passed to the host on each tick.
#[derive(Debug)]
struct DecisionCounter {
    metric: Option<MetricId>,
    pending: Slot<u64>,
}

impl<H: Host> Statistics<H> {
    /// Defines them.
    pub fn define(host: H) -> Self {
        let counter = |metric| DecisionCounter { metric, pending: Slot::new(0) };
        let decision =
            |outcome: Outcome| counter(host.define_counter(&format!("portcullis.decisions.{}_total", outcome.name())));
        let shadow = |outcome: Outcome| {
            let define = |_| host.define_counter(&format!("portcullis.shadow_decisions.{}_total", outcome.name()));
            counter(outcome.refusal().and_then(define))
        };
        Self {
            decisions: Outcome::ALL.into_iter().map(decision).collect(),
            shadow: Outcome::ALL.into_iter().map(shadow).collect(),
            store_revision: host.define_gauge("portcullis.store.revision"),
            keys: host.define_gauge("portcullis.store.keys"),
            sync_age: host.define_gauge("portcullis.sync.age_seconds"),
            usage_pending: host.define_gauge("portcullis.usage.pending_requests"),
            sync_failures: host.define_counter("portcullis.sync.failures_total"),
            report_failures: host.define_counter("portcullis.usage.report_failures_total"),
            allowance_calls: host.define_counter("portcullis.limits.calls_total"),
            allowance_failures: host.define_counter("portcullis.limits.call_failures_total"),
            allowance_waits: host.define_counter("portcullis.limits.waits_total"),
            live_envoys: host.define_gauge("portcullis.limits.live_envoys"),
            host,
        }
    }

    /// Counts a decision; `shadowed` if it was not enforced. The host gets it with the next [`Statistics::flush`].
    pub fn count(&self, outcome: Outcome, shadowed: bool) {
        let counters = if shadowed { &self.shadow } else { &self.decisions };
        if let Some(counter) = counters.get(usize::from(outcome.code())) {
            counter.pending.set(counter.pending.get().saturating_add(1));
        }
    }

    /// Passes the decisions since the last time to the host.
    pub fn flush(&self) {
        for counter in self.decisions.iter().chain(&self.shadow) {
            let more = counter.pending.take();
            if more > 0 {
                self.add(counter.metric, more);
            }
        }
    }

    /// Sets the revision of the store and its number of keys.
    pub fn set_store(&self, revision: u64, keys: u64) {
        self.set(self.store_revision, revision);
        self.set(self.keys, keys);
    }

    /// Sets the seconds since the control plane last confirmed the store.
    pub fn set_sync_age(&self, seconds: u64) {
        self.set(self.sync_age, seconds);
    }

    /// Sets the number of requests that are counted and not acknowledged.
    pub fn set_usage_pending(&self, requests: u64) {
        self.set(self.usage_pending, requests);
    }

    /// Counts a poll without a usable response.
    pub fn count_sync_failure(&self) {
        self.add(self.sync_failures, 1);
    }

    /// Counts a usage report without an acknowledgement.
    pub fn count_report_failure(&self) {
        self.add(self.report_failures, 1);
    }

    /// Counts a call for allowances of shared limits.
    pub fn count_allowance_call(&self) {
        self.add(self.allowance_calls, 1);
    }

    /// Counts one that was not answered.
    pub fn count_allowance_failure(&self) {
        self.add(self.allowance_failures, 1);
    }

    /// Counts a request that waits for an allowance.
    pub fn count_allowance_wait(&self) {
        self.add(self.allowance_waits, 1);
    }

    /// Sets the number of live Envoys, this one among them.
    pub fn set_live_envoys(&self, envoys: u32) {
        self.set(self.live_envoys, envoys.into());
    }

    fn set(&self, metric: Option<MetricId>, value: u64) {
        if let Some(metric) = metric {
            self.host.set(metric, value);
        }
    }

    fn add(&self, metric: Option<MetricId>, more: u64) {
        if let Some(metric) = metric {
            self.host.add(metric, more);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::MockHost;
    use crate::store::generation::Generation;

    #[test]
    fn each_outcome_has_a_counter_and_each_refusal_one_more_for_shadow_mode() {
        let host = MockHost::default();
        let stats = Statistics::define(host.clone());
        for outcome in Outcome::ALL {
            stats.count(outcome, false);
            stats.count(outcome, true);
        }
        assert_eq!(host.metric("portcullis.decisions.allowed_total"), 0, "nothing before the flush");
        stats.flush();
        stats.flush();
        for outcome in Outcome::ALL {
            assert_eq!(host.metric(&format!("portcullis.decisions.{}_total", outcome.name())), 1);
            let shadow = format!("portcullis.shadow_decisions.{}_total", outcome.name());
            assert_eq!(host.defined(&shadow), outcome.refusal().is_some(), "{shadow}");
            assert_eq!(host.metric(&shadow), u64::from(outcome.refusal().is_some()));
        }
    }

    #[test]
    fn gauges_and_failure_counters_have_their_documented_names() {
        let host = MockHost::default();
        let stats = Statistics::define(host.clone());
        stats.set_store(7, 3);
        stats.set_sync_age(9);
        stats.set_usage_pending(11);
        stats.set_live_envoys(2);
        stats.count_sync_failure();
        stats.count_report_failure();
        stats.count_report_failure();
        let values = [
            ("portcullis.store.revision", 7),
            ("portcullis.store.keys", 3),
            ("portcullis.sync.age_seconds", 9),
            ("portcullis.usage.pending_requests", 11),
            ("portcullis.limits.live_envoys", 2),
            ("portcullis.sync.failures_total", 1),
            ("portcullis.usage.report_failures_total", 2),
        ];
        for (name, value) in values {
            assert_eq!(host.metric(name), value, "{name}");
        }
    }

    #[test]
    fn without_metrics_nothing_is_counted_and_there_is_no_generation() {
        let host = MockHost::default();
        host.refuse_metrics(true);
        let (stats, generation) = (Statistics::define(host.clone()), Generation::define(&host));
        stats.count(Outcome::Allowed, false);
        stats.flush();
        stats.set_store(1, 1);
        stats.count_sync_failure();
        generation.raise();
        assert_eq!(generation.current(), None);
    }
}
