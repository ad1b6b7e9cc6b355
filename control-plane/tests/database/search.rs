//! Finding keys, and looking up who did what, over the real router and a real PostgreSQL.

use crate::support::Fixture;
use contract::key::Secret;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const ADMIN: &[&str] = &["admin"];

async fn named(fixture: &Fixture, admin: &Secret, email: &str, name: &str) -> (Uuid, Secret) {
    let body = json!({"email": email, "name": name});
    let created = fixture.call("POST", "/v1/keys", admin, Some(&body)).await.json();
    let secret = Secret::from_presented(created["secret"].as_str().unwrap().into());
    (created["id"].as_str().unwrap().parse().unwrap(), secret)
}

async fn names(fixture: &Fixture, caller: &Secret, query: &str) -> Vec<String> {
    let reply = fixture.call("GET", &format!("/v1/keys?{query}"), caller, None).await;
    assert_eq!(reply.status.as_u16(), 200, "{}", reply.json());
    let reply = reply.json();
    reply["keys"].as_array().unwrap().iter().map(|key| key["name"].as_str().unwrap().to_owned()).collect()
}

async fn change(pool: &PgPool, id: Uuid, columns: &str) {
    let change = sqlx::AssertSqlSafe(format!("update api_keys set {columns} where id = $1"));
    sqlx::query(change).bind(id).execute(pool).await.unwrap();
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_are_found_by_prefix_owner_name_state_and_last_use(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let (first, one) = named(&fixture, &admin, "user@example.com", "Production 100%").await;
    let (second, _) = named(&fixture, &admin, "user@example.com", "production_two").await;
    let (third, _) = named(&fixture, &admin, "user@example.com", "Staging").await;
    let (fourth, user) = named(&fixture, &admin, "user@example.com", "Caller").await;
    named(&fixture, &admin, "other@example.com", "Foreign production").await;

    assert_eq!(
        names(&fixture, &admin, "name=PRODUCTION").await,
        ["Foreign production", "production_two", "Production 100%"]
    );
    assert_eq!(
        names(&fixture, &admin, "name=production&email=user%40example.com").await,
        ["production_two", "Production 100%"]
    );
    assert_eq!(names(&fixture, &user, "name=production").await, ["production_two", "Production 100%"]);
    assert_eq!(names(&fixture, &admin, "name=0%25").await, ["Production 100%"]);
    assert_eq!(names(&fixture, &admin, "name=n_t").await, ["production_two"]);

    change(&pool, second, "prefix = 'abc_1'").await;
    change(&pool, third, "prefix = 'abcd1'").await;
    assert_eq!(names(&fixture, &admin, "prefix=abc").await, ["Staging", "production_two"]);
    assert_eq!(names(&fixture, &admin, "prefix=abc_").await, ["production_two"]);
    let old = one.display_prefix().unwrap();
    fixture.call("POST", &format!("/v1/keys/{first}/rotate"), &admin, None).await;
    assert_eq!(names(&fixture, &admin, &format!("prefix={old}")).await, ["Production 100%"], "by an old secret too");

    change(&pool, first, "disabled = true").await;
    change(&pool, second, "expires_at = now(), disabled = true").await;
    crate::support::revoke(&pool, third).await;
    for (state, found) in
        [("active", "Caller"), ("disabled", "Production 100%"), ("expired", "production_two"), ("revoked", "Staging")]
    {
        assert_eq!(names(&fixture, &user, &format!("state={state}")).await, [found]);
    }

    change(&pool, first, "created_at = '2026-01-01Z'").await;
    change(&pool, second, "created_at = '2026-01-01Z'").await;
    for (id, last) in [(second, "2026-03-01Z"), (fourth, "2026-01-15Z")] {
        sqlx::query("insert into key_usage values ($1, 1, 1, $2::text::timestamptz)")
            .bind(id)
            .bind(last)
            .execute(&pool)
            .await
            .unwrap();
    }
    let before = |day: &str| format!("email=user%40example.com&last_used_before=2026-{day}T00:00:00Z");
    assert_eq!(names(&fixture, &admin, &before("02-01")).await, ["Caller", "Production 100%"]);
    assert_eq!(names(&fixture, &admin, &before("03-02")).await, ["Caller", "production_two", "Production 100%"]);

    for (query, field) in [
        ("state=asleep", "state"),
        ("prefix=", "prefix"),
        ("name=a%00b", "name"),
        ("last_used_before=yesterday", "last_used_before"),
    ] {
        let reply = fixture.call("GET", &format!("/v1/keys?{query}"), &admin, None).await;
        assert_eq!((reply.status.as_u16(), &reply.json()["field"]), (400, &json!(field)), "{}", reply.json());
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn the_next_page_keeps_all_that_was_asked(pool: PgPool) {
    let fixture = Fixture::new(pool).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    for number in 0..5 {
        named(&fixture, &admin, "user@example.com", &format!("á & {number}")).await;
        named(&fixture, &admin, "user@example.com", "another").await;
    }
    let asked =
        "email=user%40example.com&prefix=sk_&name=%C3%A1%20%26&state=active&last_used_before=2099-01-01T00%3A00%3A00Z";
    let (mut uri, mut seen, mut pages) = (format!("/v1/keys?{asked}&limit=2"), Vec::new(), 0);
    loop {
        let reply = fixture.call("GET", &uri, &admin, None).await;
        let page = reply.json();
        seen.extend(page["keys"].as_array().unwrap().iter().map(|key| key["name"].as_str().unwrap().to_owned()));
        pages += 1;
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        uri = format!("/v1/keys?{asked}&cursor={cursor}&limit=2");
        assert_eq!(reply.header("link"), format!("<{uri}>; rel=\"next\""));
    }
    assert_eq!((seen, pages), ((0..5).rev().map(|number| format!("á & {number}")).collect(), 3));
}

#[sqlx::test(migrations = "./migrations")]
async fn every_change_is_in_the_trail_with_its_actor_and_never_a_secret(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (admin_id, admin) = fixture.key("admin@example.com", ADMIN).await;
    let (id, secret) = named(&fixture, &admin, "user@example.com", "n").await;
    let uri = format!("/v1/keys/{id}");
    let mut secrets = vec![secret.reveal().to_owned()];
    let body = json!({"name": "m", "disabled": true, "expires_at": "2030-01-01T00:00:00Z"});
    let headers = [("x-request-id", "0192f0c1-2f0e-7c3a-8a53-3f1f0a9f6e11")];
    fixture.call_with("PATCH", &uri, &admin, Some(&body), &headers).await;
    fixture.call("PATCH", &uri, &admin, Some(&json!({"name": "m"}))).await;
    let grace = json!({"grace_seconds": 60});
    let rotated = fixture.call("POST", &format!("{uri}/rotate"), &admin, Some(&grace)).await.json();
    secrets.push(rotated["secret"].as_str().unwrap().into());
    fixture.call("DELETE", &format!("{uri}/secrets/1"), &admin, None).await;
    let primary = json!({"email": "user@example.com", "key_name": "primary"});
    for _ in 0..2 {
        let generated = fixture.call("POST", "/api/user/key", &admin, Some(&primary)).await.json();
        secrets.push(generated["key"].as_str().unwrap().into());
    }
    fixture.call("DELETE", "/api/user/key/user@example.com", &admin, None).await;
    fixture.call("DELETE", &uri, &admin, None).await;
    let user = fixture.user("user@example.com").await;
    fixture.call("POST", &format!("{user}/revoke-keys"), &admin, None).await;

    let trail = fixture.call("GET", "/v1/audit", &admin, None).await.json();
    let entries = trail["entries"].as_array().unwrap();
    let done: Vec<_> = entries.iter().rev().map(|entry| entry["action"].as_str().unwrap()).collect();
    let expected = [
        "key.create",
        "key.create",
        "key.update",
        "key.rotate",
        "secret.revoke",
        "key.create",
        "key.revoke",
        "key.create",
        "key.revoke",
        "key.revoke",
        "user.revoke_keys",
    ];
    assert_eq!(done, expected);
    assert_eq!(entries[10]["actor_key_id"], Value::Null, "the command line");
    let change = &entries[8];
    let expected = json!({
        "id": change["id"], "at": change["at"], "actor_key_id": admin_id, "actor_email": "admin@example.com",
        "address": "0.0.0.0", "request_id": "0192f0c1-2f0e-7c3a-8a53-3f1f0a9f6e11", "action": "key.update", "key_id": id, "target": null,
        "detail": {
            "name": {"from": "n", "to": "m"}, "disabled": {"from": false, "to": true},
            "expires_at": {"from": null, "to": "2030-01-01T00:00:00Z"},
        },
    });
    assert_eq!(change, &expected);
    assert_eq!(entries[7]["detail"], json!({"retired": 1, "grace_seconds": 60}));
    assert_eq!(
        (&entries[0]["target"], &entries[0]["detail"]),
        (&json!("user@example.com"), &json!({"revoked": 0, "skipped": 0}))
    );
    let all = trail.to_string();
    for secret in secrets {
        assert!(!all.contains(&secret[8..]));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn the_trail_is_filtered_and_paged_and_users_see_their_own(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (admin_id, admin) = fixture.key("admin@example.com", ADMIN).await;
    let (id, user) = named(&fixture, &admin, "user@example.com", "n").await;
    named(&fixture, &admin, "other@example.com", "foreign").await;
    for number in 0..4 {
        fixture.call("PATCH", &format!("/v1/keys/{id}"), &user, Some(&json!({"name": format!("{number}")}))).await;
    }
    let other = fixture.user("other@example.com").await;
    fixture.call("POST", &format!("{other}/revoke-keys"), &admin, None).await;
    let actions = async |caller: &Secret, query: &str| {
        let reply = fixture.call("GET", &format!("/v1/audit?{query}"), caller, None).await;
        assert_eq!(reply.status.as_u16(), 200, "{}", reply.json());
        let reply = reply.json();
        let entries = reply["entries"].as_array().unwrap();
        entries.iter().map(|entry| entry["action"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let own = ["key.update", "key.update", "key.update", "key.update", "key.create"];
    assert_eq!(actions(&admin, &format!("key_id={id}")).await, own);
    assert_eq!(actions(&user, "").await, own);
    assert_eq!(actions(&admin, &format!("actor_key_id={id}")).await, own[..4]);
    assert_eq!(actions(&admin, &format!("actor_key_id={admin_id}&action=key.create")).await, ["key.create"; 2]);
    assert_eq!(actions(&admin, "target=other%40example.com").await, ["user.revoke_keys"]);
    assert!(actions(&user, "target=other%40example.com").await.is_empty());
    assert!(actions(&admin, "to=2020-01-01T00:00:00Z").await.is_empty());
    assert_eq!(actions(&admin, "from=2020-01-01T00:00:00Z&to=2099-01-01T00:00:00Z").await.len(), 9);

    let (mut uri, mut seen) = (format!("/v1/audit?key_id={id}&limit=2"), Vec::new());
    loop {
        let reply = fixture.call("GET", &uri, &admin, None).await;
        let page = reply.json();
        seen.extend(page["entries"].as_array().unwrap().iter().map(|entry| entry["id"].as_i64().unwrap()));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        uri = format!("/v1/audit?key_id={id}&cursor={cursor}&limit=2");
        assert_eq!(reply.header("link"), format!("<{uri}>; rel=\"next\""));
    }
    assert!(seen.len() == 5 && seen.is_sorted_by(|one, next| one > next), "{seen:?}");
    for (query, field) in [("from=x", Some("from")), ("key_id=x", Some("key_id")), ("action=a%00", Some("action"))] {
        let reply = fixture.call("GET", &format!("/v1/audit?{query}"), &admin, None).await;
        assert_eq!((reply.status.as_u16(), reply.json()["field"].as_str()), (400, field), "{}", reply.json());
    }
    let (_, sync) = fixture.key("user@example.com", &["sync"]).await;
    assert_eq!(fixture.call("GET", "/v1/audit", &sync, None).await.status.as_u16(), 403);
}
