//! Rotation of keys.

use crate::support::{Fixture, Reply, change_key, execute, id_of, revision, revoke, secret_of};
use contract::key::{KeyKind, Secret, check};
use serde_json::{Value, json};
use sqlx::PgPool;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

async fn rotate(fixture: &Fixture, caller: &Secret, id: Uuid, body: Option<&Value>) -> Reply {
    fixture.call("POST", &format!("/v1/keys/{id}/rotate"), caller, body).await
}

async fn rotated(fixture: &Fixture, caller: &Secret, id: Uuid, grace_seconds: i64) -> Secret {
    let reply = rotate(fixture, caller, id, Some(&json!({"grace_seconds": grace_seconds}))).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
    reply.secret()
}

async fn secrets(fixture: &Fixture, caller: &Secret, id: Uuid) -> Vec<Value> {
    let reply = fixture.get(&format!("/v1/keys/{id}"), caller).await;
    reply.json()["secrets"].as_array().unwrap().clone()
}

#[sqlx::test(migrations = "./migrations")]
async fn a_rotated_key_has_two_secrets_until_the_grace_ends_and_keeps_all_else(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let body = json!({
        "email": "user@example.com", "name": "kept", "kind": "test", "scopes": ["orders:read"], "expires_in_seconds": 86_400,
        "rate_limits": [{"name": "burst", "requests": 10, "window_seconds": 1}],
    });
    let created = fixture.post("/v1/keys", &admin, &body).await.json();
    let id: Uuid = id_of(&created);
    let old = secret_of(&created);
    for (generation, requests) in [(1, 40), (2, 2)] {
        let sql =
            format!("insert into key_usage values ('{id}', '{generation}', '{requests}', '2026-05-16 09:12:43.5Z')");
        execute(&pool, sql).await;
    }

    let before = OffsetDateTime::now_utc();
    let reply = rotate(&fixture, &admin, id, Some(&json!({"grace_seconds": 3_600}))).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
    assert_eq!((reply.header("location"), reply.header("etag")), (&*format!("/v1/keys/{id}"), "\"2\""));
    assert_eq!(reply.header("cache-control"), "no-store");
    let new = reply.secret();
    assert_eq!(check(new.reveal()), Ok(KeyKind::Test));
    let mut expected = created.clone();
    expected["secret"] = new.reveal().into();
    expected["prefix"] = new.display_prefix().into();
    expected["generation"] = 2.into();
    expected["usage_count"] = 42.into();
    expected["last_used_at"] = "2026-05-16T09:12:43Z".into();
    assert_eq!(reply.json(), expected, "what else there is to see of the key is as it was");

    assert_eq!((fixture.opens(&old).await, fixture.opens(&new).await), (json!("allowed"), json!("allowed")));
    let known = secrets(&fixture, &admin, id).await;
    let ends_at = known[1]["ends_at"].clone();
    let secret = |generation: i32, of: &Secret, ends_at: &Value, usage_count: i64| {
        json!({
            "generation": generation, "prefix": of.display_prefix(), "current": ends_at.is_null(), "ends_at": ends_at,
            "usage_count": usage_count, "last_used_at": "2026-05-16T09:12:43Z",
        })
    };
    assert_eq!(known, [secret(2, &new, &Value::Null, 2), secret(1, &old, &ends_at, 40)]);
    let ends_at = OffsetDateTime::parse(ends_at.as_str().unwrap(), &Rfc3339).unwrap();
    let grace = (ends_at - before).as_seconds_f64();
    assert!((3_600.0..3_615.0).contains(&grace), "{grace}");

    // Filters have both: the old one with its end, both under one key with its limits.
    fixture.in_step().await;
    let record = |secret: &Secret| fixture.app.store.find(&secret.hash()).unwrap();
    let (was, is) = (record(&old), record(&new));
    assert_eq!((was.generation, is.generation), (1, 2));
    assert_eq!(was.expires_at_s, Some(ends_at.unix_timestamp().cast_unsigned()));
    let end = OffsetDateTime::parse(created["expires_at"].as_str().unwrap(), &Rfc3339).unwrap();
    assert_eq!(is.expires_at_s, Some(end.unix_timestamp().cast_unsigned()));
    assert_eq!((was.key_id, &was.rate_limits, &was.scopes), (is.key_id, &is.rate_limits, &is.scopes));

    // The old one ends by itself: here its end is moved into the past.
    execute(&pool, "update retired_secrets set ends_at = now()").await;
    assert_eq!((fixture.opens(&old).await, fixture.opens(&new).await), (json!("expired"), json!("allowed")));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_grace_never_outlives_the_key(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, old) = fixture.key("user@example.com", &[]).await;
    let end = json!({"expires_in_seconds": 60});
    fixture.patch(&format!("/v1/keys/{id}"), &admin, &end).await;
    rotated(&fixture, &admin, id, 86_400).await;
    fixture.in_step().await;
    let record = fixture.app.store.find(&old.hash()).unwrap();
    let left = record.expires_at_s.unwrap().cast_signed() - OffsetDateTime::now_utc().unix_timestamp();
    assert!((30..=61).contains(&left), "{left}");
    // Revoking the key revokes all of its secrets.
    revoke(&pool, id).await;
    assert_eq!(fixture.opens(&old).await, "revoked");
}

