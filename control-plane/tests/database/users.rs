//! Users: `/v1/users`.

use crate::support::{Fixture, change_key, execute, revision, rows};
use contract::key::Secret;
use serde_json::{Value, json};
use sqlx::PgPool;

const USER: &str = "/v1/users/user@example.com";
const CREDITS: &str = "/v1/users/user@example.com/credits";
const CHANGED: &str =
    "The resource has changed since it was read. Read it again and repeat the change with its new ETag.";

#[sqlx::test(migrations = "./migrations")]
async fn a_user_has_a_plan_a_balance_and_counted_keys(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (revoked, _) = fixture.key("user@example.com", &[]).await;
    let (expired, _) = fixture.key("user@example.com", &[]).await;
    fixture.delete(&format!("/v1/keys/{revoked}"), &admin).await;
    change_key(&pool, expired, "expires_at = now()").await;
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let uri = "/v1/users/User@Example.com";
    let read = fixture.get(uri, &user).await;
    let mut expected = json!({
        "id": read.json()["id"], "email": "user@example.com", "plan": null, "balance": 0, "metered": false,
        "created_at": read.json()["created_at"], "keys": {"live": 1, "total": 3},
    });
    assert_eq!((read.status, read.json()), (200, expected.clone()));

    let patch = async |body: Value| fixture.patch(uri, &admin, &body).await;
    let patched = patch(json!({"plan": "gold"})).await;
    expected["plan"] = "gold".into();
    assert_eq!((patched.status, patched.json()), (200, expected.clone()));
    let before = revision(&pool).await;
    assert_eq!(patch(json!({"plan": "gold"})).await.json(), expected);
    assert_eq!(revision(&pool).await, before, "nothing changed: nothing for filters to learn");
    patch(json!({})).await.assert_problem(400, "invalid", "Set plan.", None);
    let detail = "there is no plan silver; create it with PUT /v1/plans/silver";
    patch(json!({"plan": "silver"})).await.assert_problem(400, "invalid", detail, Some("plan"));
    assert_eq!(fixture.get(uri, &user).await.json(), expected);
    assert_eq!(patch(json!({"plan": null})).await.json()["plan"], Value::Null);

    let audit: Vec<(String, Option<String>, Value)> =
        rows(&pool, "select action, target, detail from audit where action like 'user.%' order by id").await;
    let changed = |plan: Value| ("user.update".to_owned(), Some("user@example.com".to_owned()), json!({"plan": plan}));
    assert_eq!(audit, [changed("gold".into()), changed(Value::Null)]);
}

