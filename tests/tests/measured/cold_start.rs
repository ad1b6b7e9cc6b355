//! A cold start of Envoy with a large store.

use std::time::Instant;

use anyhow::Result;
use portcullis_tests::process::Signal;
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::wait::eventually;

const KEYS: u64 = 100_000;

/// Key number n is the text `key-n`, as if imported from elsewhere.
const INSERT: &str = "
    insert into user_preferences (id, email)
    select gen_random_uuid(), 'many-' || n || '@example.com' from generate_series(1, {keys} / 10) n;
    insert into api_keys (id, owner_id, name, hash, revision)
    select gen_random_uuid(), owner.id, 'Many', sha256(convert_to('key-' || n, 'UTF8')), 0
    from generate_series(1, {keys}) n
    join user_preferences owner on owner.email = 'many-' || (n % ({keys} / 10) + 1) || '@example.com'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_starts_cold_judges_each_of_a_hundred_thousand_keys() -> Result<()> {
    let stack = Stack::start().await?;
    stack.database.execute(&INSERT.replace("{keys}", &KEYS.to_string())).await?;
    let inserted = Instant::now();
    // The Envoy that runs already gets them too: one commit, too large for an update of changes, comes as a snapshot.
    let envoy = stack.envoy();
    let keys = "wasmcustom.portcullis.store.keys";
    eventually("100,000 keys to arrive", async || (envoy.stat(keys).await.ok()? >= KEYS).then_some(())).await?;
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
