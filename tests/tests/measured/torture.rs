//! Every kind of fault once on the whole stack, in an order and at times that a seed gives. `cargo
//! xtask torture` runs longer. Linux only: elsewhere the clock cannot be shifted.
#![cfg(target_os = "linux")]

use std::time::Duration;

use anyhow::{Result, ensure};
use portcullis_tests::paths;
use portcullis_torture::plan::Kind;
use portcullis_torture::{Options, run};

/// The same schedule each time, so that a change is judged by what it changed: `PORTCULLIS_SEED=7 cargo test …` tries another.
fn seed() -> Result<u64> {
    const USUAL: u64 = 588_714;
    std::env::var("PORTCULLIS_SEED").map_or(Ok(USUAL), |seed| Ok(seed.parse()?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_once_and_nobody_is_let_in_and_nothing_is_lost_but_what_is_stated() -> Result<()> {
    let seed = seed()?;
    println!("seed {seed}: PORTCULLIS_SEED={seed} repeats it");
    let report = run(Options::short(seed, paths::target().join("torture/short.log"))).await?;
    println!("{}", report.table());
    ensure!(report.is_clean(), "{} promises were broken", report.verdict.broken.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_of_the_control_planes_loses_nothing_and_no_request_sees_it() -> Result<()> {
    // A number and not a time, since a busy machine takes long for each restart.
    const RESTARTS: usize = 8;
    let options = Options {
        behind: vec![Kind::ControlPlaneTerm; RESTARTS],
        before: Vec::new(),
        pause: (Duration::from_millis(200), Duration::from_millis(400)),
        lasts: (Duration::from_millis(100), Duration::from_millis(200)),
        ..Options::short(seed()?, paths::target().join("torture/rolling.log"))
    };
    let mut seen = run(options).await?;
    println!("{}", seen.table());
    ensure!(seen.is_clean(), "{:?}", seen.verdict.broken);
    // To the last: nothing is excused here.
    ensure!(seen.counted.decided == seen.counted.counted && seen.counted.doubtful == 0, "{:?}", seen.counted);
    let restarts = seen.faults.remove(&Kind::ControlPlaneTerm).unwrap_or_default();
    ensure!(restarts == RESTARTS as u64, "only {restarts} restarts");
    Ok(())
}