#[sqlx::test(migrations = "./migrations")]
async fn an_unknown_user_is_made_by_a_change_and_by_nothing_else(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let uri = "/v1/users/new@example.com";
    let missing = async || {
        let reply = fixture.get(uri, &admin).await;
        reply.assert_problem(404, "not_found", "There is no user new@example.com.", None);
    };
    missing().await;
    let reply = fixture.patch(uri, &admin, json!({"plan": "none"})).await;
    assert_eq!(reply.status, 400);
    missing().await;
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let made = fixture.patch(uri, &admin, json!({"plan": "gold"})).await;
    assert_eq!((made.status, &made.json()["plan"]), (200, &json!("gold")));
    assert_eq!(made.json()["keys"], json!({"live": 0, "total": 0}));
    // Keys that are made later have the plan too.
    let body = json!({"email": "new@example.com", "name": "x"});
    let key = fixture.post("/v1/keys", &admin, &body).await.json();
    assert_eq!((&key["plan"], &key["effective_plan"]), (&Value::Null, &json!("gold")));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_sees_themselves_and_changes_nothing(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let (_, sync) = fixture.key("user@example.com", &["sync"]).await;
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let admins = "Use a key with the scope admin.";
    let own = "This key manages only its owner's data. Use a key with the scope admin.";
    let filters = "A key with the scope sync cannot manage keys. Use another key.";
    let body = json!({"plan": "gold"});
    for (key, method, uri, body, detail) in [
        (&user, "PATCH", "/v1/users/user@example.com", Some(&body), admins),
        (&user, "GET", "/v1/users", None, admins),
        (&user, "GET", "/v1/users/admin@example.com", None, own),
        (&sync, "GET", "/v1/users/user@example.com", None, filters),
        (&sync, "PATCH", "/v1/users/user@example.com", Some(&body), admins),
    ] {
        fixture.call(method, uri, key, body).await.assert_problem(403, "forbidden", detail, None);
    }
    assert_eq!(fixture.get("/v1/users/user@example.com", &user).await.json()["plan"], Value::Null);
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_hold_every_user_once_by_address_and_prefix(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for email in ["a+3@example.com", "a+1@example.com", "a+2@example.com", "b@example.com", "a_1@example.com"] {
        fixture.key(email, &[]).await;
    }
    let first = fixture.get("/v1/users?email_prefix=A%2B&limit=2", &admin).await;
    let next = "/v1/users?email_prefix=a%2B&cursor=a%2B2%40example.com&limit=2";
    assert_eq!(first.header("link"), format!("<{next}>; rel=\"next\""));
    let pages = fixture.pages("/v1/users", "email_prefix=a%2B&", "users", "email", &admin).await;
    assert_eq!(pages, [vec!["a+1@example.com", "a+2@example.com"], vec!["a+3@example.com"]]);
    let all = fixture.get("/v1/users", &admin).await.json();
    assert_eq!(all["users"].as_array().unwrap().len(), 6);
    // A percent sign is a character like others.
    let none = fixture.get("/v1/users?email_prefix=%25", &admin).await.json();
    assert_eq!(none, json!({"users": [], "next_cursor": null}));
    let text = "must have at most 254 characters and no control characters";
    for (query, field, detail) in [
        ("limit=201", "limit", "must be a number from 1 to 200"),
        ("email_prefix=a%00", "email_prefix", text),
        ("cursor=%0A", "cursor", text),
    ] {
        let reply = fixture.get(&format!("/v1/users?{query}"), &admin).await;
        reply.assert_problem(400, "invalid", detail, Some(field));
    }
}

/// The user and the account of the user, as they are now and with their ETag.
async fn tags(fixture: &Fixture, key: &Secret) -> [String; 2] {
    let user = fixture.get(USER, key).await;
    let account = fixture.get(CREDITS, key).await;
    [user, account].map(|reply| {
        assert_eq!(reply.status, 200, "{}", reply.json());
        reply.header("etag").to_owned()
    })
}

#[sqlx::test(migrations = "./migrations")]
async fn a_user_is_changed_only_as_the_client_has_seen_them(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    for name in ["gold", "silver"] {
        fixture.put(&format!("/v1/plans/{name}"), &admin, json!({})).await;
    }
    assert_eq!(tags(&fixture, &user).await, ["\"1\"", "\"1\""]);
    let patch = async |uri: &str, body: Value, tag: &str| {
        fixture.call_with("PATCH", uri, &admin, Some(&body), &[("if-match", tag)]).await
    };
    let refill = json!({"refill": {"amount": 5, "period": "day", "time_zone": "UTC"}});
    for (uri, body, before, after) in [
        (USER, json!({"plan": "gold"}), "\"1\"", "\"2\""),
        (CREDITS, json!({"metered": true}), "\"7\", \"2\"", "\"3\""),
        (CREDITS, refill.clone(), "\"3\"", "\"4\""),
        // Nothing to change is no change.
        (CREDITS, refill, "*", "\"4\""),
        (USER, json!({"plan": "gold"}), "*", "\"4\""),
    ] {
        let reply = patch(uri, body.clone(), before).await;
        assert_eq!((reply.status, reply.header("etag")), (200, after), "{uri} {body}");
        assert_eq!(tags(&fixture, &user).await, [after, after], "{uri} {body}");
    }
    for (uri, body) in [(USER, json!({"plan": "silver"})), (CREDITS, json!({"metered": false}))] {
        for tag in ["\"3\"", "W/\"4\""] {
            patch(uri, body.clone(), tag).await.assert_problem(412, "precondition_failed", CHANGED, None);
        }
        let detail = "if-match must be * or a list of entity tags such as \"7\"";
        patch(uri, body, "4").await.assert_problem(400, "invalid", detail, None);
    }
    let shown = fixture.get(USER, &user).await.json();
    assert_eq!((&shown["plan"], &shown["metered"]), (&json!("gold"), &json!(true)));
}

#[sqlx::test(migrations = "./migrations")]
async fn top_ups_and_usage_do_not_change_the_etag_of_a_user(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    let top_up = async || {
        let reply = fixture.post(CREDITS, &admin, json!({"amount": 1_000})).await;
        assert_eq!(reply.status, 201);
    };
    // The first top-up makes the user metered, which is set from then on.
    top_up().await;
    assert_eq!(tags(&fixture, &user).await, ["\"2\"", "\"2\""]);
    top_up().await;
    let sql = "insert into ledger (owner_id, kind, amount, balance) select id, 'usage', -700, 0 from user_preferences where email = 'user@example.com'";
    execute(&pool, sql).await;
    fixture.key("user@example.com", &[]).await;
    assert_eq!(fixture.get(CREDITS, &user).await.json()["balance"], 1_300);
    assert_eq!(tags(&fixture, &user).await, ["\"2\"", "\"2\""]);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_change_with_if_match_creates_no_user(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let body = json!({"plan": "gold"});
    let patch = async |header: &'static str, tag: &str| {
        fixture.call_with("PATCH", USER, &admin, Some(&body), &[(header, tag)]).await
    };
    for tag in ["*", "\"1\""] {
        patch("if-match", tag).await.assert_problem(412, "precondition_failed", CHANGED, None);
    }
    let detail = "There is no user user@example.com.";
    fixture.get(USER, &admin).await.assert_problem(404, "not_found", detail, None);
    let metered = json!({"metered": true});
    let reply = fixture.call_with("PATCH", CREDITS, &admin, Some(&metered), &[("if-match", "*")]).await;
    reply.assert_problem(404, "not_found", detail, None);
    let made = patch("if-none-match", "*").await;
    assert_eq!((made.status, made.header("etag"), &made.json()["plan"]), (200, "\"2\"", &json!("gold")));
    let detail = "The resource exists already, and If-None-Match demands that it does not.";
    patch("if-none-match", "*").await.assert_problem(412, "precondition_failed", detail, None);
}

#[sqlx::test(migrations = "./migrations")]
async fn of_changes_of_a_user_at_the_same_time_that_expect_the_same_version_one_is_made(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, user) = fixture.key("user@example.com", &[]).await;
    fixture.put("/v1/plans/gold", &admin, json!({})).await;
    let one = async |uri: &str, body: Value| {
        fixture.call_with("PATCH", uri, &admin, Some(&body), &[("if-match", "\"1\"")]).await.status
    };
    let refill = |amount: i64| json!({"refill": {"amount": amount, "period": "day"}});
    let (a, b, c, d) = tokio::join!(
        one(USER, json!({"plan": "gold"})),
        one(CREDITS, json!({"metered": true})),
        one(CREDITS, refill(1)),
        one(CREDITS, refill(2))
    );
    let mut statuses = [a, b, c, d];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 412, 412, 412]);
    // A refill also makes the user metered: two things in two statements.
    let [now, _] = tags(&fixture, &user).await;
    assert!(["\"2\"", "\"3\""].contains(&&*now), "{now}");
}
