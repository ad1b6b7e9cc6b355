//! A transaction has ended before its answer is sent. The PostgreSQL of these tests takes long to roll back.

use crate::support::reports::{count, submit};
use crate::support::slow_rollback::SlowRollback;
use crate::support::{Fixture, Reply, change_key, execute, revoke};
use contract::id::ReporterId;
use contract::outcome::Outcome;
use contract::usage::Report;
use control_plane::api;
use control_plane::change::{Writer, transact};
use control_plane::metering::Ingest;
use serde_json::{Value, json};
use sqlx::PgPool;

/// Method, URI, body, headers, and the status of the refusal.
type Case<'a> = (&'a str, &'a str, Option<&'a Value>, &'a [(&'static str, &'a str)], u16);

const STALE: &[(&str, &str)] = &[("if-match", "\"0\"")];

/// A fixture whose requests and reports reach the database through the proxy. The feed, which only reads, does not.
async fn slow(pool: &PgPool) -> (Fixture, SlowRollback) {
    let mut fixture = Fixture::new(pool).await;
    let slow = SlowRollback::to_database_of(pool);
    fixture.app.writer = Writer::new(slow.pool.clone(), fixture.app.store.waker().clone());
    (fixture.app.pool, fixture.app.usage) = (slow.pool.clone(), Ingest::start(slow.pool.clone()).0);
    fixture.router = api::router(fixture.app.clone(), None);
    (fixture, slow)
}

/// A refusal after which one more transaction was rolled back, and none is open.
fn assert_ended(slow: &SlowRollback, before: usize, status: u16, what: &str, reply: &Reply) {
    let (open, rolled_back) = (slow.open(), slow.rolled_back() - before);
    let body = String::from_utf8_lossy(&reply.body);
    assert_eq!((reply.status, open, rolled_back), (status, 0, 1), "{what}: {body}");
}

/// What these tests would see of a handler that leaves the rollback to a dropped transaction.
#[sqlx::test(migrations = "./migrations")]
async fn a_transaction_that_is_only_dropped_is_still_open(pool: PgPool) {
    let slow = SlowRollback::to_database_of(&pool);
    let mut transaction = slow.pool.begin().await.unwrap();
    sqlx::query("select from store_state for update").execute(&mut *transaction).await.unwrap();
    drop(transaction);
    assert_eq!((slow.open(), slow.rolled_back()), (1, 0));
    let refused = transact(&slow.pool, async |_| Err::<(), _>(sqlx::Error::RowNotFound)).await;
    assert!(matches!(refused, Err(sqlx::Error::RowNotFound)));
    // That of the second is awaited; that of the first came before or beside it.
    assert!(slow.rolled_back() >= 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_refused_change_is_rolled_back_before_it_is_answered(pool: PgPool) {
    let (fixture, slow) = slow(&pool).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (live, _) = fixture.key("user@example.com", &[]).await;
    let (dead, _) = fixture.key("user@example.com", &[]).await;
    revoke(&pool, dead).await;
    assert_eq!(fixture.put("/v1/roles/used", &admin, json!({})).await.status, 201);
    let used = json!({"roles": ["used"]});
    assert_eq!(fixture.patch(&format!("/v1/keys/{live}"), &admin, &used).await.status, 200);

    let (live, dead) = (format!("/v1/keys/{live}"), format!("/v1/keys/{dead}"));
    let no_plan = json!({"email": "user@example.com", "name": "n", "plan": "none"});
    let (name, empty) = (json!({"name": "n"}), json!({}));
    let metered = json!({"metered": true});
    let user = fixture.user("user@example.com").await;
    let full = "insert into ledger (owner_id, kind, amount, balance) select id, 'top_up', 1000000000000000, 0 from user_preferences
        where email = 'user@example.com'";
    execute(&pool, full).await;
    let too_much = json!({"kind": "top_up", "amount": 1, "note": "n"});
    let cases: [Case<'_>; 14] = [
        ("POST", "/v1/keys", Some(&no_plan), &[], 400),
        ("POST", "/v1/keys", Some(&no_plan), &[("idempotency-key", "one")], 400),
        ("POST", &format!("{dead}/rotate"), None, &[], 409),
        ("PATCH", &dead, Some(&name), &[], 409),
        ("PATCH", &live, Some(&name), STALE, 412),
        ("DELETE", &live, None, STALE, 412),
        ("DELETE", &format!("{live}/secrets/7"), None, &[], 404),
        ("DELETE", "/api/user/key/user@example.com", None, &[], 404),
        ("POST", "/v1/users/00000000-0000-0000-0000-000000000000/revoke-keys", None, &[], 404),
        ("PATCH", &user, Some(&json!({"plan": "none"})), &[], 400),
        ("PATCH", &user, Some(&metered), STALE, 412),
        ("POST", &format!("{user}/ledger"), Some(&too_much), &[], 409),
        ("PUT", "/v1/roles/used", Some(&empty), STALE, 412),
        ("DELETE", "/v1/roles/used", None, &[], 409),
    ];
    for (method, uri, body, headers, status) in cases {
        let before = slow.rolled_back();
        let reply = fixture.call_with(method, uri, &admin, body, headers).await;
        assert_ended(&slow, before, status, &format!("{method} {uri}"), &reply);
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_fault_of_the_database_is_rolled_back_before_it_is_answered(pool: PgPool) {
    let (fixture, slow) = slow(&pool).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    let (key, _) = fixture.key("user@example.com", &[]).await;
    for broken in [
        "alter table api_keys add constraint broken check (name <> 'broken')",
        "alter table usage_hourly add constraint broken check (requests < 7)",
        "alter table idempotent_replies add constraint broken check (idempotency_key <> 'broken')",
    ] {
        execute(&pool, broken).await;
    }

    let before = slow.rolled_back();
    let line = json!({"email": "user@example.com", "name": "broken", "key": "imported-key-1234"}).to_string();
    assert_ended(&slow, before, 500, "an import", &fixture.import(&admin, line).await);

    let before = slow.rolled_back();
    let body = json!({"email": "user@example.com", "name": "n"});
    let reply = fixture.call_with("POST", "/v1/keys", &admin, Some(&body), &[("idempotency-key", "broken")]).await;
    assert_ended(&slow, before, 500, "an answer that is not kept", &reply);

    let before = slow.rolled_back();
    let report = Report { reporter: ReporterId([1; 16]), seq: 1, counts: vec![count(key, Outcome::Allowed, 7)] };
    assert_ended(&slow, before, 503, "a usage report", &submit(&fixture, &sync, &[report]).await);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_failed_request_may_be_repeated_at_once_with_the_same_idempotency_key(pool: PgPool) {
    let (fixture, _slow) = slow(&pool).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let post = async || {
        let uri = format!("/v1/keys/{id}/rotate");
        fixture.call_with("POST", &uri, &admin, None, &[("idempotency-key", "one")]).await
    };
    change_key(&pool, id, "expires_at = now()").await;
    assert_eq!(post().await.json()["code"], "conflict");
    // The control plane does not answer that the first request is still in progress.
    assert_eq!(post().await.json()["code"], "conflict");
    change_key(&pool, id, "expires_at = null").await;
    assert_eq!(post().await.status, 201);
}
