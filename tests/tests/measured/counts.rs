//! Every admitted request is counted once.

use std::time::Instant;

use anyhow::Result;
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

/// The fewest requests. The load goes on until the control plane has been restarted twice.
const REQUESTS: u64 = 20_000;
const KEYS: usize = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_requests_are_counted_to_the_last_though_the_control_plane_is_restarted_twice() -> Result<()> {
    let stack = Stack::builder().envoys(2).workers(2).plugin(&json!({"rate_limit": null})).start().await?;
    let rest = stack.rest();
    let (mut emails, mut keys) = (Vec::new(), Vec::new());
    for number in 0..KEYS {
        let email = format!("user{number}@example.com");
        keys.push(rest.generate(&email).await?);
        emails.push(email);
    }
    // The last one is known where all are, because changes arrive in order. This one request is counted too.
    stack.wait_for_status(keys.last().map(String::as_str), 200).await?;
    let before = stack.demo.requests();

    let start = Instant::now();
    let load = Load::start(Plan { connections: 16, ..Plan::endless(&stack.envoys, keys, Some(2_500)) });
    for (share, signal) in [(3, Signal::SIGKILL), (2, Signal::SIGTERM)] {
        let what = format!("a part of {share} of the requests");
        eventually(&what, async || (load.sent() >= REQUESTS / share).then_some(())).await?;
        stack.control_plane.stop(signal).await?;
        stack.control_plane.restart().await?;
    }
    eventually("all of the requests", async || (load.sent() >= REQUESTS).then_some(())).await?;
    let answers = load.stop().await;
    let requests = with_status(&answers, 200);
    assert_eq!(requests, answers.values().sum::<u64>(), "{answers:?}");
    assert_eq!(stack.demo.requests(), before + requests);
    let took = start.elapsed();

    let mut counted = 0;
    for (number, email) in emails.iter().enumerate() {
        let sent = answers.get(&(number, 200)).copied().unwrap_or_default();
        let warmed_up = if number == KEYS - 1 { before } else { 0 };
        stack.wait_for_usage(email, sent + warmed_up).await?;
        counted += sent;
    }
    let complete = start.elapsed();
    // Nothing is counted later either: after the final reports of the Envoys, and after the control plane has committed all
    // reports and ended.
    for envoy in &stack.envoys {
        envoy.stop(Signal::SIGTERM).await?;
    }
    stack.control_plane.stop(Signal::SIGTERM).await?;
    stack.control_plane.restart().await?;
    let mut all = 0;
    for email in &emails {
        all += rest.status(email).await?["usageCount"].as_u64().unwrap_or_default();
    }
    assert_eq!(all, before + requests);
    println!("counts: {counted} of {requests} requests over {KEYS} keys, 2 Envoys with 2 workers each, 2 restarts");
    println!("counts: requests took {took:.1?}, the last count stood in the database after {complete:.1?}");
    Ok(())
}
