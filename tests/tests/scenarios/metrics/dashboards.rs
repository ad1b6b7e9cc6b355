//! The dashboards that `deploy/` has for Grafana.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use portcullis_tests::paths;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

use super::alerts;
use super::promql::Query;
use super::scrape::{Scrape, busy_stack};

/// The version of Grafana's schema that the files are written in, that of Grafana 12.
const SCHEMA_VERSION: u64 = 42;

/// Panels that Grafana develops further. A row only groups the panels below it.
const PANELS: [&str; 5] = ["bargauge", "row", "stat", "table", "timeseries"];

/// Units of Grafana: a number, seconds, a share, and requests, events and rows a second.
const UNITS: [&str; 7] = ["none", "short", "s", "percentunit", "reqps", "cps", "wps"];

/// What Grafana writes in place of its own variables, and of those of the dashboards if all is chosen.
const VARIABLES: [(&str, &str); 4] =
    [("$__rate_interval", "5m"), ("$__range", "3h"), ("$envoy", ".*"), ("$replica", ".*")];

/// One file of `deploy/grafana`.
struct Dashboard {
    /// Without the extension.
    file: String,
    json: Value,
}

/// An expression of a panel, with what Grafana shows as the name of a series.
struct Target {
    panel: String,
    expression: String,
    legend: String,
}

/// The items of an array. None of an absent one.
fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

impl Dashboard {
    fn all() -> Result<Vec<Self>> {
        let directory = paths::workspace().join("deploy/grafana");
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            let file = path.file_stem().context("a file without a name")?.to_string_lossy().into_owned();
            let json = serde_json::from_str(&std::fs::read_to_string(&path)?);
            all.push(Self { json: json.with_context(|| file.clone())?, file });
        }
        all.sort_by(|one, other| one.file.cmp(&other.file));
        let files: Vec<_> = all.iter().map(|dashboard| dashboard.file.as_str()).collect();
        ensure!(files == ["api-owner", "operator"], "{files:?}");
        Ok(all)
    }

    fn panels(&self) -> &[Value] {
        items(&self.json["panels"])
    }

    /// The variables by name.
    fn variables(&self) -> BTreeMap<&str, &Value> {
        items(&self.json["templating"]["list"]).iter().map(|variable| (text(variable, "name"), variable)).collect()
    }

    fn targets(&self) -> Vec<Target> {
        let mut all = Vec::new();
        for panel in self.panels() {
            for target in items(&panel["targets"]) {
                all.push(Target {
                    panel: format!("{}: {}", self.file, text(panel, "title")),
                    expression: text(target, "expr").to_owned(),
                    legend: text(target, "legendFormat").to_owned(),
                });
            }
        }
        all
    }

    /// The metric and the label of each variable that lists the values of a label.
    fn listed(&self) -> Result<Vec<(String, String)>> {
        let variables = self.variables();
        let queries = variables.values().filter(|variable| text(variable, "type") == "query");
        let parsed = queries.map(|variable| {
            let query = text(&variable["query"], "query");
            ensure!(query == text(variable, "definition"), "{}: {query} is not its definition", self.file);
            let inside = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
            let (metric, label) =
                inside.and_then(|inside| inside.split_once(", ")).with_context(|| query.to_owned())?;
            Ok((metric.to_owned(), label.to_owned()))
        });
        parsed.collect()
    }
}

/// All expressions, as Prometheus gets them if all Envoys and replicas are chosen.
pub fn queries() -> Result<Vec<String>> {
    let targets = Dashboard::all()?.iter().flat_map(Dashboard::targets).collect::<Vec<_>>();
    Ok(targets.iter().map(Target::filled_in).collect())
}

impl Target {
    /// The expression without variables.
    fn filled_in(&self) -> String {
        VARIABLES.iter().fold(self.expression.clone(), |text, (name, value)| text.replace(name, value))
    }

    fn query(&self) -> Result<Query> {
        Query::parse(&self.filled_in()).with_context(|| self.panel.clone())
    }

    /// The labels that the name of a series shows: `{{instance}}`.
    fn legend_labels(&self) -> BTreeSet<String> {
        let parts = self.legend.split("{{").skip(1).filter_map(|rest| rest.split_once("}}"));
        parts.map(|(label, _)| label.to_owned()).collect()
    }

    /// The variables of the dashboard that the expression has: `$envoy`.
    fn variables(&self) -> BTreeSet<String> {
        let is_outside = |char: char| !char.is_ascii_alphanumeric() && char != '_';
        let names = self.expression.split('$').skip(1).filter_map(|rest| rest.split(is_outside).next());
        names.filter(|name| !name.starts_with("__")).map(ToOwned::to_owned).collect()
    }
}

