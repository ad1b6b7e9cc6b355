//! A flood of keys that nobody has: it costs Envoy no memory, the database no rows and the operator no statistics, and
//! those with a good key hardly notice. The figures are printed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use contract::outcome::Outcome;
use portcullis_tests::http::Connection;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use tokio::task::JoinSet;

/// Connections that flood.
const CONNECTIONS: u64 = 8;

/// Keys before memory is looked at for the first time, and after that.
const WARM: u64 = 5_000;
const FLOOD: u64 = 60_000;

/// No longer than this, however slow the machine.
const AT_MOST: Duration = Duration::from_secs(9);

/// The fewest of those for anything to be said.
const AT_LEAST: u64 = 20_000;

/// What memory may grow by: what allocators and buffers take however many keys there are, in KiB, and so many bytes for each
/// key. So 70 bytes that are kept of each of 60,000 keys are found: a hash with what a table keeps beside it.
const BASE_KIB: u64 = 2 * 1_024;
const BYTES_A_KEY: u64 = 32;

/// Requests with a good key for each measurement.
const PROBES: usize = 200;

/// A key that nobody has, of the right form or not, different each time (splitmix64).
fn stranger(seed: u64) -> String {
    let mut mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    match mixed % 4 {
        0 => format!("{mixed:x}"),
        1 => format!("sk_test_{mixed:036x}"),
        2 => format!("{mixed:0700}"),
        _ => format!("sk_live_{mixed:036}"),
    }
}

/// Sends keys from `from` on until `count` are refused or the time is over; says how many were.
async fn flood(stack: &Stack, from: u64, count: u64) -> Result<u64> {
    let (address, start) = (stack.envoy().address(), Instant::now());
    let next = Arc::new(AtomicU64::new(0));
    let mut connections = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let next = Arc::clone(&next);
        connections.spawn(async move {
            let mut connection = Connection::open(address).await?;
            let mut refused = 0;
            while start.elapsed() < AT_MOST {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                if turn >= count {
                    break;
                }
                let reply = connection.get("/", Some(&stranger(from + turn))).await?;
                ensure!(reply.status == 401, "a stranger's key is answered with {}", reply.status);
                refused += 1;
            }
            Ok::<u64, anyhow::Error>(refused)
        });
    }
    let mut refused = 0;
    while let Some(done) = connections.join_next().await {
        refused += done??;
    }
    Ok(refused)
}

/// How long requests with a good key take, the shortest first, until there are enough or it is told to stop.
async fn probe(connection: &mut Connection, key: &str, enough: usize, stop: &AtomicBool) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    while took.len() < enough && !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let reply = connection.get("/", Some(key)).await?;
        took.push(start.elapsed());
        ensure!(reply.status == 200, "a good key is answered with {}", reply.status);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    took.sort_unstable();
    Ok(took)
}

fn at(took: &[Duration], per_mille: usize) -> Duration {
    let place = took.len().saturating_sub(1).saturating_mul(per_mille) / 1_000;
    took.get(place).copied().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_unknown_keys_leaves_nothing_behind_and_good_keys_alone() -> Result<()> {
    let stack = Arc::new(Stack::start().await?);
    let key = stack.working_key("ada@example.com").await?;
    let never = AtomicBool::new(false);
    let mut connection = Connection::open(stack.envoy().address()).await?;
    let calm = probe(&mut connection, &key, PROBES, &never).await?;

    let warm = flood(&stack, 0, WARM).await?;
    let names_before = stack.envoy().stats("").await?.len();
    let memory_before = stack.envoy().resident_kib()?;

    let (over, start) = (Arc::new(AtomicBool::new(false)), Instant::now());
    let probing = tokio::spawn({
        let (over, key) = (Arc::clone(&over), key.clone());
        async move { probe(&mut connection, &key, usize::MAX, &over).await }
    });
    let flooded = flood(&stack, WARM, FLOOD).await;
    let took = start.elapsed();
    over.store(true, Ordering::Relaxed);
    let (flooded, pressed) = (flooded?, probing.await??);
    ensure!(flooded >= AT_LEAST, "only {flooded} keys in {took:?}");

    let unknown = "wasmcustom.portcullis_decisions_unknown";
    let all = warm + flooded;
    // Workers add decisions up and tell of them on their ticks.
    let told = async || (stack.envoy().stat(unknown).await.ok()? >= all).then_some(());
    eventually("the flood to be told in Envoy's statistics", told).await?;
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
    // Clients and servers share the machine's processors here: a bound for what must never happen, not for what is usual.
    assert!(at(&pressed, 990) < Duration::from_millis(500), "good keys wait {:?}", at(&pressed, 990));
    for (name, value) in stack.envoy().stats("vm_reload").await? {
        assert_eq!(value, 0, "{name}");
    }
    Ok(())
}
