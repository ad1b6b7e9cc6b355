//! Only the filter sets identity headers: clients cannot forge them.

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use filter_core::identity::FOREIGN;
use http_body_util::Full;
use hyper::Request;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::filter_harness::{FilterHarness, record};
use portcullis_tests::http::{Outgoing, Reply, send, with_key};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use serde_json::{Value, json};

const SPOOFED: [&str; 3] = ["x-consumer-id", "x-credential-identifier", "X-Credential-Scopes"];

fn spoofing(key: Option<&str>) -> Result<Outgoing> {
    let mut request = with_key(Request::get("/orders"), key);
    for name in SPOOFED {
        // Twice: neither of them may get through.
        request = request.header(name, "root").header(name, "admin");
    }
    Ok(request.body(Full::default())?)
}

async fn spoof(stack: &Stack, key: Option<&str>) -> Result<Reply> {
    send(stack.envoy().address(), spoofing(key)?).await
}

/// The one key of a user, as `/v1/keys` shows it.
async fn resource(stack: &Stack, email: &str) -> Result<Value> {
    let keys = stack.rest().get(&format!("/v1/keys?email={email}")).await?;
    keys["keys"].get(0).cloned().with_context(|| format!("no key in {keys}"))
}

#[tokio::test]
async fn the_upstream_gets_the_identity_of_the_key_and_never_the_clients_own() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let known = resource(&stack, "ada@example.com").await?;
    let owner = stack.owner_id("ada@example.com").await?;
    for reply in [spoof(&stack, Some(&key)).await?, stack.get(Some(&key)).await?] {
        let headers = assert_upstream(&reply, &IDENTITY);
        assert_eq!(headers["x-consumer-id"], json!([owner]));
        assert_eq!(headers["x-credential-identifier"], json!([known["id"]]));
    }
    Ok(())
}

#[tokio::test]
async fn scopes_are_told_if_the_key_has_some() -> Result<()> {
    let stack = Stack::start().await?;
    let wanted = json!({"email": "bob@example.com", "name": "Scoped", "scopes": ["orders:read", "orders:write"]});
    let (_, key) = stack.rest().create_with(wanted).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let reply = spoof(&stack, Some(&key)).await?;
    let headers = assert_upstream(&reply, &["x-consumer-id", "x-credential-identifier", "x-credential-scopes"]);
    assert_eq!(headers["x-credential-scopes"], json!(["orders:read orders:write"]));
    Ok(())
}

