//! The four endpoints of a user's primary key, and who may call the REST API.

use crate::support::{Fixture, Reply, change_key, execute, request, revision, scalar, secret_of};
use axum::body::Body;
use axum::http::Request;
use contract::key::{KeyKind, Secret, check};
use contract::outcome::PROBLEMS;
use control_plane::domain::{Email, KeyName, Scopes};
use control_plane::keys::create::insert_given;
use control_plane::keys::read::find_by_hash;
use serde_json::{Value, json};
use sqlx::PgPool;

/// Every field and header of a problem that is the same in each call.
fn assert_problem(reply: &Reply, status: u16, code: &str, title: &str, detail: &str, field: Option<&str>) {
    let mut expected = json!({
        "type": format!("{PROBLEMS}{code}"), "title": title, "status": status, "detail": detail, "code": code,
    });
    if let Some(field) = field {
        expected["field"] = field.into();
    }
    assert_eq!((reply.status, reply.json()), (status, expected));
    assert_eq!(reply.header("content-type"), "application/problem+json");
    assert_eq!(reply.header("cache-control"), "no-store");
}

fn assert_ok(reply: &Reply, expected: &Value) {
    assert_eq!((reply.status, &reply.json()), (200, expected));
    assert_eq!(reply.header("content-type"), "application/json");
    assert_eq!(reply.header("cache-control"), "no-store");
}

async fn post(fixture: &Fixture, key: &Secret, body: &Value) -> Reply {
    fixture.post("/api/user/key", key, body).await
}

