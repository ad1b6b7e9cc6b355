//! Repeated requests with one Idempotency-Key.

use std::time::Duration;

use crate::support::{Fixture, Reply, change_key, execute, scalar};
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

fn same(one: &Reply, other: &Reply) {
    let head =
        |reply: &Reply| ["location", "etag", "content-type", "cache-control"].map(|name| reply.header(name).to_owned());
    assert_eq!((one.status, head(one), one.json()), (other.status, head(other), other.json()));
}

async fn keys_of(pool: &PgPool, email: &str) -> i64 {
    let sql = format!(
        "select count(*) from api_keys k join user_preferences p on p.id = k.owner_id where p.email = '{email}'"
    );
    scalar(pool, sql).await
}

#[sqlx::test(migrations = "./migrations")]
async fn a_repeated_create_gets_the_same_answer_and_runs_once(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let first = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "\"one\"").await;
    assert_eq!(first.status, 201, "{}", first.json());
    same(&first, &post(&fixture, "/v1/keys", &admin, Some(&body("n")), "\"one\"").await);
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
    let secret = first.secret();
    assert_eq!(fixture.get("/v1/keys", &secret).await.status, 200);

    // Another name is another request, and so is one without a name.
    post(&fixture, "/v1/keys", &admin, Some(&body("n")), "two").await;
    fixture.post("/v1/keys", &admin, &body("n")).await;
    assert_eq!(keys_of(&pool, "user@example.com").await, 3);

    // The name belongs to the caller.
    let (_, other) = fixture.key("admin@example.com", ADMIN).await;
    let foreign = post(&fixture, "/v1/keys", &other, Some(&body("n")), "one").await;
    assert_eq!(foreign.status, 201);
    assert_ne!(foreign.json()["id"], first.json()["id"]);

    let detail = "Another request used this Idempotency-Key. Use a new one for each request.";
    let mismatch = post(&fixture, "/v1/keys", &admin, Some(&body("another")), "one").await;
    mismatch.assert_problem(422, "idempotency_mismatch", detail, None);
    let id = first.json()["id"].as_str().unwrap().to_owned();
    let elsewhere = post(&fixture, &format!("/v1/keys/{id}/rotate"), &admin, None, "one").await;
    elsewhere.assert_problem(422, "idempotency_mismatch", detail, None);
    let nameless = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "").await;
    nameless.assert_problem(400, "invalid", "Idempotency-Key must have 1 to 255 visible ASCII characters", None);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_repeated_rotation_or_primary_key_gets_the_same_answer(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}/rotate");
    for body in [None, Some(json!({"grace_seconds": 60}))] {
        let name = Uuid::now_v7().to_string();
        let first = post(&fixture, &uri, &admin, body.as_ref(), &name).await;
        assert_eq!(first.status, 201, "{}", first.json());
        same(&first, &post(&fixture, &uri, &admin, body.as_ref(), &name).await);
    }
    assert_eq!(scalar::<i32>(&pool, format!("select generation from api_keys where id = '{id}'")).await, 3);

    let body = json!({"email": "new@example.com", "key_name": "primary"});
    let first = post(&fixture, "/api/user/key", &admin, Some(&body), "primary").await;
    assert_eq!(first.status, 200, "{}", first.json());
    same(&first, &post(&fixture, "/api/user/key", &admin, Some(&body), "primary").await);
    assert_eq!(keys_of(&pool, "new@example.com").await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_request_that_is_still_running_is_not_run_again(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    fixture.key("user@example.com", &[]).await;
    // The first one waits for the row of the user, which another transaction holds.
    let mut elsewhere = pool.begin().await.unwrap();
    let lock = "select from user_preferences where email = 'user@example.com' for update";
    sqlx::query(lock).execute(&mut *elsewhere).await.unwrap();
    let request = body("n");
    let (first, second) = tokio::join!(post(&fixture, "/v1/keys", &admin, Some(&request), "one"), async {
        let waits = "select exists (
            select from pg_locks l join pg_database d on d.oid = l.database
            where d.datname = current_database() and locktype = 'advisory' and granted
        )";
        while !scalar::<bool>(&pool, waits).await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let second = post(&fixture, "/v1/keys", &admin, Some(&request), "one").await;
        elsewhere.rollback().await.unwrap();
        second
    });
    let detail = "The first request with this Idempotency-Key is still running. Try again shortly.";
    second.assert_problem(409, "idempotency_in_progress", detail, None);
    assert_eq!((second.header("retry-after"), first.status), ("1", 201));
    same(&first, &post(&fixture, "/v1/keys", &admin, Some(&request), "one").await);
    assert_eq!(keys_of(&pool, "user@example.com").await, 2);
}

