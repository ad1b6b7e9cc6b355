//! Limits of one owner: keys and changes a day, ended keys in filters, rows in the database.

use crate::support::{Fixture, Reply, execute, id_of, revision, revoke, scalar};
use contract::key::{KeyKind, Secret, check};
use control_plane::audit::delete_old;
use control_plane::keys::purge::{REMEMBERED, delete_ended};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const USER: &str = "user@example.com";

async fn bounded(pool: &PgPool, per_day: u32) -> Fixture {
    let mut fixture = Fixture::new(pool).await;
    fixture.configure(|app| app.owner_keys_per_day = per_day);
    fixture
}

async fn rotate(fixture: &Fixture, caller: &Secret, id: Uuid) -> Reply {
    fixture.call("POST", &format!("/v1/keys/{id}/rotate"), caller, None).await
}

async fn primary(fixture: &Fixture, caller: &Secret) -> Reply {
    let body = json!({"email": USER, "key_name": "primary"});
    fixture.post("/api/user/key", caller, &body).await
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
        assert_eq!(reply.status, 201, "{}", reply.json());
    }
    let other = fixture.create(&user, json!({})).await;
    primary(&fixture, &user).await.secret();
    // What fails is not counted.
    assert_eq!(fixture.create(&user, json!({"scopes": ["b"]})).await.status, 403);
    let stale =
        fixture.call_with("POST", &format!("/v1/keys/{id}/rotate"), &user, None, &[("if-match", "\"9\"")]).await;
    assert_eq!(stale.status, 412);
    let user = rotate(&fixture, &user, id).await.secret();

    let before = revision(&pool).await;
    let refused = [
        fixture.create(&user, json!({})).await,
        primary(&fixture, &user).await,
        rotate(&fixture, &user, id).await,
        // It counts by owner, and not by key.
        fixture.create(&other.secret(), json!({})).await,
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
    assert_eq!(fixture.post("/v1/keys", &another, &body).await.status, 201);
    assert_eq!(fixture.create(&admin, json!({})).await.status, 201);
    assert_eq!(rotate(&fixture, &admin, id).await.status, 201);

    let day = "update user_preferences set makes_since = makes_since - interval '1 day'";
    execute(&pool, day).await;
    assert_eq!(fixture.create(&other.secret(), json!({})).await.status, 201);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_owner_changes_keys_so_often_a_day_and_revokes_them_at_any_time(pool: PgPool) {
    let fixture = bounded(&pool, 1).await;
    let (id, user) = fixture.key(USER, &[]).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let uri = format!("/v1/keys/{id}");
    let rename = async |caller: &Secret, name: &str| fixture.patch(&uri, caller, json!({"name": name})).await;
    for number in 0..10 {
        assert_eq!(rename(&user, &format!("{number}")).await.status, 200);
    }
    let refused = rename(&user, "once more").await;
    let wait = refused.header("retry-after");
    let detail = format!(
        "The keys of this user may change keys 10 times in 24 hours; this limit is reached. Retry in {wait} seconds, or ask an admin."
    );
    refused.assert_problem(429, "bound_reached", &detail, None);
    assert_eq!(rename(&admin, "by an admin").await.status, 200);
    assert_eq!(fixture.create(&user, json!({})).await.status, 201);
    assert_eq!(fixture.delete(&uri, &user).await.status, 204);
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_that_replaced_each_other_leave_filters_but_for_the_last_few(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (_, first) = fixture.key(USER, &[]).await;
    let mut secrets = vec![primary(&fixture, &first).await.secret()];
    for _ in 0..REMEMBERED + 5 {
        let next = primary(&fixture, secrets.last().unwrap()).await;
        secrets.push(next.secret());
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
        secrets.push(next.secret());
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
    let expired = fixture.create(&user, json!({"expires_in_seconds": 600})).await;
    for _ in 0..REMEMBERED {
        fixture.create(&user, json!({"expires_in_seconds": 900})).await;
    }
    let end = "update api_keys set expires_at = expires_at - interval '1 hour' where expires_at < now() + interval '20 minutes'";
    execute(&pool, end).await;
    fixture.create(&user, json!({})).await;
    fixture.in_step().await;
    assert_eq!(known(&fixture, &expired.secret()), None);
    assert_eq!(fixture.app.store.keys(), 3 + REMEMBERED.cast_unsigned());

    let plan = json!({"rate_limits": [], "quota": {"requests": 1_600, "period": "day"}});
    assert_eq!(fixture.put("/v1/plans/gold", &admin, &plan).await.status, 201);
    let gold = json!({"plan": "gold"});
    assert_eq!(fixture.patch(&fixture.user(USER).await, &admin, &gold).await.status, 200);
    let later = json!({"expires_in_seconds": 3_600});
    let uri = format!("/v1/keys/{}", id_of(&expired.json()));
    assert_eq!(fixture.patch(&uri, &admin, &later).await.json()["effective_plan"], "gold");
    fixture.in_step().await;
    let record = fixture.app.store.find(&expired.secret().hash()).unwrap();
    assert!(record.plan.is_some());
    assert_eq!(record.quota.map(|quota| quota.fill), Some(1));
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
    let counted = "insert into usage_daily (key_id, day, outcome, requests, cost)
        values ($1, date_trunc('day', now() - interval '2 days', 'UTC'), 0, 7, 0)";
    sqlx::query(counted).bind(ids[0]).execute(&pool).await.unwrap();
    let total = "insert into key_usage (key_id, generation, requests, last_used_at) values ($1, 1, 7, now())";
    sqlx::query(total).bind(ids[0]).execute(&pool).await.unwrap();
    execute(&pool, format!("update user_preferences set primary_key_id = '{}' where email = '{USER}'", ids[1])).await;
    let usage = async || fixture.get(&format!("/v1/usage?email={USER}"), &admin).await.json()["usage"].clone();
    let before = usage().await;
    assert_eq!(before[0]["requests"], 7);

    // Nothing that ended lately goes, and nothing that filters still know.
    assert_eq!(delete_ended(&pool, 30).await.unwrap(), 0);
    let old = "update api_keys set revoked_at = revoked_at - interval '31 days' where revoked_at is not null";
    execute(&pool, old).await;
    assert_eq!(delete_ended(&pool, 30).await.unwrap(), 2);
    let left = "select k.id from api_keys k join user_preferences p on p.id = k.owner_id where p.email = $1 order by k.created_at";
    let left: Vec<Uuid> = sqlx::query_scalar(left).bind(USER).fetch_all(&pool).await.unwrap();
    assert_eq!(left, [&[user, ids[0]], &ids[3..]].concat());
    assert_eq!(usage().await, before);
    let error = sqlx::query("delete from api_keys").execute(&pool).await.unwrap_err().to_string();
    assert!(error.contains("never deleted: revoke the key instead"), "{error}");

    let entries: i64 = scalar(&pool, "select count(*) from audit").await;
    execute(&pool, "update audit set at = now() - interval '40 days' where id <= 5").await;
    assert_eq!((delete_old(&pool, 41).await.unwrap(), delete_old(&pool, 39).await.unwrap()), (0, 5));
    assert_eq!(scalar::<i64>(&pool, "select count(*) from audit").await, entries - 5);
}

#[sqlx::test(migrations = "./migrations")]
async fn users_do_not_read_who_an_administrator_is_and_where(pool: PgPool) {
    let fixture = bounded(&pool, 1_000).await;
    let (admin_id, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (id, user) = fixture.key(USER, &[]).await;
    for (caller, name) in [(&user, "mine"), (&admin, "theirs")] {
        let body = json!({"name": name});
        assert_eq!(fixture.patch(&format!("/v1/keys/{id}"), caller, &body).await.status, 200);
    }
    let trail = async |caller: &Secret, query: &str| {
        let reply = fixture.get(&format!("/v1/audit?action=key.update{query}"), caller).await;
        assert_eq!(reply.status, 200);
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
    let body = fixture.get("/v1/audit", &user).await.body;
    let body = String::from_utf8(body).unwrap();
    assert!(!body.contains("admin@example.com") && !body.contains(&admin_id.to_string()), "{body}");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_test_key_makes_itself_no_live_key(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, test) = fixture.created(&admin, json!({"email": USER, "name": "n", "kind": "test"})).await;
    let (_, live) = fixture.key(USER, &[]).await;
    let detail = "A test key creates test keys only. Leave kind out, or use a live key.";
    fixture.create(&test, json!({"kind": "live"})).await.assert_forbidden(detail);
    for (caller, fields, kind) in [
        (&test, json!({}), KeyKind::Test),
        (&test, json!({"kind": "test"}), KeyKind::Test),
        (&live, json!({}), KeyKind::Live),
        (&live, json!({"kind": "test"}), KeyKind::Test),
    ] {
        let made = fixture.create(caller, fields.clone()).await;
        assert_eq!(check(made.secret().reveal()), Ok(kind), "{fields}");
        assert_eq!(made.json()["kind"], kind.name());
    }
    let made = primary(&fixture, &test).await.json();
    assert_eq!(check(made["key"].as_str().unwrap()), Ok(KeyKind::Test));
}