#[test]
fn dashboards_have_fixed_uids_and_unique_titles_and_every_panel_a_description_and_a_unit() -> Result<()> {
    let source = json!({"type": "prometheus", "uid": "${datasource}"});
    let mut titles = BTreeSet::new();
    for dashboard in Dashboard::all()? {
        let (file, json) = (&dashboard.file, &dashboard.json);
        // Grafana finds a dashboard by its uid when a newer one is imported, and gives ids itself.
        assert_eq!((text(json, "uid"), &json["id"]), (format!("portcullis-{file}").as_str(), &Value::Null));
        assert_eq!(json["schemaVersion"], SCHEMA_VERSION, "{file}");
        assert!(titles.insert(text(json, "title").to_owned()), "{file}: two dashboards have its title");
        assert_eq!(text(dashboard.variables()["datasource"], "type"), "datasource", "{file}");
        let (mut ids, mut panel_titles) = (BTreeSet::new(), BTreeSet::new());
        for panel in dashboard.panels() {
            let title = text(panel, "title");
            let name = format!("{file}: {title}");
            assert!(!title.is_empty() && panel_titles.insert(title), "{name}: two panels have this title");
            assert!(ids.insert(panel["id"].as_u64()), "{name}: two panels have its id");
            assert!(PANELS.contains(&text(panel, "type")), "{name}: type {}", panel["type"]);
            if panel["type"] == "row" {
                assert_eq!(panel["panels"], json!([]), "{name}: the panels of an open row follow it");
                continue;
            }
            let description = text(panel, "description");
            assert!(description.len() > 30 && description.ends_with('.'), "{name}: no description");
            assert!(UNITS.contains(&text(&panel["fieldConfig"]["defaults"], "unit")), "{name}: no unit");
            assert_eq!(panel["datasource"], source, "{name}");
            let mut references = BTreeSet::new();
            for target in items(&panel["targets"]) {
                assert_eq!(target["datasource"], source, "{name}");
                assert!(references.insert(text(target, "refId")), "{name}: two queries have one name");
            }
            assert!(!references.is_empty(), "{name}: no query");
        }
    }
    Ok(())
}

#[test]
fn panels_do_not_overlap() -> Result<()> {
    for dashboard in Dashboard::all()? {
        let mut taken = BTreeSet::new();
        for panel in dashboard.panels() {
            let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap_or_default());
            let name = format!("{}: {}", dashboard.file, text(panel, "title"));
            assert!(w > 0 && h > 0 && x + w <= 24, "{name}: {}", panel["gridPos"]);
            let cells = (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y)));
            for cell in cells {
                assert!(taken.insert(cell), "{name} lies over another panel at {cell:?}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn each_expression_of_the_dashboards_reads_metrics_and_labels_that_a_stack_has() -> Result<()> {
    let dashboards = Dashboard::all()?;
    let stack = busy_stack().await?;
    let metrics: BTreeSet<String> = {
        let targets = dashboards.iter().flat_map(Dashboard::targets);
        let queries = targets.map(|target| target.query()).collect::<Result<Vec<_>>>()?;
        queries.iter().flat_map(Query::selectors).map(|selector| selector.metric).collect()
    };
    assert!(metrics.len() > 40, "{metrics:?}");
    // Some metrics appear with the first allowance or the first row of the ledger.
    let mut missing = Vec::new();
    let complete = async || {
        let scrape = Scrape::of(&stack).await.ok()?;
        missing = metrics.iter().filter(|metric| !scrape.has(metric)).collect();
        missing.is_empty().then_some(scrape)
    };
    let waited = eventually("each metric of the dashboards", complete).await;
    let scrape = waited.with_context(|| format!("the stack does not show {missing:?}"))?;

    for dashboard in &dashboards {
        for (metric, label) in dashboard.listed()? {
            assert!(scrape.has(&metric) && label == "instance", "{}: {metric} {label}", dashboard.file);
        }
        let variables = dashboard.variables();
        for target in dashboard.targets() {
            let (panel, query) = (&target.panel, target.query()?);
            let selectors = query.selectors();
            assert!(!selectors.is_empty(), "{panel}: {}", target.expression);
            for selector in &selectors {
                scrape.check(selector).with_context(|| panel.clone())?;
            }
            for name in target.variables() {
                assert!(variables.contains_key(name.as_str()), "{panel}: there is no variable {name}");
            }
            if let Some(labels) = query.result_labels() {
                let lost: Vec<_> = target.legend_labels().difference(&labels).cloned().collect();
                assert!(lost.is_empty(), "{panel}: the result has no labels {lost:?} for the legend");
            }
        }
    }
    Ok(())
}

#[test]
fn the_dashboard_for_operators_shows_each_metric_that_an_alert_watches() -> Result<()> {
    let dashboards = Dashboard::all()?;
    let operator = dashboards.iter().find(|dashboard| dashboard.file == "operator").context("no dashboard")?;
    let queries = operator.targets().iter().map(Target::query).collect::<Result<Vec<_>>>()?;
    let shown: BTreeSet<String> = queries.iter().flat_map(Query::selectors).map(|selector| selector.metric).collect();
    for rule in alerts::rules()? {
        for selector in alerts::query(&rule)?.selectors() {
            let name = rule["alert"].as_str().unwrap_or_default();
            assert!(shown.contains(&selector.metric), "{name}: no panel shows {}", selector.metric);
        }
    }
    Ok(())
}
