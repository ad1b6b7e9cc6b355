//! The time from a revocation until every worker refuses the key.

use std::time::Instant;

use anyhow::Result;
use portcullis_tests::envoy::until_all;
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_torture::envoy_model::BOUND;
use serde_json::json;

const TRIES: usize = 100;
const PER_SECOND: u32 = 2_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_key_is_refused_by_every_worker_within_the_bound_and_by_none_admitted_again() -> Result<()> {
    let stack = Stack::builder().plugin(&json!({"rate_limit": null})).start().await?;
    let (rest, envoy) = (stack.rest(), stack.envoy());
    let flowing = stack.working_key("flow@example.com").await?;
    // Before the load starts: Envoy's counters show which worker accepted a connection only while no other client connects.
    let mut workers = envoy.connection_per_worker().await?;
    let load = Load::start(Plan::endless(&stack.envoys, vec![flowing], Some(PER_SECOND)));
    let (began, mut took) = (Instant::now(), Vec::new());
    for number in 0..TRIES {
        let email = format!("user{number}@example.com");
        let key = rest.generate(&email).await?;
        wait_for_status(envoy, Some(&key), 200).await?;
        rest.revoke(&email).await?;
        took.push(until_all(&mut workers, "/", &key, 401).await?);
        // Once refused, refused for good, whichever worker is asked.
        for worker in &mut workers {
            assert_eq!(worker.get("/", Some(&key)).await?.status, 401);
        }
    }
    let lasted = began.elapsed();
    let answers = load.stop().await;
    let flowed = with_status(&answers, 200);
    assert_eq!(flowed, answers.values().sum::<u64>(), "{answers:?}");
    took.sort();
    let (p50, p99, most) = (took[TRIES / 2], took[TRIES * 99 / 100 - 1], took[TRIES - 1]);
    let rate = flowed as f64 / lasted.as_secs_f64();
    println!("revocation: {TRIES} tries at {rate:.0} requests/s: p50 {p50:.1?}, p99 {p99:.1?}, most {most:.1?}");
    // `cargo xtask bench` judges milliseconds, which depend on what else the machine does.
    assert!(p99 <= BOUND, "{took:?}");
    assert!(flowed > TRIES as u64, "only {flowed} requests flowed beside");
    Ok(())
}
