//! A cold start of Envoy with a large store.

use std::time::Instant;

use anyhow::Result;
use portcullis_tests::process::Signal;
use portcullis_tests::stack::{STORE_KEYS, Stack, wait_for_status};

const KEYS: u64 = 100_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_starts_cold_judges_each_of_a_hundred_thousand_keys() -> Result<()> {
    let stack = Stack::start().await?;
    stack.insert_keys(KEYS).await?;
    let inserted = Instant::now();
    // The Envoy that runs already gets them too: one commit, too large for an update of changes, comes as a snapshot.
    let envoy = stack.envoy();
    envoy.wait_for_stat(STORE_KEYS, |keys| keys >= KEYS).await?;
    let arrived = inserted.elapsed();

    let mut took = Vec::new();
    for _ in 0..3 {
        envoy.stop(Signal::SIGKILL).await?;
        let start = Instant::now();
        envoy.restart().await?;
        wait_for_status(envoy, Some("key-1"), 200).await?;
        took.push(start.elapsed());
        // The filter answers 503 until its store is complete, so an Envoy that admits one key has all of them.
        for number in (1..=KEYS).step_by(997).chain([KEYS / 2, KEYS]) {
            assert_eq!(stack.get(Some(&format!("key-{number}"))).await?.status, 200, "key-{number}");
        }
        assert_eq!(stack.get(Some(&format!("key-{}", KEYS + 1))).await?.status, 401);
    }
    took.sort();
    println!(
        "cold start: {KEYS} keys judged {took:.2?} after the start of Envoy (at one that ran: after {arrived:.2?})"
    );
    Ok(())
}
