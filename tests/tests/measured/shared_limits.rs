//! One rate limit, three Envoys: together they admit what one would, wherever the load is. A key with uneven load and one with
//! even load are watched at the same time: their limits have nothing to do with each other.

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

/// A key with the limit that every Envoy knows.
async fn limited_key(stack: &Stack, email: &str) -> Result<String> {
    let body = json!({
        "email": email, "name": "shared",
        "rate_limits": [{"name": "shared", "requests": LIMIT, "window_seconds": 1}]
    });
    let made = stack.rest().expect(Method::POST, "/v1/keys", Some(&body), 201).await?;
    let key = made["key"].as_str().context("no key in the answer")?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(key), 200).await?;
    }
    Ok(key.to_owned())
}

/// Most of the load at one Envoy, then at the next; by turns another has a little or nothing. For a minute.
async fn under_uneven_load(stack: &Stack) -> Result<()> {
    let key = limited_key(stack, "uneven@example.com").await?;
    let (mut admitted, mut took, mut phases) = (0, 0.0, 0);
    for round in 0..4 {
        for most in 0..ENVOYS {
            let mut paces = [if round % 2 == 0 { 20 } else { 0 }; ENVOYS];
            paces[most] = 240;
            let (more, seconds) = load_each(stack, &key, paces, 5).await?;
            (admitted, took, phases) = (admitted + more, took + seconds, phases + 1);
        }
    }
    // The limit, its burst, the shares of one Nth that Envoys begin with, and such a share, of the burst and of half a second,
    // of the Envoy that begins again in each phase.
    let bound = (LIMIT as f64 * took) as u64 + LIMIT + LIMIT + phases * (LIMIT + LIMIT / 2) / ENVOYS as u64;
    println!("shared_limits: uneven load admitted {admitted} in {took:.1} s, the bound is {bound}");
    assert!(admitted <= bound, "{admitted} admitted, {bound} allowed");
    // Nor is it a limit that nobody can use: a load that moves on every five seconds gets most of it.
    assert!(admitted as f64 >= 0.5 * LIMIT as f64 * took, "{admitted} admitted, {bound} allowed");
    Ok(())
}

async fn under_even_load(stack: &Stack) -> Result<()> {
    let key = limited_key(stack, "even@example.com").await?;
    let (admitted, took) = load_each(stack, &key, [100; ENVOYS], 60).await?;
    let part = admitted as f64 / (LIMIT as f64 * took);
    println!("shared_limits: even load admitted {admitted} in {took:.1} s, {:.1} % of the limit", part * 100.0);
    assert!((0.95..=1.05).contains(&part), "{admitted} in {took} s");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_admit_what_one_limit_allows_under_uneven_and_even_load() -> Result<()> {
    let stack = Stack::builder().envoys(ENVOYS).start().await?;
    let (uneven, even) = tokio::join!(under_uneven_load(&stack), under_even_load(&stack));
    uneven?;
    even?;
    // No more is held of either than there is.
    let held = "select max(held)::text from (
            select sum(held) as held from leases where stock = 0 group by subject
        ) of_each";
    let held = stack.database.text(held).await?;
    assert!(held.parse::<u64>()? <= 1_000_000, "{held}");
    Ok(())
}
