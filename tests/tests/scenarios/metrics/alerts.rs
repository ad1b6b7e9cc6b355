//! The alerts that `deploy/` has for Prometheus.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, ensure};
use portcullis_tests::paths;
use yaml_rust2::{Yaml, YamlLoader};

use super::promql::Query;
use super::scrape::{Scrape, busy_stack};

fn document(name: &str) -> Result<Yaml> {
    let file = std::fs::read_to_string(paths::workspace().join("deploy/prometheus").join(name))?;
    let documents = YamlLoader::load_from_str(&file)?;
    let [document] = <[Yaml; 1]>::try_from(documents).map_err(|all| anyhow!("{name} has {} documents", all.len()))?;
    Ok(document)
}

/// The rules of all groups.
pub fn rules() -> Result<Vec<Yaml>> {
    let document = document("alerts.yaml")?;
    let groups = document["groups"].as_vec().context("no groups")?;
    Ok(groups.iter().filter_map(|group| group["rules"].as_vec()).flatten().cloned().collect())
}

pub fn query(rule: &Yaml) -> Result<Query> {
    Query::parse(rule["expr"].as_str().context("no expression")?)
}

#[tokio::test]
async fn each_alert_is_an_expression_over_metrics_that_exist_and_has_a_section_of_the_book() -> Result<()> {
    let scrape = Scrape::of(&busy_stack().await?).await?;
    let book = std::fs::read_to_string(paths::workspace().join("docs/src/operating/alerts.md"))?;
    let sections: BTreeSet<String> =
        book.lines().filter_map(|line| line.strip_prefix("## ")).map(ToOwned::to_owned).collect();
    let mut alerts = BTreeSet::new();
    for rule in rules()? {
        let name = rule["alert"].as_str().context("no name")?.to_owned();
        let selectors = query(&rule).with_context(|| name.clone())?.selectors();
        assert!(!selectors.is_empty(), "{name}");
        for selector in selectors {
            scrape.check(&selector).with_context(|| name.clone())?;
        }
        for annotation in ["summary", "description"] {
            assert!(rule["annotations"][annotation].as_str().is_some(), "{name}: no {annotation}");
        }
        let runbook = format!("operating/alerts.md#{}", name.to_lowercase());
        assert_eq!(rule["annotations"]["runbook"].as_str(), Some(runbook.as_str()));
        assert!(["critical", "warning"].contains(&rule["labels"]["severity"].as_str().unwrap_or_default()), "{name}");
        assert!(alerts.insert(name.clone()), "{name} stands twice");
    }
    assert_eq!(alerts, sections);
    Ok(())
}

/// `cargo xtask test --only alerts` runs the cases, where there is promtool.
#[test]
fn each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> Result<()> {
    let document = document("alerts.test.yaml")?;
    let tests = document["tests"].as_vec().context("no tests")?;
    let mut cases: BTreeMap<&str, BTreeSet<bool>> = BTreeMap::new();
    for case in tests.iter().filter_map(|test| test["alert_rule_test"].as_vec()).flatten() {
        let name = case["alertname"].as_str().context("a case without an alert")?;
        ensure!(case["eval_time"].as_str().is_some(), "{name}: a case without a time");
        let fires = case["exp_alerts"].as_vec().is_some_and(|alerts| !alerts.is_empty());
        cases.entry(name).or_default().insert(fires);
    }
    let rules = rules()?;
    let alerts: BTreeSet<&str> = rules.iter().filter_map(|rule| rule["alert"].as_str()).collect();
    assert_eq!(cases.keys().copied().collect::<BTreeSet<_>>(), alerts);
    for (name, kinds) in cases {
        assert_eq!(kinds, BTreeSet::from([false, true]), "{name}: one case that fires and one that does not");
    }
    Ok(())
}
