//! `explain`: every check with the values that it used, from the record that Envoys get.

use crate::support::{Fixture, Reply, change_key, scalar};
use contract::key::{KeyKind, Secret};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

fn policies() -> [(&'static str, Value); 5] {
    let limit = json!({"name": "second", "requests": 10, "window_seconds": 1, "burst": 20});
    [
        (
            "orders-read",
            json!({"scopes": {"all": ["orders:read"]}, "cost": 5, "rate_limits": [limit],
                "match": [{"path": {"prefix": "/orders"}, "methods": ["GET"]}]}),
        ),
        ("open", json!({"key": "optional", "match": [{"path": {"prefix": "/open"}}]})),
        ("dark", json!({"scopes": {"any": ["orders:admin"]}, "shadow": true})),
        ("platform", json!({"from_annotation": false})),
        (
            "model",
            json!({"cost": 7, "match": [{"hosts": ["*.ai.example"], "header": {"name": "x-model", "value": "gpt-*"}}]}),
        ),
    ]
}

async fn fixture(pool: PgPool) -> (Fixture, Secret) {
    let fixture = Fixture::new(&pool).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    for (name, policy) in policies() {
        let reply = fixture.put(&format!("/v1/policies/{name}"), &admin, &policy).await;
        assert_eq!(reply.status, 201, "{}", reply.json());
    }
    (fixture, admin)
}

async fn explain(fixture: &Fixture, caller: &Secret, body: Value) -> Reply {
    fixture.post("/v1/explain", caller, &body).await
}

/// Outcome, status and the names of the checks that fail.
async fn verdict(fixture: &Fixture, caller: &Secret, body: Value) -> (String, Value, Vec<String>) {
    let reply = explain(fixture, caller, body).await;
    let json = reply.json();
    assert_eq!(reply.status, 200, "{json}");
    let failed = json["checks"].as_array().unwrap().iter().filter(|check| check["passed"] == false);
    let failed = failed.map(|check| check["name"].as_str().unwrap().to_owned()).collect();
    (json["outcome"].as_str().unwrap().to_owned(), json["status"].clone(), failed)
}

#[sqlx::test(migrations = "./migrations")]
async fn each_check_is_told_in_order_with_what_it_saw(pool: PgPool) {
    let (fixture, admin) = fixture(pool.clone()).await;
    let (id, key) = fixture.key("user@example.com", &["orders:write"]).await;
    change_key(
        &pool,
        id,
        r#"rate_limits = '[{"name": "burst", "requests": 9, "window_s": 60, "burst": 3, "shared": true},
            {"name": "own", "requests": 2, "window_s": 1, "burst": 2, "shared": false}]'"#,
    )
    .await;
    let body = json!({"key": key.reveal(), "path": "/orders?page=2", "address": "192.0.2.7"});
    let reply = explain(&fixture, &admin, body).await;
    let passed = |name: &str, saw: &str| json!({"name": name, "passed": true, "saw": saw});
    let expected = json!({
        "outcome": "scope_denied", "status": 403, "policy": "orders-read", "shadow": false,
        "checks": [
            passed("credential", &format!("the key {id}, its secret number 1; well-formed")),
            passed("policy", "orders-read: the most specific match is: GET, path /orders and below"),
            passed("revocation", "the key is not revoked"),
            passed("expiry", "the key does not end"),
            passed("switch", "the key is switched on"),
            passed("support", "the key requires 0x0, 0x7 is understood"),
            passed("kind", "the route accepts all kinds, the kind of the key is live"),
            passed("address", "the key may be used from any address"),
            {"name": "scopes", "passed": false, "outcome": "scope_denied",
                "saw": "the route asks for all of orders:read, the key has orders:write"},
            passed("quota", "none is set"),
            passed("credits", "none is set; the request costs 5"),
            {"name": "rate_limit", "passed": null,
                "saw": "of the key: burst 9 in 60 s, 3 at once, shared by all Envoys; of the key: own 2 in 1 s, 2 at once, \
                        each Envoy by itself; of the policy: orders-read.second 10 in 1 s, 20 at once, each Envoy by itself"},
            {"name": "rate_limit_left", "passed": null, "saw": "burst: Envoys hold 0, 3 are left"},
        ],
    });
    assert_eq!((reply.status, reply.json()), (200, expected));
    assert_eq!(reply.header("cache-control"), "no-store");
    assert!(!String::from_utf8_lossy(&reply.body).contains(key.reveal()), "a response never contains the secret");
}

