//! One rate limit over three Envoys: together they admit as much as one would, wherever the load
//! is. A key with uneven load and a key with even load run at the same time; their limits are
//! independent.

use std::time::Instant;

use anyhow::{Context, Result};
use hyper::Method;
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::{Stack, wait_for_status};
use serde_json::json;

const LIMIT: u64 = 100;
const ENVOYS: usize = 3;

/// The result of a load.
#[derive(Clone, Copy, Default)]
struct Outcome {
    sent: u64,
    admitted: u64,
    seconds: f64,
}

impl Outcome {
    fn add(&mut self, more: Self) {
        self.sent += more.sent;
        self.admitted += more.admitted;
        self.seconds += more.seconds;
    }

    /// What the limit allows in the time that the load took.
    fn allowed(self) -> f64 {
        LIMIT as f64 * self.seconds
    }

    /// The most that may be admitted: what the limit allows, its burst, the shares of one Nth that Envoys begin with, and
    /// such a share, of the burst and of half a second, for each time that an Envoy begins again.
    fn bound(self, begins_again: u64) -> u64 {
        self.allowed() as u64 + LIMIT + LIMIT + begins_again * (LIMIT + LIMIT / 2) / ENVOYS as u64
    }

    /// The most that a perfect limiter would have admitted: a busy machine may send less than the limit allows.
    fn usable(self) -> f64 {
        self.allowed().min(self.sent as f64)
    }
}

/// One load for each Envoy, at its own pace, for so many seconds. It takes longer where the machine cannot keep the pace.
async fn load_each(stack: &Stack, key: &str, paces: [u32; ENVOYS], seconds: u32) -> Result<Outcome> {
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
    let mut outcome = Outcome::default();
    for load in loads {
        let answers = load.finish().await;
        let (admitted, refused) = (with_status(&answers, 200), with_status(&answers, 429));
        assert_eq!(admitted + refused, answers.values().sum::<u64>(), "{answers:?}");
        outcome.add(Outcome { sent: admitted + refused, admitted, seconds: 0.0 });
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    Ok(outcome)
}

/// A key with the limit that every Envoy knows.
async fn limited_key(stack: &Stack, email: &str) -> Result<String> {
    let body = json!({
        "email": email, "name": "shared",
        "rate_limits": [{"name": "shared", "requests": LIMIT, "window_seconds": 1}]
    });
    let made = stack.rest().expect(Method::POST, "/v1/keys", Some(&body), 201).await?;
    let key = made["secret"].as_str().context("no key in the answer")?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(key), 200).await?;
    }
    Ok(key.to_owned())
}

/// Most of the load at one Envoy, then at the next; by turns another has a little or nothing. For a minute.
async fn under_uneven_load(stack: &Stack) -> Result<()> {
    let key = limited_key(stack, "uneven@example.com").await?;
    let (mut all, mut phases) = (Outcome::default(), 0);
    for round in 0..4 {
        for most in 0..ENVOYS {
            let mut paces = [if round % 2 == 0 { 20 } else { 0 }; ENVOYS];
            paces[most] = 240;
            all.add(load_each(stack, &key, paces, 5).await?);
            phases += 1;
        }
    }
    // One Envoy begins again in each phase.
    let (Outcome { sent, admitted, seconds }, bound) = (all, all.bound(phases));
    println!("shared_limits: uneven load admitted {admitted} of {sent} in {seconds:.1} s, the bound is {bound}");
    assert!(admitted <= bound, "{admitted} admitted, {bound} allowed");
    // A load that moves every five seconds can use most of the limit on an idle machine, and less where reports are late.
    assert!(admitted as f64 >= 0.25 * all.usable(), "{admitted} admitted of {sent}, {bound} allowed");
    Ok(())
}

async fn under_even_load(stack: &Stack) -> Result<()> {
    let key = limited_key(stack, "even@example.com").await?;
    let all = load_each(stack, &key, [100; ENVOYS], 60).await?;
    let (Outcome { sent, admitted, seconds }, bound) = (all, all.bound(0));
    let part = 100.0 * admitted as f64 / all.allowed();
    println!("shared_limits: even load admitted {admitted} of {sent} in {seconds:.1} s, {part:.1} % of the limit");
    assert!(admitted <= bound, "{admitted} admitted, {bound} allowed");
    assert!(admitted as f64 >= 0.5 * all.usable(), "{admitted} admitted of {sent}, {bound} allowed");
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
