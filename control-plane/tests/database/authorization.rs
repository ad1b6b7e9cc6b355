//! Who may do what: every route with every kind of caller, in one table. A route of the OpenAPI document without a row
//! fails the test.

use std::collections::BTreeSet;

use contract::id::ReporterId;
use contract::key::Secret;
use contract::usage::{Report, write_reports};
use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

use crate::document::document;
use crate::support::{Fixture, Reply, change_key, request, scalar};

/// The callers, in the order of the columns.
const CALLERS: [&str; 9] = [
    "no key",
    "unknown key",
    "another user's key",
    "own key",
    "sync key",
    "admin key",
    "revoked admin key",
    "expired admin key",
    "disabled admin key",
];

/// What a call is answered with, by caller, and what a refusal of a known caller (403) may say; anything where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Row([u16; CALLERS.len()], &'static [&'static str]);

const OWNERS: &str = "This key manages only its owner's data. Use a key with the scope admin.";
const ADMINS: &str = "Use a key with the scope admin.";
const MANAGERS: &str = "A key with the scope sync cannot manage keys. Use another key.";

/// The answer for a secret that no key has, or only a key of somebody else.
const NO_SUCH_SECRET: &str = "There is no key with this secret.";

/// For everybody.
const PUBLIC: Row = Row([200; CALLERS.len()], &[]);

/// For everybody too, where metrics are collected; tests collect none.
const METRICS: Row = Row([404; CALLERS.len()], &[]);

/// A call that names the user. Other users get 403.
const fn by_user(done: u16) -> Row {
    Row([401, 401, 403, done, 403, done, 401, 401, 401], &[OWNERS, MANAGERS])
}

/// A call that finds its target by its id: what belongs to others is not there.
const fn by_id(done: u16) -> Row {
    Row([401, 401, 404, done, 403, done, 401, 401, 401], &[MANAGERS])
}

/// A call whose answer is about the caller's own, unless an admin asks.
const fn for_users(done: u16) -> Row {
    Row([401, 401, done, done, 403, done, 401, 401, 401], &[MANAGERS])
}

/// A call for the operator only.
const fn for_admins(done: u16) -> Row {
    Row([401, 401, 403, 403, 403, done, 401, 401, 401], &[ADMINS])
}

/// A call with a field that only the operator sets.
const fn set_by_admins(done: u16) -> Row {
    Row(for_admins(done).0, &[])
}

/// A call for filters only.
const fn for_filters(done: u16) -> Row {
    Row([401, 401, 403, 403, done, 403, 401, 401, 401], &[])
}