#[tokio::test]
async fn a_request_that_is_let_in_unchecked_carries_no_identity_at_all() -> Result<()> {
    let stack = Stack::builder().plugin(&json!({"failure_mode": {"not_ready": "allow"}})).start().await?;
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

/// An upstream that stood behind another gateway may believe that gateway's headers.
#[tokio::test]
async fn identity_headers_of_other_gateways_are_removed_from_client_requests() -> Result<()> {
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

/// The lines of `envoy/minimal.yaml` by which Envoy removes the filter's own identity headers.
const REMOVED_BY_ENVOY: [&str; 4] = [
    "- remove: x-consumer-id",
    "- remove: x-credential-identifier",
    "- remove: x-credential-scopes",
    "- remove: x-portcullis-shadow",
];

/// What the upstream receives of a client that forges every identity header: with a good key without scopes, and without a
/// key on a route that needs none.
async fn forged(plugin: &Value, removed_by_envoy: bool) -> Result<[Reply; 2]> {
    let open = json!({"open": {"key": "anonymous_allowed"}});
    let mut harness = FilterHarness::builder().plugin(plugin.clone()).policies(&open).route("/open", "open");
    for line in REMOVED_BY_ENVOY {
        harness = if removed_by_envoy { harness } else { harness.edit(&format!("{line}\n"), "\n") };
    }
    let harness = harness.start(&[("good", record(1))]).await?;
    let ask = async |path, key| {
        let mut request = Request::get(path).header("x-identity", "root").header("x-portcullis-shadow", "root");
        for name in SPOOFED {
            request = request.header(name, "root").header(name, "admin");
        }
        harness.send(request.header("x-api-key", key).body(Full::default())?).await
    };
    Ok([ask("/", "good").await?, ask("/open", "").await?])
}

#[tokio::test]
async fn a_client_cannot_forge_an_identity_whether_the_filter_or_envoy_removes_its_headers() -> Result<()> {
    let three = ["x-consumer-id", "x-credential-identifier"];
    for envoy_removes in [false, true] {
        let plugin = json!({"envoy_removes_identity_headers": envoy_removes});
        let [good, open] = forged(&plugin, envoy_removes).await?;
        // No gateway is known by this name here, so it passes.
        assert_upstream(&good, &[&three[..], &["x-identity"]].concat());
        assert_upstream(&open, &["x-identity"]);

        let packed = json!({"identity_headers": {"packed": "x-identity"},
            "envoy_removes_identity_headers": envoy_removes});
        let [good, open] = forged(&packed, envoy_removes).await?;
        let identity = "consumer=\"22222222-2222-2222-2222-222222222222\", \
            credential=\"01010101-0101-0101-0101-010101010101\"";
        assert_eq!(assert_upstream(&good, &["x-identity"])["x-identity"], json!([identity]));
        assert_upstream(&open, &[]);
    }
    Ok(())
}

/// The setting without Envoy's part. Then a client with a good key can forge headers that its key has no value for, and no
/// others; a client without a key can forge none.
#[tokio::test]
async fn a_filter_that_relies_on_an_envoy_that_removes_nothing_still_gives_no_identity_to_a_request_without_a_key()
-> Result<()> {
    let plugin = json!({"envoy_removes_identity_headers": true, "remove_headers": ["x-identity"]});
    let [good, open] = forged(&plugin, false).await?;
    let all = ["x-consumer-id", "x-credential-identifier", "x-credential-scopes", "x-portcullis-shadow"];
    let headers = assert_upstream(&good, &all);
    assert_eq!(headers["x-consumer-id"], json!(["22222222-2222-2222-2222-222222222222"]));
    assert_eq!(headers["x-credential-identifier"], json!(["01010101-0101-0101-0101-010101010101"]));
    assert_upstream(&open, &[]);
    Ok(())
}

#[tokio::test]
async fn attributes_that_admins_set_reach_the_upstream_within_milliseconds_and_clients_cannot_forge_them() -> Result<()>
{
    let attributes = json!({"x-customer": "owner.external_id", "x-tenant": "owner.metadata.tenant",
        "x-project": "key.metadata.project"});
    let stack = Stack::builder().plugin(&json!({"identity_headers": {"attributes": attributes}})).start().await?;
    let rest = stack.rest();
    let names = ["x-customer", "x-project", "x-tenant"];
    let body = json!({"email": "ada@example.com", "name": "n", "metadata": {"project": "Zoë & 5%"}});
    let (id, key) = rest.create_with(body).await?;
    stack.in_step().await?;
    let received = async |key: &str| {
        let mut request = Request::get("/").header("x-api-key", key);
        for name in names {
            request = request.header(name, "root");
        }
        let reply = send(stack.envoy().address(), request.body(Full::default())?).await?;
        assert_eq!(reply.status, 200);
        let headers = reply.json()?["headers"].clone();
        anyhow::Ok(names.map(|name| headers[name].clone()))
    };
    let (nothing, project) = (serde_json::Value::Null, json!(["Zo%C3%AB & 5%25"]));
    assert_eq!(received(&key).await?, [nothing.clone(), project.clone(), nothing.clone()]);
    let uri = rest.user("ada@example.com").await?;
    rest.patch(&uri, json!({"external_id": "cus_1", "metadata": {"tenant": "acme"}})).await?;
    stack.in_step().await?;
    assert_eq!(received(&key).await?, [json!(["cus_1"]), project.clone(), json!(["acme"])]);
    rest.patch(&uri, json!({"metadata": {"tenant": {"name": "Zoë", "seats": [5, null]}}})).await?;
    stack.in_step().await?;
    let tenant = json!([r#"{"name":"Zo%C3%AB","seats":[5,null]}"#]);
    assert_eq!(received(&key).await?, [json!(["cus_1"]), project, tenant]);
    rest.patch(&format!("/v1/keys/{id}"), json!({"metadata": {}})).await?;
    rest.patch(&uri, json!({"metadata": {}})).await?;
    stack.in_step().await?;
    assert_eq!(received(&key).await?, [json!(["cus_1"]), nothing.clone(), nothing]);
    Ok(())
}
