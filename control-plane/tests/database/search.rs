//! Search for keys, and the audit trail.

use crate::support::{Fixture, change_key, encoded, execute, revoke, secret_of};
use contract::key::Secret;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

async fn named(fixture: &Fixture, admin: &Secret, email: &str, name: &str) -> (Uuid, Secret) {
    fixture.created(admin, json!({"email": email, "name": name})).await
}

async fn names(fixture: &Fixture, caller: &Secret, query: &str) -> Vec<String> {
    let reply = fixture.get(&format!("/v1/keys?{query}"), caller).await.expect(200);
    reply["keys"].as_array().unwrap().iter().map(|key| key["name"].as_str().unwrap().to_owned()).collect()
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_are_found_by_prefix_owner_name_state_and_last_use(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
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

    change_key(&pool, second, "prefix = 'abc_1'").await;
    change_key(&pool, third, "prefix = 'abcd1'").await;
    assert_eq!(names(&fixture, &admin, "prefix=abc").await, ["Staging", "production_two"]);
    assert_eq!(names(&fixture, &admin, "prefix=abc_").await, ["production_two"]);
    let old = one.display_prefix().unwrap();
    fixture.call("POST", &format!("/v1/keys/{first}/rotate"), &admin, None).await;
    assert_eq!(names(&fixture, &admin, &format!("prefix={old}")).await, ["Production 100%"], "by an old secret too");

    change_key(&pool, first, "disabled = true").await;
    change_key(&pool, second, "expires_at = now(), disabled = true").await;
    revoke(&pool, third).await;
    for (state, found) in
        [("active", "Caller"), ("disabled", "Production 100%"), ("expired", "production_two"), ("revoked", "Staging")]
    {
        assert_eq!(names(&fixture, &user, &format!("state={state}")).await, [found]);
    }

    change_key(&pool, first, "created_at = '2026-01-01Z'").await;
    change_key(&pool, second, "created_at = '2026-01-01Z'").await;
    for (id, last) in [(second, "2026-03-01Z"), (fourth, "2026-01-15Z")] {
        execute(&pool, format!("insert into key_usage values ('{id}', 1, 1, '{last}'::text::timestamptz)")).await;
    }
    let before = |day: &str| format!("email=user%40example.com&last_used_before=2026-{day}T00:00:00Z");
    assert_eq!(names(&fixture, &admin, &before("02-01")).await, ["Caller", "Production 100%"]);
    assert_eq!(names(&fixture, &admin, &before("03-02")).await, ["Caller", "production_two", "Production 100%"]);

    for (query, field) in [
        ("state=asleep", "state"),
        ("prefix=", "prefix"),
        ("name=a%00b", "name"),
        ("last_used_before=yesterday", "last_used_before"),
        ("expires_before=soon", "expires_before"),
        ("plan=Gold", "plan"),
    ] {
        let reply = fixture.get(&format!("/v1/keys?{query}"), &admin).await;
        assert_eq!((reply.status, &reply.json()["field"]), (400, &json!(field)), "{}", reply.json());
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_are_found_by_the_id_of_their_owner_plan_role_and_end(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    fixture.put("/v1/plans/gold", &admin, &json!({})).await.expect(201);
    fixture.put("/v1/roles/support", &admin, &json!({"scopes": ["a"]})).await.expect(201);
    let (_, user) = named(&fixture, &admin, "user@example.com", "Plain").await;
    let key = |name: &str, more: Value| {
        let mut body = json!({"email": "other@example.com", "name": name});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    fixture.created(&admin, key("Golden", json!({"plan": "gold", "expires_at": "2030-01-01T00:00:00Z"}))).await;
    fixture
        .created(&admin, key("Supporting", json!({"roles": ["support"], "expires_at": "2031-01-01T00:00:00Z"})))
        .await;
    let id = |uri: String| uri.rsplit('/').next().unwrap().to_owned();
    let (own, other) = (id(fixture.user("user@example.com").await), id(fixture.user("other@example.com").await));
    assert_eq!(names(&fixture, &admin, &format!("owner_id={other}")).await, ["Supporting", "Golden"]);
    assert_eq!(names(&fixture, &admin, &format!("owner_id={other}&email=user%40example.com")).await, [""; 0]);
    assert_eq!(names(&fixture, &user, &format!("owner_id={own}")).await, ["Plain"]);
    let reply = fixture.get(&format!("/v1/keys?owner_id={other}"), &user).await;
    assert_eq!(reply.status, 403, "{}", reply.json());
    assert_eq!(names(&fixture, &admin, "plan=gold").await, ["Golden"]);
    assert_eq!(names(&fixture, &admin, "role=support").await, ["Supporting"]);
    assert_eq!(names(&fixture, &admin, "role=support&plan=gold").await, [""; 0]);
    assert_eq!(names(&fixture, &admin, "expires_before=2030-06-01T00:00:00Z").await, ["Golden"]);
    // Filters have forgotten this key, which has the plan of its user all the same.
    let (old, _) = fixture.created(&admin, key("Old", json!({}))).await;
    change_key(&pool, old, "revoked_at = now(), withdrawn = true").await;
    fixture.patch(&format!("/v1/users/{other}"), &admin, json!({"plan": "gold"})).await.expect(200);
    assert_eq!(names(&fixture, &admin, "plan=gold&state=revoked").await, ["Old"]);
    assert_eq!(names(&fixture, &admin, "plan=gold&state=active").await, ["Supporting", "Golden"], "of the user");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_is_found_by_the_first_characters_that_people_have_of_it(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, one) = named(&fixture, &admin, "user@example.com", "one").await;
    let (imported, _) = named(&fixture, &admin, "user@example.com", "imported").await;
    change_key(&pool, imported, "prefix = 'sk_live_4eC3'").await;
    let start = &one.reveal()[..14];
    let shown = one.display_prefix().unwrap();
    for text in [start, &one.reveal()[..20], &format!("{start}…"), &format!("{start}..."), &shown, &format!("{shown}…")]
    {
        assert_eq!(names(&fixture, &admin, &format!("prefix={}", encoded(text))).await, ["one"], "{text}");
    }
    assert_eq!(names(&fixture, &admin, "prefix=sk_live_4eC").await, ["imported"]);
    for whole in [one.reveal(), &format!("{}…", one.reveal())] {
        fixture.get(&format!("/v1/keys?prefix={}", encoded(whole)), &admin).await.assert_invalid(
            "prefix",
            "is a whole key, which must not stand in an address: send it in the body of POST /v1/keys/lookup",
        );
    }
    let empty = fixture.get(&format!("/v1/keys?prefix={}", encoded("…")), &admin).await;
    empty.assert_invalid("prefix", "must have a character before the dots");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_whole_secret_present_or_old_finds_its_key_for_those_who_manage_it(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, old) = named(&fixture, &admin, "user@example.com", "n").await;
    let (_, other) = fixture.key("other@example.com", &[]).await;
    let rotated =
        fixture.post(&format!("/v1/keys/{id}/rotate"), &admin, json!({"grace_seconds": 60})).await.expect(201);
    let new = secret_of(&rotated);
    let lookup = async |caller: &Secret, key: &str| fixture.post("/v1/keys/lookup", caller, json!({"key": key})).await;
    for (caller, secret) in [(&admin, &new), (&admin, &old), (&new, &old)] {
        let found = lookup(caller, secret.reveal()).await.expect(200);
        assert_eq!((&found["id"], &found["name"]), (&json!(id), &json!("n")));
    }
    // One of somebody else and one that does not exist are answered alike.
    for (caller, key) in [(&other, new.reveal()), (&admin, "sk_live_nobody")] {
        lookup(caller, key).await.assert_not_found("There is no key with this secret.");
    }
    for key in ["", &"x".repeat(1_025)] {
        lookup(&admin, key).await.assert_invalid("key", "must have 1 to 1024 bytes");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn the_next_page_keeps_all_that_was_asked(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for number in 0..5 {
        named(&fixture, &admin, "user@example.com", &format!("á & {number}")).await;
        named(&fixture, &admin, "user@example.com", "another").await;
    }
    let asked =
        "email=user%40example.com&prefix=sk_&name=%C3%A1%20%26&state=active&last_used_before=2099-01-01T00%3A00%3A00Z";
    let pages = fixture.pages("/v1/keys", &format!("{asked}&"), "keys", "name", &admin).await;
    assert_eq!(pages, [vec!["á & 4", "á & 3"], vec!["á & 2", "á & 1"], vec!["á & 0"]]);
}

#[sqlx::test(migrations = "./migrations")]
async fn every_change_is_in_the_trail_with_its_actor_and_never_a_secret(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (admin_id, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (id, secret) = named(&fixture, &admin, "user@example.com", "n").await;
    let uri = format!("/v1/keys/{id}");
    let mut secrets = vec![secret];
    let body = json!({"name": "m", "disabled": true, "expires_at": "2030-01-01T00:00:00Z"});
    let headers = [("x-request-id", "0192f0c1-2f0e-7c3a-8a53-3f1f0a9f6e11")];
    fixture.call_with("PATCH", &uri, &admin, Some(&body), &headers).await;
    fixture.patch(&uri, &admin, json!({"name": "m"})).await;
    let grace = json!({"grace_seconds": 60});
    let rotated = fixture.post(&format!("{uri}/rotate"), &admin, &grace).await.json();
    secrets.push(secret_of(&rotated));
    fixture.delete(&format!("{uri}/secrets/1"), &admin).await;
    let primary = json!({"email": "user@example.com", "key_name": "primary"});
    for _ in 0..2 {
        secrets.push(fixture.post("/api/user/key", &admin, &primary).await.secret());
    }
    fixture.delete("/api/user/key/user@example.com", &admin).await;
    fixture.delete(&uri, &admin).await;
    let user = fixture.user("user@example.com").await;
    fixture.call("POST", &format!("{user}/revoke-keys"), &admin, None).await;

    let trail = fixture.get("/v1/audit", &admin).await.json();
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
        assert!(!all.contains(&secret.reveal()[8..]));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn the_trail_is_filtered_and_paged_and_users_see_their_own(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (admin_id, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (id, user) = named(&fixture, &admin, "user@example.com", "n").await;
    named(&fixture, &admin, "other@example.com", "foreign").await;
    for number in 0..4 {
        fixture.patch(&format!("/v1/keys/{id}"), &user, json!({"name": format!("{number}")})).await;
    }
    let other = fixture.user("other@example.com").await;
    fixture.call("POST", &format!("{other}/revoke-keys"), &admin, None).await;
    let actions = async |caller: &Secret, query: &str| {
        let reply = fixture.get(&format!("/v1/audit?{query}"), caller).await.expect(200);
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

    let seen = fixture.pages("/v1/audit", &format!("key_id={id}&"), "entries", "id", &admin).await.concat();
    assert!(seen.len() == 5 && seen.is_sorted_by(|one, next| one.as_i64() > next.as_i64()), "{seen:?}");
    for (query, field) in [("from=x", Some("from")), ("key_id=x", Some("key_id")), ("action=a%00", Some("action"))] {
        let reply = fixture.get(&format!("/v1/audit?{query}"), &admin).await;
        assert_eq!((reply.status, reply.json()["field"].as_str()), (400, field), "{}", reply.json());
    }
}
