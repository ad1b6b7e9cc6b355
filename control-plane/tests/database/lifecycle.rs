//! Preconditions, changes of the expiry, and the revocation of all keys of a user.

use crate::support::{Fixture, Reply, change_key, revision};
use contract::key::Secret;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

async fn patch(fixture: &Fixture, caller: &Secret, id: Uuid, body: &Value) -> Reply {
    fixture.patch(&format!("/v1/keys/{id}"), caller, body).await
}

async fn ending(fixture: &Fixture, admin: &Secret, email: &str, expires_at: &str) -> (Uuid, Secret) {
    fixture.created(admin, json!({"email": email, "name": "ends", "expires_at": expires_at})).await
}

#[sqlx::test(migrations = "./migrations")]
async fn the_end_of_a_key_is_moved_and_taken_away(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, secret) = fixture.key("user@example.com", &[]).await;
    let reply = patch(&fixture, &admin, id, &json!({"expires_at": "2030-01-31T14:00:00.25+02:00"})).await;
    assert_eq!((reply.status, &reply.json()["expires_at"]), (200, &json!("2030-01-31T12:00:01Z")));
    fixture.in_step().await;
    assert_eq!(fixture.app.store.find(&secret.hash()).unwrap().expires_at_s, Some(1_896_091_201));
    let before = revision(&pool).await;
    let reply = patch(&fixture, &admin, id, &json!({"name": "renamed"})).await;
    assert_eq!(reply.json()["expires_at"], "2030-01-31T12:00:01Z", "what is absent stays");
    patch(&fixture, &admin, id, &json!({"expires_at": "2030-01-31T12:00:01Z"})).await;
    assert_eq!(revision(&pool).await, before, "filters have nothing to learn");
    for none in [json!({"expires_at": null}), json!({"expires_in_seconds": null})] {
        let reply = patch(&fixture, &admin, id, &json!({"expires_in_seconds": 60})).await;
        assert!(reply.json()["expires_at"].is_string());
        assert_eq!(patch(&fixture, &admin, id, &none).await.json()["expires_at"], Value::Null);
    }
    fixture.in_step().await;
    assert_eq!(fixture.app.store.find(&secret.hash()).unwrap().expires_at_s, None);

    for (body, field, detail) in [
        (json!({"expires_at": "2020-01-01T00:00:00Z"}), "expires_at", "must be in the future"),
        (
            json!({"expires_in_seconds": 0}),
            "expires_in_seconds",
            "must be a number from 1 to 315360000, which is ten years",
        ),
        (
            json!({"expires_at": null, "expires_in_seconds": 1}),
            "expires_at",
            "give either expires_at or expires_in_seconds, not both",
        ),
    ] {
        patch(&fixture, &admin, id, &body).await.assert_invalid(field, detail);
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_users_key_lets_none_live_longer_than_itself(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (own, user) = ending(&fixture, &admin, "user@example.com", "2030-01-01T00:00:00Z").await;
    let (later, _) = ending(&fixture, &admin, "user@example.com", "2032-01-01T00:00:00Z").await;
    let (endless, _) = fixture.key("user@example.com", &[]).await;
    let to = async |id: Uuid, end: Value| patch(&fixture, &user, id, &json!({"expires_at": end})).await;
    let detail = "expires_at must not be later than the expiry of the calling key.";
    for (id, end) in [
        (own, Value::Null),
        (own, json!("2030-01-01T00:00:01Z")),
        (later, Value::Null),
        (later, json!("2032-01-01T00:00:01Z")),
    ] {
        to(id, end).await.assert_forbidden(detail);
    }
    // A user may shorten the expiry.
    for (id, end) in [(later, "2031-01-01T00:00:00Z"), (endless, "2031-01-01T00:00:00Z"), (own, "2029-01-01T00:00:00Z")]
    {
        assert_eq!(to(id, json!(end)).await.json()["expires_at"], end);
    }
    let (short, _) = ending(&fixture, &admin, "user@example.com", "2028-01-01T00:00:00Z").await;
    assert_eq!(to(short, json!("2028-06-01T00:00:00Z")).await.status, 200);
    change_key(&pool, short, "expires_at = now()").await;
    let detail = "This key has expired. Only a key with the scope admin can extend it.";
    to(short, json!("2028-06-01T00:00:00Z")).await.assert_forbidden(detail);
    let back = patch(&fixture, &admin, short, &json!({"expires_at": null})).await.json();
    assert_eq!((&back["state"], &back["expires_at"]), (&json!("active"), &Value::Null));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_change_is_made_only_of_what_the_client_has_seen(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}");
    let with = async |method: &str, uri: &str, body: Option<Value>, header: &'static str, tags: &str| {
        fixture.call_with(method, uri, &admin, body.as_ref(), &[(header, tags)]).await
    };
    let rename = |name: &str| Some(json!({"name": name}));
    let seen = fixture.get(&uri, &admin).await;
    assert_eq!(seen.header("etag"), "\"1\"");
    let reply = with("GET", &uri, None, "if-none-match", "W/\"1\"").await;
    assert_eq!((reply.status, reply.body.len(), reply.header("etag")), (304, 0, "\"1\""));

    let reply = with("PATCH", &uri, rename("one"), "if-match", "\"7\", \"1\"").await;
    assert_eq!((reply.status, reply.header("etag")), (200, "\"2\""));
    let detail = "The resource has changed since it was read. Read it again and repeat the change with its new ETag.";
    let rotate = format!("{uri}/rotate");
    let cut_off = format!("{uri}/secrets/1");
    for reply in [
        with("PATCH", &uri, rename("two"), "if-match", "\"1\"").await,
        with("PATCH", &uri, rename("two"), "if-match", "W/\"2\"").await,
        with("DELETE", &uri, None, "if-match", "\"1\"").await,
        with("POST", &rotate, None, "if-match", "\"1\"").await,
        with("DELETE", &cut_off, None, "if-match", "\"1\"").await,
    ] {
        reply.assert_problem(412, "precondition_failed", detail, None);
    }
    let key = with("GET", &uri, None, "if-none-match", "\"1\"").await.json();
    assert_eq!((&key["name"], &key["state"], &key["generation"]), (&json!("one"), &json!("active"), &json!(1)));
    // Nothing to change is no change.
    let reply = with("PATCH", &uri, rename("one"), "if-match", "*").await;
    assert_eq!((reply.status, reply.header("etag")), (200, "\"2\""));
    assert_eq!(with("DELETE", &uri, None, "if-match", "\"2\"").await.status, 204);
}