async fn generate(fixture: &Fixture, caller: &Secret, email: &str) -> Secret {
    secret_of(&post(fixture, caller, &json!({"email": email, "key_name": "Production Key"})).await.expect(200))
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_without_a_key_has_nulls_and_a_balance(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let nothing = json!({
        "hasKey": false, "generatedAt": null, "lastUsed": null, "usageCount": null, "keyName": null, "keyPrefix": null,
        "balance": 0,
    });
    let reply = fixture.get("/api/user/key/user@example.com", &admin).await;
    assert_ok(&reply, &json!({"success": true, "keyPreference": nothing}));
    let reply = fixture.get("/api/user/usage/user@example.com", &admin).await;
    assert_ok(&reply, &json!({"success": true, "usage": nothing}));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_generated_key_is_told_once_and_its_state_ever_after(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let reply = post(&fixture, &admin, &json!({"email": "User@Example.com", "key_name": " Production Key "})).await;
    let key = reply.secret();
    assert_eq!(check(key.reveal()), Ok(KeyKind::Live));
    let prefix = format!("sk_{}", &key.reveal()[8..14]);
    assert_ok(
        &reply,
        &json!({
            "success": true, "message": "API key generated successfully", "key": key.reveal(), "keyPrefix": prefix,
        }),
    );

    // Times are fixed here so that the whole reply can be compared, with fractions that must not show.
    let hash = hex::encode(key.hash().0);
    let made = "update api_keys set created_at = '2026-05-15 14:30:00.987654Z'";
    let id: uuid::Uuid = scalar(&pool, format!("{made} where hash = '\\x{hash}' returning id")).await;
    let book = "insert into ledger (owner_id, kind, amount, balance)
        select id, 'top_up', 42, 0 from user_preferences where email = 'user@example.com'";
    execute(&pool, book).await;
    let mut expected = json!({
        "hasKey": true, "generatedAt": "2026-05-15T14:30:00Z", "lastUsed": null, "usageCount": 0,
        "keyName": "Production Key", "keyPrefix": prefix, "balance": 42,
    });
    let reply = fixture.get("/api/user/key/user@example.com", &admin).await;
    assert_ok(&reply, &json!({"success": true, "keyPreference": expected}));

    for (generation, requests, last) in [(1, 100, "2026-05-16 09:12:43.5Z"), (2, 27, "2026-05-16 08:00:00Z")] {
        let sql =
            format!("insert into key_usage values ('{id}', '{generation}', '{requests}', '{last}'::text::timestamptz)");
        execute(&pool, sql).await;
    }
    expected["usageCount"] = 127.into();
    expected["lastUsed"] = "2026-05-16T09:12:43Z".into();
    let reply = fixture.get("/api/user/usage/User%40example.com", &admin).await;
    assert_ok(&reply, &json!({"success": true, "usage": expected}));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_new_primary_key_revokes_the_old_one(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let old = generate(&fixture, &admin, "user@example.com").await;
    assert_eq!(fixture.get("/v1/keys", &old).await.status, 200);
    assert_eq!(fixture.get("/api/user/usage/USER@example.com", &old).await.status, 200);
    // The user replaces the key with the key itself.
    let new = generate(&fixture, &old, "user@example.com").await;
    assert_eq!(fixture.get("/v1/keys", &new).await.status, 200);
    let reply = fixture.get("/v1/keys", &old).await;
    let detail = "This API key was revoked. Ask its owner for a new one.";
    assert_problem(&reply, 401, "revoked", "API key revoked", detail, None);
    let sql = "select count(*) from api_keys k join user_preferences p on p.id = k.owner_id
        where p.email = 'user@example.com' and revoked_at is null";
    assert_eq!(scalar::<i64>(&pool, sql).await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn replacements_at_the_same_time_leave_one_key(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let tries: [Secret; 4] = {
        let one = || generate(&fixture, &admin, "user@example.com");
        let (a, b, c, d) = tokio::join!(one(), one(), one(), one());
        [a, b, c, d]
    };
    let mut good = 0;
    for key in &tries {
        good += u32::from(fixture.get("/v1/keys", key).await.status == 200);
    }
    assert_eq!(good, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_revoked_key_is_gone_and_cannot_be_revoked_again(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let key = generate(&fixture, &admin, "user@example.com").await;
    let reply = fixture.delete("/api/user/key/user@example.com", &admin).await;
    assert_ok(&reply, &json!({"success": true, "message": "API key revoked successfully"}));
    assert_eq!(fixture.get("/v1/keys", &key).await.status, 401);
    let reply = fixture.get("/api/user/key/user@example.com", &admin).await;
    assert_eq!(reply.json()["keyPreference"]["hasKey"], false);
    assert_eq!(reply.json()["keyPreference"]["keyPrefix"], Value::Null);
    for email in ["user@example.com", "nobody@example.com"] {
        let reply = fixture.delete(&format!("/api/user/key/{email}"), &admin).await;
        assert_problem(&reply, 404, "not_found", "Not found", &format!("{email} has no API key."), None);
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_refused_key_is_answered_with_the_reason(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let stranger = Secret::generate(KeyKind::Live, &mut getrandom::SysRng).unwrap();
    for (method, uri) in [("POST", "/api/user/key"), ("GET", "/v1/keys")] {
        let reply = fixture.send(request(method, uri, None, Body::empty())).await;
        assert_problem(&reply, 401, "missing", "API key missing", "Send your API key in the header x-api-key.", None);
        assert_eq!(reply.header("www-authenticate"), "ApiKey realm=\"portcullis\"");
        let reply = fixture.send(request(method, uri, Some(&stranger), Body::empty())).await;
        let detail = "No such API key. Check that it was copied whole.";
        assert_problem(&reply, 401, "unknown", "API key unknown", detail, None);
    }
    for odd in [&b"\xff\xfe"[..], &[b'a'; 8_192], b"' or 1=1 --"] {
        let request = Request::get("/v1/keys").header("x-api-key", odd).body(Body::empty()).unwrap();
        assert_eq!(fixture.send(request).await.json()["code"], "unknown");
    }
    let empty = Request::get("/v1/keys").header("x-api-key", "").body(Body::empty()).unwrap();
    assert_eq!(fixture.send(empty).await.json()["code"], "missing");

    let (id, key) = fixture.key("user@example.com", &[]).await;
    for (change, status, code) in [
        ("disabled = true", 401, "disabled"),
        ("expires_at = now()", 401, "expired"),
        ("revoked_at = now()", 401, "revoked"),
    ] {
        change_key(&pool, id, change).await;
        let reply = fixture.get("/v1/keys", &key).await;
        assert_eq!((reply.status, &reply.json()["code"]), (status, &json!(code)));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_field_is_named_with_the_remedy(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let address = "must be an email address such as user@example.com";
    for (body, field, detail) in [
        (json!({"email": "user", "key_name": "x"}), Some("email"), address),
        (json!({"email": "a\0b@example.com", "key_name": "x"}), Some("email"), address),
        (json!({"email": "u@example.com", "key_name": " "}), Some("key_name"), "must have 1 to 100 characters"),
        (
            json!({"email": "u@example.com", "key_name": "a\0b"}),
            Some("key_name"),
            "must not contain control characters",
        ),
        (json!({"email": "u@example.com"}), Some("key_name"), "is missing"),
        (json!({"email": 1, "key_name": "x"}), Some("email"), "must be a string"),
        (
            json!({"email": "u@example.com", "key_name": "x", "x": 1}),
            Some("x"),
            "is not a known field; the fields are `email` or `key_name`",
        ),
    ] {
        assert_problem(&post(&fixture, &admin, &body).await, 400, "invalid", "Invalid request", detail, field);
    }
    let reply = fixture.get("/api/user/key/user", &admin).await;
    assert_problem(&reply, 400, "invalid", "Invalid request", address, Some("email"));
    let reply = fixture.get("/api/user/key/%00@example.com", &admin).await;
    assert_problem(&reply, 400, "invalid", "Invalid request", address, Some("email"));
    let reply = fixture.get("/api/user/key/%ff", &admin).await;
    assert_problem(&reply, 400, "invalid", "Invalid request", "must be UTF-8, with percent-encoding", Some("email"));

    let large = json!({"email": "u@example.com", "key_name": "x".repeat(100_000)});
    let detail = "The body is larger than this call allows.";
    assert_problem(&post(&fixture, &admin, &large).await, 413, "too_large", "Body too large", detail, None);
    let text = Request::post("/api/user/key").header("x-api-key", admin.reveal()).body(Body::from("{}")).unwrap();
    let detail = "Send the body as JSON, with Content-Type: application/json.";
    let reply = fixture.send(text).await;
    assert_problem(&reply, 415, "unsupported_media_type", "Unsupported media type", detail, None);
    let broken = fixture.send(request("POST", "/api/user/key", Some(&admin), "{\"email\": ")).await;
    let detail = "The body is not JSON: EOF while parsing a value at line 1 column 10.";
    assert_problem(&broken, 400, "invalid", "Invalid request", detail, None);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_caller_that_calls_too_often_is_told_when_to_come_back(pool: PgPool) {
    let fixture = Fixture::with_rate_limit(&pool, 2).await;
    let (_, one) = fixture.key("one@example.com", &[]).await;
    let (_, other) = fixture.key("other@example.com", &[]).await;
    fixture.in_step().await;
    let uri = "/api/user/key/one@example.com";
    assert_eq!(fixture.get(uri, &one).await.status, 200);
    let reply = until_refused(async || fixture.get(uri, &one).await).await;
    let detail = "This caller sends too many requests. Wait as long as Retry-After demands.";
    assert_problem(&reply, 429, "too_many_requests", "Too many requests", detail, None);
    assert_eq!(reply.header("retry-after"), "1");
    assert_eq!(fixture.get("/v1/keys", &other).await.status, 200);

    let without_key = async || fixture.send(request("GET", uri, None, Body::empty())).await;
    assert_eq!(without_key().await.status, 401);
    until_refused(without_key).await;
    // Guesses are limited at both APIs, and known keys are not affected by guesses from their address.
    let guess = Secret::from_presented("sk_live_guess".into());
    for door in ["/v1/keys", "/sync/v1/keys"] {
        until_refused(async || fixture.get(door, &guess).await).await;
    }
    assert_eq!(fixture.get("/v1/keys", &other).await.status, 200);
}

/// Calls until the control plane refuses one with 429. The limit admits two calls at once and one more each second. A slow
/// machine takes seconds for a few calls in turn, so the test sends many at once.
async fn until_refused(call: impl AsyncFn() -> Reply) -> Reply {
    for _ in 0..10 {
        let replies = futures_util::future::join_all((0..8).map(|_| call())).await;
        if let Some(refused) = replies.into_iter().find(|reply| reply.status == 429) {
            return refused;
        }
    }
    panic!("80 calls were admitted")
}

#[sqlx::test(migrations = "./migrations")]
async fn a_bootstrap_key_is_stored_once(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let secret = Secret::from_presented("a key of another system".into());
    let name = KeyName::parse("name", "bootstrap").unwrap();
    let (scopes, email) = (Scopes::parse(vec!["admin".into()]).unwrap(), Email::parse("ops@example.com").unwrap());
    assert!(insert_given(&fixture.app.writer, &secret, &name, &scopes, &email).await.unwrap());
    let before = revision(&pool).await;
    assert!(!insert_given(&fixture.app.writer, &secret, &name, &scopes, &email).await.unwrap());
    assert_eq!(revision(&pool).await, before);
    assert_eq!(fixture.get("/api/user/key/user@example.com", &secret).await.status, 200);
    assert_eq!(fixture.get("/v1/keys", &secret).await.json()["keys"][0]["prefix"], Value::Null);
}

#[sqlx::test(migrations = "./migrations")]
async fn nothing_but_the_hash_and_the_prefix_of_a_key_is_kept_or_shown(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let key = generate(&fixture, &admin, "user@example.com").await;
    let rest = &key.reveal()[14..];
    let kept: String = scalar(&pool, "select string_agg(k::text, ' ') from api_keys k").await;
    assert!(!kept.contains(rest));
    for uri in ["/v1/keys", "/api/user/key/user@example.com", "/api/user/usage/user@example.com"] {
        let reply = fixture.get(uri, &admin).await;
        assert!(!String::from_utf8(reply.body).unwrap().contains(rest), "{uri}");
    }
    let found = find_by_hash(&pool, &key.hash()).await.unwrap();
    assert!(!format!("{key:?} {found:?}").contains(&key.reveal()[8..14]));
}
