//! A route that costs more than an Envoy may spend without a lease: the refusal requests a lease
//! for the next try.

use std::time::Duration;

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{Reply, get_request, send};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

const ADA: &str = "ada@example.com";
const CREDITS: u64 = 1_000;
const PRICE: u64 = 400;

async fn export(stack: &Stack, key: &str) -> Result<Reply> {
    send(stack.envoy().address(), get_request("/export", Some(key))?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_retries_a_dear_route_after_retry_after_comes_through() -> Result<()> {
    let plugin = json!({"rate_limit": null, "policies": {"export": {"cost": PRICE}, "free": {"cost": 0}}});
    let stack = Stack::builder().plugin(&plugin).route("/export", "export").route("/", "free").start().await?;
    let rest = stack.rest();
    let (_, key) = rest.create(ADA).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let user = rest.user(ADA).await?;
    let account = async || rest.get(&format!("{user}/balance")).await;
    rest.post(&format!("{user}/ledger"), json!({"amount": CREDITS})).await?;
    let starter = account().await?["starter"].as_u64().context("no starter")?;
    assert!(starter < PRICE, "{starter}");
    stack.in_step().await?;

    for left in [CREDITS - PRICE, CREDITS - 2 * PRICE] {
        // What was leased beyond the first request is taken back while nobody asks, so each begins without.
        let idle = async || (account().await.ok()?["leased"].as_u64()? < PRICE).then_some(());
        eventually("the lease to be given back", idle).await?;
        let reply = export(&stack, &key).await?;
        assert_refused(&reply, Outcome::CreditsExhausted, &[]);
        assert_eq!(reply.header("retry-after"), Some("1"));
        // One refusal leases the price, and an idle lease is returned after three seconds. A client that retries after
        // Retry-After comes through in between; on a busy machine it may need more than one try.
        let mut tries = 0;
        let through = async || {
            tokio::time::sleep(Duration::from_secs(1)).await;
            tries += 1;
            let reply = export(&stack, &key).await.ok()?;
            if reply.status != 200 {
                assert_refused(&reply, Outcome::CreditsExhausted, &[]);
                assert_eq!(reply.header("retry-after"), Some("1"));
            }
            (reply.status == 200).then_some(())
        };
        eventually("the price to be leased", through).await?;
        println!("prices: a request came through at try {tries} after its refusal");
        let booked = async || (account().await.ok()?["balance"] == left).then_some(());
        eventually("the price to be booked", booked).await?;
    }
    // What is left does not pay for a third, and refused requests cost nothing in usage.
    assert_refused(&export(&stack, &key).await?, Outcome::CreditsExhausted, &[]);
    let sum = "select sum(cost)::text from usage_hourly";
    let booked = async || (stack.database.text(sum).await.ok()? == (2 * PRICE).to_string()).then_some(());
    eventually("the cost of two requests", booked).await
}
