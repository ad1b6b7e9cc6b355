//! Figures and verdicts, as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::stats::Estimate;

#[derive(Clone, Debug)]
struct Figure {
    suite: &'static str,
    name: String,
    unit: &'static str,
    estimate: Estimate,
    /// Held against the figure of this name and suite.
    ratio: Option<(Estimate, &'static str)>,
}

/// A target of the project, and how far it is met.
#[derive(Clone, Debug)]
struct Target {
    name: &'static str,
    bound: Bound,
    unit: &'static str,
    /// None if it could not be measured.
    found: Option<Estimate>,
}

/// How much or how little is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    /// None if nothing can be said: it was not measured, or not for long enough. What is below nothing, or is no number,
    /// comes of a disturbed run and meets no target.
    fn met(&self, quick: bool) -> Option<bool> {
        let found = self.found.filter(|_| !quick)?.judged;
        let within = match self.bound {
            Bound::AtMost(most) => found <= most,
            Bound::AtLeast(least) => found >= least,
        };
        Some(within && found.is_finite() && found >= 0.0)
    }

    fn verdict(&self, quick: bool) -> &'static str {
        match (&self.found, self.met(quick)) {
            (None, _) => "not measured",
            (Some(_), None) => "not judged",
            (Some(_), Some(true)) => "pass",
            (Some(_), Some(false)) => "FAIL",
        }
    }
}

/// How the columns are to be read.
const LEGEND: &str = "low quartile, found: from the lower quartiles of the times that were measured, which are those of \
    undisturbed rounds. A rate is so much by such a time, a ratio is between two of them. Where two things were measured \
    right after each other in each round (cold start, usage and api), a ratio is the median of the rounds'. A p99 stands \
    for itself, and so does the worst of several, whose range is from the best to the worst.";

/// Everything that one run found.
#[derive(Debug)]
pub(crate) struct Report {
    quick: bool,
    figures: Vec<Figure>,
    targets: Vec<Target>,
    notes: Vec<String>,
}

impl Report {
    pub(crate) const fn new(quick: bool) -> Self {
        Self { quick, figures: Vec::new(), targets: Vec::new(), notes: Vec::new() }
    }

    pub(crate) fn figure(
        &mut self,
        suite: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        estimate: Estimate,
    ) {
        self.compared(suite, name, unit, estimate, None);
    }

    pub(crate) fn compared(
        &mut self,
        suite: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        estimate: Estimate,
        ratio: Option<(Estimate, &'static str)>,
    ) {
        // Figures of one suite stay together, in whichever order they come.
        let end =
            self.figures.iter().rposition(|figure| figure.suite == suite).map_or(self.figures.len(), |last| last + 1);
        self.figures.insert(end, Figure { suite, name: name.into(), unit, estimate, ratio });
    }

    /// A target, with nothing found if it could not be measured.
    pub(crate) fn target(
        &mut self,
        name: &'static str,
        bound: Bound,
        unit: &'static str,
        found: impl Into<Option<Estimate>>,
    ) {
        self.targets.push(Target { name, bound, unit, found: found.into() });
    }

    /// Something that the reader of the table has to know.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    pub(crate) fn table(&self) -> String {
        let mut out = String::new();
        let mut suite = "";
        for figure in &self.figures {
            if figure.suite != suite {
                suite = figure.suite;
                let _ = writeln!(
                    out,
                    "\n{suite:<58} {:>12} {:>12} {:>22}  {:>8} {:>8} {:>22}",
                    "low quartile", "median", "90 % of resamples", "ratio", "median", "90 % of resamples"
                );
            }
            let Estimate { judged, median, .. } = figure.estimate;
            let name = format!("{} [{}]", figure.name, figure.unit);
            let ratio = figure.ratio.map_or_else(String::new, |(ratio, of)| {
                let (judged, median, range) = (short(ratio.judged), short(ratio.median), range(&ratio));
                format!("  {judged:>8} {median:>8} {range:>22} × {of}")
            });
            let (judged, median, range) = (short(judged), short(median), range(&figure.estimate));
            let _ = writeln!(out, "{name:<58} {judged:>12} {median:>12} {range:>22}{ratio}");
        }
        if !self.targets.is_empty() {
            let _ = writeln!(
                out,
                "\n{:<58} {:>8} {:>8} {:>8} {:>22}  verdict",
                "target", "wanted", "found", "median", "90 % of resamples"
            );
        }
        for target in &self.targets {
            let wanted = match target.bound {
                Bound::AtMost(most) => format!("≤ {}", short(most)),
                Bound::AtLeast(least) => format!("≥ {}", short(least)),
            };
            let name = if target.unit.is_empty() {
                target.name.to_owned()
            } else {
                format!("{} [{}]", target.name, target.unit)
            };
            let found = target.found.unwrap_or(Estimate::NOTHING);
            let (range, verdict) = (range(&found), target.verdict(self.quick));
            let (found, median) = (short(found.judged), short(found.median));
            let _ = writeln!(out, "{name:<58} {wanted:>8} {found:>8} {median:>8} {range:>22}  {verdict}");
        }
        let _ = writeln!(out, "\n{LEGEND}");
        if self.quick {
            let _ =
                writeln!(out, "\nA quick run: too few rounds and keys for figures that count, so nothing is judged.");
        }
        for note in &self.notes {
            let _ = writeln!(out, "\n{note}");
        }
        out
    }

