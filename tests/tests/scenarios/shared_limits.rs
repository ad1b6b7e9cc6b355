//! Limits over several Envoys on the whole stack, as customers meet them: a request within a limit is
//! admitted, and no request beyond it is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use futures_util::future::join_all;
use hyper::Method;
use portcullis_tests::envoy::Envoy;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{Reply, get_request, send};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::{eventually, eventually_within};
use serde_json::{Value, json};

/// Sends this many requests at once, to the Envoys in rotation.
async fn page(stack: &Stack, requests: usize, key: &str) -> Result<Vec<Reply>> {
    let envoys: Vec<&Envoy> = stack.envoys.iter().collect();
    let ask = async |number: usize| {
        let envoy = envoys[number % envoys.len()];
        send(envoy.address(), get_request("/orders", Some(key))?).await
    };
    join_all((0..requests).map(ask)).await.into_iter().collect()
}

fn admitted(replies: &[Reply]) -> usize {
    replies.iter().filter(|reply| reply.status == 200).count()
}

/// A key, on every Envoy.
async fn key(stack: &Stack, email: &str, fields: Value) -> Result<(String, String)> {
    let mut body = json!({"email": email, "name": "of a test"});
    let fields = fields.as_object().cloned().unwrap_or_default();
    body.as_object_mut().context("an object")?.extend(fields);
    let (id, key) = stack.rest().create_with(body).await?;
    stack.in_step().await?;
    Ok((id, key))
}

fn per_day(requests: u32) -> Value {
    json!({"quota": {"requests": requests, "period": "day", "time_zone": "UTC"}})
}

