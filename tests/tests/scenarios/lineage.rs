//! Limits, quotas and credits belong to a key, not to one of its secrets: a rotation continues
//! where the old secret was. The quota is that of the key's plan.

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use hyper::Method;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{Reply, get_request, send};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";

async fn ask(stack: &Stack, key: &str) -> Result<Reply> {
    send(stack.envoy().address(), get_request("/orders", Some(key))?).await
}

/// Makes a key; its id and the key itself.
async fn made(stack: &Stack, body: Value) -> Result<(String, String)> {
    let both = stack.rest().create_with(body).await?;
    stack.in_step().await?;
    Ok(both)
}

/// The new secret of a key, whose old one goes on working.
async fn rotated(stack: &Stack, id: &str) -> Result<String> {
    let reply = stack
        .rest()
        .call(Method::POST, &format!("/v1/keys/{id}/rotate"), Some(&json!({"grace_seconds": 3_600})))
        .await?;
    let key = reply.json()?["secret"].as_str().map(ToOwned::to_owned).context("no key in the answer")?;
    stack.in_step().await?;
    Ok(key)
}

/// Asks until so many requests have come through in all.
async fn spend(stack: &Stack, key: &str, in_all: u64) -> Result<()> {
    let spent = async || {
        ask(stack, key).await.ok()?;
        (stack.demo.requests() >= in_all).then_some(())
    };
    eventually("the requests to come through", spent).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_begins_no_limit_anew() -> Result<()> {
    let stack = Stack::start().await?;
    let limits = json!([{"name": "hour", "requests": 6, "window_seconds": 3_600}]);
    let (id, old) = made(&stack, json!({"email": ADA, "name": "limited", "rate_limits": limits})).await?;
    for _ in 0..4 {
        assert_eq!(ask(&stack, &old).await?.status, 200);
    }
    let new = rotated(&stack, &id).await?;
    for key in [&new, &old] {
        assert_eq!(ask(&stack, key).await?.status, 200);
    }
    for key in [&new, &old] {
        assert_refused(&ask(&stack, key).await?, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_begins_no_quota_of_a_plan_anew() -> Result<()> {
    let stack = Stack::start().await?;
    let plan = json!({"quota": {"requests": 8, "period": "day", "time_zone": "UTC"}});
    stack.rest().call(Method::PUT, "/v1/plans/small", Some(&plan)).await?;
    let (id, old) = made(&stack, json!({"email": ADA, "name": "metered", "plan": "small"})).await?;
    let before = stack.demo.requests();
    spend(&stack, &old, before + 5).await?;
    let new = rotated(&stack, &id).await?;
    spend(&stack, &new, before + 8).await?;
    let quota = async || {
        let view = stack.rest().get(&format!("/v1/keys/{id}/quota")).await.ok()?;
        (view["exceeded"] == true && view["used"] == 8).then_some(())
    };
    eventually("the quota to be used up", quota).await?;
    stack.in_step().await?;
    for key in [&new, &old] {
        assert_refused(&ask(&stack, key).await?, Outcome::QuotaExceeded, &[]);
    }
    assert_eq!(stack.demo.requests() - before, 8);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_brings_no_credits() -> Result<()> {
    let stack = Stack::start().await?;
    let user = stack.rest().user(ADA).await?;
    stack.rest().post(&format!("{user}/ledger"), json!({"amount": 8})).await?;
    let (id, old) = made(&stack, json!({"email": ADA, "name": "metered"})).await?;
    let before = stack.demo.requests();
    spend(&stack, &old, before + 5).await?;
    let new = rotated(&stack, &id).await?;
    spend(&stack, &new, before + 8).await?;
    let booked = async || {
        let account = stack.rest().get(&format!("{user}/balance")).await.ok()?;
        (account["balance"] == 0).then_some(())
    };
    eventually("the credits to be used up", booked).await?;
    stack.in_step().await?;
    for key in [&new, &old] {
        assert_refused(&ask(&stack, key).await?, Outcome::CreditsExhausted, &[]);
    }
    assert_eq!(stack.demo.requests() - before, 8);
    Ok(())
}
