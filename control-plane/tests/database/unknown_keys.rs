//! Keys that filters do not know and clients use: noted by their hashes, listed, imported and forgotten.

use contract::hash::KeyHash;
use contract::key::Secret;
use contract::pepper::Pepper;
use contract::sightings::{Sightings, UNKNOWN_KEYS};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Fixture, Reply, execute, request, scalar};

async fn note(fixture: &Fixture, sync: &Secret, keys: &[&str]) -> Reply {
    let unknown_keys = keys.iter().map(|key| KeyHash::of(key.as_bytes())).collect();
    fixture.note(sync, &Sightings { unknown_keys, policies: Vec::new() }).await
}

fn hash(key: &str) -> String {
    format!("sha256:{}", hex::encode(KeyHash::of(key.as_bytes()).0))
}

async fn listed(fixture: &Fixture, admin: &Secret) -> Vec<Value> {
    let pages = fixture.pages("/v1/unknown-keys", "", "keys", "hash", admin).await;
    pages.into_iter().flatten().collect()
}

fn sorted(keys: &[&str]) -> Vec<Value> {
    let mut hashes: Vec<String> = keys.iter().map(|key| hash(key)).collect();
    hashes.sort();
    hashes.into_iter().map(Value::from).collect()
}

#[sqlx::test(migrations = "./migrations")]
async fn unknown_keys_are_listed_until_they_are_imported(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (_, known) = fixture.key("user@example.com", &[]).await;
    let keys = ["the-first-old-key", "the-second-old-key", "the-third-old-key"];
    note(&fixture, &sync, &keys[..2]).await.assert_ok();
    execute(
        &pool,
        "update unknown_keys set first_seen_at = now() - interval '1 day', last_seen_at = now() - interval '1 day'",
    )
    .await;
    note(&fixture, &sync, &[keys[1], keys[2], keys[2], known.reveal()]).await.assert_ok();
    assert_eq!(listed(&fixture, &admin).await, sorted(&keys));
    let seen = "select count(*) from unknown_keys where last_seen_at > first_seen_at + interval '23 hours'";
    assert_eq!(scalar::<i64>(&pool, seen).await, 1);
    let line = json!({"email": "user@example.com", "name": "Adopted", "hash": hash(keys[1])}).to_string();
    assert_eq!(fixture.import(&admin, line).await.expect(200)["imported"], 1);
    assert_eq!(listed(&fixture, &admin).await, sorted(&[keys[0], keys[2]]));
    assert_eq!(fixture.opens(&Secret::from_presented(keys[1].into())).await, "allowed");
    // An Envoy that does not have the imported key yet may send it again. It is not listed.
    note(&fixture, &sync, &keys[1..2]).await.assert_ok();
    assert_eq!(fixture.delete("/v1/unknown-keys", &admin).await.expect(200), json!({"forgotten": 2}));
    assert_eq!(listed(&fixture, &admin).await, Vec::<Value>::new());
    let trail = fixture.get("/v1/audit?action=unknown_keys.forget", &admin).await.json();
    assert_eq!(trail["entries"][0]["detail"], json!({"forgotten": 2}));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_that_was_imported_with_a_pepper_or_rotated_away_is_not_unknown(pool: PgPool) {
    let (mut fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    fixture.configure(|app| app.pepper = Some(Pepper::parse(&"5e".repeat(32)).unwrap()));
    let (id, rotated) = fixture.key("user@example.com", &[]).await;
    fixture.call("POST", &format!("/v1/keys/{id}/rotate"), &admin, None).await.expect(201);
    let line = json!({"email": "user@example.com", "name": "n", "key": "the-first-old-key"}).to_string();
    assert_eq!(fixture.import(&admin, line).await.expect(200)["imported"], 1);
    note(&fixture, &sync, &["the-first-old-key", "the-second-old-key", rotated.reveal()]).await.assert_ok();
    assert_eq!(listed(&fixture, &admin).await, sorted(&["the-second-old-key"]));
}

#[sqlx::test(migrations = "./migrations")]
async fn the_number_of_unknown_keys_is_bounded(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let full = "insert into unknown_keys (hash) select sha256(n::text::bytea) from generate_series(1, 100000) n";
    execute(&pool, full).await;
    // While the table is full, only keys that are in it are noted.
    note(&fixture, &sync, &["1", "another-old-key"]).await.assert_ok();
    assert_eq!(scalar::<i64>(&pool, "select count(*) from unknown_keys").await, 100_000);
    let renewed = "select count(*) from unknown_keys where last_seen_at > first_seen_at";
    assert_eq!(scalar::<i64>(&pool, renewed).await, 1);
    execute(&pool, "update unknown_keys set last_seen_at = now() - interval '31 days' where hash <> sha256('1')").await;
    assert_eq!(control_plane::keys::unknown::forget_old(&pool).await.unwrap(), 99_999);
    let unknown_keys = vec![KeyHash([7; 32]); UNKNOWN_KEYS + 1];
    let reply = fixture.note(&sync, &Sightings { unknown_keys, policies: Vec::new() }).await;
    reply.assert_invalid("unknown_keys", "must have at most 1000 entries");
    assert_eq!(note(&fixture, &admin, &["a-key"]).await.status, 403);
    let reply = fixture.send(request("POST", "/sync/v1/sightings", Some(&sync), "x")).await;
    assert_eq!(reply.status, 400);
}
