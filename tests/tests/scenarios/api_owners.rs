//! What API owners ask for, on the real stack: erasure, a change of address, look-ups by what people have in hand, months
//! from an anchor day, scopes with upper case, and pages that call the management API.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use http_body_util::Full;
use hyper::{Method, Request};
use portcullis_tests::expect::{IDENTITY, SCOPED, assert_refused, assert_upstream};
use portcullis_tests::http::{get_request, send};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";

/// Uses up a quota of two requests. Returns the seconds that the refusal of a third one tells the client to wait.
async fn wait_after_two(stack: &Stack, key: &str) -> Result<u64> {
    for _ in 0..2 {
        assert_upstream(&stack.get(Some(key)).await?, &IDENTITY);
    }
    let reply = stack.get(Some(key)).await?;
    assert_refused(&reply, Outcome::QuotaExceeded, &[]);
    Ok(reply.header("retry-after").context("no retry-after")?.parse()?)
}

#[tokio::test]
async fn a_user_keeps_key_and_id_under_a_new_address_and_is_refused_and_forgotten_once_erased() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let (id, key) = rest.create_with(json!({"email": ADA, "name": "Ada's laptop"})).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let uri = rest.user(ADA).await?;
    let owner = stack.owner_id(ADA).await?;
    rest.patch(&uri, json!({"email": "lovelace@example.com"})).await?;
    stack.in_step().await?;
    let headers = assert_upstream(&stack.get(Some(&key)).await?, &IDENTITY);
    assert_eq!(headers["x-consumer-id"], json!([owner]));
    assert_eq!(rest.get("/v1/keys?email=lovelace@example.com").await?["keys"][0]["id"], json!(id));
    rest.expect(Method::DELETE, &uri, None, 200).await?;
    stack.in_step().await?;
    assert_refused(&stack.get(Some(&key)).await?, Outcome::Revoked, &[]);
    let left = "select count(*)::text from (select row_to_json(t)::text as row from audit t
        union all select row_to_json(t)::text from api_keys t union all select row_to_json(t)::text from user_preferences t)
        rows where row like '%Ada%' or row like '%ada@%' or row like '%lovelace%'";
    assert_eq!(stack.database.text(left).await?, "0");
    let counted = async || {
        let usage = rest.get(&format!("/v1/keys/{id}/usage")).await.ok()?;
        usage["totals"]["allowed"].is_object().then_some(())
    };
    eventually("what was counted to be there", counted).await?;
    Ok(())
}

#[tokio::test]
async fn a_key_is_found_by_its_first_characters_and_by_all_of_it() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let (id, key) = rest.create(ADA).await?;
    let short = format!("sk_{}", &key[8..14]);
    for prefix in [&key[..14], &short, &format!("{}%E2%80%A6", &key[..14])] {
        let found = rest.get(&format!("/v1/keys?prefix={prefix}")).await?;
        assert_eq!(found["keys"][0]["id"], json!(id), "{prefix}");
    }
    let found = rest.expect(Method::POST, "/v1/keys/lookup", Some(&json!({"key": key})), 200).await?;
    assert_eq!(found["id"], json!(id));
    Ok(())
}

#[tokio::test]
async fn a_month_from_an_anchor_day_ends_on_that_day_for_the_client_too() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    // Tomorrow's day of the month, which every month from now on has or clamps.
    let day: i64 = stack
        .database
        .text("select extract(day from now() at time zone 'UTC' + interval '1 day')::int::text")
        .await?
        .parse()?;
    let quota = json!({"requests": 2, "period": "month", "anchor_day": day});
    let (id, key) = rest.create_with(json!({"email": ADA, "name": "n", "quota": quota})).await?;
    stack.in_step().await?;
    let wait = wait_after_two(&stack, &key).await?;
    let until = "select extract(epoch from date_trunc('day', now() at time zone 'UTC') + interval '1 day'
        - now() at time zone 'UTC')::bigint::text";
    let midnight: u64 = stack.database.text(until).await?.parse()?;
    assert!(wait.abs_diff(midnight) <= 5, "{wait} s, {midnight} s until the anchor day");
    assert_eq!(rest.get(&format!("/v1/keys/{id}/quota")).await?["requests"], 2);
    Ok(())
}

