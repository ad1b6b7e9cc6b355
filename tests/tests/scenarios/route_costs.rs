//! A route that costs a large part of an owner's credits.

use anyhow::Result;
use contract::outcome::Outcome;
use portcullis_tests::http::{Reply, get_request, send};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";
const CREDITS: u64 = 1_000;
const PRICE: u64 = 400;

async fn export(stack: &Stack, key: &str) -> Result<Reply> {
    send(stack.envoy().address(), get_request("/export", Some(key))?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_with_a_high_price_passes_at_once_as_often_as_the_credits_suffice() -> Result<()> {
    let policies = json!({"export": {"cost": PRICE}, "free": {"cost": 0}});
    let stack = Stack::builder().plugin(&json!({"rate_limit": null})).policies(&policies);
    let stack = stack.route("/export", "export").route("/", "free").start().await?;
    let rest = stack.rest();
    let (_, key) = rest.create(ADA).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let user = rest.user(ADA).await?;
    rest.post(&format!("{user}/ledger"), json!({"amount": CREDITS})).await?;
    stack.in_step().await?;

    for left in [CREDITS - PRICE, CREDITS - 2 * PRICE] {
        assert_eq!(export(&stack, &key).await?.status, 200);
        let account = async || rest.get(&format!("{user}/balance")).await;
        let booked = async || (account().await.ok()?["balance"] == left).then_some(());
        eventually("the price to be booked", booked).await?;
    }
    // What is left does not pay for a third, and refused requests cost nothing in usage.
    let reply = export(&stack, &key).await?;
    let body: Value = reply.json()?;
    assert_eq!((reply.status, &body["code"]), (429, &json!(Outcome::CreditsExhausted.name())));
    assert_eq!(reply.header("retry-after"), None, "waiting does not help");
    let sum = "select sum(cost)::text from usage_hourly";
    let booked = async || (stack.database.text(sum).await.ok()? == (2 * PRICE).to_string()).then_some(());
    eventually("the cost of two requests", booked).await
}
