//! One rate limit, three Envoys: together they admit what one would, wherever the load is.

use std::time::Instant;

use anyhow::{Context, Result};
use hyper::Method;
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::{Stack, wait_for_status};
use serde_json::json;

const LIMIT: u64 = 100;
const ENVOYS: usize = 3;

/// One load for each Envoy, at its own pace, for so many seconds; what was admitted, and in how many seconds.
async fn load_each(stack: &Stack, key: &str, paces: [u32; ENVOYS], seconds: u32) -> Result<(u64, f64)> {
    let start = Instant::now();
    let loads = stack.envoys.iter().zip(paces).filter(|(_, pace)| *pace > 0).map(|(envoy, pace)| {
        let plan = Plan {
            targets: vec![envoy.address()],
            keys: vec![key.to_owned()],
            connections: 4,
            requests: u64::from(pace * seconds),
            per_second: Some(pace),
        };
        Load::start(plan)
    });
    let loads: Vec<Load> = loads.collect();
    let mut admitted = 0;
    for load in loads {
        let answers = load.finish().await;
        admitted += with_status(&answers, 200);
        let told = with_status(&answers, 200) + with_status(&answers, 429);
        assert_eq!(told, answers.values().sum::<u64>(), "{answers:?}");
    }
    Ok((admitted, start.elapsed().as_secs_f64()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_admit_what_one_limit_allows_under_uneven_and_even_load() -> Result<()> {
    let stack = Stack::builder().envoys(ENVOYS).start().await?;
    let body = json!({
        "email": "shared@example.com", "name": "shared",
        "rate_limits": [{"name": "shared", "requests": LIMIT, "window_seconds": 1}]
    });
    let reply = stack.rest().call(Method::POST, "/v1/keys", Some(&body)).await?;
    assert_eq!(reply.status, 201, "{:?}", reply.body);
    let reply = reply.json()?;
    let key = reply["key"].as_str().context("no key in the answer")?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(key), 200).await?;
    }

    let (mut admitted, mut took, mut phases) = (0, 0.0, 0);
    for round in 0..4 {
        // Most of it at one Envoy, then at the next; by turns another has a little or nothing.
        for most in 0..ENVOYS {
            let mut paces = [if round % 2 == 0 { 20 } else { 0 }; ENVOYS];
            paces[most] = 240;
            let (more, seconds) = load_each(&stack, key, paces, 5).await?;
            (admitted, took, phases) = (admitted + more, took + seconds, phases + 1);
        }
    }
    // The limit, its burst, the shares of one Nth that Envoys begin with, and a request of each whenever it begins.
    let bound = (LIMIT as f64 * took) as u64 + LIMIT + LIMIT + phases * ENVOYS as u64;
    println!("shared_limits: uneven load admitted {admitted} in {took:.1} s, the bound is {bound}");
    assert!(admitted <= bound, "{admitted} admitted, {bound} allowed");

    let (admitted, took) = load_each(&stack, key, [100; ENVOYS], 60).await?;
    let part = admitted as f64 / (LIMIT as f64 * took);
    println!("shared_limits: even load admitted {admitted} in {took:.1} s, {:.1} % of the limit", part * 100.0);
    assert!((0.95..=1.05).contains(&part), "{admitted} in {took} s");

    // No more is held than there is.
    let held = stack.database.text("select sum(held)::text from leases where stock = 0").await?;
    assert!(held.parse::<u64>()? <= 1_000_000, "{held}");
    Ok(())
}
