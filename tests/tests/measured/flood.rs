//! A flood of unknown keys costs Envoy no memory, the database no rows and the operator no
//! statistics, and hardly affects good keys. The figures are printed.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use contract::outcome::Outcome;
use portcullis_tests::flood::{Flood, at, flood, flood_and_probe, probe};
use portcullis_tests::http::Connection;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use portcullis_torture::envoy_model::BOUND;

/// Keys before memory is looked at for the first time, and after that.
const WARM: Flood = Flood { from: 0, least: 5_000, most: 5_000, lasts: Duration::ZERO };
const FLOOD: Flood = Flood { from: WARM.most, least: 20_000, most: 60_000, lasts: Duration::from_secs(9) };

/// What memory may grow by: what allocators and buffers take however many keys there are, in KiB, and so many bytes for each
/// key. So 70 bytes that are kept of each of 60,000 keys are found: a hash with what a table keeps beside it.
const BASE_KIB: u64 = 2 * 1_024;
const BYTES_A_KEY: u64 = 32;

/// Requests with a good key for each measurement.
const PROBES: usize = 200;

/// Longer than a screen: one story.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_unknown_keys_leaves_nothing_behind_and_good_keys_alone() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let address = stack.envoy().address();
    let calm = probe(&mut Connection::open(address).await?, &key, PROBES, &AtomicBool::new(false)).await?;

    let warm = flood(address, WARM).await?;
    let names_before = stack.envoy().stats("").await?.len();
    let memory_before = stack.envoy().resident_kib()?;

    let start = Instant::now();
    let (flooded, pressed) = flood_and_probe(address, FLOOD, &key).await?;
    let took = start.elapsed();
    assert!((FLOOD.least..=FLOOD.most).contains(&flooded), "{flooded} keys in {took:?}");

    let unknown = "wasmcustom.portcullis.decisions.unknown_total";
    let all = warm + flooded;
    // Workers write the statistics of decisions on their ticks.
    stack.envoy().wait_for_stat(unknown, |counted| counted >= all).await?;
    // All of it is one count for the database: by outcome and hour, of which there may have been two.
    let code = Outcome::Unknown.code();
    let counted = format!("select coalesce(sum(requests), 0)::bigint from usage_keyless_hourly where outcome = {code}");
    let arrived = async || {
        let counted = stack.database.number(&counted).await.ok()?;
        (u64::try_from(counted).ok()? >= all).then_some(())
    };
    eventually("the flood to be counted in the database", arrived).await?;
    let keyless = stack.database.number("select count(*) from usage_keyless_hourly").await?;
    let hourly = stack.database.number("select count(*) from usage_hourly").await?;
    let memory = stack.envoy().resident_kib()?;
    let names = stack.envoy().stats("").await?.len();
    println!(
        "flood: {flooded} unknown keys in {:.1} s ({:.0} a second); Envoy's resident memory {memory_before} KiB before, \
         {memory} KiB after; rows of usage {hourly} by key, {keyless} without; statistics {names_before} before, {names} after",
        took.as_secs_f64(),
        flooded as f64 / took.as_secs_f64(),
    );
    println!(
        "good key: p50 {:?}, p99 {:?}, most {:?} without the flood ({} requests); p50 {:?}, p99 {:?}, most {:?} with it ({})",
        at(&calm, 500),
        at(&calm, 990),
        at(&calm, 1_000),
        calm.len(),
        at(&pressed, 500),
        at(&pressed, 990),
        at(&pressed, 1_000),
        pressed.len()
    );
    let growth = BASE_KIB + flooded * BYTES_A_KEY / 1_024;
    assert!(memory <= memory_before + growth, "Envoy grew from {memory_before} to {memory} KiB");
    assert!(hourly <= 2 && keyless <= 4, "{hourly} rows by key, {keyless} without");
    assert_eq!(names, names_before);
    // `probe` fails if a good key is refused. `cargo xtask bench --suite flood` judges milliseconds.
    assert!(at(&pressed, 990) <= BOUND, "good keys wait {:?}", at(&pressed, 990));
    for (name, value) in stack.envoy().stats("vm_reload").await? {
        assert_eq!(value, 0, "{name}");
    }
    Ok(())
}
