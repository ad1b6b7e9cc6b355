//! Users, over the real router and a real PostgreSQL.

use crate::support::{Fixture, revision};
use serde_json::{Value, json};
use sqlx::PgPool;

const ADMIN: &[&str] = &["admin"];

#[sqlx::test(migrations = "./migrations")]
async fn a_user_has_a_plan_a_balance_and_counted_keys(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (revoked, _) = fixture.key("user@example.com", &[]).await;
    let (expired, _) = fixture.key("user@example.com", &[]).await;
    fixture.call("DELETE", &format!("/v1/keys/{revoked}"), &admin, None).await;
    sqlx::query("update api_keys set expires_at = now() where id = $1").bind(expired).execute(&pool).await.unwrap();
    fixture.call("PUT", "/v1/plans/gold", &admin, Some(&json!({}))).await;
    let uri = "/v1/users/User@Example.com";
    let read = fixture.call("GET", uri, &user, None).await;
    let mut expected = json!({
        "id": read.json()["id"], "email": "user@example.com", "plan": null, "balance": 0, "metered": false,
        "created_at": read.json()["created_at"], "keys": {"live": 1, "total": 3},
    });
    assert_eq!((read.status.as_u16(), read.json()), (200, expected.clone()));

    let patch = async |body: Value| fixture.call("PATCH", uri, &admin, Some(&body)).await;
    let patched = patch(json!({"plan": "gold"})).await;
    expected["plan"] = "gold".into();
    assert_eq!((patched.status.as_u16(), patched.json()), (200, expected.clone()));
    let before = revision(&pool).await;
    assert_eq!(patch(json!({"plan": "gold"})).await.json(), expected);
    assert_eq!(revision(&pool).await, before, "nothing changed: nothing for filters to learn");
    patch(json!({})).await.assert_problem(400, "invalid", "Give plan.", None);
    let detail = "there is no plan silver; PUT /v1/plans/silver makes it";
    patch(json!({"plan": "silver"})).await.assert_problem(400, "invalid", detail, Some("plan"));
    assert_eq!(fixture.call("GET", uri, &user, None).await.json(), expected);
    assert_eq!(patch(json!({"plan": null})).await.json()["plan"], Value::Null);

    let audit: Vec<(String, Option<String>, Value)> =
        sqlx::query_as("select action, target, detail from audit where action like 'user.%' order by id")
            .fetch_all(&pool)
            .await
            .unwrap();
    let changed = |plan: Value| ("user.change".to_owned(), Some("user@example.com".to_owned()), json!({"plan": plan}));
    assert_eq!(audit, [changed("gold".into()), changed(Value::Null)]);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_unknown_user_is_made_by_a_change_and_by_nothing_else(pool: PgPool) {
    let fixture = Fixture::new(pool.clone()).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let uri = "/v1/users/new@example.com";
    let missing = async || {
        let reply = fixture.call("GET", uri, &admin, None).await;
        reply.assert_problem(404, "not_found", "There is no user new@example.com.", None);
    };
    missing().await;
    let reply = fixture.call("PATCH", uri, &admin, Some(&json!({"plan": "none"}))).await;
    assert_eq!(reply.status.as_u16(), 400);
    missing().await;
    fixture.call("PUT", "/v1/plans/gold", &admin, Some(&json!({}))).await;
    let made = fixture.call("PATCH", uri, &admin, Some(&json!({"plan": "gold"}))).await;
    assert_eq!((made.status.as_u16(), &made.json()["plan"]), (200, &json!("gold")));
    assert_eq!(made.json()["keys"], json!({"live": 0, "total": 0}));
    // Keys that are made later have the plan too.
    let body = json!({"email": "new@example.com", "name": "x"});
    let key = fixture.call("POST", "/v1/keys", &admin, Some(&body)).await.json();
    assert_eq!((&key["plan"], &key["effective_plan"]), (&Value::Null, &json!("gold")));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_sees_themselves_and_changes_nothing(pool: PgPool) {
    let fixture = Fixture::new(pool).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (_, sync) = fixture.key("user@example.com", &["sync"]).await;
    fixture.call("PUT", "/v1/plans/gold", &admin, Some(&json!({}))).await;
    let admins = "This is for admins: use a key with the scope admin.";
    let own = "This key manages its owner's data only. Use a key with the scope admin.";
    let filters = "A key with the scope sync serves filters and cannot manage keys.";
    let body = json!({"plan": "gold"});
    for (key, method, uri, body, detail) in [
        (&user, "PATCH", "/v1/users/user@example.com", Some(&body), admins),
        (&user, "GET", "/v1/users", None, admins),
        (&user, "GET", "/v1/users/admin@example.com", None, own),
        (&sync, "GET", "/v1/users/user@example.com", None, filters),
        (&sync, "PATCH", "/v1/users/user@example.com", Some(&body), filters),
    ] {
        fixture.call(method, uri, key, body).await.assert_problem(403, "forbidden", detail, None);
    }
    assert_eq!(fixture.call("GET", "/v1/users/user@example.com", &user, None).await.json()["plan"], Value::Null);
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_hold_every_user_once_by_address_and_prefix(pool: PgPool) {
    let fixture = Fixture::new(pool).await;
    let (_, admin) = fixture.key("admin@example.com", ADMIN).await;
    for email in ["a+3@example.com", "a+1@example.com", "a+2@example.com", "b@example.com", "a_1@example.com"] {
        fixture.key(email, &[]).await;
    }
    let (mut uri, mut seen) = ("/v1/users?email_prefix=A%2B&limit=2".to_owned(), Vec::new());
    loop {
        let reply = fixture.call("GET", &uri, &admin, None).await;
        let page = reply.json();
        seen.push(page["users"].as_array().unwrap().iter().map(|user| user["email"].clone()).collect::<Vec<_>>());
        if page["next_cursor"].is_null() {
            assert!(!reply.headers.contains_key("link"));
            break;
        }
        assert_eq!(page["next_cursor"], "a+2@example.com");
        uri = "/v1/users?email_prefix=a%2B&cursor=a%2B2%40example.com&limit=2".into();
        assert_eq!(reply.header("link"), format!("<{uri}>; rel=\"next\""));
    }
    assert_eq!(seen, [vec!["a+1@example.com", "a+2@example.com"], vec!["a+3@example.com"]]);
    let all = fixture.call("GET", "/v1/users", &admin, None).await.json();
    assert_eq!(all["users"].as_array().unwrap().len(), 6);
    // A percent sign is a character like others.
    let none = fixture.call("GET", "/v1/users?email_prefix=%25", &admin, None).await.json();
    assert_eq!(none, json!({"users": [], "next_cursor": null}));
    let text = "must have at most 254 characters and no control characters";
    for (query, field, detail) in [
        ("limit=201", "limit", "must be a number from 1 to 200"),
        ("email_prefix=a%00", "email_prefix", text),
        ("cursor=%0A", "cursor", text),
    ] {
        let reply = fixture.call("GET", &format!("/v1/users?{query}"), &admin, None).await;
        reply.assert_problem(400, "invalid", detail, Some(field));
    }
}
