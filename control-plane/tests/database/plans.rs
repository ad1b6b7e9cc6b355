//! Plans, quotas, networks and costs of keys.

use crate::support::{Fixture, Reply, execute, id_of, request, revision, row, rows, scalar, scalars, secret_of};
use axum::extract::ConnectInfo;
use contract::key::Secret;
use contract::record::{Budget, Per, Record, Requires};
use control_plane::net::connection::Peer;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

async fn put(fixture: &Fixture, admin: &Secret, name: &str, body: Value) -> Reply {
    fixture.put(&format!("/v1/plans/{name}"), admin, &body).await
}

/// Makes a key of user@example.com; its id and secret.
async fn create(fixture: &Fixture, caller: &Secret, more: Value) -> (Uuid, Secret) {
    let made = fixture.create(caller, more).await.expect(201);
    (id_of(&made), secret_of(&made))
}

async fn patch(fixture: &Fixture, caller: &Secret, id: Uuid, body: Value) -> Reply {
    fixture.patch(&format!("/v1/keys/{id}"), caller, &body).await
}

async fn record(fixture: &Fixture, key: &Secret) -> Record {
    fixture.in_step().await;
    fixture.app.store.find(&key.hash()).unwrap()
}

/// The requests of the quota that applies to a key.
async fn applied(pool: &PgPool, id: Uuid) -> Option<i64> {
    scalar(pool, format!("select (applied_quota ->> 'requests')::bigint from api_keys where id = '{id}'")).await
}

fn daily(requests: i64) -> Value {
    json!({"requests": requests, "period": "day"})
}

