//! A key gets a new secret while the old one is still in use, on real Envoys.

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use hyper::Method;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";

/// Rotates a key, and waits until every Envoy admits its new secret.
async fn rotate(stack: &Stack, id: &str, grace_seconds: i64) -> Result<String> {
    let body = json!({"grace_seconds": grace_seconds});
    let rotated = stack.rest().post(&format!("/v1/keys/{id}/rotate"), &body).await?;
    let secret = rotated["secret"].as_str().context("no secret")?;
    stack.wait_for_status(Some(secret), 200).await?;
    Ok(secret.to_owned())
}

/// The secrets of a key: generation, whether it is the current one, and how often it was used.
async fn secrets(stack: &Stack, id: &str) -> Result<Value> {
    let key = stack.rest().get(&format!("/v1/keys/{id}")).await?;
    let secrets = key["secrets"].as_array().context("no secrets")?;
    Ok(secrets.iter().map(|one| json!([one["generation"], one["current"], one["usage_count"]])).collect())
}

#[tokio::test]
async fn both_secrets_open_until_the_grace_ends_and_each_is_counted_by_itself() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let (id, old) = stack.rest().create(ADA).await?;
    stack.wait_for_status(Some(&old), 200).await?;
    let used_before = stack.demo.requests();
    let new = rotate(&stack, &id, 3_600).await?;
    let used_new = stack.demo.requests() - used_before;
    // The upstream gets the same key id with each secret.
    let by_old = assert_upstream(&stack.get(Some(&old)).await?, &IDENTITY);
    let by_new = assert_upstream(&stack.get(Some(&new)).await?, &IDENTITY);
    for name in IDENTITY {
        assert_eq!(by_old[name], by_new[name]);
    }

    let expected = json!([[2, true, used_new + 1], [1, false, used_before + 1]]);
    let shown = async || secrets(&stack, &id).await.ok().filter(|shown| *shown == expected);
    eventually(&format!("secrets {expected}"), shown).await?;

    // Three seconds of the hour are left. The old secret then ends at every Envoy by itself.
    let soon = "update retired_secrets set ends_at = now() + interval '3 seconds'";
    assert_eq!(stack.database.execute(soon).await?, 1);
    stack.wait_for_status(Some(&old), 401).await?;
    assert_refused(&stack.get(Some(&old)).await?, Outcome::Expired, &[]);
    assert_upstream(&stack.get(Some(&new)).await?, &IDENTITY);
    Ok(())
}

#[tokio::test]
async fn an_old_secret_that_nobody_uses_any_more_is_cut_off() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let (id, old) = rest.create(ADA).await?;
    stack.wait_for_status(Some(&old), 200).await?;
    let new = rotate(&stack, &id, 86_400).await?;
    assert_upstream(&stack.get(Some(&old)).await?, &IDENTITY);
    let cut = rest.call(Method::DELETE, &format!("/v1/keys/{id}/secrets/1"), None).await?;
    assert_eq!(cut.status, 204);
    stack.wait_for_status(Some(&old), 401).await?;
    assert_refused(&stack.get(Some(&old)).await?, Outcome::Expired, &[]);
    assert_upstream(&stack.get(Some(&new)).await?, &IDENTITY);
    Ok(())
}

#[tokio::test]
async fn without_grace_the_old_secret_dies_as_the_new_one_opens() -> Result<()> {
    let stack = Stack::start().await?;
    let (id, old) = stack.rest().create(ADA).await?;
    stack.wait_for_status(Some(&old), 200).await?;
    rotate(&stack, &id, 0).await?;
    // They changed in one transaction, so an Envoy that has the new one knows that the old one has ended.
    assert_refused(&stack.get(Some(&old)).await?, Outcome::Expired, &[]);
    Ok(())
}
