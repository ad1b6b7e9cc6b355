//! `cargo xtask torture`: builds everything, tortures the stack for as long as one likes, and prints what came of it.

use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use clap::Args;
use portcullis_tests::{paths, tools, torture};

use crate::output::{progress, say};
use crate::run::{cargo, run};
use crate::wasm;

/// For how long, and which run.
#[derive(Args)]
pub(crate) struct Options {
    /// For how many minutes faults are injected. From three on, memory is compared with what it was after two.
    #[arg(long, value_name = "N", default_value = "10")]
    minutes: u64,
    /// Repeats the schedule of an earlier run; drawn if it is not given.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Leave out the faults that may lose counts, so that every request has to be counted to the last.
    #[arg(long)]
    without_loss: bool,
}

/// Tortures. Fails if a promise was broken.
pub(crate) async fn torture(options: &Options) -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let seed = options.seed.unwrap_or(now.as_secs() % 1_000_000);
    wasm::build_for_faults()?;
    run(cargo(&["build", "--locked", "--package", "control-plane"]))?;
    tools::envoy(&progress)?;
    let journal = paths::target().join("torture").join(format!("{seed}.log"));
    say(&format!("seed {seed}; what happens is written to {}", journal.display()));
    let length = Duration::from_secs(options.minutes.saturating_mul(60));
    let mut chosen = torture::Options::long(seed, length, journal);
    if options.without_loss {
        chosen.behind.retain(|kind| !kind.may_lose());
        chosen.before.retain(|kind| !kind.may_lose());
    }
    let report = torture::run(chosen).await?;
    let table = report.table();
    say(&table);
    std::fs::write(paths::target().join("torture").join(format!("{seed}.txt")), table)?;
    ensure!(report.is_clean(), "promises were broken; --seed {seed} repeats the schedule");
    Ok(())
}