#[sqlx::test(migrations = "./migrations")]
async fn of_concurrent_requests_with_one_idempotency_key_one_runs(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let request = body("n");
    let one = || post(&fixture, "/v1/keys", &admin, Some(&request), "one");
    let (a, b, c, d) = tokio::join!(one(), one(), one(), one());
    let mut statuses = [a, b, c, d].map(|reply| reply.status);
    statuses.sort_unstable();
    assert!(statuses[0] == 201 && statuses.iter().all(|status| [201, 409].contains(status)), "{statuses:?}");
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_failed_request_stores_nothing_and_may_be_repeated(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}/rotate");
    change_key(&pool, id, "expires_at = now()").await;
    assert_eq!(post(&fixture, &uri, &admin, None, "one").await.status, 409);
    assert_eq!(scalar::<i64>(&pool, "select count(*) from idempotent_replies").await, 0);
    change_key(&pool, id, "expires_at = null").await;
    assert_eq!(post(&fixture, &uri, &admin, None, "one").await.status, 201);

    // A fact whose answer cannot be kept is no fact.
    let full = "alter table idempotent_replies add constraint full_up check (idempotency_key <> 'two')";
    execute(&pool, full).await;
    assert_eq!(post(&fixture, "/v1/keys", &admin, Some(&body("n")), "two").await.status, 500);
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn stored_answers_are_encrypted_and_expire_after_a_day(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let first = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    let kept: Vec<u8> = scalar(&pool, "select body from idempotent_replies").await;
    assert!(kept.len() == first.body.len() + 16 && !kept.windows(8).any(|window| window == b"sk_live_"));

    // Nor can an answer be put in the place of another.
    post(&fixture, "/v1/keys", &admin, Some(&body("other")), "two").await;
    let swap = "update idempotent_replies one set body = two.body, nonce = two.nonce from idempotent_replies two
        where one.idempotency_key = 'one' and two.idempotency_key = 'two'";
    execute(&pool, swap).await;
    let swapped = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    assert_eq!(swapped.status, 422);

    let day = "update idempotent_replies set created_at = now() - interval '25 hours'";
    execute(&pool, day).await;
    let again = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    assert_eq!(again.status, 201);
    assert_ne!(again.json()["id"], first.json()["id"]);
    assert_eq!(control_plane::api::idempotency::tidy(&pool).await.unwrap(), 1);
    same(&again, &post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await);
}

const OLD_SECRET: &str = "This request was handled before, and an old secret cannot read its response. Use the current secret, or \
                          ask an admin to rotate the key.";

#[sqlx::test(migrations = "./migrations")]
async fn an_old_secret_cannot_read_the_answer_that_names_its_successor(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (id, old) = fixture.key("user@example.com", &[]).await;
    let (uri, grace) = (format!("/v1/keys/{id}/rotate"), json!({"grace_seconds": 3_600}));
    let rotated = post(&fixture, &uri, &old, Some(&grace), "one").await;
    assert_eq!(rotated.status, 201, "{}", rotated.json());
    // The old secret still works. A thief may know the body and the idempotency key of the request.
    assert_eq!(fixture.get("/v1/keys", &old).await.status, 200);
    let replayed = post(&fixture, &uri, &old, Some(&grace), "one").await;
    replayed.assert_forbidden(OLD_SECRET);
    assert!(!String::from_utf8_lossy(&replayed.body).contains("sk_live_"));

    // Nor does the new secret read it: it is sealed under the old one.
    let new = rotated.secret();
    let detail = "The first request used another secret of this key. Only that secret can read the response.";
    post(&fixture, &uri, &new, Some(&grace), "one").await.assert_problem(422, "idempotency_mismatch", detail, None);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_old_secret_cannot_read_any_stored_answer(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (caller, admin) = fixture.key("admin@example.com", ADMIN).await;
    let first = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    same(&first, &post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await);
    let (uri, grace) = (format!("/v1/keys/{caller}/rotate"), json!({"grace_seconds": 60}));
    let rotated = fixture.post(&uri, &admin, &grace).await;
    assert_eq!(rotated.status, 201);
    let replayed = post(&fixture, "/v1/keys", &admin, Some(&body("n")), "one").await;
    replayed.assert_forbidden(OLD_SECRET);
    assert_eq!(keys_of(&pool, "user@example.com").await, 1);
}
