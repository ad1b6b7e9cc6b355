//! What Prometheus reads of a stack: names of samples, and the values of their labels.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use portcullis_tests::http;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

use super::promql::Selector;

/// Labels that Prometheus itself adds.
const OF_PROMETHEUS: [&str; 2] = ["instance", "job"];

/// By name, and by label.
#[derive(Debug, Default)]
pub struct Scrape(BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl Scrape {
    /// Reads the first Envoy and the control plane.
    pub async fn of(stack: &Stack) -> Result<Self> {
        let mut scrape = Self::default();
        for (address, path) in
            [(stack.envoy().admin(), "/stats/prometheus"), (stack.control_plane.address(), "/metrics")]
        {
            let text = String::from_utf8(http::get(address, path).await?.body.to_vec())?;
            let samples = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
            samples.for_each(|sample| scrape.add(sample));
        }
        Ok(scrape)
    }

    fn add(&mut self, sample: &str) {
        let (name, rest) = sample.split_at(sample.find(['{', ' ']).unwrap_or(sample.len()));
        let labels = self.0.entry(name.to_owned()).or_default();
        // {method="GET",route="/v1/keys"} 7
        let mut rest = rest.strip_prefix('{').unwrap_or_default();
        while let Some((label, after)) = rest.split_once("=\"") {
            let mut quotes = after.match_indices('"').map(|(at, _)| at);
            let end = quotes.find(|at| !after[..*at].ends_with('\\')).unwrap_or(after.len());
            let (value, after) = after.split_at(end);
            labels.entry(label.to_owned()).or_default().insert(value.to_owned());
            rest = after.trim_start_matches(['"', ',']);
        }
    }

    pub fn has(&self, metric: &str) -> bool {
        self.0.contains_key(metric)
    }

    /// Fails if the metric, one of its labels or an outcome that is asked for is not here.
    pub fn check(&self, selector: &Selector) -> Result<()> {
        let Selector { metric, matchers, labels } = selector;
        ensure!(self.has(metric), "there is no metric {metric}");
        let seen = &self.0[metric];
        for label in labels {
            let is_known = seen.contains_key(label) || OF_PROMETHEUS.contains(&label.as_str());
            ensure!(is_known, "{metric} has no label {label}");
        }
        for matcher in matchers.iter().filter(|matcher| matcher.name == "outcome") {
            for outcome in matcher.value.split('|') {
                ensure!(seen["outcome"].contains(outcome), "{metric} has no outcome {outcome}");
            }
        }
        Ok(())
    }
}

/// A stack on which each part has worked: a key with a rate limit, a quota and credits was admitted and counted.
pub async fn busy_stack() -> Result<Stack> {
    const ADA: &str = "ada@example.com";
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let limits = json!({
        "email": ADA,
        "name": "of a test",
        "quota": {"requests": 1_000, "period": "day", "time_zone": "UTC"},
        "rate_limits": [{"name": "hour", "requests": 1_000, "window_seconds": 3_600}],
    });
    let (_, key) = rest.create_with(limits).await?;
    let user = rest.user(ADA).await?;
    rest.post(&format!("{user}/ledger"), json!({"amount": 1_000})).await?;
    stack.in_step().await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let used = async || (rest.get(&format!("{user}/balance")).await.ok()?["balance"] != 1_000).then_some(());
    eventually("the credits to be spent", used).await?;
    Ok(stack)
}

#[test]
fn a_sample_has_a_name_and_labels() {
    let mut scrape = Scrape::default();
    for sample in ["a_total{x=\"1\",y=\"a \\\"b\\\", c\"} 3", "a_total{x=\"2\",y=\"\"} 0", "b{} 1", "c 1"] {
        scrape.add(sample);
    }
    let values = |all: &[&str]| -> BTreeSet<String> { all.iter().map(ToString::to_string).collect() };
    let labels = [("x", values(&["1", "2"])), ("y", values(&["", "a \\\"b\\\", c"]))];
    assert_eq!(scrape.0["a_total"], labels.map(|(label, values)| (label.to_owned(), values)).into());
    assert_eq!((scrape.0["b"].len(), scrape.0["c"].len(), scrape.0.len()), (0, 0, 3));
}
