//! What was measured, and whether it is good enough: figures and verdicts come in, a table for people and JSON for
//! programs go out.

use std::fmt::Write;

use serde_json::{Value, json};

use super::stats::Estimate;

/// One row.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    pub(super) suite: &'static str,
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) estimate: Estimate,
    /// Held against the figure of this name and suite.
    pub(super) ratio: Option<(f64, &'static str)>,
}

/// A target of the project, and how far it is met.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) name: &'static str,
    pub(super) bound: Bound,
    pub(super) unit: &'static str,
    pub(super) found: Estimate,
}

/// How much or how little is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    fn met(&self) -> bool {
        match self.bound {
            Bound::AtMost(most) => self.found.lower_quartile <= most,
            Bound::AtLeast(least) => self.found.lower_quartile >= least,
        }
    }
}

/// Everything that one run found.
#[derive(Debug)]
pub(super) struct Report {
    quick: bool,
    pub(super) figures: Vec<Figure>,
    targets: Vec<Target>,
    notes: Vec<String>,
}

impl Report {
    pub(super) const fn new(quick: bool) -> Self {
        Self { quick, figures: Vec::new(), targets: Vec::new(), notes: Vec::new() }
    }

    pub(super) fn figure(
        &mut self,
        suite: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        estimate: Estimate,
    ) {
        self.compared(suite, name, unit, estimate, None);
    }

    pub(super) fn compared(
        &mut self,
        suite: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        estimate: Estimate,
        ratio: Option<(f64, &'static str)>,
    ) {
        self.figures.push(Figure { suite, name: name.into(), unit, estimate, ratio });
    }

    pub(super) fn target(&mut self, name: &'static str, bound: Bound, unit: &'static str, found: Estimate) {
        self.targets.push(Target { name, bound, unit, found });
    }

    /// Something that the reader of the table has to know.
    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    pub(super) fn table(&self) -> String {
        let mut out = String::new();
        let mut suite = "";
        for figure in &self.figures {
            if figure.suite != suite {
                suite = figure.suite;
                let _ = writeln!(
                    out,
                    "\n{suite:<58} {:>12} {:>12} {:>22}  ratio",
                    "low quartile", "median", "90 % of resamples"
                );
            }
            let Estimate { lower_quartile, median, low, high } = figure.estimate;
            let name = format!("{} [{}]", figure.name, figure.unit);
            let spread = format!("{} … {}", short(low), short(high));
            let ratio = figure.ratio.map_or_else(String::new, |(ratio, of)| format!("{} × {of}", short(ratio)));
            let _ =
                writeln!(out, "{name:<58} {:>12} {:>12} {spread:>22}  {ratio}", short(lower_quartile), short(median));
        }
        if !self.targets.is_empty() {
            let _ = writeln!(out, "\n{:<58} {:>12} {:>12} {:>22}  verdict", "target", "wanted", "found", "90 %");
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
            let spread = format!("{} … {}", short(target.found.low), short(target.found.high));
            let verdict = if target.met() { "pass" } else { "FAIL" };
            let _ = writeln!(
                out,
                "{name:<58} {wanted:>12} {:>12} {spread:>22}  {verdict}",
                short(target.found.lower_quartile)
            );
        }
        if self.quick {
            let _ = writeln!(out, "\nA quick run: too few rounds and keys for figures that count.");
        }
        for note in &self.notes {
            let _ = writeln!(out, "\n{note}");
        }
        out
    }

    pub(super) fn json(&self) -> Value {
        let estimate = |found: &Estimate| {
            json!({
                "lower_quartile": found.lower_quartile, "median": found.median,
                "resampled_5": found.low, "resampled_95": found.high,
            })
        };
        let figures = self.figures.iter().map(|figure| {
            let ratio = figure.ratio.map(|(ratio, of)| json!({"ratio": ratio, "of": of}));
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
                "found": estimate(&target.found), "met": target.met(),
            })
        });
        json!({
            "quick": self.quick, "figures": figures.collect::<Vec<_>>(), "targets": targets.collect::<Vec<_>>(),
            "notes": self.notes,
        })
    }
}

/// Three figures that count.
pub(super) fn short(value: f64) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    match value.abs() {
        size if size >= 1_000_000.0 => format!("{:.2} M", value / 1_000_000.0),
        size if size >= 1_000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_pass_or_fail_for_each_target() {
        let mut report = Report::new(false);
        report.target("small", Bound::AtMost(1.0), "", Estimate::once(0.5));
        report.target("large", Bound::AtLeast(0.7), "", Estimate::once(0.5));
        let table = report.table();
        let verdict = |name: &str| table.lines().find(|line| line.starts_with(name)).map(|line| line.ends_with("pass"));
        assert_eq!((verdict("small"), verdict("large")), (Some(true), Some(false)));
        assert_eq!(report.json()["targets"][1]["met"], false);
    }
}
