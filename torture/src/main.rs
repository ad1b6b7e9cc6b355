//! `cargo xtask torture`: builds what runs, tortures it, and prints the report.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use clap::Parser;
use portcullis_harness::output::{exit_code, progress, say};
use portcullis_harness::{compile, paths, tools};
use portcullis_torture::Options;

/// Injects faults into the whole stack at random, under load, and checks that no count is lost and no dead key admitted.
/// A seed repeats the schedule of faults.
#[derive(Parser)]
#[command(name = "cargo xtask torture", bin_name = "cargo xtask torture")]
struct Arguments {
    /// Minutes in which faults are injected. From three minutes on, memory at the end is compared with memory after two.
    #[arg(long, value_name = "N", default_value = "10")]
    minutes: u64,
    /// Repeats the schedule of an earlier run [default: random]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Leave out faults that may lose counts, so that every request must be counted.
    #[arg(long)]
    without_loss: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    exit_code(torture(&arguments))
}

/// Fails if a promise was broken.
async fn torture(arguments: &Arguments) -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let seed = arguments.seed.unwrap_or(now.as_secs() % 1_000_000);
    compile::for_faults()?;
    compile::control_plane()?;
    tools::envoy(&progress)?;
    let home = paths::target().join("torture");
    let journal = home.join(format!("{seed}.log"));
    say(&format!("seed {seed}; the journal is {}", journal.display()));
    let length = Duration::from_secs(arguments.minutes.saturating_mul(60));
    let mut options = Options::long(seed, length, journal);
    if arguments.without_loss {
        options.behind.retain(|kind| !kind.may_lose());
        options.before.retain(|kind| !kind.may_lose());
    }
    let report = portcullis_torture::run(options).await?;
    let table = report.table();
    say(&table);
    std::fs::write(home.join(format!("{seed}.txt")), table)?;
    ensure!(report.is_clean(), "promises were broken; --seed {seed} repeats the schedule");
    Ok(())
}