#[sqlx::test(migrations = "./migrations")]
async fn a_plan_bundles_scopes_limits_and_a_quota(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let body = json!({
        "description": "The best", "scopes": ["orders:*"],
        "rate_limits": [
            {"name": "burst", "requests": 10, "window_seconds": 1},
            {"name": "hour", "requests": 1000, "window_seconds": 3600, "burst": 5, "shared": false},
        ],
        "quota": {"requests": 1_000_000, "period": "month", "time_zone": "Europe/Berlin"},
    });
    let made = put(&fixture, &admin, "gold", body.clone()).await;
    let mut expected = body;
    expected["name"] = "gold".into();
    expected["rate_limits"][0]["burst"] = 10.into();
    expected["rate_limits"][0]["shared"] = true.into();
    expected["created_at"] = made.json()["created_at"].clone();
    assert_eq!((made.status, made.header("etag"), made.json()), (201, "\"1\"", expected.clone()));
    assert_eq!(fixture.get("/v1/plans/gold", &admin).await.json(), expected);
    let listed = fixture.get("/v1/plans", &admin).await.json();
    assert_eq!(listed, json!({"plans": [expected], "next_cursor": null}));
    let stored: Value = scalar(&pool, "select quota from definitions").await;
    assert_eq!(stored, json!({"requests": 1_000_000, "period": "month", "time_zone": "Europe/Berlin", "per": "key"}));
    let before = revision(&pool).await;
    let mut same = expected.clone();
    for field in ["name", "created_at"] {
        same.as_object_mut().unwrap().remove(field);
    }
    assert_eq!(put(&fixture, &admin, "gold", same).await.header("etag"), "\"1\"");
    assert_eq!(revision(&pool).await, before, "nothing changed: nothing for filters to learn");

    // A key has what its plan has, and its own limits before those of the plan.
    let (id, key) = create(&fixture, &admin, json!({"plan": "gold", "scopes": ["own"]})).await;
    let shown = fixture.get(&format!("/v1/keys/{id}"), &admin).await.json();
    assert_eq!((&shown["plan"], &shown["effective_plan"]), (&json!("gold"), &json!("gold")));
    assert_eq!((&shown["effective_scopes"], &shown["quota"]), (&json!(["own", "orders:*"]), &Value::Null));
    let record = record(&fixture, &key).await;
    assert_eq!((record.requires, record.quota.unwrap().fill), (Requires(Requires::PLAN.0 | Requires::BUDGETS.0), 1));
    let definitions = fixture.app.store.definitions();
    let limits = definitions.rate_limits(&record);
    assert_eq!(limits.iter().map(|limit| (limit.burst, limit.shared)).collect::<Vec<_>>(), [(10, true), (5, false)]);
    let own = json!([{"name": "own", "requests": 1, "window_seconds": 1, "burst": 1, "shared": true}]);
    let patched = patch(&fixture, &admin, id, json!({"rate_limits": own})).await.json();
    assert_eq!(patched["rate_limits"], own);
    let record = self::record(&fixture, &key).await;
    assert_eq!(fixture.app.store.definitions().rate_limits(&record)[0].name, "own");
    assert_eq!(patch(&fixture, &admin, id, json!({"rate_limits": []})).await.json()["rate_limits"], json!([]));

    let audit: (Value, Uuid) =
        row(&pool, "select detail, key_id from audit where action = 'key.update' order by id limit 1").await;
    assert_eq!(audit, (json!({"rate_limits": own}), id));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_patch_of_many_fields_is_one_version_one_revision_and_one_entry_of_the_audit_trail(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    put(&fixture, &admin, "gold", json!({"quota": {"requests": 160, "period": "day"}})).await;
    let (id, _) = create(&fixture, &admin, json!({})).await;
    let before = revision(&pool).await;
    let body = json!({
        "name": "renamed", "disabled": true, "expires_at": "2030-01-01T00:00:00Z", "plan": "gold", "cost": 3,
        "allowed_addresses": ["192.0.2.0/24"],
    });
    let reply = patch(&fixture, &admin, id, body).await;
    assert_eq!((reply.status, reply.header("etag")), (200, "\"2\""), "{}", reply.json());
    assert_eq!(revision(&pool).await, before + 1);
    assert_eq!(applied(&pool, id).await, Some(160));
    let audit: Vec<(String, Value)> =
        rows(&pool, format!("select action, detail from audit where key_id = '{id}' and action <> 'key.create'")).await;
    let detail = json!({
        "name": {"from": "n", "to": "renamed"}, "disabled": {"from": false, "to": true},
        "expires_at": {"from": null, "to": "2030-01-01T00:00:00Z"}, "plan": "gold", "cost": 3,
        "allowed_addresses": ["192.0.2.0/24"],
    });
    assert_eq!(audit, [("key.update".to_owned(), detail)]);
    // What is set already changes nothing.
    let same = json!({"name": "renamed", "disabled": true, "plan": "gold", "cost": 3});
    assert_eq!(patch(&fixture, &admin, id, same).await.header("etag"), "\"2\"");
    assert_eq!(revision(&pool).await, before + 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn the_plan_that_applies_is_the_keys_own_or_else_its_owners(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    put(&fixture, &admin, "gold", json!({"scopes": ["g"]})).await;
    put(&fixture, &admin, "free", json!({"scopes": ["f"]})).await;
    let (id, key) = create(&fixture, &admin, json!({})).await;
    let uri = format!("/v1/keys/{id}");
    let plans = async || {
        let shown = fixture.get(&uri, &admin).await.json();
        let record = record(&fixture, &key).await;
        let definitions = fixture.app.store.definitions();
        let known = definitions.scopes(&record);
        assert_eq!(json!(known), shown["effective_scopes"]);
        (shown["plan"].clone(), shown["effective_plan"].clone(), known.join(" "))
    };
    let user = fixture.user("user@example.com").await;
    let owner = async |plan: Value| fixture.patch(&user, &admin, json!({"plan": plan})).await;
    assert_eq!(plans().await, (Value::Null, Value::Null, "".into()));
    owner(json!("free")).await;
    assert_eq!(plans().await, (Value::Null, json!("free"), "f".into()));
    patch(&fixture, &admin, id, json!({"plan": "gold"})).await;
    assert_eq!(plans().await, (json!("gold"), json!("gold"), "g".into()));
    // A field that is left out stays; null removes it.
    patch(&fixture, &admin, id, json!({"name": "y", "cost": 2})).await;
    assert_eq!(plans().await, (json!("gold"), json!("gold"), "g".into()));
    patch(&fixture, &admin, id, json!({"plan": null})).await;
    assert_eq!(plans().await, (Value::Null, json!("free"), "f".into()));

    let delete = async || fixture.delete("/v1/plans/free", &admin).await;
    delete().await.assert_conflict("The plan free is used by 1 key and 1 user. Remove it from them first.");
    fixture.delete(&uri, &admin).await;
    delete().await.assert_conflict("The plan free is used by 0 keys and 1 user. Remove it from them first.");
    owner(Value::Null).await;
    assert_eq!(delete().await.status, 204);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_quota_is_refused_unless_its_fields_go_together(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = create(&fixture, &admin, json!({})).await;
    let zone = "time_zone must be a time zone of the IANA database such as Europe/Berlin, or owner";
    for (quota, detail) in [
        (json!({"requests": 0, "period": "day"}), "requests must be a number from 1 to 1000000000000"),
        (json!({"requests": 1, "period": "day", "time_zone": "Europe/Atlantis"}), zone),
        (json!({"requests": 1, "period": "day", "time_zone": "a\u{0}"}), zone),
        (
            json!({"requests": 1, "period": "day", "window_seconds": 60}),
            "window_seconds goes with the period rolling only",
        ),
        (
            json!({"requests": 1, "period": "rolling"}),
            "a rolling quota needs window_seconds, a number from 60 to 31622400",
        ),
        (
            json!({"requests": 1, "period": "rolling", "window_seconds": 60, "time_zone": "UTC"}),
            "a rolling quota has no time_zone",
        ),
    ] {
        let body = json!({"quota": quota});
        put(&fixture, &admin, "gold", body.clone()).await.assert_invalid("quota", detail);
        patch(&fixture, &admin, id, body.clone()).await.assert_invalid("quota", detail);
        fixture.create(&admin, body).await.assert_invalid("quota", detail);
    }
    for (quota, field) in
        [(json!({"requests": 1, "period": "year"}), "quota.period"), (json!({"period": "day"}), "quota.requests")]
    {
        let reply = patch(&fixture, &admin, id, json!({"quota": quota})).await;
        assert_eq!((reply.status, &reply.json()["field"]), (400, &json!(field)), "{}", reply.json());
    }
    for (quota, shown) in [
        (daily(5), json!({"requests": 5, "period": "day", "time_zone": "UTC"})),
        (
            json!({"requests": 5, "period": "rolling", "window_seconds": 60}),
            json!({"requests": 5, "period": "rolling", "window_seconds": 60}),
        ),
        (
            json!({"requests": 5, "period": "week", "time_zone": "Asia/Kolkata"}),
            json!({"requests": 5, "period": "week", "time_zone": "Asia/Kolkata"}),
        ),
    ] {
        assert_eq!(patch(&fixture, &admin, id, json!({"quota": quota})).await.json()["quota"], shown);
    }
    let stored: Value = scalar(&pool, format!("select quota from api_keys where id = '{id}'")).await;
    assert_eq!(stored, json!({"requests": 5, "period": "week", "time_zone": "Asia/Kolkata", "per": "key"}));
    patch(&fixture, &admin, id, json!({"quota": {"requests": 5, "period": "rolling", "window_seconds": 90}})).await;
    let stored: Value = scalar(&pool, format!("select quota from api_keys where id = '{id}'")).await;
    assert_eq!(stored, json!({"requests": 5, "period": "rolling", "window_s": 90, "per": "key"}));
}

#[sqlx::test(migrations = "./migrations")]
async fn filters_learn_of_each_change_of_the_quota_however_the_key_comes_to_it(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let owner = async |plan: Value| {
        let reply = fixture.patch(&fixture.user("user@example.com").await, &admin, json!({"plan": plan})).await;
        assert_eq!(reply.status, 200, "{}", reply.json());
    };
    put(&fixture, &admin, "gold", json!({"quota": daily(1_600)})).await;
    let (plain, _) = create(&fixture, &admin, json!({})).await;
    let (own, key) = create(&fixture, &admin, json!({"quota": daily(160)})).await;
    let (planned, _) = create(&fixture, &admin, json!({"plan": "gold"})).await;
    let quotas = async || [applied(&pool, plain).await, applied(&pool, own).await, applied(&pool, planned).await];
    assert_eq!(quotas().await, [None, Some(160), Some(1_600)]);
    let budget = Budget { fill: 1, resets_at_s: None, per: Per::Key };
    assert_eq!(record(&fixture, &key).await.quota, Some(budget));

    owner(json!("gold")).await;
    assert_eq!(quotas().await, [Some(1_600), Some(160), Some(1_600)]);
    // A change of the plan is one change of all its keys, whether it raises the quota or lowers it.
    for requests in [3_200, 1_000] {
        let before = revision(&pool).await;
        put(&fixture, &admin, "gold", json!({"quota": daily(requests)})).await;
        assert_eq!(quotas().await, [Some(requests), Some(160), Some(requests)]);
        assert_eq!(revision(&pool).await, before + 2);
    }
    let fills: Vec<i32> = scalars(&pool, "select quota_fill from api_keys where quota_fill > 0 order by id").await;
    assert_eq!(fills, [3, 1, 3]);
    let before = revision(&pool).await;
    put(&fixture, &admin, "gold", json!({"quota": daily(1_000), "scopes": ["a"]})).await;
    assert_eq!(revision(&pool).await, before + 1, "no key changed");

    for (quota, expected) in [(Value::Null, 1_000), (daily(31), 31), (daily(32), 32), (Value::Null, 1_000)] {
        let before = record(&fixture, &key).await.quota.unwrap().fill;
        patch(&fixture, &admin, own, json!({"quota": quota})).await;
        assert_eq!(applied(&pool, own).await, Some(expected));
        assert_eq!(record(&fixture, &key).await.quota.unwrap().fill, before + 1);
    }
    owner(Value::Null).await;
    assert_eq!(quotas().await, [None, None, Some(1_000)]);
    assert_eq!(record(&fixture, &key).await.quota, None);
    // Keys of a user who has a plan already.
    owner(json!("gold")).await;
    let (late, _) = create(&fixture, &admin, json!({})).await;
    let body = json!({"email": "user@example.com", "key_name": "x"});
    assert_eq!(fixture.post("/api/user/key", &admin, &body).await.status, 200);
    let primary: Uuid =
        scalar(&pool, "select primary_key_id from user_preferences where email = 'user@example.com'").await;
    assert_eq!((applied(&pool, late).await, applied(&pool, primary).await), (Some(1_000), Some(1_000)));
    put(&fixture, &admin, "gold", json!({})).await;
    assert_eq!(quotas().await, [None, None, None]);
}

#[sqlx::test(migrations = "./migrations")]
async fn only_plans_have_limits_and_quotas_that_the_keys_of_a_user_share(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let limit = json!([{"name": "a", "requests": 5, "window_seconds": 1, "burst": 5, "shared": true, "per": "owner"}]);
    let quota = json!({"requests": 9, "period": "day", "time_zone": "UTC", "per": "owner"});
    put(&fixture, &admin, "team", json!({"rate_limits": limit, "quota": quota})).await;
    let shown = fixture.get("/v1/plans/team", &admin).await.json();
    assert_eq!((&shown["rate_limits"], &shown["quota"]), (&limit, &quota));
    let (id, key) = create(&fixture, &admin, json!({"plan": "team"})).await;
    assert_eq!(record(&fixture, &key).await.quota.unwrap().per, Per::Owner);
    assert_eq!(fixture.app.store.definitions().rate_limits(&record(&fixture, &key).await)[0].per, Per::Owner);
    let detail =
        "per must be key for the limits and the quota of a single key; per owner goes with a plan, whose keys share it";
    for (field, value) in [("rate_limits", limit), ("quota", quota)] {
        let body = json!({field: value});
        patch(&fixture, &admin, id, body.clone()).await.assert_problem(400, "invalid", detail, Some(field));
        fixture.create(&admin, body).await.assert_problem(400, "invalid", detail, Some(field));
    }
    let alone =
        json!({"rate_limits": [{"name": "a", "requests": 5, "window_seconds": 1, "shared": false, "per": "owner"}]});
    let detail = "\"a\" is per owner, so shared must be true";
    let reply = fixture.put("/v1/plans/other", &admin, &alone).await;
    reply.assert_problem(400, "invalid", detail, Some("rate_limits"));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_quota_that_grew_or_is_gone_opens_at_once(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, key) = create(&fixture, &admin, json!({"quota": daily(160)})).await;
    let used_up = async || {
        let update = format!(
            "update api_keys set quota_exceeded = true, quota_resets_at = now() + interval '1 h' where id = '{id}'"
        );
        execute(&pool, update).await;
    };
    let insert = format!(
        "insert into quota_use (subject, kind, window_start, window_end, used)
        values ('{id}', 'day/UTC', now() - interval '1 h', now() + interval '1 h', 170)"
    );
    execute(&pool, insert).await;
    used_up().await;
    let state = async || {
        let record = record(&fixture, &key).await;
        let fill = record.quota.map(|quota| (quota.fill, quota.resets_at_s.is_some()));
        (record.flags.contains(contract::record::Flags::QUOTA_EXCEEDED), fill)
    };
    assert_eq!(state().await, (true, Some((1, true))));
    // Not enough.
    patch(&fixture, &admin, id, json!({"quota": daily(170)})).await;
    assert_eq!(state().await, (true, Some((2, true))));
    patch(&fixture, &admin, id, json!({"quota": daily(171)})).await;
    assert_eq!(state().await, (false, Some((3, false))));
    used_up().await;
    patch(&fixture, &admin, id, json!({"quota": null})).await;
    assert_eq!(state().await, (false, None));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_is_bound_to_networks_that_are_written_in_one_way(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, key) =
        create(&fixture, &admin, json!({"allowed_addresses": ["192.0.2.7", "2001:DB8::/32", "192.0.2.7/32"]})).await;
    let shown = fixture.get(&format!("/v1/keys/{id}"), &admin).await.json();
    assert_eq!(shown["allowed_addresses"], json!(["192.0.2.7/32", "2001:db8::/32"]));
    let known = record(&fixture, &key).await;
    assert_eq!((known.requires, known.networks.len()), (Requires::NETWORKS, 2));
    // The control plane keeps to them too.
    let from = async |address: &str| {
        let mut request = request("GET", "/v1/keys", Some(&key), axum::body::Body::empty());
        request.extensions_mut().insert(ConnectInfo(Peer(format!("{address}:1").parse().unwrap())));
        fixture.send(request).await.status
    };
    assert_eq!((from("192.0.2.7").await, from("192.0.2.8").await, from("[2001:db8::1]").await), (200, 403, 200));
    // IPv4 that is written as IPv6 is IPv4, in the list and in the address of the peer.
    let mapped = json!({"allowed_addresses": ["::ffff:192.0.2.0/120", "192.0.2.0/24", "::ffff:198.51.100.7"]});
    let shown = patch(&fixture, &admin, id, mapped).await.json();
    assert_eq!(shown["allowed_addresses"], json!(["192.0.2.0/24", "198.51.100.7/32"]));
    let seen = (from("192.0.2.8").await, from("[::ffff:192.0.2.9]").await, from("198.51.100.8").await);
    assert_eq!((seen, from("[::ffff:198.51.100.7]").await), ((200, 200, 403), 200));
    for (bad, detail) in [
        ("192.0.2.0/33", "entry 1: the prefix is longer than the address"),
        (
            "::ffff:192.0.2.0/24",
            "entry 1: the address has bits beyond its prefix; write the first address of the network",
        ),
        ("192.0.2.1/24", "entry 1: the address has bits beyond its prefix; write the first address of the network"),
        ("example.com", "entry 1: must be an address or a network such as 192.0.2.0/24 or 2001:db8::/32"),
    ] {
        let reply = patch(&fixture, &admin, id, json!({"allowed_addresses": ["::1", bad]})).await;
        reply.assert_invalid("allowed_addresses", detail);
    }
    assert_eq!(
        patch(&fixture, &admin, id, json!({"allowed_addresses": []})).await.json()["allowed_addresses"],
        json!([])
    );
    assert_eq!(record(&fixture, &key).await.requires, Requires(0));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_narrows_addresses_and_sets_nothing_that_frees_a_key(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    put(&fixture, &admin, "gold", json!({})).await;
    // These calls have no address, so the user's own key must be valid from any address.
    let (id, user) = create(&fixture, &admin, json!({})).await;
    let (bound, _) = create(&fixture, &admin, json!({"allowed_addresses": ["192.0.2.0/24"]})).await;
    let limit = json!([{"name": "a", "requests": 1, "window_seconds": 1}]);
    for (field, value) in [
        ("roles", json!([])),
        ("plan", json!("gold")),
        ("plan", json!(null)),
        ("quota", json!(null)),
        ("quota", daily(1)),
        ("cost", json!(0)),
        ("rate_limits", limit),
    ] {
        let detail = format!("Only a key with the scope admin sets {field}.");
        let body = json!({(field): value});
        patch(&fixture, &user, id, body.clone()).await.assert_forbidden(&detail);
        if field != "rate_limits" {
            fixture.create(&user, body).await.assert_forbidden(&detail);
        }
    }
    let detail = "Only a key with the scope admin widens allowed_addresses.";
    for wider in [json!([]), json!(["192.0.2.0/23"]), json!(["192.0.2.7", "203.0.113.0/24"])] {
        patch(&fixture, &user, bound, json!({"allowed_addresses": wider})).await.assert_forbidden(detail);
    }
    let narrower = json!(["192.0.2.0/25", "192.0.2.200/32"]);
    let reply = patch(&fixture, &user, bound, json!({"allowed_addresses": narrower})).await;
    assert_eq!((reply.status, &reply.json()["allowed_addresses"]), (200, &narrower));
    let reply = patch(&fixture, &user, id, json!({"allowed_addresses": ["0.0.0.0/0"]})).await;
    assert_eq!((reply.status, &reply.json()["allowed_addresses"]), (200, &json!(["0.0.0.0/0"])));
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_that_a_user_creates_inherit_the_restrictions_of_the_calling_key(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    put(&fixture, &admin, "gold", json!({"rate_limits": [{"name": "a", "requests": 5, "window_seconds": 1}]})).await;
    fixture.put("/v1/roles/reader", &admin, json!({"scopes": ["r"]})).await;
    let quota = json!({"requests": 160, "period": "day", "time_zone": "UTC"});
    let all = json!({
        "plan": "gold", "roles": ["reader"], "quota": quota, "cost": 7, "allowed_addresses": ["0.0.0.0/1", "128.0.0.0/1"],
    });
    let (_, user) = create(&fixture, &admin, all).await;
    let call = async |uri: &str, body: Value| {
        let mut request = request("POST", uri, Some(&user), body.to_string());
        request.extensions_mut().insert(ConnectInfo(Peer("192.0.2.1:1".parse().unwrap())));
        fixture.send(request).await
    };
    let free = json!([{"name": "free", "requests": 1_000_000_000, "window_seconds": 1}]);
    let body = json!({"email": "user@example.com", "name": "x", "rate_limits": free});
    let made = call("/v1/keys", body).await.json();
    let bound = |key: &Value, addresses: Value| {
        let shown = ["plan", "effective_plan", "roles", "quota", "cost", "rate_limits", "allowed_addresses"]
            .map(|field| key[field].clone());
        let expected = [json!("gold"), json!("gold"), json!([]), quota.clone(), json!(7), json!([]), addresses];
        assert_eq!(shown, expected);
    };
    bound(&made, json!(["0.0.0.0/1", "128.0.0.0/1"]));
    assert_eq!(applied(&pool, id_of(&made)).await, Some(160));
    let narrow = json!({"email": "user@example.com", "name": "x", "allowed_addresses": ["192.0.2.0/24"]});
    bound(&call("/v1/keys", narrow).await.json(), json!(["192.0.2.0/24"]));
    let detail = "Only a key with the scope admin widens allowed_addresses.";
    for wide in [json!([]), json!(["::/0"])] {
        let body = json!({"email": "user@example.com", "name": "x", "allowed_addresses": wide});
        call("/v1/keys", body).await.assert_forbidden(detail);
    }
    // So it is with the primary key.
    assert_eq!(call("/api/user/key", json!({"email": "user@example.com", "key_name": "x"})).await.status, 200);
    let primary: Uuid =
        scalar(&pool, "select primary_key_id from user_preferences where email = 'user@example.com'").await;
    let primary = fixture.get(&format!("/v1/keys/{primary}"), &admin).await.json();
    bound(&primary, json!(["0.0.0.0/1", "128.0.0.0/1"]));
}

#[sqlx::test(migrations = "./migrations")]
async fn the_cost_of_a_request_is_bounded_and_sent_to_filters(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, key) = create(&fixture, &admin, json!({"cost": 0})).await;
    assert_eq!(record(&fixture, &key).await.cost, 0);
    assert_eq!(patch(&fixture, &admin, id, json!({"cost": 1_000_000})).await.json()["cost"], 1_000_000);
    assert_eq!(record(&fixture, &key).await.cost, 1_000_000);
    for cost in [-1, 1_000_001, i64::MAX] {
        let reply = patch(&fixture, &admin, id, json!({"cost": cost})).await;
        reply.assert_invalid("cost", "must be a number from 0 to 1000000");
    }
    let detail = "This key is revoked and cannot be changed.";
    fixture.delete(&format!("/v1/keys/{id}"), &admin).await;
    patch(&fixture, &admin, id, json!({"cost": 1})).await.assert_conflict(detail);
}
