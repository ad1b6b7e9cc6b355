//! Plans of keys and users: their limits and scopes apply at Envoy, and a change reaches every Envoy without a change of the
//! keys.

use anyhow::Result;
use contract::outcome::Outcome;
use hyper::Method;
use portcullis_tests::expect::{SCOPED, assert_refused, assert_upstream};
use portcullis_tests::http;
use portcullis_tests::stack::{Stack, wait_for_path};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";

/// A plan that admits so many requests at once and then one in a long time: each Envoy judges it alone.
fn plan(requests: u32) -> Value {
    json!({
        "scopes": ["orders:read"],
        "rate_limits": [{"name": "plan", "requests": requests, "window_seconds": 31_622_400, "shared": false}],
    })
}

/// Sends requests until one is refused by the limit; how many were admitted before.
async fn admitted(stack: &Stack, key: &str, policy: &str) -> Result<u32> {
    for sent in 0..100 {
        let reply = stack.get(Some(key)).await?;
        if reply.status != 200 {
            assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
            assert_eq!(reply.header("ratelimit-policy"), Some(policy));
            return Ok(sent);
        }
        assert_upstream(&reply, &SCOPED);
    }
    anyhow::bail!("100 requests were admitted")
}

#[tokio::test]
async fn the_limits_of_a_plan_apply_to_its_keys_and_a_change_reaches_every_envoy() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let rest = stack.rest();
    rest.expect(Method::PUT, "/v1/plans/gold", Some(&plan(5)), 201).await?;
    let body = json!({"email": ADA, "name": "Test Key", "plan": "gold"});
    let (id, key) = rest.create_with(body).await?;
    let first = async || stack.get(Some(&key)).await.ok().filter(|reply| reply.status == 200);
    eventually("the new key to be known", first).await?;
    // The key's first request is one of the five.
    assert_eq!(admitted(&stack, &key, "\"plan\";q=5;w=31622400").await?, 4);

    // What was used stays used: the key goes on at the rate of the larger plan.
    rest.expect(Method::PUT, "/v1/plans/gold", Some(&plan(20)), 200).await?;
    for envoy in &stack.envoys {
        let larger = async || {
            let reply = http::send(envoy.address(), http::get_request("/orders", Some(&key)).ok()?).await.ok()?;
            let shown = reply.header("ratelimit-policy") == Some("\"plan\";q=20;w=31622400");
            (reply.status == 200 || shown).then_some(shown)
        };
        // The other Envoy has admitted none yet, and does so until it has had its burst.
        eventually("the larger plan to be known", async || larger().await.filter(|shown| *shown)).await?;
    }

    // A key that is given limits of its own leaves those of the plan behind.
    let limits = json!([{"name": "own", "requests": 3, "window_seconds": 31_622_400, "shared": false}]);
    rest.patch(&format!("/v1/keys/{id}"), json!({"rate_limits": limits})).await?;
    let own = async || {
        let reply = stack.get(Some(&key)).await.ok()?;
        (reply.status == 200 || reply.header("ratelimit-policy") == Some("\"own\";q=3;w=31622400")).then_some(())
    };
    eventually("the key's own limits to be known", own).await
}

#[tokio::test]
async fn the_plan_of_a_user_applies_to_keys_that_have_none() -> Result<()> {
    let policies = json!({"orders-read": {"scopes": {"all": ["orders:read"]}}});
    let stack = Stack::builder().route("/orders", "orders-read").policies(&policies).envoys(2);
    let stack = stack.start().await?;
    let rest = stack.rest();
    rest.expect(Method::PUT, "/v1/plans/gold", Some(&json!({"scopes": ["orders:read"]})), 201).await?;
    let key = stack.working_key(ADA).await?;
    let all = async |status: u16| -> Result<()> {
        for envoy in &stack.envoys {
            wait_for_path(envoy, "/orders", Some(&key), status).await?;
        }
        Ok(())
    };
    all(403).await?;
    let user = rest.user(ADA).await?;
    rest.patch(&user, json!({"plan": "gold"})).await?;
    all(200).await?;
    rest.expect(Method::PUT, "/v1/plans/gold", Some(&json!({"scopes": []})), 200).await?;
    all(403).await?;
    rest.expect(Method::PUT, "/v1/plans/gold", Some(&json!({"scopes": ["orders:*"]})), 200).await?;
    all(200).await?;
    rest.patch(&user, json!({"plan": null})).await?;
    all(403).await
}
