//! The life of a key as in the README, over the REST API and real Envoys.

use anyhow::{Context, Result};
use contract::key::Secret;
use contract::outcome::Outcome;
use hyper::{Method, Request};
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::http;
use portcullis_tests::stack::{Stack, wait_for_status};
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";

fn prefix(key: &str) -> Option<String> {
    Secret::from_presented(key.to_owned()).display_prefix()
}

#[tokio::test]
async fn a_generated_key_is_accepted_counted_revoked_and_refused() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let none = json!({
        "hasKey": false, "generatedAt": null, "lastUsed": null, "usageCount": null, "keyName": null, "keyPrefix": null,
        "balance": null,
    });
    let status = rest.status(ADA).await?;
    assert_eq!(status["hasKey"], none["hasKey"]);
    assert!(status.as_object().context("no object")?.keys().eq(none.as_object().context("no object")?.keys()));

    let body = json!({"email": ADA, "key_name": "Production Key"});
    let generated = rest.call(Method::POST, "/api/user/key", Some(&body)).await?;
    assert_eq!(generated.status, 200);
    let generated = generated.json()?;
    let key = generated["key"].as_str().context("no key")?;
    let expected = json!({
        "success": true, "message": "API key generated successfully", "key": key, "keyPrefix": prefix(key),
    });
    assert_eq!(generated, expected);

    stack.wait_for_status(Some(key), 200).await?;
    for _ in 0..9 {
        assert_upstream(&stack.get(Some(key)).await?, &IDENTITY);
    }
    let used = stack.demo.requests();
    let status = stack.wait_for_usage(ADA, used).await?;
    let (generated_at, last_used) = (&status["generatedAt"], &status["lastUsed"]);
    let expected = json!({
        "hasKey": true, "generatedAt": generated_at, "lastUsed": last_used, "usageCount": used,
        "keyName": "Production Key", "keyPrefix": prefix(key), "balance": 0,
    });
    assert_eq!(status, expected);
    for time in [generated_at, last_used] {
        assert!(time.as_str().is_some_and(|time| time.len() >= 20 && time.ends_with('Z')), "{time}");
    }
    assert!(generated_at.as_str() <= last_used.as_str());
    let usage = rest.call(Method::GET, &format!("/api/user/usage/{ADA}"), None).await?;
    assert_eq!((usage.status, usage.json()?), (200, json!({"success": true, "usage": status})));

    let revoked = rest.call(Method::DELETE, &format!("/api/user/key/{ADA}"), None).await?;
    let expected = json!({"success": true, "message": "API key revoked successfully"});
    assert_eq!((revoked.status, revoked.json()?), (200, expected));
    stack.wait_for_status(Some(key), 401).await?;
    assert_refused(&stack.get(Some(key)).await?, Outcome::Revoked, &[]);
    assert_eq!(rest.status(ADA).await?["hasKey"], Value::Bool(false));
    Ok(())
}

#[tokio::test]
async fn a_new_key_replaces_the_old_one_everywhere() -> Result<()> {
    let stack = Stack::start().await?;
    let old = stack.working_key(ADA).await?;
    let new = stack.rest().generate(ADA).await?;
    assert_ne!(old, new);
    stack.wait_for_status(Some(&new), 200).await?;
    // The old one was revoked in the same transaction, so an Envoy that has the new one knows that.
    assert_refused(&stack.get(Some(&old)).await?, Outcome::Revoked, &[]);
    assert_eq!(stack.rest().status(ADA).await?["keyPrefix"].as_str(), prefix(&new).as_deref());
    Ok(())
}

#[tokio::test]
async fn a_revocation_reaches_every_worker_of_every_envoy() -> Result<()> {
    let stack = Stack::builder().envoys(2).workers(3).start().await?;
    let key = stack.working_key(ADA).await?;
    let mut workers = Vec::new();
    for envoy in &stack.envoys {
        let connections = envoy.connection_per_worker().await?;
        assert_eq!(connections.len(), 3);
        workers.extend(connections);
    }
    for worker in &mut workers {
        assert_upstream(&worker.get("/", Some(&key)).await?, &IDENTITY);
    }
    stack.rest().revoke(ADA).await?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(&key), 401).await?;
    }
    let admitted = stack.demo.requests();
    for worker in &mut workers {
        assert_refused(&worker.get("/", Some(&key)).await?, Outcome::Revoked, &[]);
    }
    assert_eq!(stack.demo.requests(), admitted);
    Ok(())
}

