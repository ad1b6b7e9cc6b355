//! Keys: the routes below `/v1/keys`.

use crate::support::{Fixture, change_key, execute, id_of, revision, scalar, scalars, secret_of};
use contract::key::{KeyKind, Secret, check};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

#[sqlx::test(migrations = "./migrations")]
async fn a_key_is_created_with_all_it_may_have_and_shown_without_its_secret(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let body = json!({
        "email": "User@example.com", "name": "Everything", "kind": "test", "scopes": ["orders:*", "sync", "sync"],
        "rate_limits": [
            {"name": "burst", "requests": 10, "window_seconds": 1},
            {"name": "day", "requests": 1000, "window_seconds": 86400, "burst": 5, "shared": false},
        ],
        "expires_at": "2030-01-31T14:00:00.25+02:00", "external_id": "key_42", "metadata": {"project": "search"},
    });
    let reply = fixture.post("/v1/keys", &admin, &body).await;
    let mut created = reply.json();
    let secret = secret_of(&created);
    assert_eq!(check(secret.reveal()), Ok(KeyKind::Test));
    let id: Uuid = id_of(&created);
    assert_eq!((reply.status, reply.header("location")), (201, &*format!("/v1/keys/{id}")));
    assert_eq!(reply.header("cache-control"), "no-store");
    let owner_id: Uuid = scalar(&pool, "select id from user_preferences where email = 'user@example.com'").await;
    let expected = json!({
        "id": id, "owner_id": owner_id, "email": "user@example.com", "name": "Everything",
        "prefix": format!("sk_{}", &secret.reveal()[8..14]), "kind": "test", "external_id": "key_42",
        "metadata": {"project": "search"}, "scopes": ["orders:*", "sync"],
        "rate_limits": [
            {"name": "burst", "requests": 10, "window_seconds": 1, "burst": 10, "shared": true},
            {"name": "day", "requests": 1000, "window_seconds": 86400, "burst": 5, "shared": false},
        ],
        "generation": 1, "state": "active", "disabled_by_admin": false, "created_at": created["created_at"],
        "expires_at": "2030-01-31T12:00:01Z", "revoked_at": null, "last_used_at": null, "usage_count": 0, "roles": [], "plan": null, "effective_plan": null,
        "effective_scopes": ["orders:*", "sync"], "allowed_addresses": [], "quota": null, "cost": 1,
    });
    created.as_object_mut().unwrap().remove("secret");
    assert_eq!(created, expected);
    let created_at = created["created_at"].as_str().unwrap();
    assert!(created_at.len() == 20 && created_at.ends_with('Z'), "{created_at}");
    assert_eq!(reply.header("etag"), "\"1\"");
    let reply = fixture.get(&format!("/v1/keys/{id}"), &admin).await;
    assert_eq!(reply.header("etag"), "\"1\"");
    let mut details = expected;
    details["secrets"] = json!([{
        "generation": 1, "prefix": details["prefix"], "current": true, "ends_at": null, "usage_count": 0,
        "last_used_at": null,
    }]);
    (details["quota_usage"], details["credits"]) = (Value::Null, Value::Null);
    details["applied_on"] = json!({"envoys": 0, "applied": 0, "max_lag_seconds": null, "unreachable": 0});
    assert_eq!(reply.json(), details);

    fixture.in_step().await;
    let record = fixture.app.store.find(&secret.hash()).unwrap();
    let limits = record.rate_limits.iter().map(|limit| (limit.burst, limit.shared));
    assert_eq!(limits.collect::<Vec<_>>(), [(10, true), (5, false)]);
}

