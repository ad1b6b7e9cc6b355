//! The SQL statements of a REST call, as a script for pgbench. They come from the committed
//! descriptions of the queries, so that pgbench always runs the statements of the present control
//! plane.

use anyhow::{Context, Result, ensure};
use portcullis_harness::paths;
use serde_json::Value;

pub(crate) struct Statements(Vec<String>);

impl Statements {
    pub(crate) fn read() -> Result<Self> {
        let mut all = Vec::new();
        for file in std::fs::read_dir(paths::workspace().join("control-plane/.sqlx"))? {
            let described: Value = serde_json::from_slice(&std::fs::read(file?.path())?)?;
            all.push(described["query"].as_str().context("a description without its query")?.to_owned());
        }
        Ok(Self(all))
    }

    /// The only query that contains all these parts, with arguments in place of its parameters, without a semicolon.
    pub(crate) fn with(&self, parts: &[&str], arguments: &[&str]) -> Result<String> {
        let fitting: Vec<_> = self.0.iter().filter(|query| parts.iter().all(|part| query.contains(part))).collect();
        ensure!(fitting.len() == 1, "{} queries of the control plane have the parts {parts:?}", fitting.len());
        let mut statement = fitting.first().map(ToString::to_string).unwrap_or_default();
        // From the last, since $1 is a prefix of $10.
        for (place, argument) in arguments.iter().enumerate().rev() {
            statement = statement.replace(&format!("${}", place + 1), argument);
        }
        ensure!(!statement.contains('$'), "an argument is missing: {statement}");
        Ok(statement.trim().to_owned())
    }
}