#[tokio::test]
async fn a_change_that_waits_for_the_envoys_holds_at_every_worker_at_once() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let rest = stack.rest();
    let change = async |method: Method, path: &str, body: &Value| {
        let request = Request::builder().method(method).uri(path).header("x-api-key", rest.key.reveal());
        let request = request.header("content-type", "application/json").header("prefer", "wait=10");
        let reply = http::send(rest.address, request.body(body.to_string().into())?).await?;
        assert_eq!(reply.header("preference-applied"), Some("wait=10"), "{reply:?}");
        reply.json()
    };
    let mut workers = Vec::new();
    for envoy in &stack.envoys {
        workers.extend(envoy.connection_per_worker().await?);
    }
    let fields = json!({"email": ADA, "name": "n"});
    for round in 0..5 {
        let made = change(Method::POST, "/v1/keys", &fields).await?;
        let (id, key) = (made["id"].as_str().context("no id")?, made["secret"].as_str().context("no secret")?);
        for worker in &mut workers {
            assert_eq!(worker.get("/orders", Some(key)).await?.status, 200, "round {round}");
        }
        change(Method::PATCH, &format!("/v1/keys/{id}"), &json!({"disabled": true})).await?;
        for worker in &mut workers {
            assert_eq!(worker.get("/orders", Some(key)).await?.status, 401, "round {round}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_key_is_switched_off_and_on_again() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let (id, key) = rest.create(ADA).await?;
    let uri = format!("/v1/keys/{id}");
    stack.wait_for_status(Some(&key), 200).await?;
    let off = rest.patch(&uri, json!({"disabled": true})).await?;
    assert_eq!(off["state"], "disabled");
    stack.wait_for_status(Some(&key), 401).await?;
    assert_refused(&stack.get(Some(&key)).await?, Outcome::Disabled, &[]);
    let on = rest.patch(&uri, json!({"disabled": false})).await?;
    assert_eq!(on["state"], "active");
    stack.wait_for_status(Some(&key), 200).await?;
    Ok(())
}

#[tokio::test]
async fn a_key_ends_at_its_time_without_anybody_acting_and_comes_back_when_its_end_is_moved() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let (id, key) = rest.create(ADA).await?;
    let uri = format!("/v1/keys/{id}");
    stack.wait_for_status(Some(&key), 200).await?;
    let ends = rest.patch(&uri, json!({"expires_in_seconds": 2})).await?;
    assert!(ends["expires_at"].is_string(), "{ends}");
    stack.wait_for_status(Some(&key), 401).await?;
    assert_refused(&stack.get(Some(&key)).await?, Outcome::Expired, &[]);
    let ended = rest.get(&uri).await?;
    assert_eq!(ended["state"], "expired");
    let back = rest.patch(&uri, json!({"expires_at": null})).await?;
    assert_eq!((&back["state"], &back["expires_at"]), (&json!("active"), &Value::Null));
    stack.wait_for_status(Some(&key), 200).await?;
    Ok(())
}

#[tokio::test]
async fn all_keys_of_a_user_are_revoked_at_once_and_nobody_elses() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let rest = stack.rest();
    let mut keys = Vec::new();
    for _ in 0..3 {
        keys.push(rest.create(ADA).await?.1);
    }
    keys.push(rest.generate(ADA).await?);
    let (_, other) = rest.create("other@example.com").await?;
    for key in keys.iter().chain([&other]) {
        stack.wait_for_status(Some(key), 200).await?;
    }
    let user = rest.user(ADA).await?;
    let all = rest.expect(Method::POST, &format!("{user}/revoke-keys"), None, 200).await?;
    assert_eq!(all, json!({"revoked": 4, "skipped": 0}));
    stack.wait_for_status(keys.first().map(String::as_str), 401).await?;
    // They were revoked in one transaction, so an Envoy that knows of one knows of all.
    for key in &keys {
        assert_refused(&stack.get(Some(key)).await?, Outcome::Revoked, &[]);
    }
    assert_upstream(&stack.get(Some(&other)).await?, &IDENTITY);
    Ok(())
}
