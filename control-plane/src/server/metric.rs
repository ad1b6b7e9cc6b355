//! The catalogue of the control plane's Prometheus metrics: the kind, the name and the help text of each.
//!
//! A name is `portcullis_`, a noun and its unit; a counter ends with `_total`. A test compares the catalogue with the
//! source code, so that no metric is recorded without a help text.

use Kind::{Counter, Gauge, Histogram};

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric of the catalogue.
#[derive(Debug)]
struct Metric {
    kind: Kind,
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
}

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric { kind: Counter, name, labels: &[], help }
}

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric { kind: Gauge, name, labels: &[], help }
}

const fn labelled(kind: Kind, name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { kind, name, labels, help }
}

/// All metrics, by name.
const CATALOGUE: &[Metric] = &[
    counter(
        "portcullis_allowance_asks_total",
        "Pools of limits, quotas and credits that Envoys asked for or reported the usage of.",
    ),
    labelled(
        Histogram,
        "portcullis_allowance_batch_calls",
        &[],
        "Calls for allowances that were answered in one transaction.",
    ),
    labelled(
        Histogram,
        "portcullis_allowance_batch_duration_seconds",
        &[],
        "Time of a transaction that answered calls for allowances.",
    ),
    labelled(
        Counter,
        "portcullis_allowance_calls_total",
        &["result"],
        "Calls of Envoys for allowances: answered, rejected (invalid, or of another sync key) or failed (the database).",
    ),
    counter("portcullis_allowance_grants_total", "Grants of limits, quotas and credits to Envoys."),
    labelled(
        Gauge,
        "portcullis_allowance_pools",
        &["kind"],
        "Pools of which Envoys hold something, by kind: rate, quota or credits.",
    ),
    counter("portcullis_allowance_recalls_total", "Allowances that the control plane recalled from Envoys."),
    labelled(
        Gauge,
        "portcullis_build_info",
        &["version", "revision"],
        "Always 1; the labels hold the version of the control plane and the revision of its source, or unknown.",
    ),
    gauge("portcullis_connections", "Connections of clients that are open."),
    counter(
        "portcullis_connections_refused_total",
        "Connections that the control plane closed because it had as many as it allows.",
    ),
    gauge("portcullis_database_connections", "Connections of this process to PostgreSQL."),
    gauge("portcullis_database_connections_idle", "Connections to PostgreSQL that no request uses."),
    counter(
        "portcullis_filter_calls_over_limit_total",
        "Polls and reports of Envoys beyond the number that their sync key may have. The polls still get keys.",
    ),
    counter(
        "portcullis_filter_calls_rejected_total",
        "Polls and reports of Envoys that are not listed: too many Envoys, or the Envoy belongs to another sync key.",
    ),
    counter("portcullis_filter_state_writes_total", "Statements that stored the state of Envoys."),
    gauge("portcullis_filters_live", "Envoys that polled or reported within the last minute."),
    labelled(
        Histogram,
        "portcullis_http_request_duration_seconds",
        &["method", "route"],
        "Time from the head of an HTTP request to the head of its response.",
    ),
    labelled(
        Counter,
        "portcullis_http_requests_total",
        &["method", "route", "status"],
        "HTTP requests that were answered.",
    ),
    counter(
        "portcullis_ledger_rows_rolled_up_total",
        "Ledger rows of usage that were merged into the row of their day.",
    ),
    labelled(Counter, "portcullis_ledger_rows_total", &["kind"], "Rows that were added to the ledger."),
    gauge("portcullis_mirror_age_seconds", "Time since the mirror last read the database."),
    gauge("portcullis_mirror_keys", "Keys in the mirror from which Envoys are served."),
    gauge("portcullis_mirror_revision", "Revision of the mirror from which Envoys are served."),
    counter(
        "portcullis_responses_timed_out_total",
        "Responses that ended because the client did not take them within the read time-out.",
    ),
    gauge("portcullis_sync_polls_in_flight", "Polls of Envoys that wait for a change."),
    counter("portcullis_sync_updates_total", "Updates of the keys that were sent to Envoys."),
    counter("portcullis_tls_handshakes_failed_total", "TLS handshakes that failed or took too long."),
    counter("portcullis_usage_events_total", "Usage events that were written."),
    counter("portcullis_usage_gaps_total", "Gaps in the numbers of an Envoy's usage reports."),
    counter("portcullis_usage_records_total", "Records of usage in the reports that were accepted."),
    labelled(
        Counter,
        "portcullis_usage_reports_total",
        &["result"],
        "Usage reports of Envoys: applied, repeated (applied before) or rejected.",
    ),
    counter("portcullis_usage_rows_rolled_up_total", "Hourly rows of usage that were merged by day."),
    counter(
        "portcullis_usage_unknown_keys_total",
        "Batches of usage reports that named keys which are not in the database.",
    ),
];

