//! Only the filter sets identity headers: clients cannot forge them.

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use filter_core::identity::FOREIGN;
use http_body_util::Full;
use hyper::{Method, Request};
use portcullis_tests::expect::{assert_refused, assert_upstream};
use portcullis_tests::filter_harness::{FilterHarness, record};
use portcullis_tests::http::{Outgoing, Reply, send};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use serde_json::{Value, json};

const SPOOFED: [&str; 3] = ["x-consumer-id", "x-credential-identifier", "X-Credential-Scopes"];

fn spoofing(key: Option<&str>) -> Result<Outgoing> {
    let mut request = Request::get("/orders");
    for name in SPOOFED {
        // Twice: neither of them may get through.
        request = request.header(name, "root").header(name, "admin");
    }
    if let Some(key) = key {
        request = request.header("x-api-key", key);
    }
    Ok(request.body(Full::default())?)
}

async fn spoof(stack: &Stack, key: Option<&str>) -> Result<Reply> {
    send(stack.envoy().address(), spoofing(key)?).await
}

/// The one key of a user, as `/v1/keys` shows it.
async fn resource(stack: &Stack, email: &str) -> Result<Value> {
    let reply = stack.rest().call(Method::GET, &format!("/v1/keys?email={email}"), None).await?;
    assert_eq!(reply.status, 200, "{:?}", reply.body);
    let keys = reply.json()?;
    keys["keys"].get(0).cloned().with_context(|| format!("no key in {keys}"))
}

#[tokio::test]
async fn the_upstream_hears_who_calls_whatever_the_client_says() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let known = resource(&stack, "ada@example.com").await?;
    let owner = stack.owner_id("ada@example.com").await?;
    for reply in [spoof(&stack, Some(&key)).await?, stack.get(Some(&key)).await?] {
        let headers = assert_upstream(&reply, &["x-consumer-id", "x-credential-identifier"]);
        assert_eq!(headers["x-consumer-id"], json!([owner]));
        assert_eq!(headers["x-credential-identifier"], json!([known["id"]]));
    }
    Ok(())
}

#[tokio::test]
async fn scopes_are_told_if_the_key_has_some() -> Result<()> {
    let stack = Stack::start().await?;
    let wanted = json!({"email": "bob@example.com", "name": "Scoped", "scopes": ["orders:read", "orders:write"]});
    let made = stack.rest().call(Method::POST, "/v1/keys", Some(&wanted)).await?;
    assert_eq!(made.status, 201, "{:?}", made.body);
    let made = made.json()?;
    let key = made["secret"].as_str().context("no key")?;
    stack.wait_for_status(Some(key), 200).await?;
    let reply = spoof(&stack, Some(key)).await?;
    let headers = assert_upstream(&reply, &["x-consumer-id", "x-credential-identifier", "x-credential-scopes"]);
    assert_eq!(headers["x-credential-scopes"], json!(["orders:read orders:write"]));
    Ok(())
}

#[tokio::test]
async fn a_request_that_is_let_in_unchecked_carries_no_identity_at_all() -> Result<()> {
    let stack = Stack::builder().plugin(&json!({"on_not_ready": "allow"})).start().await?;
    stack.control_plane.stop(Signal::SIGKILL).await?;
    stack.envoy().stop(Signal::SIGKILL).await?;
    stack.envoy().restart().await?;
    assert_upstream(&spoof(&stack, None).await?, &[]);
    assert_upstream(&spoof(&stack, Some("sk_live_nobody")).await?, &[]);
    Ok(())
}

#[tokio::test]
async fn names_and_stripping_are_the_operators_choice() -> Result<()> {
    let plugin = json!({
        "identity_headers": {"consumer": "X-Who", "credential": "", "scopes": ""}, "strip_key": false,
        "key_header": "Authorization-Key",
    });
    let stack = Stack::builder().plugin(&plugin).start_unsynced().await?;
    let key = stack.rest().generate("ada@example.com").await?;
    let ask = async || {
        // The usual names too: an upstream may trust them all the same.
        let request = Request::get("/").header("authorization-key", &key).header("x-who", "root");
        let request = request.header("x-consumer-id", "root").header("x-credential-identifier", "root");
        let request = request.header("x-credential-scopes", "admin");
        send(stack.envoy().address(), request.body(Full::default()).ok()?)
            .await
            .ok()
            .filter(|reply| reply.status == 200)
    };
    let reply = portcullis_tests::wait::eventually("the key to work", ask).await?;
    let headers = assert_upstream(&reply, &["authorization-key", "x-who"]);
    assert_eq!(headers["x-who"], json!([stack.owner_id("ada@example.com").await?]));
    assert_eq!(headers["authorization-key"], json!([key]));
    // The usual header is no key here.
    assert_refused(&stack.get(Some(&key)).await?, Outcome::Missing, &[]);
    Ok(())
}

#[tokio::test]
async fn a_name_with_underscores_cannot_pass_for_an_identity_header() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let before = stack.demo.requests();
    let request = Request::get("/").header("x-api-key", &key).header("x_consumer_id", "root");
    let reply = send(stack.envoy().address(), request.body(Full::default())?).await?;
    assert_eq!((reply.status, stack.demo.requests()), (400, before));
    Ok(())
}

/// An upstream that stood behind another gateway may believe that gateway's headers.
#[tokio::test]
async fn what_other_gateways_tell_an_upstream_no_client_can_tell_it() -> Result<()> {
    let harness = FilterHarness::builder().plugin(json!({"remove_headers": ["X-Tenant", "x-role"]}));
    let harness = harness.start(&[("good", record(1))]).await?;
    let mut request = Request::get("/").header("x-api-key", "good").header("x-tenant", "root").header("x-other", "1");
    for name in FOREIGN {
        request = request.header(name, "root").header(name.to_ascii_uppercase(), "admin");
    }
    let reply = harness.send(request.header("x-tenant", "admin").body(Full::default())?).await?;
    let headers = assert_upstream(&reply, &["x-consumer-id", "x-credential-identifier", "x-other"]);
    assert_eq!(headers["x-consumer-id"], json!(["22222222-2222-2222-2222-222222222222"]));
    Ok(())
}