    pub(crate) fn json(&self) -> Value {
        let estimate = |found: &Estimate| {
            json!({
                "judged": found.judged, "median": found.median,
                "resampled_5": found.low, "resampled_95": found.high,
            })
        };
        let figures = self.figures.iter().map(|figure| {
            let ratio = figure.ratio.map(|(ratio, of)| json!({"ratio": estimate(&ratio), "of": of}));
            json!({
                "suite": figure.suite, "name": figure.name, "unit": figure.unit,
                "found": estimate(&figure.estimate), "compared": ratio,
            })
        });
        let targets = self.targets.iter().map(|target| {
            let (least, most) = match target.bound {
                Bound::AtMost(most) => (None, Some(most)),
                Bound::AtLeast(least) => (Some(least), None),
            };
            json!({
                "name": target.name, "unit": target.unit, "at_most": most, "at_least": least,
                "found": target.found.as_ref().map(estimate), "met": target.met(self.quick),
            })
        });
        json!({
            "quick": self.quick, "figures": figures.collect::<Vec<_>>(), "targets": targets.collect::<Vec<_>>(),
            "notes": self.notes,
        })
    }
}

/// Where nine of ten resamples put a figure, if that is known.
fn range(found: &Estimate) -> String {
    if !found.low.is_finite() && !found.high.is_finite() {
        "–".into()
    } else {
        format!("{} … {}", short(found.low), short(found.high))
    }
}

/// Three figures that count.
fn short(value: f64) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    match value.abs() {
        size if size >= 1_000_000.0 => format!("{:.2} M", value / 1_000_000.0),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What table and JSON say of each target, and how each ends.
    fn verdicts(quick: bool) -> Vec<(String, Value)> {
        let of = |value| Estimate { judged: value, ..Estimate::NOTHING };
        let mut report = Report::new(quick);
        report.target("small", Bound::AtMost(1.0), "", of(0.5));
        report.target("large", Bound::AtLeast(0.7), "", of(0.5));
        report.target("negative", Bound::AtMost(1.0), "", of(-0.5));
        report.target("no number", Bound::AtMost(1.0), "", of(f64::NAN));
        report.target("endless", Bound::AtLeast(1.0), "", of(f64::INFINITY));
        report.target("away", Bound::AtLeast(1.0), "", None);
        let (table, json) = (report.table(), report.json());
        let said = |target: &Target| {
            let line = table.lines().find(|line| line.starts_with(target.name)).unwrap();
            line.rsplit("  ").next().unwrap().to_owned()
        };
        let met = json["targets"].as_array().unwrap().iter().map(|target| target["met"].clone());
        report.targets.iter().map(said).zip(met).collect()
    }

    #[test]
    fn only_a_sensible_figure_within_the_bound_passes() {
        let (pass, fail) = (("pass".to_owned(), json!(true)), ("FAIL".to_owned(), json!(false)));
        let away = ("not measured".to_owned(), Value::Null);
        assert_eq!(verdicts(false), [pass, fail.clone(), fail.clone(), fail.clone(), fail, away]);
    }

    #[test]
    fn a_quick_run_judges_nothing() {
        let unjudged = ("not judged".to_owned(), Value::Null);
        let away = ("not measured".to_owned(), Value::Null);
        assert_eq!(verdicts(true), [vec![unjudged; 5], vec![away]].concat());
    }
}