#[sqlx::test(migrations = "./migrations")]
async fn each_state_of_a_key_has_its_name_and_changes_as_asked(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, key) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}");
    let patched = async |body: Value| fixture.patch(&uri, &admin, &body).await;

    let reply = patched(json!({"name": " Renamed ", "disabled": true})).await;
    assert_eq!(
        (reply.status, &reply.json()["name"], &reply.json()["state"]),
        (200, &json!("Renamed"), &json!("disabled"))
    );
    assert_eq!(fixture.get("/v1/keys", &key).await.json()["code"], "disabled");
    assert_eq!(patched(json!({"disabled": false})).await.json()["state"], "active");
    assert_eq!(fixture.get("/v1/keys", &key).await.status, 200);
    let before = revision(&pool).await;
    assert_eq!(patched(json!({"name": "Again"})).await.json()["name"], "Again");
    assert_eq!(revision(&pool).await, before, "filters know nothing of names");

    patched(json!({})).await.assert_problem(400, "invalid", "Set at least one field.", None);
    patched(json!({"name": ""})).await.assert_invalid("name", "must have 1 to 100 characters");
    assert_eq!(patched(json!({"scopes": ["admin"]})).await.status, 400);

    change_key(&pool, id, "expires_at = now()").await;
    assert_eq!(fixture.get(&uri, &admin).await.json()["state"], "expired");
    let reply = fixture.delete(&uri, &admin).await;
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    let revoked = fixture.get(&uri, &admin).await.json();
    assert_eq!(revoked["state"], "revoked");
    let before = revision(&pool).await;
    assert_eq!(fixture.delete(&uri, &admin).await.status, 204);
    assert_eq!(fixture.get(&uri, &admin).await.json(), revoked);
    assert_eq!(revision(&pool).await, before, "revoked before: nothing for filters to learn");
    patched(json!({"disabled": false})).await.assert_conflict("This key is revoked and cannot be changed.");
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_hold_every_key_once_the_newest_first(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(json!(fixture.key("user@example.com", &[]).await.0));
        fixture.key("other@example.com", &[]).await;
    }
    made.reverse();
    // A key that is made meanwhile moves nothing.
    let meanwhile = async || _ = fixture.key("user@example.com", &[]).await;
    let pages = fixture.pages_while("/v1/keys", "email=User%40example.com&", "keys", "id", &admin, meanwhile).await;
    assert_eq!((pages.concat(), pages.len()), (made, 3));
    let all = fixture.get("/v1/keys?limit=200", &admin).await.json();
    assert_eq!(all["keys"].as_array().unwrap().len(), 14);

    for (query, field, detail) in [
        ("limit=0", Some("limit"), "must be a number from 1 to 200"),
        ("limit=201", Some("limit"), "must be a number from 1 to 200"),
        ("limit=x", Some("limit"), "must be a whole number"),
        ("email=x", Some("email"), "must be an email address such as user@example.com"),
    ] {
        fixture.get(&format!("/v1/keys?{query}"), &admin).await.assert_problem(400, "invalid", detail, field);
    }
    let reply = fixture.get("/v1/keys?cursor=x", &admin).await;
    assert_eq!((reply.status, &reply.json()["field"]), (400, &json!("cursor")));
    let reply = fixture.get("/v1/keys?offset=1", &admin).await;
    assert_eq!((reply.status, &reply.json()["code"]), (400, &json!("invalid")));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_sees_and_manages_their_own_keys_only(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (own, user) = fixture.key("user@example.com", &["orders:read", "orders:write"]).await;
    let (foreign, _) = fixture.key("other@example.com", &[]).await;
    let listed = fixture.get("/v1/keys", &user).await.json();
    assert_eq!(listed["keys"].as_array().unwrap().iter().map(|key| &key["id"]).collect::<Vec<_>>(), [&json!(own)]);

    // A foreign key is answered word for word like one that does not exist.
    for id in [foreign, Uuid::now_v7()] {
        let detail = format!("There is no key {id}.");
        let uri = format!("/v1/keys/{id}");
        for reply in [
            fixture.get(&uri, &user).await,
            fixture.delete(&uri, &user).await,
            fixture.patch(&uri, &user, json!({"disabled": true})).await,
            fixture.get(&format!("{uri}/usage"), &user).await,
        ] {
            reply.assert_not_found(&detail);
        }
    }

    let reply = fixture.create(&user, json!({"scopes": ["orders:read"]})).await;
    assert_eq!((reply.status, &reply.json()["scopes"]), (201, &json!(["orders:read"])));
    for scope in ["admin", "sync", "orders:*"] {
        let detail = format!(
            "This key cannot grant the scope {scope}, which it does not have itself. Use a key with the scope admin."
        );
        fixture.create(&user, json!({"scopes": ["orders:read", scope]})).await.assert_forbidden(&detail);
    }

    let own = format!("/v1/keys/{own}");
    assert_eq!(fixture.patch(&own, &user, json!({"name": "mine"})).await.status, 200);
    assert_eq!(fixture.delete(&own, &user).await.status, 204);
    assert_eq!(fixture.get(&own, &user).await.json()["code"], "revoked");
}

