//! `cargo xtask bench`: suites come in; each peer is started on the same Envoy binary and measured, and a table, JSON
//! (`target/bench/results.json`) and a plot (`target/bench/results.svg`) go out, with a verdict on each target.
//!
//! Reading order: [`stats`] makes figures of samples, [`report`] shows them and judges, `plot` draws. `machine` reads
//! what a process used and pins it, `load` is the load generator, `server` an Envoy, `feed` a control plane with keys
//! and nothing else, `peers` the configurations that are held against each other. Then one file a
//! suite; `store` is the control plane that the last four stand on.

mod report;
mod statements;
mod stats;

mod plot;

mod machine;

mod load;

pub(crate) mod authorizer;
mod feed;
mod peers;
mod server;

mod memory;
mod request;

mod store;

mod api;
mod flood;
mod sync;
mod usage;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use portcullis_tests::paths;

use self::machine::Cores;
use self::report::Report;
use crate::output::{progress, say};
use crate::wasm;

/// What to measure, and how long.
#[derive(Args)]
pub(crate) struct Options {
    /// Fewer rounds and keys: under three minutes once everything is built. Not for figures that count.
    #[arg(long)]
    quick: bool,
    /// Only these suites; all of them otherwise.
    #[arg(long, value_name = "SUITE")]
    suite: Vec<Suite>,
    /// How often each peer is measured in the suite `request`, rounded up to a multiple of the Envoys that are started for
    /// it: twelve, one in a quick run.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Another build of the filter, to be measured beside this one in the suite `request`: with a thousand keys, with
    /// limits, and with a million keys, of which any are asked for or always the same thousand.
    #[arg(long, value_name = "FILE")]
    beside: Vec<PathBuf>,
    /// Of the suite `request`, only rows with this in their names, and the one without a filter.
    #[arg(long, value_name = "TEXT")]
    row: Vec<String>,
}

impl Options {
    /// Whether a row of the suite `request` is measured.
    fn wants(&self, name: &str) -> bool {
        self.row.is_empty() || self.row.iter().any(|part| name.contains(part))
    }
}

/// What can be measured on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// CPU time of Envoy for each request, with each way to check a key.
    Request,
    /// Memory of Envoy for each key.
    Memory,
    /// How soon Envoys have all keys, or one change.
    Sync,
    /// How fast usage reports are taken.
    Usage,
    /// How fast the REST API is.
    Api,
    /// How long a good key takes during a flood of unknown keys.
    Flood,
}

impl Suite {
    const ALL: [Self; 6] = [Self::Request, Self::Memory, Self::Sync, Self::Usage, Self::Api, Self::Flood];
}

/// Measures.
pub(crate) async fn bench(options: &Options) -> Result<()> {
    let cores = Cores::choose()?;
    wasm::build()?;
    let home = paths::target().join("bench");
    std::fs::create_dir_all(&home)?;
    let mut report = Report::new(options.quick);
    let mut failed = Vec::new();
    for suite in Suite::ALL {
        if !options.suite.is_empty() && !options.suite.contains(&suite) {
            continue;
        }
        let done = match suite {
            Suite::Request => request::measure(options, cores, &mut report).await,
            Suite::Memory => memory::measure(options, &mut report).await,
            Suite::Sync => sync::measure(options, &mut report).await,
            Suite::Usage => usage::measure(options, &mut report).await,
            Suite::Api => api::measure(options, &mut report).await,
            Suite::Flood => flood::measure(options, &mut report).await,
        };
        // One suite that cannot run does not cost the figures of the others.
        if let Err(error) = done {
            progress(&format!("suite {suite:?} failed: {error:#}"));
            report.note(format!("suite {suite:?} failed: {error:#}"));
            failed.push(format!("{suite:?}"));
        }
    }
    say(&report.table());
    let (json, svg) = (home.join("results.json"), home.join("results.svg"));
    std::fs::write(&json, format!("{:#}\n", report.json()))?;
    std::fs::write(&svg, plot::draw(&report))?;
    say(&format!("{}\n{}", json.display(), svg.display()));
    ensure!(failed.is_empty(), "suites that failed: {}", failed.join(", "));
    Ok(())
}
