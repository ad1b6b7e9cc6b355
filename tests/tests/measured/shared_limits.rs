//! One rate limit over three Envoys: together they admit what one limit allows, under even and under
//! uneven load, for one key and for all keys of an owner, and no more. The keys of one test have their
//! loads at the same time; their limits are independent.

use std::time::Instant;

use anyhow::Result;
use hyper::Method;
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::Stack;
use serde_json::{Value, json};

const ENVOYS: usize = 3;
const SECONDS: u32 = 60;

/// The result of a load.
#[derive(Clone, Copy, Default)]
struct Outcome {
    sent: u64,
    admitted: u64,
    seconds: f64,
}

/// One load for each Envoy, at its own pace, for this many seconds. It takes longer where the machine cannot keep the pace.
async fn load_each(stack: &Stack, keys: &[String], paces: [u32; ENVOYS], seconds: u32) -> Outcome {
    let start = Instant::now();
    let loads = stack.envoys.iter().zip(paces).filter(|(_, pace)| *pace > 0).map(|(envoy, pace)| {
        let plan = Plan {
            targets: vec![envoy.address()],
            keys: keys.to_vec(),
            // Enough to keep the pace although requests wait.
            connections: (pace / 10).clamp(4, 48) as usize,
            requests: u64::from(pace * seconds),
            per_second: Some(pace),
        };
        Load::start(plan)
    });
    let loads: Vec<Load> = loads.collect();
    let mut outcome = Outcome::default();
    for load in loads {
        let answers = load.finish().await;
        let (admitted, refused) = (with_status(&answers, 200), with_status(&answers, 429));
        assert_eq!(admitted + refused, answers.values().sum::<u64>(), "{answers:?}");
        outcome.sent += admitted + refused;
        outcome.admitted += admitted;
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    outcome
}

/// A key with the limit that every Envoy knows.
async fn limited_key(stack: &Stack, email: &str, limit: u64) -> Result<Vec<String>> {
    let body = json!({
        "email": email, "name": "shared",
        "rate_limits": [{"name": "shared", "requests": limit, "window_seconds": 1}]
    });
    let (_, key) = stack.rest().create_with(body).await?;
    stack.in_step().await?;
    Ok(vec![key])
}

/// Creates this many keys for one owner, and gives them this plan.
async fn keys_of_an_owner(stack: &Stack, keys: usize, plan: &Value) -> Result<Vec<String>> {
    let rest = stack.rest();
    rest.expect(Method::PUT, "/v1/plans/team", Some(plan), 201).await?;
    let mut all = Vec::new();
    for number in 0..keys {
        let fields = json!({"email": "team@example.com", "name": format!("key {number}"), "plan": "team"});
        all.push(rest.create_with(fields).await?.1);
    }
    stack.in_step().await?;
    Ok(all)
}

/// Asserts that the load was admitted as far as the limit allows, and no further. A busy machine may send less than the limit.
fn assert_exact(name: &str, limit: u64, outcome: Outcome) {
    let Outcome { sent, admitted, seconds } = outcome;
    let allowed = limit as f64 * (seconds + 1.0);
    let part = 100.0 * admitted as f64 / allowed.min(sent as f64);
    println!("shared_limits: {name}: {admitted} of {sent} in {seconds:.1} s, {part:.1} % of what is allowed");
    assert!(admitted as f64 <= allowed + 1.0, "{name}: {admitted} admitted, {allowed} allowed");
    assert!(part >= 99.0, "{name}: {admitted} admitted of {sent}, {allowed} allowed");
}

/// Most of the load goes to one Envoy, then to the next. The other Envoys get a fifth of the limit each in every second round,
/// and nothing in the others.
async fn under_uneven_load(stack: &Stack, limit: u32, rounds: u32) -> Result<()> {
    let keys = limited_key(stack, &format!("uneven{limit}@example.com"), limit.into()).await?;
    let start = Instant::now();
    let mut all = Outcome::default();
    for round in 0..rounds {
        for most in 0..ENVOYS {
            let mut paces = [if round % 2 == 0 { limit / 5 } else { 0 }; ENVOYS];
            paces[most] = limit * 2;
            let Outcome { sent, admitted, .. } = load_each(stack, &keys, paces, SECONDS / 12).await;
            all.sent += sent;
            all.admitted += admitted;
        }
    }
    all.seconds = start.elapsed().as_secs_f64();
    assert_exact(&format!("uneven load on {limit}/s"), limit.into(), all);
    Ok(())
}

async fn under_even_load(stack: &Stack, limit: u32) -> Result<()> {
    let keys = limited_key(stack, &format!("even{limit}@example.com"), limit.into()).await?;
    let all = load_each(stack, &keys, [limit / 2; ENVOYS], SECONDS).await;
    assert_exact(&format!("even load on {limit}/s"), limit.into(), all);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_admit_what_a_limit_of_100_a_second_allows_under_uneven_and_even_load() -> Result<()> {
    let stack = Stack::builder().envoys(ENVOYS).start().await?;
    let (uneven, even) = tokio::join!(under_uneven_load(&stack, 100, 4), under_even_load(&stack, 100));
    uneven?;
    even
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_admit_what_a_limit_of_1000_a_second_allows_under_even_and_uneven_load() -> Result<()> {
    let stack = Stack::builder().envoys(ENVOYS).start().await?;
    under_even_load(&stack, 1_000).await?;
    under_uneven_load(&stack, 1_000, 2).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_admit_for_all_100_keys_of_an_owner_what_one_limit_allows() -> Result<()> {
    let stack = Stack::builder().envoys(ENVOYS).plugin(&json!({"rate_limit": null})).start().await?;
    let limit = json!({"name": "team", "requests": 100, "window_seconds": 1, "per": "owner"});
    let keys = keys_of_an_owner(&stack, 100, &json!({"rate_limits": [limit]})).await?;
    let all = load_each(&stack, &keys, [60; ENVOYS], SECONDS).await;
    assert_exact("100 keys of an owner with 100/s", 100, all);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_admit_for_all_100_keys_of_an_owner_exactly_one_quota() -> Result<()> {
    const QUOTA: u64 = 2_000;
    let stack = Stack::builder().envoys(ENVOYS).plugin(&json!({"rate_limit": null})).start().await?;
    let quota = json!({"requests": QUOTA, "period": "day", "time_zone": "UTC", "per": "owner"});
    let keys = keys_of_an_owner(&stack, 100, &json!({"quota": quota})).await?;
    let all = load_each(&stack, &keys, [100; ENVOYS], 10).await;
    println!(
        "shared_limits: 100 keys of an owner with a quota: {} of {} in {:.1} s",
        all.admitted, all.sent, all.seconds
    );
    assert_eq!((all.admitted, stack.demo.requests()), (QUOTA, QUOTA));
    Ok(())
}
