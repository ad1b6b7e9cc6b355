//! Requests that come again under one Idempotency-Key, over the real router and a real PostgreSQL.

use std::time::Duration;

use crate::support::{Fixture, Reply};
use contract::key::Secret;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const ADMIN: &[&str] = &["admin"];

fn body(name: &str) -> Value {
    json!({"email": "user@example.com", "name": name})
}

async fn post(fixture: &Fixture, uri: &str, caller: &Secret, body: Option<&Value>, key: &str) -> Reply {
    fixture.call_with("POST", uri, caller, body, &[("idempotency-key", key)]).await
}

fn assert_problem(reply: &Reply, status: u16, code: &str, detail: &str) {
    let body = reply.json();
    assert_eq!((reply.status.as_u16(), &body["code"], &body["detail"]), (status, &json!(code), &json!(detail)));
}

fn same(one: &Reply, other: &Reply) {
    let head =
        |reply: &Reply| ["location", "etag", "content-type", "cache-control"].map(|name| reply.header(name).to_owned());
    assert_eq!((one.status, head(one), one.json()), (other.status, head(other), other.json()));
}

async fn keys_of(pool: &PgPool, email: &str) -> i64 {
    sqlx::query_scalar(
        "select count(*) from api_keys k join user_preferences p on p.id = k.owner_id where p.email = $1",
    )
    .bind(email)
    .fetch_one(pool)
    .await
    .unwrap()
}

#[sqlx::test(migrations = "./migrations")]
async fn a_create_that_comes_again_is_answered_alike_and_done_once(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let first = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "\"one\"").await;
    assert_eq!(first.status.as_u16(), 201, "{}", first.json());
    same(&first, &post(&fixture, "/v1/keys", &admin, Some(&body("n")), "\"one\"").await);
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
    let secret = Secret::from_presented(first.json()["secret"].as_str().unwrap().into());
    assert_eq!(fixture.call("GET", "/v1/keys", &secret, None).await.status.as_u16(), 200);

    // Another name is another request, and so is one without a name.
    post(&fixture, "/v1/keys", &admin, Some(&body("n")), "two").await;
    fixture.call("POST", "/v1/keys", &admin, Some(&body("n"))).await;
    assert_eq!(keys_of(&pool, "user@example.com").await, 3);

    // The name belongs to the caller.
    let (_, other) = fixture.key("admin@example.com", ADMIN).await;
    let foreign = post(&fixture, "/v1/keys", &other, Some(&body("n")), "one").await;
    assert_eq!(foreign.status.as_u16(), 201);
    assert_ne!(foreign.json()["id"], first.json()["id"]);

    let detail = "Another request used this Idempotency-Key. Use a new one for each request.";
    let mismatch = post(&fixture, "/v1/keys", &admin, Some(&body("another")), "one").await;
    assert_problem(&mismatch, 422, "idempotency_mismatch", detail);
    let id = first.json()["id"].as_str().unwrap().to_owned();
    let elsewhere = post(&fixture, &format!("/v1/keys/{id}/rotate"), &admin, None, "one").await;
    assert_problem(&elsewhere, 422, "idempotency_mismatch", detail);
    let nameless = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "").await;
    let detail = "Idempotency-Key must have 1 to 255 visible ASCII characters";
    assert_problem(&nameless, 400, "invalid", detail);
}

#[sqlx::test(migrations = "./migrations")]
async fn rotations_and_primary_keys_come_again_too(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}/rotate");
    for body in [None, Some(json!({"grace_seconds": 60}))] {
        let name = Uuid::now_v7().to_string();
        let first = post(&fixture, &uri, &admin, body.as_ref(), &name).await;
        assert_eq!(first.status.as_u16(), 201, "{}", first.json());
        same(&first, &post(&fixture, &uri, &admin, body.as_ref(), &name).await);
    }
    let generation: i32 =
        sqlx::query_scalar("select generation from api_keys where id = $1").bind(id).fetch_one(&pool).await.unwrap();
    assert_eq!(generation, 3);

    let body = json!({"email": "new@example.com", "key_name": "primary"});
    let first = post(&fixture, "/api/user/key", &admin, Some(&body), "primary").await;
    assert_eq!(first.status.as_u16(), 200, "{}", first.json());
    same(&first, &post(&fixture, "/api/user/key", &admin, Some(&body), "primary").await);
    assert_eq!(keys_of(&pool, "new@example.com").await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_request_that_is_being_done_is_not_done_twice(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    fixture.key("user@example.com", &[]).await;
    // The first one waits for the row of the user, which somebody else holds.
    let mut elsewhere = pool.begin().await.unwrap();
    sqlx::query("select from user_preferences where email = 'user@example.com' for update")
        .execute(&mut *elsewhere)
        .await
        .unwrap();
    let request = body("n");
    let (first, second) = tokio::join!(post(&fixture, "/v1/keys", &admin, Some(&request), "one"), async {
        let waits = "select exists (
            select from pg_locks l join pg_database d on d.oid = l.database
            where d.datname = current_database() and locktype = 'advisory' and granted
        )";
        while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&pool).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let second = post(&fixture, "/v1/keys", &admin, Some(&request), "one").await;
        elsewhere.rollback().await.unwrap();
        second
    });
    let detail = "The first request with this Idempotency-Key is still running. Try again shortly.";
    assert_problem(&second, 409, "idempotency_in_progress", detail);
    assert_eq!((second.header("retry-after"), first.status.as_u16()), ("1", 201));
    same(&first, &post(&fixture, "/v1/keys", &admin, Some(&request), "one").await);
    assert_eq!(keys_of(&pool, "user@example.com").await, 2);
}