#[sqlx::test(migrations = "./migrations")]
async fn without_grace_and_without_a_body_the_old_secret_is_dead_at_once(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    // The primary key of a user, by the user, with the key itself.
    let body = json!({"email": "user@example.com", "key_name": "primary"});
    let generated = fixture.post("/api/user/key", &admin, &body).await.json();
    let old = secret_of(&generated);
    let listed = fixture.get("/v1/keys", &old).await.json();
    let id: Uuid = listed["keys"][0]["id"].as_str().unwrap().parse().unwrap();
    let reply = rotate(&fixture, &old, id, None).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
    let new = reply.secret();
    assert_eq!(check(new.reveal()), Ok(KeyKind::Live));
    assert_eq!((fixture.opens(&old).await, fixture.opens(&new).await), (json!("expired"), json!("allowed")));
    let status = fixture.get("/api/user/key/user@example.com", &admin).await.json();
    assert_eq!(status["keyPreference"]["keyPrefix"], json!(new.display_prefix()));
}

#[sqlx::test(migrations = "./migrations")]
async fn an_old_secret_is_cut_off_when_asked_and_the_present_one_is_not(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, first) = fixture.key("user@example.com", &[]).await;
    let second = rotated(&fixture, &admin, id, 3_600).await;
    let third = rotated(&fixture, &admin, id, 3_600).await;
    let cut = async |generation: i32| fixture.delete(&format!("/v1/keys/{id}/secrets/{generation}"), &admin).await;
    let reply = cut(1).await;
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    for (secret, outcome) in [(&first, "expired"), (&second, "allowed"), (&third, "allowed")] {
        assert_eq!(fixture.opens(secret).await, outcome);
    }
    let (ended, at) = (secrets(&fixture, &admin, id).await, revision(&pool).await);
    assert_eq!(cut(1).await.status, 204);
    assert_eq!((secrets(&fixture, &admin, id).await, revision(&pool).await), (ended, at), "once is enough");
    cut(4).await.assert_not_found(&format!("Key {id} has no secret 4."));
    cut(3).await.assert_conflict("This is the current secret of the key. Rotate, disable or revoke the key instead.");
    let reply = fixture.delete(&format!("/v1/keys/{id}/secrets/x"), &admin).await;
    assert_eq!((reply.status, &reply.json()["field"]), (400, &json!("generation")), "{}", reply.json());
}

