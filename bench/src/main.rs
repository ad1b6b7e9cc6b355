//! `cargo xtask bench`: starts each peer on the same Envoy binary and measures it. Prints a table
//! with a verdict on each target, and writes `target/bench/results.json`.
//!
//! Reading order: `stats` computes figures from samples, `report` prints and judges them. `machine`
//! reads CPU time and memory and pins processes, `load` sends requests, `server` is an Envoy, `feed`
//! a control plane with keys and no database, `peers` the configurations that are compared. Then one
//! file for each suite, and two for the suite `limits`; `store` is the control plane of the last five.

mod report;
mod statements;
mod stats;

mod machine;

mod load;

mod authorizer;
mod feed;
mod peers;
mod rows;
mod server;

mod memory;
mod request;

mod store;

mod api;
mod flood;
mod grants;
mod sync;
mod usage;
mod waits;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use portcullis_harness::output::{exit_code, progress, say};
use portcullis_harness::{compile, paths};

use crate::machine::Cores;
use crate::report::Report;

/// Measures what Portcullis costs, against other ways to do the same, on this machine and with one Envoy binary.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Answer every gRPC authorization request with yes: one of the peers, in a process of its own.
    #[command(hide = true)]
    Authorizer(authorizer::Options),
}

/// What to measure, and how long.
#[derive(Clone, clap::Args)]
struct Options {
    /// Fewer rounds and keys: under four minutes once everything is built. Checks the bench, not the product.
    #[arg(long)]
    quick: bool,
    /// Measure only this suite. Can be given several times.
    #[arg(long, value_name = "SUITE")]
    suite: Vec<Suite>,
    /// Rounds of each row of the suite `request`, rounded up to a multiple of the Envoys started for it: twelve, or one
    /// in a quick run [default: three for each Envoy]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Another build of the filter to measure beside this one in the suite `request`: with a thousand keys, with rate
    /// limits, and with a million keys, of which all or always the same thousand are used.
    #[arg(long, value_name = "FILE")]
    beside: Vec<PathBuf>,
    /// In the suite `request`, measure only rows whose name contains this, and the row without a filter.
    #[arg(long, value_name = "TEXT")]
    row: Vec<String>,
    /// Whether the suite `request` is only what the suite `limits` needs of it.
    #[arg(skip)]
    limits_only: bool,
}

impl Options {
    /// Whether this suite is measured.
    fn measures(&self, suite: Suite) -> bool {
        self.suite.is_empty() || self.suite.contains(&suite)
    }

    /// Whether a row of the suite `request` is measured.
    fn wants(&self, name: &str) -> bool {
        (!self.limits_only || request::OF_LIMITS.contains(&name))
            && (self.row.is_empty() || self.row.iter().any(|part| name.contains(part)))
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
    /// CPU time of a request with a shared limit, a quota or credits. How many requests wait for an allowance of a shared limit,
    /// how long, and how fast allowances are granted.
    Limits,
}

fn main() -> ExitCode {
    let Arguments { options, command } = Arguments::parse();
    exit_code(async {
        match command {
            Some(Command::Authorizer(options)) => authorizer::serve(&options).await,
            None => bench(&options).await,
        }
    })
}

async fn limits_suite(options: &Options, cores: Cores, report: &mut Report) -> Result<()> {
    // The whole suite `request` has these rows too.
    if !options.measures(Suite::Request) {
        request::measure(&Options { limits_only: true, ..options.clone() }, cores, report).await?;
    }
    waits::measure(options, report).await?;
    grants::measure(options, report).await
}

async fn bench(options: &Options) -> Result<()> {
    let cores = Cores::choose()?;
    compile::filter()?;
    let home = paths::target().join("bench");
    std::fs::create_dir_all(&home)?;
    let mut report = Report::new(options.quick);
    let mut failed = Vec::new();
    for suite in Suite::value_variants() {
        if !options.measures(*suite) {
            continue;
        }
        let done = match suite {
            Suite::Request => request::measure(options, cores, &mut report).await,
            Suite::Memory => memory::measure(options, &mut report).await,
            Suite::Sync => sync::measure(options, &mut report).await,
            Suite::Usage => usage::measure(options, &mut report).await,
            Suite::Api => api::measure(options, &mut report).await,
            Suite::Flood => flood::measure(options, &mut report).await,
            Suite::Limits => limits_suite(options, cores, &mut report).await,
        };
        // One suite that cannot run does not cost the figures of the others.
        if let Err(error) = done {
            progress(&format!("suite {suite:?} failed: {error:#}"));
            report.note(format!("suite {suite:?} failed: {error:#}"));
            failed.push(format!("{suite:?}"));
        }
    }
    say(&report.table());
    let json = home.join("results.json");
    std::fs::write(&json, format!("{:#}\n", report.json()))?;
    say(&json.display().to_string());
    ensure!(failed.is_empty(), "suites that failed: {}", failed.join(", "));
    Ok(())
}