#[tokio::test]
async fn scopes_have_upper_case_and_slashes_and_hashes_may_be_base64() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    let policy = json!({"scopes": {"all": ["Orders/Read"]}, "match": [{"path": {"prefix": "/orders"}}]});
    rest.expect(Method::PUT, "/v1/policies/orders", Some(&policy), 201).await?;
    // The SHA-256 of `abcdefghijklmnop`, as other systems write it.
    let (key, hash) = ("abcdefghijklmnop", "sha256:852sbLq6U14sIHzQzY8VSXQiPISPcn+Ys1ZM6labQc8=");
    let lines = [
        json!({"email": ADA, "name": "hashed", "hash": hash, "scopes": ["Orders/Read"]}),
        json!({"email": ADA, "name": "lower", "key": "another-key-of-old", "scopes": ["orders/read"]}),
    ];
    let report = rest.import(lines.map(|line| line.to_string()).join("\n")).await?;
    assert_eq!(report["imported"], 2, "{report}");
    stack.in_step().await?;
    assert_upstream(&stack.get(Some(key)).await?, &SCOPED);
    assert_refused(&stack.get(Some("another-key-of-old")).await?, Outcome::ScopeDenied, &[]);
    Ok(())
}

#[tokio::test]
async fn a_page_of_a_named_origin_may_call_the_management_api_and_no_other() -> Result<()> {
    const PAGE: &str = "https://keys.example.com";
    let stack = Stack::builder().control_plane_arguments(&["--cors-origins", PAGE]).start().await?;
    let rest = stack.rest();
    for (origin, allowed) in [(PAGE, Some(PAGE)), ("https://other.example.com", None)] {
        let preflight = Request::builder().method(Method::OPTIONS).uri("/v1/keys").header("origin", origin);
        let preflight = preflight
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "x-api-key,content-type");
        let call = Request::get("/v1/keys").header("origin", origin).header("x-api-key", rest.key.reveal());
        for request in [preflight, call] {
            let reply = send(rest.address, request.body(Full::default())?).await?;
            assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, allowed), "{origin}");
        }
    }
    Ok(())
}

