//! A quota of one key, three Envoys: so many requests in a window, and the door opens by itself with the next.

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use hyper::Method;
use portcullis_tests::envoy::Envoy;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{get_request, send};
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";
const REQUESTS: u64 = 320;
const STARTER: u64 = REQUESTS / 16;

async fn quota(stack: &Stack) -> Result<Value> {
    let id = stack
        .database
        .text(&format!("select primary_key_id::text from user_preferences where email = '{ADA}'"))
        .await?;
    let reply = stack.rest().call(Method::GET, &format!("/v1/keys/{id}/quota"), None).await?;
    assert_eq!(reply.status, 200, "{:?}", reply.body);
    reply.json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_is_shared_by_all_envoys_and_opens_by_itself_with_the_next_window() -> Result<()> {
    let stack = Stack::builder().envoys(3).plugin(&json!({"rate_limit": null})).start().await?;
    let key = stack.rest().generate(ADA).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let before = stack.demo.requests();
    stack.wait_for_usage(ADA, before).await?;
    let set = format!(
        "quota = '{{\"requests\": {REQUESTS}, \"period\": \"day\", \"time_zone\": \"UTC\"}}', quota_starter = {STARTER}"
    );
    stack.change_key(ADA, &set).await?;
    let revision: u64 = stack.database.text("select revision::text from store_state").await?.parse()?;
    for envoy in &stack.envoys {
        let version = async || {
            let version = envoy.stat("wasmcustom.portcullis_store_version").await.ok()?;
            (version >= revision).then_some(())
        };
        eventually("the filter to be told of the quota", version).await?;
    }

    let load = Load::start(Plan {
        targets: stack.envoys.iter().map(Envoy::address).collect(),
        keys: vec![key.clone()],
        connections: 6,
        requests: u64::MAX,
        per_second: Some(600),
    });
    eventually("the quota to be used up", async || (quota(&stack).await.ok()?["exceeded"] == true).then_some(()))
        .await?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(&key), 429).await?;
    }
    let answers = load.stop().await;
    assert_eq!(with_status(&answers, 200) + with_status(&answers, 429), answers.values().sum::<u64>(), "{answers:?}");
    let (admitted, bound) = (stack.demo.requests() - before, REQUESTS + 3 * STARTER);
    println!("quota: {admitted} requests were admitted, the quota is {REQUESTS}, the bound {bound}");
    assert!((REQUESTS..=bound).contains(&admitted), "{admitted} {bound}");
    for envoy in &stack.envoys {
        let reply = send(envoy.address(), get_request("/orders", Some(&key))?).await?;
        assert_refused(&reply, Outcome::QuotaExceeded, &[]);
        // Until midnight.
        let wait: u64 = reply.header("retry-after").context("no retry-after")?.parse()?;
        assert!((1..=86_400).contains(&wait), "{wait}");
    }
    let told = async || (quota(&stack).await.ok()?["used"] == admitted).then_some(());
    eventually("all requests to be counted", told).await?;
    let seen = quota(&stack).await?;
    assert_eq!((&seen["remaining"], &seen["resets_at"]), (&json!(0), &seen["window_end"]));

    // Midnight comes in three seconds: each Envoy knows when, and opens the door.
    stack.database.execute("update quota_use set window_end = now() + interval '3 seconds'").await?;
    stack.change_key(ADA, "quota_resets_at = now() + interval '3 seconds'").await?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(&key), 200).await?;
    }
    let counted = async || (quota(&stack).await.ok()?["used"].as_u64()? <= 3 * STARTER).then_some(());
    eventually("a window that begins anew", counted).await
}