/// Method, route as the document has it, query, body, and the answers. In each, `EMAIL` is the owner's address and `ID` the
/// id of the target, a user below `/v1/users` and else a key.
const TABLE: &[(&str, &str, &str, &str, Row)] = &[
    ("GET", "/api/user/key/{email}", "", "", by_user(200)),
    ("DELETE", "/api/user/key/{email}", "", "", by_user(200)),
    ("POST", "/api/user/key", "", r#"{"email": "EMAIL", "key_name": "n"}"#, by_user(200)),
    ("GET", "/api/user/usage/{email}", "", "", by_user(200)),
    ("POST", "/v1/keys", "", r#"{"email": "EMAIL", "name": "n"}"#, by_user(201)),
    // A user's key cannot grant a scope that it lacks, or set a field that only admins set.
    ("POST", "/v1/keys", "", r#"{"email": "EMAIL", "name": "n", "scopes": ["orders"]}"#, set_by_admins(201)),
    ("POST", "/v1/keys", "", r#"{"email": "EMAIL", "name": "n", "scopes": ["admin"]}"#, set_by_admins(201)),
    ("POST", "/v1/keys", "", r#"{"email": "EMAIL", "name": "n", "scopes": ["sync"]}"#, set_by_admins(201)),
    ("POST", "/v1/keys", "", r#"{"email": "EMAIL", "name": "n", "cost": 0}"#, set_by_admins(201)),
    ("GET", "/v1/keys", "", "", for_users(200)),
    ("GET", "/v1/keys", "?email=EMAIL", "", by_user(200)),
    ("GET", "/v1/keys/{id}", "", "", by_id(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"name": "n"}"#, by_id(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"disabled": true}"#, by_id(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"allowed_addresses": ["192.0.2.0/24"]}"#, by_id(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"roles": []}"#, set_by_admins(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"plan": null}"#, set_by_admins(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"quota": null}"#, set_by_admins(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"cost": 0}"#, set_by_admins(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"external_id": null}"#, set_by_admins(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"metadata": {}}"#, set_by_admins(200)),
    ("PATCH", "/v1/keys/{id}", "", r#"{"rate_limits": []}"#, set_by_admins(200)),
    ("DELETE", "/v1/keys/{id}", "", "", by_id(204)),
    // A key rotates itself only.
    ("POST", "/v1/keys/{id}/rotate", "", "{}", Row([401, 401, 404, 403, 403, 201, 401, 401, 401], &[])),
    ("DELETE", "/v1/keys/{id}/secrets/{generation}", "", "", by_id(204)),
    ("POST", "/v1/keys/lookup", "", r#"{"key": "sk_live_nobody"}"#, Row(for_users(404).0, &[MANAGERS, NO_SUCH_SECRET])),
    ("POST", "/v1/keys/import", "", "NDJSON", for_admins(200)),
    ("GET", "/v1/unknown-keys", "", "", for_admins(200)),
    ("DELETE", "/v1/unknown-keys", "", "", for_admins(200)),
    ("GET", "/v1/keys/{id}/usage", "", "", by_id(200)),
    ("GET", "/v1/keys/{id}/quota", "", "", by_id(200)),
    ("POST", "/v1/keys/{id}/quota/reset", "", "{}", for_admins(200)),
    ("GET", "/v1/users", "", "", for_admins(200)),
    ("GET", "/v1/users", "?email=EMAIL", "", by_user(200)),
    ("POST", "/v1/users", "", r#"{"email": "EMAIL"}"#, for_admins(200)),
    ("GET", "/v1/users/{id}", "", "", by_user(200)),
    ("PATCH", "/v1/users/{id}", "", r#"{"plan": null}"#, for_admins(200)),
    ("PATCH", "/v1/users/{id}", "", r#"{"metered": false}"#, for_admins(200)),
    ("DELETE", "/v1/users/{id}", "", "", for_admins(200)),
    ("POST", "/v1/users/{id}/revoke-keys", "", "", by_user(200)),
    ("GET", "/v1/users/{id}/balance", "", "", by_user(200)),
    ("GET", "/v1/users/{id}/ledger", "", "", by_user(200)),
    ("POST", "/v1/users/{id}/ledger", "", r#"{"amount": 1}"#, for_admins(201)),
    ("GET", "/v1/roles", "", "", for_admins(200)),
    ("GET", "/v1/roles/{name}", "", "", for_admins(200)),
    ("PUT", "/v1/roles/{name}", "", r#"{"scopes": []}"#, for_admins(200)),
    ("DELETE", "/v1/roles/{name}", "", "", for_admins(204)),
    ("GET", "/v1/plans", "", "", for_admins(200)),
    ("GET", "/v1/plans/{name}", "", "", for_admins(200)),
    ("PUT", "/v1/plans/{name}", "", "{}", for_admins(200)),
    ("DELETE", "/v1/plans/{name}", "", "", for_admins(204)),
    ("GET", "/v1/policies", "", "", for_admins(200)),
    ("GET", "/v1/policies/{name}", "", "", for_admins(200)),
    ("PUT", "/v1/policies/{name}", "", "{}", for_admins(200)),
    ("DELETE", "/v1/policies/{name}", "", "", for_admins(204)),
    ("GET", "/v1/audit", "", "", for_users(200)),
    // A key of another user is explained like an unknown key.
    ("POST", "/v1/explain", "", r#"{"key_id": "ID"}"#, by_id(200)),
    ("GET", "/v1/usage", "", "", for_users(200)),
    ("GET", "/v1/usage", "?email=EMAIL", "", by_user(200)),
    ("GET", "/v1/usage", "?key_id=ID", "", by_id(200)),
    ("GET", "/v1/usage/events", "", "", for_admins(200)),
    ("GET", "/v1/envoys", "", "", for_admins(200)),
    ("GET", "/healthz", "", "", PUBLIC),
    ("GET", "/readyz", "", "", PUBLIC),
    // Not in the document:
    ("GET", "/", "", "", PUBLIC),
    ("GET", "/openapi.json", "", "", PUBLIC),
    ("GET", "/metrics", "", "", METRICS),
    ("GET", "/sync/v1/keys", "?wait=0", "", for_filters(200)),
    ("POST", "/sync/v1/usage", "", "REPORT", for_filters(200)),
];

/// Where rows of the table go that are not in the document.
const BESIDE_THE_DOCUMENT: [&str; 5] = ["/", "/openapi.json", "/metrics", "/sync/v1/keys", "/sync/v1/usage"];

/// What calls find: a user with a primary key and another one, a role and a plan.
struct Found {
    email: String,
    owner: Uuid,
    target: Uuid,
    /// The user's other key.
    own: Secret,
    /// A key of the user with the scope `sync`.
    sync: Secret,
    /// Of the role and of the plan.
    name: String,
}

/// Makes what calls find; the target has a quota and an old secret.
async fn find(fixture: &Fixture, admin: &Secret, number: usize) -> Found {
    let (email, name) = (format!("owner-{number}@example.com"), format!("definition-{number}"));
    let (target, _) = fixture.key(&email, &[]).await;
    let (_, own) = fixture.key(&email, &[]).await;
    let (_, sync) = fixture.key(&email, &["sync"]).await;
    let quota = r#"{"quota": {"requests": 1, "period": "day", "time_zone": "UTC"}}"#;
    for (method, uri, body, done) in [
        ("PATCH", format!("/v1/keys/{target}"), quota, 200),
        ("POST", format!("/v1/keys/{target}/rotate"), r#"{"grace_seconds": 3600}"#, 201),
        ("PUT", format!("/v1/roles/{name}"), r#"{"scopes": []}"#, 201),
        ("PUT", format!("/v1/plans/{name}"), "{}", 201),
        ("PUT", format!("/v1/policies/{name}"), "{}", 201),
    ] {
        let reply = fixture.send(request(method, &uri, Some(admin), body)).await;
        assert_eq!(reply.status, done, "{method} {uri}: {}", String::from_utf8_lossy(&reply.body));
    }
    let primary =
        format!("update user_preferences set primary_key_id = '{target}' where email = '{email}' returning id");
    let owner = scalar(&fixture.pool, primary).await;
    Found { email, owner, target, own, sync, name }
}

/// The callers' keys; those of the owner come with what calls find.
async fn callers(fixture: &Fixture) -> [Option<Secret>; CALLERS.len()] {
    let admin = async |columns: &str| {
        let (id, secret) = fixture.key("admin@example.com", &["admin"]).await;
        change_key(&fixture.pool, id, columns).await;
        Some(secret)
    };
    [
        None,
        Some(Secret::from_presented("sk_live_nobody".into())),
        Some(fixture.key("stranger@example.com", &[]).await.1),
        None,
        None,
        admin("disabled = false").await,
        admin("revoked_at = now()").await,
        admin("expires_at = now() - interval '1 second'").await,
        admin("disabled = true").await,
    ]
}

/// What a refusal says, by its status. It reveals nothing about the key that was asked for.
fn assert_refused(reply: &Reply, who: &str, refusals: &[&str], id: &str, what: &str) {
    let problem = reply.json();
    assert_eq!(reply.header("content-type"), "application/problem+json", "{what}");
    assert_eq!(problem["status"], reply.status, "{what}");
    assert!(!problem.to_string().contains("sk_"), "{what}: {problem}");
    match reply.status {
        401 => {
            let codes = [("no key", "missing"), ("unknown key", "unknown")];
            for (_, code) in codes.iter().filter(|(caller, _)| *caller == who) {
                assert_eq!(problem["code"], *code, "{what}");
            }
            assert_eq!(reply.header("www-authenticate"), "ApiKey realm=\"portcullis\"", "{what}");
        }
        403 => {
            let code = if what.contains(" /sync/") { "scope_denied" } else { "forbidden" };
            assert_eq!(problem["code"], code, "{what}");
            let known = refusals.is_empty() || refusals.iter().any(|detail| problem["detail"] == *detail);
            assert!(known, "{what}: {problem}");
        }
        404 if refusals == [MANAGERS] => assert_eq!(problem["detail"], format!("There is no key {id}."), "{what}"),
        _ => {}
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn every_route_lets_in_whom_the_table_says_and_nobody_else(pool: PgPool) {
    let fixture = Fixture::with_rate_limit(&pool, 1_000_000).await;
    let callers = callers(&fixture).await;
    let (_, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let mut wrong = Vec::new();
    let mut finds = 0;
    let mut found = find(&fixture, &admin, finds).await;
    let changes = async || scalar::<i64>(&pool, "select count(*) from audit").await;
    for (method, route, query, body, Row(statuses, refusals)) in TABLE.iter().copied() {
        for ((who, key), expected) in CALLERS.into_iter().zip(&callers).zip(statuses) {
            let of_users = route.starts_with("/v1/users/");
            let id = if of_users { found.owner } else { found.target }.to_string();
            let fill = |text: &str| text.replace("EMAIL", &found.email).replace("ID", &id);
            let uri = route.replace("{email}", &found.email).replace("{id}", &id).replace("{generation}", "1");
            let uri = uri.replace("{name}", &found.name) + &fill(query);
            let (kind, body) = match body {
                "REPORT" => {
                    let reporter = ReporterId::from(Uuid::now_v7());
                    let report = Report { reporter, seq: 1, counts: Vec::new() };
                    ("application/octet-stream", write_reports(&[report]).unwrap())
                }
                "NDJSON" => ("application/x-ndjson", Vec::new()),
                body => ("application/json", fill(body).into_bytes()),
            };
            let key = match who {
                "own key" => Some(&found.own),
                "sync key" => Some(&found.sync),
                _ => key.as_ref(),
            };
            let before = changes().await;
            let mut request = request(method, &uri, key, body);
            request.headers_mut().insert("content-type", kind.parse().unwrap());
            let reply = fixture.send(request).await;
            let status = reply.status;
            if status != expected {
                wrong.push(format!("{method} {route}{query} {kind} with {who}: {status}, not {expected}"));
            }
            if status >= 400 {
                let what = format!("{method} {uri} with {who}");
                assert_refused(&reply, who, refusals, &id, &what);
                assert_eq!(changes().await, before, "{what}: a refused call changes nothing");
            } else if method != "GET" {
                // The next caller finds what this one found.
                finds += 1;
                found = find(&fixture, &admin, finds).await;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_route_of_the_document_has_a_row_and_every_row_a_route() {
    let document = document();
    let mut documented = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            documented.insert((method.to_uppercase(), path.clone()));
        }
    }
    let rows: BTreeSet<_> = TABLE
        .iter()
        .filter(|(_, route, ..)| !BESIDE_THE_DOCUMENT.contains(route))
        .map(|(method, route, ..)| ((*method).to_owned(), (*route).to_owned()))
        .collect();
    let missing: Vec<_> = documented.difference(&rows).collect();
    let invented: Vec<_> = rows.difference(&documented).collect();
    assert!(missing.is_empty() && invented.is_empty(), "without a row: {missing:?}; without a route: {invented:?}");
}

#[test]
fn every_route_that_wants_a_key_says_so_in_the_document() {
    let document = document();
    for (method, route, _, _, row) in TABLE {
        if BESIDE_THE_DOCUMENT.contains(route) {
            continue;
        }
        let secured = document["paths"][*route][method.to_lowercase()]["security"] == json!([{"api_key": []}]);
        assert_eq!(secured, *row != PUBLIC, "{method} {route}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn an_admin_key_ends_after_ninety_days_unless_it_is_said_when(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let lifetime_days = async |more: serde_json::Value| {
        let created = fixture.create(&admin, more).await.expect(201);
        let time = |field: &str| {
            let text = created[field].as_str()?;
            time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()
        };
        Some((time("expires_at")? - time("created_at").unwrap()).whole_hours().saturating_add(1) / 24)
    };
    assert_eq!(lifetime_days(json!({})).await, None);
    assert_eq!(lifetime_days(json!({"scopes": ["sync"]})).await, None);
    assert_eq!(lifetime_days(json!({"scopes": ["orders", "admin"]})).await, Some(90));
    assert_eq!(lifetime_days(json!({"scopes": ["admin"], "expires_in_seconds": 31_536_000})).await, Some(365));
}