/// All that a key may have, both at creation and in a line of an import.
fn everything(external_id: &str) -> Value {
    json!({
        "email": ADA, "name": "everything", "scopes": ["orders:read"], "roles": ["reader"], "plan": "gold", "cost": 2,
        "kind": "test", "allowed_addresses": ["127.0.0.0/8"], "external_id": external_id, "metadata": {"tenant": "acme"},
        "quota": {"requests": 3, "period": "day", "time_zone": "UTC"},
        "rate_limits": [{"name": "hour", "requests": 100, "window_seconds": 3_600}],
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_gets_all_that_it_may_have_in_one_call_or_one_line_and_envoy_applies_it() -> Result<()> {
    let attributes = json!({"x-tenant": "key.metadata.tenant", "x-key": "key.external_id"});
    let plugin = json!({"rate_limit": null, "identity_headers": {"attributes": attributes}});
    let stack = Stack::builder().plugin(&plugin).policies(&json!({"default": {"kinds": ["test"]}})).start().await?;
    let rest = stack.rest();
    rest.expect(Method::PUT, "/v1/roles/reader", Some(&json!({"scopes": ["reports:read"]})), 201).await?;
    rest.expect(Method::PUT, "/v1/plans/gold", Some(&json!({"scopes": ["gold"]})), 201).await?;
    let (_, created) = rest.create_with(everything("created")).await?;
    let mut line = everything("imported");
    line["key"] = json!("a-key-of-another-system-0001");
    assert_eq!(rest.import(line.to_string()).await?["imported"], 1);
    stack.in_step().await?;
    for (key, external_id) in [(created.as_str(), "created"), ("a-key-of-another-system-0001", "imported")] {
        let found = rest.get(&format!("/v1/keys?external_id={external_id}")).await?["keys"][0].take();
        for field in ["name", "kind", "plan", "cost", "external_id", "metadata", "allowed_addresses", "roles"] {
            assert_eq!(found[field], everything(external_id)[field], "{external_id}: {field}");
        }
        for _ in 0..3 {
            let headers =
                assert_upstream(&stack.get(Some(key)).await?, &[&SCOPED[..], &["x-tenant", "x-key"]].concat());
            assert_eq!((&headers["x-tenant"], &headers["x-key"]), (&json!(["acme"]), &json!([external_id])));
            let scopes = headers["x-credential-scopes"][0].as_str().context("no scopes")?;
            assert_eq!(
                scopes.split(' ').collect::<BTreeSet<_>>(),
                BTreeSet::from(["gold", "orders:read", "reports:read"])
            );
        }
        let refused = stack.get(Some(key)).await?;
        assert_eq!((refused.status, &refused.json()?["code"]), (429, &json!("quota_exceeded")), "{external_id}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_limits_all_keys_of_an_owner_together() -> Result<()> {
    let stack = Stack::builder().plugin(&json!({"rate_limit": null})).start().await?;
    let rest = stack.rest();
    let limit = json!({"name": "team", "requests": 4, "window_seconds": 3_600, "per": "owner"});
    let policy = json!({"rate_limits": [limit], "match": [{"path": {"prefix": "/search"}}]});
    rest.expect(Method::PUT, "/v1/policies/search", Some(&policy), 201).await?;
    let mut keys = Vec::new();
    for email in [ADA, ADA, "bob@example.com"] {
        keys.push(rest.create(email).await?.1);
    }
    stack.in_step().await?;
    let mut admitted = Vec::new();
    for key in &keys {
        let mut of_key = 0;
        for _ in 0..3 {
            let reply = send(stack.envoy().address(), get_request("/search", Some(key))?).await?;
            of_key += u32::from(reply.status == 200);
        }
        admitted.push(of_key);
    }
    assert_eq!(admitted, [3, 1, 3]);
    Ok(())
}

#[tokio::test]
async fn a_day_of_a_quota_and_of_usage_ends_at_midnight_of_the_owners_time_zone() -> Result<()> {
    let stack = Stack::start().await?;
    let rest = stack.rest();
    // 14 hours ahead of UTC, so its midnight is another moment.
    let zone = "Pacific/Kiritimati";
    let quota = json!({"requests": 2, "period": "day", "time_zone": "owner"});
    let (id, key) = rest.create_with(json!({"email": ADA, "name": "n", "quota": quota})).await?;
    rest.patch(&rest.user(ADA).await?, json!({"time_zone": zone})).await?;
    stack.in_step().await?;
    let wait = wait_after_two(&stack, &key).await?;
    let until = format!(
        "select extract(epoch from date_trunc('day', now() at time zone '{zone}') + interval '1 day'
        - now() at time zone '{zone}')::bigint::text"
    );
    let midnight: u64 = stack.database.text(&until).await?.parse()?;
    assert!(wait.abs_diff(midnight) <= 5, "{wait} s, {midnight} s until midnight");
    let today = stack.database.text(&format!("select (now() at time zone '{zone}')::date::text")).await?;
    let uri = format!("/v1/usage?interval=day&time_zone=owner&email={ADA}");
    let counted = async || {
        let usage = rest.get(&uri).await.ok()?;
        let row = usage["usage"].as_array()?.iter().find(|row| row["allowed"] == 2)?.clone();
        Some((usage["time_zone"].clone(), row))
    };
    let (shown, row) = eventually("the usage of today", counted).await?;
    assert_eq!(shown, zone);
    assert!(row.to_string().contains(&format!("{today}T00:00:00+14:00")), "{row}");
    assert_eq!(rest.get(&format!("/v1/keys/{id}/quota")).await?["time_zone"], zone);
    Ok(())
}