#[sqlx::test(migrations = "./migrations")]
async fn of_changes_at_the_same_time_that_expect_the_same_version_one_is_made(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}");
    let one = async |number: i32| {
        let body = json!({"name": format!("name {number}")});
        fixture.call_with("PATCH", &uri, &admin, Some(&body), &[("if-match", "\"1\"")]).await.status
    };
    let (a, b, c, d) = tokio::join!(one(1), one(2), one(3), one(4));
    let mut statuses = [a, b, c, d];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 412, 412, 412]);
    assert_eq!(fixture.get(&uri, &admin).await.header("etag"), "\"2\"");
}

#[sqlx::test(migrations = "./migrations")]
async fn all_keys_of_a_user_are_revoked_but_those_that_only_an_admin_ends(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (_, second) = fixture.key("user@example.com", &["orders:read"]).await;
    let (_, sync) = fixture.key("user@example.com", &["sync", "orders:read"]).await;
    let (_, other) = fixture.key("other@example.com", &[]).await;
    let all = async |caller: &Secret, email: &str| {
        fixture.call("POST", &format!("{}/revoke-keys", fixture.user(email).await), caller, None).await
    };
    let reply = all(&user, "user@example.com").await;
    assert_eq!((reply.status, reply.json()), (200, json!({"revoked": 2, "skipped": 1})));
    for key in [&user, &second] {
        assert_eq!(fixture.get("/v1/keys", key).await.json()["code"], "revoked");
    }
    assert_eq!(fixture.get("/v1/keys", &sync).await.json()["code"], "forbidden");
    assert_eq!(fixture.get("/v1/keys", &other).await.status, 200);
    assert_eq!(all(&admin, "user@example.com").await.json(), json!({"revoked": 1, "skipped": 0}));
    let before = revision(&pool).await;
    assert_eq!(all(&admin, "user@example.com").await.json(), json!({"revoked": 0, "skipped": 0}));
    assert_eq!(revision(&pool).await, before, "nothing for filters to learn");
}