#[sqlx::test(migrations = "./migrations")]
async fn every_outcome_that_the_decision_knows_is_explained_by_secret_and_by_id(pool: PgPool) {
    let (fixture, admin) = fixture(pool.clone()).await;
    for (columns, outcome, status, check) in [
        ("cost = 1", "allowed", Value::Null, None),
        ("revoked_at = now()", "revoked", json!(401), Some("revocation")),
        ("expires_at = now()", "expired", json!(401), Some("expiry")),
        ("disabled = true", "disabled", json!(401), Some("switch")),
        ("networks = '{198.51.100.0/24}'", "address_denied", json!(403), Some("address")),
        ("quota_exceeded = true, applied_quota = '{}'", "quota_exceeded", json!(429), Some("quota")),
        ("credits_exhausted = true, metered = true", "credits_exhausted", json!(429), Some("credits")),
    ] {
        let (id, key) = fixture.key("user@example.com", &["orders:read"]).await;
        change_key(&pool, id, columns).await;
        for named in [json!({"key": key.reveal()}), json!({"key_id": id})] {
            let mut body = named;
            body["path"] = "/orders".into();
            body["address"] = "192.0.2.7".into();
            let failed = check.map(ToOwned::to_owned).into_iter().collect();
            let expected = (outcome.to_owned(), status.clone(), failed);
            assert_eq!(verdict(&fixture, &admin, body).await, expected, "{columns}");
        }
    }
    // At another time, from another address, under another policy.
    let (id, _) = fixture.key("user@example.com", &["orders:read"]).await;
    change_key(&pool, id, "expires_at = '2030-01-01Z', networks = '{198.51.100.0/24}'").await;
    let mut body = json!({"key_id": id, "address": "::ffff:198.51.100.9", "time": "2029-12-31T23:59:59Z"});
    assert_eq!(verdict(&fixture, &admin, body.clone()).await.0, "allowed");
    body["time"] = "2030-01-01T00:00:00Z".into();
    assert_eq!(verdict(&fixture, &admin, body.clone()).await.0, "expired");
    body["time"] = "2029-01-01T00:00:00Z".into();
    body["policy"] = json!({"scopes": {"any": ["orders:write", "orders:list"]}});
    assert_eq!(verdict(&fixture, &admin, body.clone()).await.0, "scope_denied");
    body["policy"] = json!({"kinds": ["test"]});
    assert_eq!(verdict(&fixture, &admin, body).await, ("kind_denied".into(), json!(403), vec!["kind".to_owned()]));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_role_and_a_plan_are_those_that_envoys_have(pool: PgPool) {
    let (fixture, admin) = fixture(pool.clone()).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let body = json!({"key_id": id, "policy": "orders-read"});
    assert_eq!(verdict(&fixture, &admin, body.clone()).await.0, "scope_denied");
    let sql = "insert into definitions (kind, name, scopes) values ('role', 'r', '{orders:*}') returning number";
    let role: i32 = scalar(&pool, sql).await;
    change_key(&pool, id, &format!("role_numbers = '{{{role}}}'")).await;
    assert_eq!(verdict(&fixture, &admin, body.clone()).await.0, "allowed");
    sqlx::query("update definitions set scopes = '{}' where number = $1").bind(role).execute(&pool).await.unwrap();
    assert_eq!(verdict(&fixture, &admin, body).await.0, "scope_denied");
}

#[sqlx::test(migrations = "./migrations")]
async fn explain_reads_quota_and_credits_from_the_database(pool: PgPool) {
    let (fixture, admin) = fixture(pool.clone()).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    for statement in [
        "insert into ledger (owner_id, kind, amount, balance) select owner_id, 'top_up', 90, 0 from api_keys where id = $1",
        "update user_preferences set metered = true where id = (select owner_id from api_keys where id = $1)",
        r#"update api_keys set applied_quota = '{"requests": 100, "period": "day", "time_zone": "UTC"}' where id = $1"#,
        "insert into quota_use (subject, kind, window_start, window_end, used)
            values ($1, 'day/UTC', '2026-05-01Z', '2126-05-02Z', 40)",
        "insert into allowance_callers (reporter, sync_key_id, heard_at)
            select reporter, $1, at from (values
                (md5('1')::uuid, now()), (md5('2')::uuid, now()), (md5('3')::uuid, now() - interval '61 seconds')
            ) envoys (reporter, at)",
        "insert into allowances (kind, subject, tag, reporter, session, granted, spent, returned, used_at)
            values (1, $1, 0, md5('1')::uuid, 1, 14, 5, 2, now()), (1, $1, 0, md5('2')::uuid, 1, 3, 0, 0, now()),
                (1, $1, 0, md5('3')::uuid, 1, 30, 0, 0, now())",
        "insert into allowances (kind, subject, tag, reporter, session, granted, spent, returned, used_at)
            select 2, owner_id, 0, md5('1')::uuid, 1, 30, 10, 0, now() from api_keys where id = $1",
    ] {
        sqlx::query(statement).bind(id).execute(&pool).await.unwrap();
    }
    let reply = explain(&fixture, &admin, json!({"key_id": id})).await.json();
    let checks = reply["checks"].as_array().unwrap();
    assert_eq!(
        checks[checks.len() - 2..],
        [
            json!({"name": "quota_left", "passed": null, "saw": "40 of 100 requests are used in the window that \
                ends at 2126-05-02T00:00:00Z; Envoys hold 10, 50 are left"}),
            json!({"name": "credits_left", "passed": null, "saw": "the balance is 90; Envoys hold 20, 70 are left"}),
        ]
    );
    assert_eq!((&reply["outcome"], &checks[9]["saw"]), (&json!("allowed"), &json!("not used up")));

    change_key(&pool, id, "cost = 91").await;
    fixture.in_step().await;
    let reply = explain(&fixture, &admin, json!({"key_id": id})).await.json();
    let saw =
        "the balance is 90; Envoys hold 20, 70 are left; the request costs 91, which is more: waiting does not help";
    assert_eq!(reply["checks"].as_array().unwrap().last().unwrap()["saw"], saw);
}

#[sqlx::test(migrations = "./migrations")]
async fn unknown_keys_and_policies_are_explained_and_unknown_ids_are_not_found(pool: PgPool) {
    let (fixture, admin) = fixture(pool.clone()).await;
    let stranger = Secret::generate(KeyKind::Live, &mut getrandom::SysRng).unwrap();
    let reply = explain(&fixture, &admin, json!({"key": stranger.reveal(), "path": "/x"})).await;
    let expected = json!({
        "outcome": "unknown", "status": 401, "policy": "default", "shadow": false,
        "checks": [
            {"name": "credential", "passed": false, "saw": "a key that Envoys do not know; well-formed", "outcome": "unknown"},
            {"name": "policy", "passed": true, "saw": "default: no policy matches the request"},
        ],
    });
    assert_eq!((reply.status, reply.json()), (200, expected));
    assert!(!String::from_utf8_lossy(&reply.body).contains(stranger.reveal()));

    let mistyped = format!("{}x", &stranger.reveal()[..43]);
    for (body, outcome, status, failed) in [
        (json!({"key": mistyped, "policy": "open"}), "anonymous", Value::Null, vec!["credential"]),
        (json!({"key": "k".repeat(2_000)}), "unknown", json!(401), vec!["credential"]),
        (json!({}), "missing", json!(401), vec!["credential"]),
        (json!({"key": ""}), "missing", json!(401), vec!["credential"]),
        (json!({"path": "/open/x", "method": "POST"}), "anonymous", Value::Null, vec!["credential"]),
        (json!({"policy": "wrong"}), "policy_unknown", json!(503), vec!["credential", "policy"]),
        (
            json!({"key": admin.reveal(), "policy": "platform", "policy_source": "annotation"}),
            "policy_unknown",
            json!(503),
            vec!["policy"],
        ),
        (json!({"key": admin.reveal(), "policy": "wrong"}), "policy_unknown", json!(503), vec!["policy"]),
        (json!({"key": admin.reveal(), "policy": "dark"}), "scope_denied", Value::Null, vec!["scopes"]),
        (json!({"key": admin.reveal(), "path": "/orders", "method": "POST"}), "allowed", Value::Null, vec![]),
    ] {
        let expected = (outcome.to_owned(), status, failed.into_iter().map(ToOwned::to_owned).collect());
        assert_eq!(verdict(&fixture, &admin, body.clone()).await, expected, "{body}");
    }
    let id = Uuid::now_v7();
    let reply = explain(&fixture, &admin, json!({"key_id": id})).await;
    assert_eq!((reply.status, &reply.json()["detail"]), (404, &json!(format!("There is no key {id}."))));
}

#[sqlx::test(migrations = "./migrations")]
async fn the_match_that_picks_a_policy_is_told(pool: PgPool) {
    let (fixture, admin) = fixture(pool).await;
    for (body, name, how) in [
        (json!({"path": "/orders/1?page=2"}), "orders-read", "the most specific match is: GET, path /orders and below"),
        (json!({"path": "/ordersx"}), "default", "no policy matches the request"),
        (
            json!({"path": "/orders/..;/x"}),
            "unknown",
            "the path has dot segments or encoded slashes, which Envoy should resolve or refuse",
        ),
        (json!({"path": "/%6Frders;v=1"}), "orders-read", "the most specific match is: GET, path /orders and below"),
        (
            json!({"path": "/orders", "host": "API.ai.example:443", "headers": {"X-Model": "gpt-5"}}),
            "model",
            "the most specific match is: host *.ai.example, header x-model: gpt-*",
        ),
        (
            json!({"path": "/", "host": "api.ai.example", "headers": {"x-model": "other"}}),
            "default",
            "no policy matches the request",
        ),
        (json!({"policy": "dark", "path": "/orders"}), "dark", "the metadata of the route names it"),
        (json!({"policy": "dark", "policy_source": "annotation"}), "dark", "the annotation of the route names it"),
        (
            json!({"policy": "platform", "policy_source": "virtual_host_metadata"}),
            "platform",
            "the metadata of the virtual host names it",
        ),
        (
            json!({"policy": "platform", "policy_source": "annotation"}),
            "platform",
            "the annotation of the route names it, which it may not: the policy has from_annotation false",
        ),
        (
            json!({"policy": "orders", "policy_source": "route_name_prefix"}),
            "orders",
            "the name of the route, after its prefix, names it, and there is no policy of this name",
        ),
        (
            json!({"policy": "route-7", "policy_source": "route_name", "path": "/orders"}),
            "orders-read",
            "the most specific match is: GET, path /orders and below",
        ),
        (json!({}), "default", "the request names neither a policy nor a path"),
    ] {
        let reply = explain(&fixture, &admin, body.clone()).await.json();
        assert_eq!(reply["policy"], name, "{body}");
        assert_eq!(reply["checks"][1]["saw"], format!("{name}: {how}"), "{body}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn before_the_first_policy_a_name_means_nothing_unless_envoy_has_policy_sources(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let reply = explain(&fixture, &admin, json!({"key": admin.reveal(), "policy": "orders"})).await.json();
    assert_eq!((&reply["outcome"], &reply["status"]), (&json!("allowed"), &Value::Null));
    let saw = reply["checks"][1]["saw"].as_str().unwrap();
    assert!(saw.ends_with("answers 503 policy_unknown if it has policy_sources"), "{saw}");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_explains_keys_of_their_own(pool: PgPool) {
    let (fixture, _) = fixture(pool).await;
    let (own, user) = fixture.key("user@example.com", &[]).await;
    let (_, secret) = fixture.key("other@example.com", &[]).await;
    assert_eq!(verdict(&fixture, &user, json!({"key_id": own})).await.0, "allowed");
    assert_eq!(verdict(&fixture, &user, json!({"key": user.reveal()})).await.0, "allowed");
    // A key of somebody else is explained like one that does not exist.
    assert_eq!(verdict(&fixture, &user, json!({"key": secret.reveal()})).await.0, "unknown");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_field_is_named_and_no_secret_is_told(pool: PgPool) {
    let (fixture, admin) = fixture(pool).await;
    let id = Uuid::nil();
    for (body, field, detail) in [
        (json!({"key": "sk_live_x", "key_id": id}), "key_id", "give either key or key_id, not both"),
        (json!({"address": "here"}), "address", "must be an IPv4 or IPv6 address such as 192.0.2.7"),
        (json!({"time": "now"}), "time", "must be a time of RFC 3339 such as 2027-01-31T12:00:00Z"),
        (json!({"method": "get"}), "method", "must be a method in capitals, such as GET"),
        (json!({"host": "a"}), "path", "is needed with host or headers: policies match all of them together"),
        (json!({"policy_source": "annotation"}), "policy_source", "needs the name of a policy in the field policy"),
        (json!({"path": "/", "host": ""}), "host", "must have 1 to 253 visible ASCII characters"),
        (json!({"path": "orders"}), "path", "must start with / and have at most 4096 bytes"),
        (json!({"policy": {"scopes": {"all": []}}}), "policy.scopes", "name at least one scope, or leave it out"),
    ] {
        explain(&fixture, &admin, body).await.assert_invalid(field, detail);
    }
    for body in [json!({"policy": 5}), json!({"policy": {"scope": "a"}}), json!({"key": ["sk_live_hidden"]})] {
        let reply = explain(&fixture, &admin, body).await;
        assert_eq!((reply.status, &reply.json()["code"]), (400, &json!("invalid")));
        assert!(!reply.json().to_string().contains("hidden"), "{}", reply.json());
    }
}