#[sqlx::test(migrations = "./migrations")]
async fn of_many_at_once_one_is_done(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let request = body("n");
    let one = || post(&fixture, "/v1/keys", &admin, Some(&request), "one");
    let (a, b, c, d) = tokio::join!(one(), one(), one(), one());
    let mut statuses = [a, b, c, d].map(|reply| reply.status.as_u16());
    statuses.sort_unstable();
    assert!(statuses[0] == 201 && statuses.iter().all(|status| [201, 409].contains(status)), "{statuses:?}");
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn what_failed_has_left_nothing_and_may_come_again(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}/rotate");
    sqlx::query("update api_keys set expires_at = now() where id = $1").bind(id).execute(&pool).await.unwrap();
    assert_eq!(post(&fixture, &uri, &admin, None, "one").await.status.as_u16(), 409);
    let kept: i64 = sqlx::query_scalar("select count(*) from idempotent_replies").fetch_one(&pool).await.unwrap();
    assert_eq!(kept, 0);
    sqlx::query("update api_keys set expires_at = null where id = $1").bind(id).execute(&pool).await.unwrap();
    assert_eq!(post(&fixture, &uri, &admin, None, "one").await.status.as_u16(), 201);

    // A fact whose answer cannot be kept is no fact.
    let full = "alter table idempotent_replies add constraint full_up check (idempotency_key <> 'two')";
    sqlx::query(full).execute(&pool).await.unwrap();
    assert_eq!(post(&fixture, "/v1/keys", &admin, Some(&body("n")), "two").await.status.as_u16(), 500);
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn the_database_alone_opens_no_answer_and_after_a_day_there_is_none(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let first = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    let kept: Vec<u8> = sqlx::query_scalar("select body from idempotent_replies").fetch_one(&pool).await.unwrap();
    assert!(kept.len() == first.body.len() + 16 && !kept.windows(8).any(|window| window == b"sk_live_"));

    // Nor can an answer be put in the place of another.
    post(&fixture, "/v1/keys", &admin, Some(&body("other")), "two").await;
    let swap = "update idempotent_replies one set body = two.body, nonce = two.nonce from idempotent_replies two
        where one.idempotency_key = 'one' and two.idempotency_key = 'two'";
    sqlx::query(swap).execute(&pool).await.unwrap();
    let swapped = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    assert_eq!(swapped.status.as_u16(), 422);

    let day = "update idempotent_replies set created_at = now() - interval '25 hours'";
    sqlx::query(day).execute(&pool).await.unwrap();
    let again = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    assert_eq!(again.status.as_u16(), 201);
    assert_ne!(again.json()["id"], first.json()["id"]);
    assert_eq!(control_plane::api::idempotency::tidy(&pool).await.unwrap(), 1);
    same(&again, &post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await);
}

const OLD_SECRET: &str = "This request was handled before, and an old secret cannot read its response. Use the current secret, or \
                          ask an admin to rotate the key.";

#[sqlx::test(migrations = "./migrations")]
async fn a_secret_that_was_rotated_away_is_not_told_its_successor(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (id, old) = fixture.key("user@example.com", &[]).await;
    let (uri, grace) = (format!("/v1/keys/{id}/rotate"), json!({"grace_seconds": 3_600}));
    let rotated = post(&fixture, &uri, &old, Some(&grace), "one").await;
    assert_eq!(rotated.status.as_u16(), 201, "{}", rotated.json());
    // The old secret still works, and whoever stole it may know the body and the name of the request.
    assert_eq!(fixture.call("GET", "/v1/keys", &old, None).await.status.as_u16(), 200);
    let replayed = post(&fixture, &uri, &old, Some(&grace), "one").await;
    assert_problem(&replayed, 403, "forbidden", OLD_SECRET);
    assert!(!String::from_utf8_lossy(&replayed.body).contains("sk_live_"));

    // Nor does the new secret read it: it is sealed under the old one.
    let new = Secret::from_presented(rotated.json()["secret"].as_str().unwrap().into());
    let detail = "The first request used another secret of this key. Only that secret can read the response.";
    assert_problem(&post(&fixture, &uri, &new, Some(&grace), "one").await, 422, "idempotency_mismatch", detail);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_secret_that_was_rotated_away_is_told_no_other_answer_either(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (caller, admin) = fixture.key("admin@example.com", ADMIN).await;
    let first = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    same(&first, &post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await);
    let (uri, grace) = (format!("/v1/keys/{caller}/rotate"), json!({"grace_seconds": 60}));
    let rotated = fixture.call("POST", &uri, &admin, Some(&grace)).await;
    assert_eq!(rotated.status.as_u16(), 201);
    let replayed = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    assert_problem(&replayed, 403, "forbidden", OLD_SECRET);
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
}
