//! `/v1/policies`: written, shown, pushed to filters, and kept free of conflicts.

use contract::key::Secret;
use contract::sightings::{POLICIES, Sightings};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Fixture, Reply, execute, request, scalar};

async fn fixture(pool: &PgPool) -> (Fixture, Secret) {
    let fixture = Fixture::new(pool).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    (fixture, admin)
}

async fn put(fixture: &Fixture, admin: &Secret, name: &str, body: Value) -> Reply {
    fixture.put(&format!("/v1/policies/{name}"), admin, &body).await
}

fn prefix(path: &str) -> Value {
    json!({"path": {"prefix": path}})
}

#[sqlx::test(migrations = "./migrations")]
async fn a_policy_is_shown_as_it_was_written_and_the_first_brings_the_default(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    assert_eq!(fixture.get("/v1/policies", &admin).await.json(), json!({"policies": [], "next_cursor": null}));
    assert_eq!(fixture.get("/v1/policies/default", &admin).await.status, 404);
    let body = json!({"description": "Reads orders", "scopes": {"all": ["orders:read"]}, "match": [prefix("/orders")]});
    let reply = put(&fixture, &admin, "orders-read", body.clone()).await;
    assert_eq!((reply.status, reply.header("etag")), (201, "\"1\""));
    let mut expected = json!({
        "name": "orders-read", "description": "Reads orders", "key": "required", "kinds": null,
        "scopes": {"all": ["orders:read"]}, "cost": null, "rate_limits": [], "shadow": false, "capture_unknown": false, "from_annotation": true, "match": [prefix("/orders")],
    });
    expected["created_at"] = reply.json()["created_at"].clone();
    assert_eq!(reply.json(), expected);
    // The same again changes nothing.
    let again = put(&fixture, &admin, "orders-read", body).await;
    assert_eq!((again.status, again.header("etag")), (200, "\"1\""));
    let shown = fixture.get("/v1/policies/orders-read", &admin).await.json();
    expected["applied_on"] = shown["applied_on"].clone();
    expected["last_named_at"] = Value::Null;
    assert_eq!(shown, expected);
    assert_eq!(shown["applied_on"]["envoys"], 0);
    let list = fixture.get("/v1/policies", &admin).await.json();
    let names: Vec<_> = list["policies"].as_array().unwrap().iter().map(|policy| policy["name"].clone()).collect();
    assert_eq!(names, ["default", "orders-read"]);
    assert_eq!((&list["policies"][0]["key"], &list["policies"][0]["match"]), (&json!("required"), &json!([])));

    let sql = "select detail from audit where action = 'policy.create' and target = 'orders-read'";
    let detail: Value = scalar(&pool, sql).await;
    assert_eq!(detail["scopes"], json!({"all": ["orders:read"]}));
    let (_, user) = fixture.key("user@example.com", &[]).await;
    for reply in [
        fixture.get("/v1/policies", &user).await,
        fixture.get("/v1/policies/default", &user).await,
        put(&fixture, &user, "default", json!({})).await,
        fixture.delete("/v1/policies/orders-read", &user).await,
    ] {
        assert_eq!(reply.status, 403);
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn filters_get_policies_as_they_change_and_forget_deleted_ones(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    let names = async || {
        fixture.in_step().await;
        let definitions = fixture.app.store.definitions();
        ["default", "a", "b"].map(|name| definitions.policy(name).map(|policy| policy.policy.cost))
    };
    assert_eq!(names().await, [None; 3]);
    assert_eq!(put(&fixture, &admin, "a", json!({"cost": 1})).await.status, 201);
    assert_eq!(names().await, [Some(None), Some(Some(1)), None]);
    assert_eq!(put(&fixture, &admin, "a", json!({"cost": 2})).await.status, 200);
    assert_eq!(put(&fixture, &admin, "b", json!({"cost": 3})).await.status, 201);
    assert_eq!(put(&fixture, &admin, "default", json!({"cost": 4})).await.status, 200);
    assert_eq!(names().await, [Some(Some(4)), Some(Some(2)), Some(Some(3))]);
    assert_eq!(fixture.delete("/v1/policies/a", &admin).await.status, 204);
    assert_eq!(names().await, [Some(Some(4)), None, Some(Some(3))]);
    // Filters go on looking for names after the last one.
    assert_eq!(fixture.delete("/v1/policies/b", &admin).await.status, 204);
    assert!(!fixture.app.store.definitions().has_no_policies());
}

#[sqlx::test(migrations = "./migrations")]
async fn a_policy_that_is_in_use_stays_and_the_default_always_does(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    put(&fixture, &admin, "a", json!({"match": [prefix("/a"), prefix("/b")]})).await;
    let reply = fixture.delete("/v1/policies/a", &admin).await;
    let detail = "The policy a is in use: it has 2 entries of match. Remove them first.";
    assert_eq!((reply.status, &reply.json()["detail"]), (409, &json!(detail)));
    let reply = fixture.delete("/v1/policies/default", &admin).await;
    assert_eq!(reply.status, 409);
    put(&fixture, &admin, "a", json!({})).await;
    assert_eq!(fixture.delete("/v1/policies/a", &admin).await.status, 204);
    assert_eq!(fixture.delete("/v1/policies/a", &admin).await.status, 404);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_policy_that_routes_named_lately_is_deleted_by_force_only(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    for name in ["orders", "items"] {
        put(&fixture, &admin, name, json!({})).await;
    }
    let named = |names: &[&str]| Sightings {
        policies: names.iter().map(|name| (*name).to_owned()).collect(),
        unknown_keys: Vec::new(),
    };
    let shown = async || fixture.get("/v1/policies/orders", &admin).await.json()["last_named_at"].clone();
    assert_eq!(shown().await, Value::Null);
    fixture.note(&sync, &named(&["orders", "gone", "orders"])).await.assert_ok();
    fixture.note(&sync, &named(&["orders"])).await.assert_ok();
    let at = shown().await;
    let reply = fixture.delete("/v1/policies/orders", &admin).await;
    let detail = format!(
        "Routes of Envoys named the policy orders within the last two hours (last report {}). Remove the name from Envoy's \
         configuration, and delete the policy two hours later, or now with ?force=true. Requests of routes that still name it \
         get 503 policy_unknown.",
        at.as_str().unwrap()
    );
    assert_eq!((reply.status, &reply.json()["detail"]), (409, &json!(detail)));
    assert_eq!(fixture.delete("/v1/policies/items", &admin).await.status, 204);
    assert_eq!(fixture.delete("/v1/policies/orders?force=true", &admin).await.status, 204);
    // A policy of the same name is another one.
    put(&fixture, &admin, "orders", json!({})).await;
    assert_eq!(shown().await, Value::Null);
    fixture.note(&sync, &named(&["orders"])).await.assert_ok();
    execute(&pool, "update policy_uses set last_named_at = now() - interval '131 minutes'").await;
    assert_eq!(fixture.delete("/v1/policies/orders", &admin).await.status, 204);
    let many = vec!["orders"; POLICIES + 1];
    fixture.note(&sync, &named(&many)).await.assert_invalid("policies", "must have at most 100 entries");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_match_that_cannot_be_told_apart_from_another_is_refused_and_changes_nothing(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    put(&fixture, &admin, "a", json!({"match": [prefix("/a")]})).await;
    let reply = put(&fixture, &admin, "b", json!({"cost": 1, "match": [prefix("/b"), prefix("/a/")]})).await;
    let detail = "The match \"path /a/ and below\" and the match \"path /a and below\" of the policy a fit the same requests, and \
         neither is more specific. Change one of them.";
    assert_eq!((reply.status, &reply.json()["detail"]), (409, &json!(detail)));
    assert_eq!(fixture.get("/v1/policies/b", &admin).await.status, 404);
    let more = json!({"match": [prefix("/b"), {"path": {"prefix": "/a"}, "methods": ["GET"]}]});
    assert_eq!(put(&fixture, &admin, "b", more).await.status, 201);
    let many: Vec<_> = (0..100).map(|number| prefix(&format!("/many/{number}"))).collect();
    for number in 0..9 {
        let own: Vec<_> = (0..100).map(|entry| prefix(&format!("/p{number}/{entry}"))).collect();
        assert_eq!(put(&fixture, &admin, &format!("p{number}"), json!({"match": own})).await.status, 201);
    }
    let reply = put(&fixture, &admin, "many", json!({"match": many})).await;
    assert_eq!((reply.status, reply.json()["detail"].as_str().unwrap().contains("there would be 1003")), (409, true));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_change_needs_the_version_that_it_was_made_of(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    let path = "/v1/policies/a";
    let with = async |name: &'static str, value: &str, body: Value| {
        fixture.call_with("PUT", path, &admin, Some(&body), &[(name, value)]).await.status
    };
    assert_eq!(with("if-match", "\"1\"", json!({})).await, 412);
    assert_eq!(with("if-none-match", "*", json!({})).await, 201);
    assert_eq!(with("if-none-match", "*", json!({"cost": 1})).await, 412);
    assert_eq!(with("if-match", "\"1\"", json!({"cost": 1})).await, 200);
    assert_eq!(with("if-match", "\"1\"", json!({"cost": 2})).await, 412);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_field_is_named(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    for (body, field) in [
        (json!({"scopes": {"all": []}}), "scopes"),
        (json!({"match": [{"path": {"exact": "/a/../b"}}]}), "match[0].path"),
        (json!({"rate_limits": [{"name": "a", "requests": 0, "window_seconds": 1}]}), "rate_limits"),
        (json!({"policy": {}}), "policy"),
    ] {
        let reply = put(&fixture, &admin, "a", body).await;
        assert_eq!((reply.status, &reply.json()["field"]), (400, &json!(field)), "{}", reply.json());
    }
    assert_eq!(put(&fixture, &admin, "A", json!({})).await.status, 400);
}

#[sqlx::test(migrations = "./migrations")]
async fn of_two_policies_that_conflict_only_one_is_written_although_they_come_at_once(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    for round in 0..10 {
        let body = json!({"match": [prefix(&format!("/round-{round}"))]});
        let names = [format!("a{round}"), format!("b{round}")];
        let [one, other] = &names;
        let (one, other) =
            tokio::join!(put(&fixture, &admin, one, body.clone()), put(&fixture, &admin, other, body.clone()));
        let mut statuses = [one.status, other.status];
        statuses.sort_unstable();
        assert_eq!(statuses, [201, 409]);
    }
    let created = "select count(*) from audit where action = 'policy.create' and target = 'default'";
    assert_eq!(scalar::<i64>(&pool, created).await, 1);
}

/// The control plane decides about its own callers by no policy of an API owner.
#[sqlx::test(migrations = "./migrations")]
async fn no_policy_lets_anybody_into_the_rest_api(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    put(&fixture, &admin, "default", json!({"key": "optional", "shadow": true})).await;
    fixture.in_step().await;
    let (id, revoked) = fixture.key("user@example.com", &["admin"]).await;
    assert_eq!(fixture.delete(&format!("/v1/keys/{id}"), &admin).await.status, 204);
    let stranger = Secret::from_presented("sk_live_nobody".into());
    for key in [Some(&revoked), Some(&stranger), None] {
        let reply = fixture.send(request("GET", "/v1/policies", key, "")).await;
        assert_eq!(reply.status, 401);
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_repeated_change_of_a_policy_or_plan_gets_the_same_answer_and_each_change_is_in_the_trail(pool: PgPool) {
    let (fixture, admin) = fixture(&pool).await;
    for (uri, kind) in [("/v1/policies/reports", "policy"), ("/v1/plans/gold", "plan"), ("/v1/roles/support", "role")] {
        let change = async |method: &str, name: &str, body: Option<Value>| {
            let id = format!("{kind}-{name}");
            let headers = [("if-none-match", "*"), ("idempotency-key", &*id)];
            let headers = if name == "create" { &headers[..] } else { &headers[1..] };
            let mut replies = Vec::new();
            for _ in 0..2 {
                let reply = fixture.call_with(method, uri, &admin, body.as_ref(), headers).await;
                replies.push((reply.status, reply.header("etag").to_owned(), reply.body));
            }
            assert_eq!(replies[0], replies[1], "{method} {uri}");
            replies.remove(0)
        };
        let (status, created, _) = change("PUT", "create", Some(json!({"description": "first"}))).await;
        assert_eq!(status, 201);
        let (status, replaced, _) = change("PUT", "replace", Some(json!({"description": "second"}))).await;
        assert_eq!(status, 200);
        assert_ne!(created, replaced);
        let (status, etag, body) = change("DELETE", "delete", None).await;
        assert_eq!((status, &*etag, body.len()), (204, "", 0));
        let detail = "Another request used this Idempotency-Key. Use a new one for each request.";
        let other = fixture
            .call_with("PUT", uri, &admin, Some(&json!({})), &[("idempotency-key", &format!("{kind}-create"))])
            .await;
        other.assert_problem(422, "idempotency_mismatch", detail, None);
        let name = uri.rsplit('/').next().unwrap();
        let trail = fixture.get(&format!("/v1/audit?target={name}"), &admin).await.json();
        let actions: Vec<_> =
            trail["entries"].as_array().unwrap().iter().map(|entry| entry["action"].clone()).collect();
        assert_eq!(actions, ["delete", "update", "create"].map(|verb| format!("{kind}.{verb}")));
        if kind == "policy" {
            assert_eq!(trail["entries"][1]["detail"]["description"], "second");
        }
    }
}