fn limit(requests: u32, window_seconds: u32) -> Value {
    json!({"rate_limits": [{"name": "limit", "requests": requests, "window_seconds": window_seconds}]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_calls_pass_on_any_number_of_envoys_until_the_quota_is_used_up() -> Result<()> {
    // The longest wait that can be configured, for a machine that is busy.
    let plugin = json!({"limits": {"wait": "0.8s"}});
    for envoys in [1, 3] {
        let stack = Stack::builder().envoys(envoys).plugin(&plugin).start().await?;
        let (_, hundred) = key(&stack, "hundred@example.com", per_day(100)).await?;
        for _ in 0..5 {
            assert_eq!(admitted(&page(&stack, 20, &hundred).await?), 20, "{envoys} Envoys");
        }
        let replies = page(&stack, 5, &hundred).await?;
        for reply in &replies {
            assert_refused(reply, Outcome::QuotaExceeded, &[]);
            let wait: u64 = reply.header("retry-after").context("no retry-after")?.parse()?;
            assert!((1..=86_400).contains(&wait), "{wait}");
        }
        let (_, three) = key(&stack, "three@example.com", per_day(3)).await?;
        assert_eq!(admitted(&page(&stack, 8, &three).await?), 3, "{envoys} Envoys");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_envoy_no_request_within_its_limits_waits() -> Result<()> {
    const WAITS: &str = "wasmcustom.portcullis.limits.waits_total";
    const CALLS: &str = "wasmcustom.portcullis.limits.calls_total";
    let stack = Stack::builder().start().await?;
    let rest = stack.rest();
    let envoy = &stack.envoys[0];
    let mut keys = Vec::new();
    for (email, fields) in [
        ("limit@example.com", limit(10, 86_400)),
        ("quota@example.com", per_day(10)),
        ("credits@example.com", json!({"cost": 2})),
    ] {
        keys.push((email, key(&stack, email, fields).await?.1));
    }
    let user = rest.user("credits@example.com").await?;
    rest.post(&format!("{user}/ledger"), json!({"amount": 20})).await?;
    stack.in_step().await?;
    // Only one call is under way at a time: with the third, the answers about the keys that came before are there.
    let calls = envoy.stat(CALLS).await?;
    eventually("calls", async || (envoy.stat(CALLS).await.ok()? >= calls + 3).then_some(())).await?;
    for (what, key) in &keys {
        assert_eq!(admitted(&page(&stack, 10, key).await?), 10);
        assert_eq!(envoy.stat(WAITS).await?, 0, "{what}");
    }
    for (_, key) in &keys {
        assert_eq!(admitted(&page(&stack, 2, key).await?), 0);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_each_one_and_a_half_seconds_passes_on_a_limit_of_one_a_second_on_five_envoys() -> Result<()> {
    let stack = Stack::builder().envoys(5).start().await?;
    let (_, slow) = key(&stack, "slow@example.com", limit(1, 1)).await?;
    let mut ticks = tokio::time::interval(Duration::from_millis(1_500));
    for number in 0..60 {
        ticks.tick().await;
        let envoy = &stack.envoys[number % stack.envoys.len()];
        let reply = send(envoy.address(), get_request("/orders", Some(&slow))?).await?;
        assert_eq!(reply.status, 200, "request {number}");
    }
    // Of two requests at once, one is admitted. After the time in `Retry-After`, another one is admitted.
    let replies = page(&stack, 2, &slow).await?;
    let refused = replies.iter().find(|reply| reply.status != 200).context("both were admitted")?;
    assert_refused(refused, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    let wait: u64 = refused.header("retry-after").context("no retry-after")?.parse()?;
    tokio::time::sleep(Duration::from_secs(wait)).await;
    assert_eq!(admitted(&page(&stack, 1, &slow).await?), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_burst_passes_on_two_envoys_and_a_restart_neither_adds_nor_removes_tokens() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    // So slow that nothing comes back during the test.
    let (_, burst) = key(&stack, "burst@example.com", limit(10, 86_400)).await?;
    let (_, half) = key(&stack, "half@example.com", limit(10, 86_400)).await?;
    assert_eq!(admitted(&page(&stack, 10, &burst).await?), 10);
    assert_eq!(admitted(&page(&stack, 4, &half).await?), 4);
    stack.envoys[0].stop(Signal::SIGTERM).await?;
    stack.envoys[0].restart().await?;
    stack.in_step().await?;
    assert_eq!(admitted(&page(&stack, 10, &burst).await?), 0);
    assert_eq!(admitted(&page(&stack, 10, &half).await?), 6);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credits_are_spent_to_the_last_whatever_a_request_costs() -> Result<()> {
    let stack = Stack::builder().envoys(3).start().await?;
    let rest = stack.rest();
    for (email, credits, cost, expected) in [("burst@example.com", 20, 2, 10), ("dear@example.com", 1_000, 900, 1)] {
        let (_, metered) = key(&stack, email, json!({"cost": cost})).await?;
        let user = rest.user(email).await?;
        rest.post(&format!("{user}/ledger"), json!({"amount": credits})).await?;
        stack.in_step().await?;
        assert_eq!(admitted(&page(&stack, expected, &metered).await?), expected, "{email}");
        let refused = page(&stack, 1, &metered).await?;
        assert_eq!(refused[0].status, 429, "{email}");
        let balance = credits - i64::try_from(expected)? * cost;
        let booked = async || (rest.get(&format!("{user}/balance")).await.ok()?["balance"] == balance).then_some(());
        eventually("the requests to be booked", booked).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_raised_limit_or_quota_admits_the_difference_at_once_and_a_lowered_one_refuses() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let rest = stack.rest();
    for (email, five, hundred, two) in [
        ("quota@example.com", per_day(5), per_day(100), per_day(2)),
        ("limit@example.com", limit(5, 86_400), limit(100, 86_400), limit(2, 86_400)),
    ] {
        let (id, raised) = key(&stack, email, five).await?;
        assert_eq!(admitted(&page(&stack, 8, &raised).await?), 5, "{email}");
        rest.patch(&format!("/v1/keys/{id}"), hundred).await?;
        stack.in_step().await?;
        assert_eq!(admitted(&page(&stack, 110, &raised).await?), 95, "{email}");
        rest.patch(&format!("/v1/keys/{id}"), two).await?;
        stack.in_step().await?;
        assert_eq!(admitted(&page(&stack, 4, &raised).await?), 0, "{email}");
    }
    // An administrator resets a rate limit by another name.
    let named = |name: &str| json!({"rate_limits": [{"name": name, "requests": 5, "window_seconds": 86_400}]});
    let (id, key) = key(&stack, "reset@example.com", named("day")).await?;
    assert_eq!(admitted(&page(&stack, 8, &key).await?), 5);
    rest.patch(&format!("/v1/keys/{id}"), named("day-2")).await?;
    stack.in_step().await?;
    assert_eq!(admitted(&page(&stack, 8, &key).await?), 5);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_keys_of_an_owner_share_what_their_plan_limits_per_owner() -> Result<()> {
    let stack = Stack::builder().envoys(3).start().await?;
    let rest = stack.rest();
    let plan = json!({
        "rate_limits": [{"name": "team", "requests": 40, "window_seconds": 86_400, "per": "owner"}],
    });
    rest.expect(Method::PUT, "/v1/plans/team", Some(&plan), 201).await?;
    let mut keys = Vec::new();
    for number in 0..20 {
        let fields = json!({"email": "team@example.com", "name": format!("key {number}"), "plan": "team"});
        keys.push(rest.create_with(fields).await?.1);
    }
    stack.in_step().await?;
    let ask = async |number: usize| {
        let envoy = &stack.envoys[number % stack.envoys.len()];
        send(envoy.address(), get_request("/orders", Some(&keys[number % keys.len()]))?).await
    };
    // Limits of a key come on top.
    let own = json!({"email": "team@example.com", "name": "own", "plan": "team", "rate_limits": limit(5, 86_400)["rate_limits"]});
    let own = rest.create_with(own).await?.1;
    stack.in_step().await?;
    assert_eq!(admitted(&page(&stack, 8, &own).await?), 5);
    let replies: Vec<Reply> = join_all((0..100).map(ask)).await.into_iter().collect::<Result<_>>()?;
    assert_eq!(admitted(&replies), 35);
    let lenient = json!({"email": "team@example.com", "name": "lenient", "plan": "team", "rate_limits": limit(500, 86_400)["rate_limits"]});
    let lenient = rest.create_with(lenient).await?.1;
    stack.in_step().await?;
    assert_eq!(admitted(&page(&stack, 8, &lenient).await?), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lowered_quota_refuses_although_envoys_hold_tokens_and_a_reset_quota_admits_again() -> Result<()> {
    let stack = Stack::builder().envoys(2).plugin(&json!({"rate_limit": null})).start().await?;
    let rest = stack.rest();
    let (id, key) = key(&stack, "lowered@example.com", per_day(8_000)).await?;
    let quota = format!("/v1/keys/{id}/quota");
    assert_eq!(admitted(&page(&stack, 200, &key).await?), 200);
    let counted = async || (rest.get(&quota).await.ok()?["used"] == 200).then_some(());
    eventually("the requests to be counted", counted).await?;
    rest.patch(&format!("/v1/keys/{id}"), per_day(150)).await?;
    stack.in_step().await?;
    assert_eq!(admitted(&page(&stack, 20, &key).await?), 0);
    let note = json!({"note": "of a test"});
    let reset = rest.expect(Method::POST, &format!("{quota}/reset"), Some(&note), 200).await?;
    assert_eq!(json!([reset["used"], reset["exceeded"]]), json!([0, false]));
    stack.in_step().await?;
    assert_eq!(admitted(&page(&stack, 160, &key).await?), 150);
    Ok(())
}

/// A statistic of the filter: the number of live Envoys.
const LIVE: &str = "wasmcustom.portcullis.limits.live_envoys";

/// Waits until the gauge of this Envoy shows this number of live Envoys. Returns how long it took.
async fn live_within(envoy: &Envoy, envoys: u64, deadline: Duration) -> Result<Duration> {
    let start = Instant::now();
    let known = async || (envoy.stat(LIVE).await.ok()? == envoys).then_some(());
    eventually_within(&format!("{envoys} live Envoys"), deadline, known).await?;
    Ok(start.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_envoy_is_no_longer_live_after_10_s_and_its_tokens_come_back_after_a_minute() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let (id, shared) = key(&stack, "killed@example.com", per_day(200)).await?;
    // Both hold some ahead.
    assert_eq!(admitted(&page(&stack, 100, &shared).await?), 100);
    // What a killed Envoy has not reported is not counted.
    let (rest, quota) = (stack.rest(), format!("/v1/keys/{id}/quota"));
    let counted = async || (rest.get(&quota).await.ok()?["used"] == 100).then_some(());
    eventually("the requests to be counted", counted).await?;
    let one = &stack.envoys[0];
    live_within(one, 2, Duration::from_secs(10)).await?;
    stack.envoys[1].stop(Signal::SIGKILL).await?;
    let start = Instant::now();
    let mut got = 100;
    let all = async || {
        let reply = send(one.address(), get_request("/orders", Some(&shared)).ok()?).await.ok()?;
        got += u64::from(reply.status == 200);
        (got >= 200).then_some(())
    };
    // The Envoy is no longer live ten seconds after its last call. The other Envoy learns that with its next call. The tokens
    // come back a minute after the last call. The further seconds are for a busy machine.
    let gone = live_within(one, 1, Duration::from_secs(12));
    let (gone, returned) = tokio::join!(gone, eventually_within("all of the quota", Duration::from_secs(80), all));
    returned?;
    println!(
        "a killed Envoy stopped counting within {:.1?}, its allowance came back within {:.0?}",
        gone?,
        start.elapsed()
    );
    assert_refused(&send(one.address(), get_request("/orders", Some(&shared))?).await?, Outcome::QuotaExceeded, &[]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_ends_on_sigterm_hands_its_tokens_back_at_once_and_is_no_longer_live() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let [one, other] = &stack.envoys[..] else { anyhow::bail!("two Envoys") };
    for round in 0..3 {
        let (_, shared) = key(&stack, &format!("ended{round}@example.com"), per_day(200)).await?;
        assert_eq!(admitted(&page(&stack, 100, &shared).await?), 100);
        live_within(one, 2, Duration::from_secs(10)).await?;
        other.stop(Signal::SIGTERM).await?;
        let gone = live_within(one, 1, Duration::from_secs(2)).await?;
        let rest = (0..110).map(async |_| send(one.address(), get_request("/orders", Some(&shared))?).await);
        let replies: Vec<Reply> = join_all(rest).await.into_iter().collect::<Result<_>>()?;
        assert_eq!(admitted(&replies), 100, "round {round}");
        println!("an Envoy that ended on SIGTERM stopped counting within {gone:.1?}");
        other.restart().await?;
        stack.in_step().await?;
    }
    Ok(())
}

/// Uses a limit up, waits for the time in `Retry-After`, and is admitted: four times, at one Envoy and then at the other.
async fn waits_for_retry_after(stack: &Stack, requests: u32, window_seconds: u32) -> Result<()> {
    let name = format!("{requests} in {window_seconds} s");
    let email = format!("in{window_seconds}@example.com");
    let (_, limited) = key(stack, &email, limit(requests, window_seconds)).await?;
    let replies = page(stack, 2 * requests as usize, &limited).await?;
    assert_eq!(admitted(&replies), requests as usize, "{name}");
    let mut refused = replies.into_iter().find(|reply| reply.status != 200).context("none was refused")?;
    for round in 0..4 {
        assert_refused(&refused, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
        let wait: u64 = refused.header("retry-after").context("no retry-after")?.parse()?;
        // A token comes back after this time, and the answer is in whole seconds.
        assert!(wait <= u64::from(window_seconds / requests) + 1, "{name}, round {round}: {wait} s");
        tokio::time::sleep(Duration::from_secs(wait)).await;
        let ask =
            async |place: usize| send(stack.envoys[place % 2].address(), get_request("/orders", Some(&limited))?).await;
        let reply = ask(round).await?;
        assert_eq!(reply.status, 200, "{name}, round {round}, after {wait} s: {reply:?}");
        refused = loop {
            let reply = ask(round + 1).await?;
            if reply.status != 200 {
                break reply;
            }
        };
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_for_retry_after_is_admitted_at_any_envoy() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    tokio::try_join!(
        waits_for_retry_after(&stack, 10, 20),
        waits_for_retry_after(&stack, 3, 12),
        waits_for_retry_after(&stack, 4, 4)
    )?;
    Ok(())
}