#[sqlx::test(migrations = "./migrations")]
async fn usage_is_told_by_hour_and_outcome_with_totals(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    for (hour, outcome, generation, requests, cost) in [
        ("2026-05-01 09:00Z", 0, 1, 1, 1),
        ("2026-05-01 10:00Z", 0, 1, 5, 10),
        ("2026-05-01 10:00Z", 0, 2, 2, 4),
        ("2026-05-01 10:00Z", 8, 1, 3, 0),
        ("2026-05-01 11:00Z", 0, 2, 7, 14),
        ("2026-05-01 11:00Z", 99, 2, 1, 0),
        ("2026-05-01 12:00Z", 0, 2, 100, 100),
    ] {
        let sql = format!(
            "insert into usage_hourly values ('{id}', '{hour}'::text::timestamptz, '{outcome}', '{generation}', '{requests}', '{cost}')"
        );
        execute(&pool, sql).await;
    }
    let usage = async |query: &str| fixture.get(&format!("/v1/keys/{id}/usage{query}"), &admin).await;
    let reply = usage("?from=2026-05-01T10:00:00Z&to=2026-05-01T12:00:00Z").await;
    let expected = json!({
        "from": "2026-05-01T10:00:00Z", "to": "2026-05-01T12:00:00Z", "time_zone": "UTC",
        "hours": [
            {"hour": "2026-05-01T10:00:00Z", "outcome": "allowed", "requests": 7, "cost": 14},
            {"hour": "2026-05-01T10:00:00Z", "outcome": "rate_limited", "requests": 3, "cost": 0},
            {"hour": "2026-05-01T11:00:00Z", "outcome": "allowed", "requests": 7, "cost": 14},
            {"hour": "2026-05-01T11:00:00Z", "outcome": "outcome_99", "requests": 1, "cost": 0},
        ],
        "totals": {
            "allowed": {"requests": 14, "cost": 28},
            "outcome_99": {"requests": 1, "cost": 0},
            "rate_limited": {"requests": 3, "cost": 0},
        },
        "sum": {"requests": 18, "allowed": 14, "refused": 3, "other": 1, "cost": 28},
    });
    assert_eq!((reply.status, reply.json()), (200, expected));
    assert_eq!(usage("").await.json()["hours"], json!([]));

    let time = "must be a date such as 2027-01-31, or a date and time such as 2027-01-31T12:00:00, \
                2027-01-31T12:00:00Z or 2027-01-31T12:00:00+01:00";
    for (query, field, detail) in [
        ("?from=yesterday", "from", time),
        ("?to=9999-12-31T23:59:59-23:59", "to", time),
        ("?from=2026-05-02T00:00:00Z&to=2026-05-02T00:00:00Z", "from", "must lie before to"),
        ("?from=2024-05-02T00:00:00Z&to=2026-05-02T00:00:00Z", "from", "must lie at most 366 days before to"),
    ] {
        usage(query).await.assert_invalid(field, detail);
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_field_of_a_new_key_is_named(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for (field, value) in [
        ("name", json!("x".repeat(101))),
        ("email", json!(format!("{}@example.com", "x".repeat(250)))),
        ("scopes", json!(["Admin"])),
        ("rate_limits", json!([{"name": "a", "requests": 0, "window_seconds": 1}])),
        ("expires_at", json!("2020-01-01T00:00:00Z")),
        ("expires_in_seconds", json!(0)),
        ("expires_in_seconds", json!(315_360_001)),
    ] {
        let reply = fixture.create(&admin, json!({(field): value})).await;
        let problem = reply.json();
        // By its path, as `rate_limits[0].name`.
        let named = problem["field"].as_str().and_then(|path| path.split(['.', '[']).next());
        assert_eq!((reply.status, named), (400, Some(field)), "{value}: {problem}");
    }
    let both = json!({"expires_at": "2030-01-01T00:00:00Z", "expires_in_seconds": 5});
    let detail = "give either expires_at or expires_in_seconds, not both";
    fixture.create(&admin, both).await.assert_invalid("expires_at", detail);
    let reply = fixture.get("/v1/keys/nonsense", &admin).await;
    assert_eq!((reply.status, &reply.json()["field"]), (400, &json!("id")), "{}", reply.json());
    assert_eq!(fixture.get("/v1/keys", &admin).await.json()["keys"].as_array().unwrap().len(), 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_that_open_the_control_plane_are_changed_by_admins_only(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    // An admin's key manages keys even if it is a filter's, too.
    let (_, admin) = fixture.key("admin@example.com", &["sync", "admin"]).await;
    for scope in ["admin", "sync"] {
        let (id, _) = fixture.key("user@example.com", &["orders:read", scope]).await;
        let uri = format!("/v1/keys/{id}");
        let sql = format!("update user_preferences set primary_key_id = '{id}' where email = 'user@example.com'");
        execute(&pool, sql).await;
        let detail =
            format!("Only an admin changes or revokes a key with the scope {scope}. Use a key with the scope admin.");
        let primary = json!({"email": "user@example.com", "key_name": "x"});
        for reply in [
            fixture.patch(&uri, &user, json!({"disabled": true})).await,
            fixture.delete(&uri, &user).await,
            fixture.delete("/api/user/key/user@example.com", &user).await,
            fixture.post("/api/user/key", &user, &primary).await,
        ] {
            reply.assert_forbidden(&detail);
        }
        assert_eq!(fixture.get(&uri, &user).await.json()["state"], "active");
        assert_eq!(fixture.delete("/api/user/key/user@example.com", &admin).await.status, 200);
        assert_eq!(fixture.get(&uri, &user).await.json()["state"], "revoked");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_makes_a_hundred_keys_and_an_admin_more(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let bulk = "insert into api_keys (id, owner_id, name, hash, revoked_at, expires_at)
        select gen_random_uuid(), p.id, 'bulk', sha256(n::text::bytea), case when n = 1 then now() end,
            case when n = 2 then now() end
        from generate_series(1, 100) n, user_preferences p where p.email = 'user@example.com'";
    execute(&pool, bulk).await;
    // 99 are live: keys that were revoked or have expired do not count.
    assert_eq!(fixture.create(&user, json!({})).await.status, 201);
    let detail = "This user has 100 live keys. Revoke one that is not needed, or ask an admin.";
    fixture.create(&user, json!({})).await.assert_conflict(detail);
    let primary = json!({"email": "user@example.com", "key_name": "x"});
    fixture.post("/api/user/key", &user, &primary).await.assert_conflict(detail);
    assert_eq!(fixture.create(&admin, json!({})).await.status, 201);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_that_an_admin_disabled_only_an_admin_enables(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let uri = format!("/v1/keys/{id}");
    let switch = async |caller: &Secret, off: bool| {
        let reply = fixture.patch(&uri, caller, json!({"disabled": off})).await;
        (reply.status, reply)
    };
    let detail = "An admin disabled this key. Ask an admin to enable it.";
    // What its owner has switched off is the owner's to switch on, unless an admin wants it off as well.
    assert_eq!(switch(&user, true).await.1.json()["disabled_by_admin"], false);
    assert_eq!(switch(&user, false).await.0, 200);
    for owner_was_first in [false, true] {
        if owner_was_first {
            assert_eq!(switch(&user, true).await.0, 200);
        }
        let (status, reply) = switch(&admin, true).await;
        assert_eq!((status, &reply.json()["state"]), (200, &json!("disabled")));
        assert_eq!(reply.json()["disabled_by_admin"], true);
        // Its owner sees who it was, wherever the key is shown.
        assert_eq!(fixture.get(&uri, &user).await.json()["disabled_by_admin"], true);
        let listed = fixture.get("/v1/keys?state=disabled", &user).await.json();
        assert_eq!((&listed["keys"][0]["id"], &listed["keys"][0]["disabled_by_admin"]), (&json!(id), &json!(true)));
        assert_eq!(switch(&user, true).await.1.json()["disabled_by_admin"], true);
        let (_, refused) = switch(&user, false).await;
        refused.assert_forbidden(detail);
        // Other changes of it are still the owner's.
        for change in [json!({"name": "mine"}), json!({"expires_at": "2030-01-01T00:00:00Z"})] {
            let changed = fixture.patch(&uri, &user, &change).await;
            assert_eq!((changed.status, &changed.json()["state"]), (200, &json!("disabled")), "{change}");
            assert_eq!(switch(&user, false).await.0, 403, "{change}");
        }
        let (status, reply) = switch(&admin, false).await;
        assert_eq!((status, &reply.json()["state"]), (200, &json!("active")));
        assert_eq!(reply.json()["disabled_by_admin"], false);
    }
    let sql = format!("select detail from audit where key_id = '{id}' and detail ? 'disabled_by_admin'");
    let details: Vec<Value> = scalars(&pool, sql).await;
    assert_eq!(details, [json!({"disabled_by_admin": {"from": false, "to": true}})]);
}