#[sqlx::test(migrations = "./migrations")]
async fn an_ended_or_foreign_key_is_not_rotated_and_old_secrets_are_bounded(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    for grace in [-1, 30 * 86_400 + 1] {
        let reply = rotate(&fixture, &admin, id, Some(&json!({"grace_seconds": grace}))).await;
        reply.assert_invalid("grace_seconds", "must be a number from 0 to 2592000, which is thirty days");
    }
    for _ in 0..8 {
        rotated(&fixture, &admin, id, 30 * 86_400).await;
    }
    let detail = "This key already has 8 active old secrets. Revoke one first, or rotate without grace_seconds.";
    rotate(&fixture, &admin, id, Some(&json!({"grace_seconds": 1}))).await.assert_conflict(detail);
    rotated(&fixture, &admin, id, 0).await;
    fixture.delete(&format!("/v1/keys/{id}/secrets/3"), &admin).await;
    rotated(&fixture, &admin, id, 1).await;
    assert_eq!(secrets(&fixture, &admin, id).await.len(), 11);

    change_key(&pool, id, "expires_at = now()").await;
    let detail = "This key has expired and cannot be rotated. Set a later expires_at first.";
    rotate(&fixture, &admin, id, None).await.assert_conflict(detail);
    revoke(&pool, id).await;
    rotate(&fixture, &admin, id, None).await.assert_conflict("This key is revoked and cannot be rotated.");

    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (foreign, _) = fixture.key("other@example.com", &[]).await;
    rotate(&fixture, &user, foreign, None).await.assert_not_found(&format!("There is no key {foreign}."));
    let (privileged, _) = fixture.key("user@example.com", &["sync"]).await;
    let detail = "Only an admin changes or revokes a key with the scope sync. Use a key with the scope admin.";
    rotate(&fixture, &user, privileged, None).await.assert_forbidden(detail);
    // A rotation returns the new secret. A user must not get the secret of a key with more scopes.
    let (sibling, _) = fixture.key("user@example.com", &["orders:write"]).await;
    let detail = "A key can rotate only itself. Use the key that is to be rotated, or a key with the scope admin.";
    rotate(&fixture, &user, sibling, None).await.assert_forbidden(detail);
    let (own, old) = fixture.key("user@example.com", &[]).await;
    let grace = json!({"grace_seconds": 60});
    assert_eq!(rotate(&fixture, &old, own, Some(&grace)).await.status, 201);
    let detail = "An old secret cannot rotate its key. Use the current secret.";
    rotate(&fixture, &old, own, None).await.assert_forbidden(detail);
}

#[sqlx::test(migrations = "./migrations")]
async fn rotations_at_the_same_time_lose_no_secret(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, first) = fixture.key("user@example.com", &[]).await;
    let one = || rotated(&fixture, &admin, id, 600);
    let (a, b, c, d) = tokio::join!(one(), one(), one(), one());
    for secret in [first, a, b, c, d] {
        assert_eq!(fixture.opens(&secret).await, "allowed");
    }
    let generations: Vec<_> =
        secrets(&fixture, &admin, id).await.iter().map(|secret| secret["generation"].clone()).collect();
    assert_eq!(generations, [5, 4, 3, 2, 1]);
}

#[sqlx::test(migrations = "./migrations")]
async fn secrets_that_ended_long_ago_are_forgotten_and_never_come_back(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, old) = fixture.key("user@example.com", &[]).await;
    rotated(&fixture, &admin, id, 0).await;
    let withdraw = async || control_plane::keys::purge::forget_old(&pool, 30).await.unwrap();
    let before = revision(&pool).await;
    assert_eq!((withdraw().await, revision(&pool).await), (0, before));
    execute(&pool, "update retired_secrets set ends_at = now() - interval '31 days'").await;
    assert_eq!(withdraw().await, 1);
    fixture.in_step().await;
    assert!(fixture.app.store.find(&old.hash()).is_none());
    assert_eq!(secrets(&fixture, &admin, id).await.len(), 1);
    let line = json!({"email": "user@example.com", "name": "again", "key": old.reveal()}).to_string();
    assert_eq!(fixture.import(&admin, line).await.json()["errors"][0]["code"], "duplicate");
    let error = sqlx::query("delete from retired_secrets").execute(&pool).await.unwrap_err().to_string();
    assert!(error.contains("never deleted: set their end instead"), "{error}");
}
