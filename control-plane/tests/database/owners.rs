//! What one owner may make in a day and leaves behind in filters and in the database, over the real router and a real
//! PostgreSQL.

use crate::support::{Fixture, Reply, request, revision, revoke};
use axum::body::Body;
use contract::key::Secret;
use control_plane::api;
use control_plane::audit::delete_old;
use control_plane::keys::purge::{REMEMBERED, delete_ended};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const USER: &str = "user@example.com";

async fn bounded(pool: &PgPool, per_day: u32) -> Fixture {
    let mut fixture = Fixture::new(pool.clone()).await;
    fixture.app.bounds.owner_keys_per_day = per_day;
    fixture.router = api::router(fixture.app.clone(), None);
    fixture
}

fn secret_of(reply: &Reply) -> Secret {
    assert!(reply.status.is_success(), "{}", reply.json());
    let reply = reply.json();
    let secret = reply.get("secret").unwrap_or(&reply["key"]);
    Secret::from_presented(secret.as_str().unwrap().into())
}

fn id_of(reply: &Reply) -> Uuid {
    reply.json()["id"].as_str().unwrap().parse().unwrap()
}

async fn create(fixture: &Fixture, caller: &Secret, more: Value) -> Reply {
    let mut body = json!({"email": USER, "name": "n"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fixture.call("POST", "/v1/keys", caller, Some(&body)).await
}

async fn rotate(fixture: &Fixture, caller: &Secret, id: Uuid) -> Reply {
    fixture.call("POST", &format!("/v1/keys/{id}/rotate"), caller, None).await
}

async fn primary(fixture: &Fixture, caller: &Secret) -> Reply {
    let body = json!({"email": USER, "key_name": "primary"});
    fixture.call("POST", "/api/user/key", caller, Some(&body)).await
}

/// What filters know of a secret, as far as it matters here: nothing, or whether it was revoked.
fn known(fixture: &Fixture, secret: &Secret) -> Option<bool> {
    let record = fixture.app.store.find(&secret.hash())?;
    Some(record.flags.contains(contract::record::Flags::REVOKED))
}

#[sqlx::test(migrations = "./migrations")]
async fn an_owner_makes_so_many_keys_and_rotations_a_day_and_is_told_when_to_try_again(pool: PgPool) {
    let fixture = bounded(&pool, 4).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (id, user) = fixture.key(USER, &[]).await;
    let name = [("idempotency-key", "one")];
    let body = json!({"email": USER, "name": "n"});
    for _ in 0..2 {
        // What comes again is not counted again.
        let reply = fixture.call_with("POST", "/v1/keys", &user, Some(&body), &name).await;
        assert_eq!(reply.status.as_u16(), 201, "{}", reply.json());
    }
    let other = create(&fixture, &user, json!({})).await;
    secret_of(&primary(&fixture, &user).await);
    // What fails is not counted.
    assert_eq!(create(&fixture, &user, json!({"scopes": ["b"]})).await.status.as_u16(), 403);
    let stale =
        fixture.call_with("POST", &format!("/v1/keys/{id}/rotate"), &user, None, &[("if-match", "\"9\"")]).await;
    assert_eq!(stale.status.as_u16(), 412);
    let user = secret_of(&rotate(&fixture, &user, id).await);

    let before = revision(&pool).await;
    let refused = [
        create(&fixture, &user, json!({})).await,
        primary(&fixture, &user).await,
        rotate(&fixture, &user, id).await,
        // It counts by owner, and not by key.
        create(&fixture, &secret_of(&other), json!({})).await,
    ];
    for reply in refused {
        let wait: u64 = reply.header("retry-after").parse().unwrap();
        assert!((86_000..=86_400).contains(&wait), "{wait}");
        let detail = format!(
            "The keys of this user may make 4 keys and rotations in 24 hours; this limit is reached. Retry in {wait} seconds, or ask \
             an admin."
        );
        reply.assert_problem(429, "bound_reached", &detail, None);
    }
    assert_eq!(revision(&pool).await, before, "no filter is woken");

    // Neither other users nor admins are bound by it.
    let (_, another) = fixture.key("another@example.com", &[]).await;
    let body = json!({"email": "another@example.com", "name": "n"});
    assert_eq!(fixture.call("POST", "/v1/keys", &another, Some(&body)).await.status.as_u16(), 201);
    assert_eq!(create(&fixture, &admin, json!({})).await.status.as_u16(), 201);
    assert_eq!(rotate(&fixture, &admin, id).await.status.as_u16(), 201);

    let day = "update user_preferences set makes_since = makes_since - interval '1 day'";
    sqlx::query(day).execute(&pool).await.unwrap();
    assert_eq!(create(&fixture, &secret_of(&other), json!({})).await.status.as_u16(), 201);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_owner_changes_keys_so_often_a_day_and_revokes_them_at_any_time(pool: PgPool) {
    let fixture = bounded(&pool, 1).await;
    let (id, user) = fixture.key(USER, &[]).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let uri = format!("/v1/keys/{id}");
    let rename =
        async |caller: &Secret, name: &str| fixture.call("PATCH", &uri, caller, Some(&json!({"name": name}))).await;
    for number in 0..10 {
        assert_eq!(rename(&user, &format!("{number}")).await.status.as_u16(), 200);
    }
    let refused = rename(&user, "once more").await;
    let wait = refused.header("retry-after");
    let detail = format!(
        "The keys of this user may change keys 10 times in 24 hours; this limit is reached. Retry in {wait} seconds, or ask an admin."
    );
    refused.assert_problem(429, "bound_reached", &detail, None);
    assert_eq!(rename(&admin, "by an admin").await.status.as_u16(), 200);
    assert_eq!(create(&fixture, &user, json!({})).await.status.as_u16(), 201);
    assert_eq!(fixture.call("DELETE", &uri, &user, None).await.status.as_u16(), 204);
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_that_replaced_each_other_leave_filters_but_for_the_last_few(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (_, first) = fixture.key(USER, &[]).await;
    let mut secrets = vec![secret_of(&primary(&fixture, &first).await)];
    for _ in 0..REMEMBERED + 5 {
        let next = primary(&fixture, secrets.last().unwrap()).await;
        secrets.push(secret_of(&next));
    }
    fixture.in_step().await;
    let (dead, live) = secrets.split_at(secrets.len() - 1);
    let (forgotten, remembered) = dead.split_at(5);
    assert_eq!(known(&fixture, &live[0]), Some(false));
    assert!(remembered.iter().all(|secret| known(&fixture, secret) == Some(true)));
    assert!(forgotten.iter().all(|secret| known(&fixture, secret).is_none()));
    assert_eq!(fixture.app.store.keys(), 2 + REMEMBERED.cast_unsigned());
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_that_rotates_itself_leaves_its_last_few_secrets_in_filters(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (id, first) = fixture.key(USER, &[]).await;
    let mut secrets = vec![first];
    for _ in 0..REMEMBERED + 5 {
        let next = rotate(&fixture, secrets.last().unwrap(), id).await;
        secrets.push(secret_of(&next));
    }
    fixture.in_step().await;
    assert_eq!(fixture.app.store.keys(), 1 + REMEMBERED.cast_unsigned());
    assert!(secrets[..5].iter().all(|secret| known(&fixture, secret).is_none()));
    assert!(secrets[5..].iter().all(|secret| known(&fixture, secret) == Some(false)));
}

#[sqlx::test(migrations = "./migrations")]
async fn all_keys_of_a_user_that_are_revoked_at_once_leave_filters_but_for_a_few(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    for _ in 0..REMEMBERED + 5 {
        fixture.key(USER, &[]).await;
    }
    let all = fixture.call("POST", &format!("{}/revoke-keys", fixture.user(USER).await), &admin, None).await.json();
    assert_eq!(all, json!({"revoked": REMEMBERED + 5, "skipped": 0}));
    fixture.in_step().await;
    assert_eq!(fixture.app.store.keys(), 1 + REMEMBERED.cast_unsigned());
}

#[sqlx::test(migrations = "./migrations")]
async fn an_expired_key_that_filters_forgot_comes_back_with_what_its_owner_has_now(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (_, user) = fixture.key(USER, &[]).await;
    let expired = create(&fixture, &user, json!({"expires_in_seconds": 600})).await;
    for _ in 0..REMEMBERED {
        create(&fixture, &user, json!({"expires_in_seconds": 900})).await;
    }
    let end = "update api_keys set expires_at = expires_at - interval '1 hour' where expires_at < now() + interval '20 minutes'";
    sqlx::query(end).execute(&pool).await.unwrap();
    create(&fixture, &user, json!({})).await;
    fixture.in_step().await;
    assert_eq!(known(&fixture, &secret_of(&expired)), None);
    assert_eq!(fixture.app.store.keys(), 3 + REMEMBERED.cast_unsigned());

    let plan = json!({"rate_limits": [], "quota": {"requests": 1_600, "period": "day"}});
    assert_eq!(fixture.call("PUT", "/v1/plans/gold", &admin, Some(&plan)).await.status.as_u16(), 201);
    let gold = json!({"plan": "gold"});
    assert_eq!(fixture.call("PATCH", &fixture.user(USER).await, &admin, Some(&gold)).await.status.as_u16(), 200);
    let later = json!({"expires_in_seconds": 3_600});
    let uri = format!("/v1/keys/{}", id_of(&expired));
    assert_eq!(fixture.call("PATCH", &uri, &admin, Some(&later)).await.json()["effective_plan"], "gold");
    fixture.in_step().await;
    let record = fixture.app.store.find(&secret_of(&expired).hash()).unwrap();
    assert!(record.further.plan.is_some());
    assert_eq!(record.further.quota.map(|quota| quota.starter), Some(100));
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_that_ended_long_ago_are_deleted_where_that_is_chosen_unless_usage_names_them(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (user, _) = fixture.key(USER, &[]).await;
    let mut ids = Vec::new();
    for _ in 0..REMEMBERED + 3 {
        let (id, _) = fixture.key(USER, &[]).await;
        rotate(&fixture, &admin, id).await;
        revoke(&pool, id).await;
        ids.push(id);
    }
    let counted = "insert into usage_daily (key_id, day, outcome, requests, cost) values ($1, now(), 0, 7, 0)";
    sqlx::query(counted).bind(ids[0]).execute(&pool).await.unwrap();
    let total = "insert into key_usage (key_id, generation, requests, last_used_at) values ($1, 1, 7, now())";
    sqlx::query(total).bind(ids[0]).execute(&pool).await.unwrap();
    sqlx::query("update user_preferences set primary_key_id = $1 where email = $2")
        .bind(ids[1])
        .bind(USER)
        .execute(&pool)
        .await
        .unwrap();
    let usage =
        async || fixture.call("GET", &format!("/v1/usage?email={USER}"), &admin, None).await.json()["usage"].clone();
    let before = usage().await;
    assert_eq!(before[0]["requests"], 7);

    // Nothing that ended lately goes, and nothing that filters still know.
    assert_eq!(delete_ended(&pool, 30).await.unwrap(), 0);
    let old = "update api_keys set revoked_at = revoked_at - interval '31 days' where revoked_at is not null";
    sqlx::query(old).execute(&pool).await.unwrap();
    assert_eq!(delete_ended(&pool, 30).await.unwrap(), 2);
    let left = "select k.id from api_keys k join user_preferences p on p.id = k.owner_id where p.email = $1 order by k.created_at";
    let left: Vec<Uuid> = sqlx::query_scalar(left).bind(USER).fetch_all(&pool).await.unwrap();
    assert_eq!(left, [&[user, ids[0]], &ids[3..]].concat());
    assert_eq!(usage().await, before);
    let error = sqlx::query("delete from api_keys").execute(&pool).await.unwrap_err().to_string();
    assert!(error.contains("never deleted: revoke the key instead"), "{error}");

    let entries: i64 = sqlx::query_scalar("select count(*) from audit").fetch_one(&pool).await.unwrap();
    sqlx::query("update audit set at = now() - interval '40 days' where id <= 5").execute(&pool).await.unwrap();
    assert_eq!((delete_old(&pool, 41).await.unwrap(), delete_old(&pool, 39).await.unwrap()), (0, 5));
    let kept: i64 = sqlx::query_scalar("select count(*) from audit").fetch_one(&pool).await.unwrap();
    assert_eq!(kept, entries - 5);
}

#[sqlx::test(migrations = "./migrations")]
async fn users_do_not_read_who_an_administrator_is_and_where(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (admin_id, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (id, user) = fixture.key(USER, &[]).await;
    for (caller, name) in [(&user, "mine"), (&admin, "theirs")] {
        let body = json!({"name": name});
        assert_eq!(fixture.call("PATCH", &format!("/v1/keys/{id}"), caller, Some(&body)).await.status.as_u16(), 200);
    }
    let trail = async |caller: &Secret, query: &str| {
        let reply = fixture.call("GET", &format!("/v1/audit?action=key.update{query}"), caller, None).await;
        assert_eq!(reply.status.as_u16(), 200);
        let entries = reply.json()["entries"].as_array().unwrap().clone();
        let who = |entry: &Value| ["actor_email", "actor_key_id", "address"].map(|field| entry[field].clone());
        entries.iter().map(who).collect::<Vec<_>>()
    };
    let own = [json!(USER), json!(id), json!("0.0.0.0")];
    assert_eq!(trail(&user, "").await, [[json!("an administrator"), Value::Null, Value::Null], own.clone()]);
    let theirs = [json!("admin@example.com"), json!(admin_id), json!("0.0.0.0")];
    assert_eq!(trail(&admin, "").await, [theirs, own.clone()]);
    // Nor does a guess of the key tell.
    assert_eq!(trail(&user, &format!("&actor_key_id={admin_id}")).await, <[[Value; 3]; 0]>::default());
    assert_eq!(trail(&user, &format!("&actor_key_id={id}")).await, [own]);
    let body = fixture.send(request("GET", "/v1/audit", Some(&user), Body::empty())).await.body;
    let body = String::from_utf8(body).unwrap();
    assert!(!body.contains("admin@example.com") && !body.contains(&admin_id.to_string()), "{body}");
}