/// Gives the installed recorder the help texts, the version, and a zero for each counter without labels: a query that
/// compares such a counter with its past then works from the start.
pub fn describe() {
    for Metric { kind, name, labels, help } in CATALOGUE {
        match kind {
            Counter => metrics::describe_counter!(*name, *help),
            Gauge => metrics::describe_gauge!(*name, *help),
            Histogram => metrics::describe_histogram!(*name, *help),
        }
        if *kind == Counter && labels.is_empty() {
            metrics::counter!(*name).absolute(0);
        }
    }
    // An alert looks for an increase. It would miss the first rejection if the counter began with it.
    for result in ["applied", "repeated", "rejected"] {
        metrics::counter!("portcullis_usage_reports_total", "result" => result).absolute(0);
    }
    let revision = option_env!("PORTCULLIS_REVISION").unwrap_or("unknown");
    metrics::gauge!("portcullis_build_info", "version" => env!("CARGO_PKG_VERSION"), "revision" => revision).set(1.0);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use portcullis_tests::paths;

    use super::*;

    /// The kind and the name of each metric that the source code below a directory records.
    fn recorded(directory: &Path) -> BTreeSet<(Kind, String)> {
        let mut found = BTreeSet::new();
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.append(&mut recorded(&path));
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for (call, kind) in [("counter!(", Counter), ("gauge!(", Gauge), ("histogram!(", Histogram)] {
                for (_, rest) in
                    text.match_indices(&format!("metrics::{call}")).map(|(at, found)| text.split_at(at + found.len()))
                {
                    let name = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'));
                    if let Some((name, _)) = name {
                        found.insert((kind, name.to_owned()));
                    }
                }
            }
        }
        found
    }

    #[test]
    fn each_metric_that_the_code_records_is_in_the_catalogue_with_its_kind_and_a_help_text() {
        let recorded = recorded(&paths::workspace().join("control-plane/src"));
        let catalogued = CATALOGUE.iter().map(|metric| (metric.kind, metric.name.to_owned())).collect::<BTreeSet<_>>();
        assert!(recorded.len() > 20, "{recorded:?}");
        let missing: Vec<_> = recorded.difference(&catalogued).collect();
        let unused: Vec<_> = catalogued.difference(&recorded).collect();
        assert!(missing.is_empty(), "add to CATALOGUE in control-plane/src/server/metric.rs: {missing:?}");
        assert!(unused.is_empty(), "nothing records, so remove from CATALOGUE: {unused:?}");
        assert_eq!(catalogued.len(), CATALOGUE.len(), "a name stands twice");
    }

    #[test]
    fn names_are_portcullis_and_a_noun_with_total_for_counters_only_and_base_units() {
        for Metric { kind, name, help, .. } in CATALOGUE {
            let noun = name.strip_prefix("portcullis_").unwrap_or_default();
            let sane = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
            assert!(!noun.is_empty() && noun.bytes().all(sane), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Counter, "{name}");
            assert_eq!(name.ends_with("_seconds"), name.contains("duration") || name.contains("_age"), "{name}");
            let words: Vec<_> = noun.split('_').collect();
            let unwanted = ["ms", "milliseconds", "minutes", "kb", "counter", "gauge", "histogram", "count", "sum"];
            assert!(!words.iter().any(|word| unwanted.contains(word)), "{name}");
            let sentence = help.ends_with('.') && help.starts_with(|first: char| first.is_ascii_uppercase());
            assert!(sentence && help.len() > 20, "{name}: {help}");
        }
        assert!(CATALOGUE.is_sorted_by_key(|metric| metric.name), "CATALOGUE is sorted by name");
    }
}
