//! The last admin key: each way to end it by accident is refused.

use crate::support::{Fixture, execute};
use contract::key::Secret;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

const ADMIN: &[&str] = &["admin"];

const DETAIL: &str = "This is the last key with the scope admin that is valid for more than one day. \
                      Create another admin key first.";

/// Sends a request that would end the only admin key: it is refused and changes nothing. Beside a second admin key it
/// succeeds.
async fn refused_for_the_last(fixture: &Fixture, method: &str, uri: &str, body: Option<&Value>, admin: &Secret) {
    let shown = fixture.get("/v1/keys", admin).await.json();
    fixture.call(method, uri, admin, body).await.assert_conflict(DETAIL);
    assert_eq!(fixture.get("/v1/keys", admin).await.json(), shown);
    fixture.key("other@example.com", ADMIN).await;
    let status = fixture.call(method, uri, admin, body).await.status;
    assert!((200..300).contains(&status), "{method} {uri} beside another one: {status}");
}

async fn with_one_admin(pool: PgPool) -> (Fixture, Uuid, Secret, String) {
    let fixture = Fixture::new(&pool).await;
    let (id, admin) = fixture.key("admin@example.com", ADMIN).await;
    // Neither of them manages keys.
    fixture.key("admin@example.com", &["sync"]).await;
    fixture.key("user@example.com", &["admin:not"]).await;
    (fixture, id, admin, format!("/v1/keys/{id}"))
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_is_not_revoked(pool: PgPool) {
    let (fixture, _, admin, uri) = with_one_admin(pool).await;
    refused_for_the_last(&fixture, "DELETE", &uri, None, &admin).await;
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_is_not_switched_off(pool: PgPool) {
    let (fixture, _, admin, uri) = with_one_admin(pool).await;
    refused_for_the_last(&fixture, "PATCH", &uri, Some(&json!({"disabled": true})), &admin).await;
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_is_not_made_to_end_within_a_day(pool: PgPool) {
    let (fixture, _, admin, uri) = with_one_admin(pool).await;
    // Later ends leave time to make another.
    let later = json!({"expires_in_seconds": 2 * 86_400});
    assert_eq!(fixture.patch(&uri, &admin, &later).await.status, 200);
    refused_for_the_last(&fixture, "PATCH", &uri, Some(&json!({"expires_in_seconds": 86_000})), &admin).await;
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_is_not_revoked_with_all_of_its_user(pool: PgPool) {
    let (fixture, _, admin, _) = with_one_admin(pool).await;
    let user = fixture.user("admin@example.com").await;
    refused_for_the_last(&fixture, "POST", &format!("{user}/revoke-keys"), None, &admin).await;
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_is_not_lost_as_the_primary_key_of_its_user(pool: PgPool) {
    let (fixture, id, admin, _) = with_one_admin(pool.clone()).await;
    let primary = format!("update user_preferences set primary_key_id = '{id}' where email = 'admin@example.com'");
    execute(&pool, primary).await;
    let new = json!({"email": "admin@example.com", "key_name": "a new one"});
    fixture.post("/api/user/key", &admin, &new).await.assert_conflict(DETAIL);
    refused_for_the_last(&fixture, "DELETE", "/api/user/key/admin@example.com", None, &admin).await;
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_does_not_lose_its_scope(pool: PgPool) {
    let (fixture, id, admin, uri) = with_one_admin(pool.clone()).await;
    // No call of the REST API changes scopes.
    let reply = fixture.patch(&uri, &admin, json!({"scopes": []})).await;
    assert_eq!((reply.status, &reply.json()["code"]), (400, &json!("invalid")));
    // An SQL statement by hand is refused, unless it sets portcullis.force.
    let by_hand = async |before: &str| {
        let sql = format!("begin; {before} update api_keys set scopes = '{{orders:read}}' where id = '{id}'; commit");
        let mut connection = pool.acquire().await.unwrap();
        let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await;
        // Whatever is left of the transaction ends with the connection.
        connection.close().await.unwrap();
        done.map(|_| ()).map_err(|error| error.as_database_error().and_then(|e| e.constraint()).unwrap().to_owned())
    };
    assert_eq!(by_hand("").await, Err("api_keys_last_admin".into()));
    assert_eq!(fixture.get(&uri, &admin).await.json()["scopes"], json!(["admin"]));
    assert_eq!(by_hand("set local portcullis.force = 'on';").await, Ok(()));
    assert_eq!(fixture.get("/v1/users", &admin).await.status, 403);
}

#[sqlx::test(migrations = "./migrations")]
async fn two_admins_who_revoke_each_other_at_once_do_not_both_succeed(pool: PgPool) {
    let (fixture, one, first, _) = with_one_admin(pool).await;
    let (other, second) = fixture.key("other@example.com", ADMIN).await;
    let end = async |caller: &Secret, id: Uuid| fixture.delete(&format!("/v1/keys/{id}"), caller).await.status;
    let (a, b) = tokio::join!(end(&first, other), end(&second, one));
    assert_eq!([a, b].iter().filter(|status| **status == 204).count(), 1, "{a} {b}");
    let alive = async |key: &Secret| fixture.get("/v1/users", key).await.status == 200;
    assert_ne!(alive(&first).await, alive(&second).await);
}

const DETAIL_HERE: &str = "After this change, no admin key that is valid for more than one day could be used \
                      from your address. Add your address to allowed_addresses, or create an admin key without allowed_addresses first.";

/// What callers of the router that tell no address come from.
const HERE: &str = "0.0.0.0/32";
const ELSEWHERE: &str = "192.0.2.1/32";

async fn bind(fixture: &Fixture, caller: &Secret, id: Uuid, networks: &[&str]) -> crate::support::Reply {
    let body = json!({"allowed_addresses": networks});
    fixture.patch(&format!("/v1/keys/{id}"), caller, &body).await
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_is_not_bound_to_networks_that_its_holder_is_not_in(pool: PgPool) {
    let (fixture, id, admin, uri) = with_one_admin(pool).await;
    bind(&fixture, &admin, id, &[ELSEWHERE]).await.assert_conflict(DETAIL_HERE);
    assert_eq!(fixture.get(&uri, &admin).await.json()["allowed_addresses"], json!([]));
    // To those that hold the caller it is, and from there to no others.
    assert_eq!(bind(&fixture, &admin, id, &[ELSEWHERE, HERE]).await.status, 200);
    bind(&fixture, &admin, id, &[ELSEWHERE, "::/0"]).await.assert_conflict(DETAIL_HERE);
    assert_eq!(fixture.get("/v1/users", &admin).await.status, 200);
    let (other, _) = fixture.key("other@example.com", ADMIN).await;
    assert_eq!(bind(&fixture, &admin, id, &[ELSEWHERE]).await.status, 200);
    assert_ne!(other, id);
}

#[sqlx::test(migrations = "./migrations")]
async fn the_last_admin_key_that_works_here_is_not_ended_for_one_that_works_elsewhere(pool: PgPool) {
    let (fixture, id, admin, uri) = with_one_admin(pool.clone()).await;
    let revoke_all = format!("{}/revoke-keys", fixture.user("admin@example.com").await);
    let (other, _) = fixture.key("other@example.com", ADMIN).await;
    assert_eq!(bind(&fixture, &admin, other, &[ELSEWHERE]).await.status, 200);
    for (method, uri, body) in [
        ("DELETE", uri.as_str(), None),
        ("PATCH", uri.as_str(), Some(json!({"disabled": true}))),
        ("PATCH", uri.as_str(), Some(json!({"expires_in_seconds": 60}))),
        ("POST", revoke_all.as_str(), None),
    ] {
        fixture.call(method, uri, &admin, body.as_ref()).await.assert_conflict(DETAIL_HERE);
    }
    // A change by hand has no address: keys that are bound to networks do not count.
    let by_hand = "update api_keys set networks = '{192.0.2.1/32}' where id = $1";
    let error = sqlx::query(by_hand).bind(id).execute(&pool).await.unwrap_err();
    assert_eq!(error.as_database_error().and_then(|error| error.constraint()), Some("api_keys_last_admin_here"));
    // What changes nothing of it is let through: a plan of the owner, which reaches all keys.
    assert_eq!(bind(&fixture, &admin, other, &[HERE]).await.status, 200);
    assert_eq!(fixture.delete(&uri, &admin).await.status, 204);
    let metered = "update user_preferences set metered = true where email = 'other@example.com'";
    execute(&pool, metered).await;
}
