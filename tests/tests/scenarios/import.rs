//! Keys of another system work as soon as they are imported.

use anyhow::Result;
use contract::hash::KeyHash;
use contract::key::Secret;
use contract::outcome::Outcome;
use hyper::Method;
use portcullis_tests::envoy::Envoy;
use portcullis_tests::envoy_config::Replacements;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::http::{get_request, send};
use portcullis_tests::log::Log;
use portcullis_tests::rest::Rest;
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::tools::silently;
use portcullis_tests::wait::eventually;
use serde_json::json;

#[tokio::test]
async fn imported_keys_open_whether_they_came_in_the_clear_or_as_hashes() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let (plain, hashed, off) = ("key-of-the-old-gateway-1", "key of the old gateway 2", "key-of-the-old-gateway-3");
    let hash: String = KeyHash::of(hashed.as_bytes()).0.iter().map(|byte| format!("{byte:02x}")).collect();
    let lines = [
        json!({"email": "ada@example.com", "name": "plain", "key": plain}),
        json!({"email": "bob@example.com", "name": "hashed", "hash": format!("sha256:{hash}")}),
        json!({"email": "bob@example.com", "name": "twice", "key": plain}),
        json!({"email": "eve@example.com", "name": "off", "key": off, "disabled": true}),
    ];
    let report = stack.rest().import(lines.map(|line| line.to_string()).join("\n")).await?;
    let expected = json!({
        "imported": 3, "failed": 1, "errors_truncated": false,
        "errors": [{"line": 3, "code": "duplicate", "reason": "this key stands in an earlier line"}],
    });
    assert_eq!(report, expected);
    for key in [plain, hashed] {
        stack.wait_for_status(Some(key), 200).await?;
        assert_upstream(&stack.get(Some(key)).await?, &IDENTITY);
    }
    assert_refused(&stack.get(Some(off)).await?, Outcome::Disabled, &[]);
    Ok(())
}

#[tokio::test]
async fn with_a_pepper_the_database_has_no_hash_of_an_imported_key_that_could_be_guessed() -> Result<()> {
    let pepper = "5e".repeat(32);
    let stack = Stack::builder().variable("PORTCULLIS_PEPPER", &pepper).start().await?;
    let (plain, hashed) = ("key-of-the-old-gateway-1", "key of the old gateway 2");
    let hash_of = |key: &str| format!("sha256:{}", KeyHash::of(key.as_bytes()));
    let lines = [
        json!({"email": "ada@example.com", "name": "plain", "key": plain}),
        json!({"email": "bob@example.com", "name": "hashed", "hash": hash_of(hashed)}),
    ];
    let lines = lines.map(|line| line.to_string()).join("\n");
    assert_eq!(stack.rest().import(lines.clone()).await?["imported"], 2);
    for key in [plain, hashed] {
        stack.wait_for_status(Some(key), 200).await?;
        assert_upstream(&stack.get(Some(key)).await?, &IDENTITY);
        let guessed = format!("select count(*)::text from api_keys where hash = sha256('{key}'::bytea)");
        assert_eq!(stack.database.text(&guessed).await?, "0");
    }
    // Keys that are made here need no pepper, and imported ones manage what is their owner's and are explained.
    stack.working_key("ada@example.com").await?;
    let legacy = Rest { address: stack.control_plane.address(), key: Secret::from_presented(plain.into()) };
    assert_eq!(legacy.get("/v1/keys").await?["keys"][0]["name"], "Test Key");
    let explained = legacy.expect(Method::POST, "/v1/explain", Some(&json!({"key": plain})), 200).await?;
    assert_eq!(explained["outcome"], "allowed");
    assert_eq!(stack.rest().import(lines).await?["failed"], 2);

    // An Envoy without the pepper does not know them.
    let mut settings = stack.envoy().settings();
    settings.environment.clear();
    settings.replacements = Replacements::between(stack.control_plane.address(), stack.demo.address());
    let log = Log::create(&stack.directory().join("without.log"))?;
    let without = Envoy::start(settings, &stack.directory().join("without"), log, &silently).await?;
    wait_for_status(&without, Some("no such key"), 401).await?;
    let reply = send(without.address(), get_request("/orders", Some(plain))?).await?;
    assert_refused(&reply, Outcome::Unknown, &[]);
    // They are revoked like others.
    let user = stack.rest().user("bob@example.com").await?;
    stack.rest().expect(Method::POST, &format!("{user}/revoke-keys"), None, 200).await?;
    stack.wait_for_status(Some(hashed), 401).await?;
    Ok(())
}

#[tokio::test]
async fn keys_that_are_still_in_use_are_captured_by_hash_and_can_be_adopted() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let policy = json!({"shadow": true, "capture_unknown": true, "match": [{"path": {"prefix": "/moving"}}]});
    rest.expect(Method::PUT, "/v1/policies/moving", Some(&policy), 201).await?;
    stack.in_step().await?;
    let old = "key-of-the-old-gateway-1";
    let ask = async |path: &str| send(stack.envoy().address(), get_request(path, Some(old))?).await;
    assert_refused(&ask("/").await?, Outcome::Unknown, &[]);
    assert_eq!(ask("/moving").await?.status, 200);
    let hash = format!("sha256:{}", KeyHash::of(old.as_bytes()));
    let listed = async || {
        let page = rest.get("/v1/unknown-keys").await.ok()?;
        page["keys"].as_array().filter(|keys| !keys.is_empty()).cloned()
    };
    let keys = eventually("the key to be listed", listed).await?;
    assert_eq!(keys.iter().map(|key| &key["hash"]).collect::<Vec<_>>(), [&json!(hash)]);
    let line = json!({"email": "ada@example.com", "name": "adopted", "hash": hash}).to_string();
    assert_eq!(rest.import(line).await?["imported"], 1);
    stack.wait_for_status(Some(old), 200).await?;
    assert_upstream(&stack.get(Some(old)).await?, &IDENTITY);
    assert_eq!(rest.get("/v1/unknown-keys").await?["keys"], json!([]));
    Ok(())
}
