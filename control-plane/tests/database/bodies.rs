//! JSON bodies: only objects are read, an error names the field by its path, and null means the same as no field.

use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::document::document;
use crate::support::{Fixture, Reply, request};

/// Every call with a JSON body, and the least of a body that it takes.
fn calls(key: Uuid, user: &str) -> Vec<(&'static str, &'static str, String, Value)> {
    let name = json!({"email": "u@example.com", "name": "n"});
    vec![
        ("post", "/api/user/key", "/api/user/key".into(), json!({"email": "u@example.com", "key_name": "n"})),
        ("post", "/v1/keys", "/v1/keys".into(), name),
        ("post", "/v1/keys/lookup", "/v1/keys/lookup".into(), json!({"key": "sk_live_nobody"})),
        // Before the patch, which takes the quota away with null.
        ("post", "/v1/keys/{id}/quota/reset", format!("/v1/keys/{key}/quota/reset"), json!({})),
        ("patch", "/v1/keys/{id}", format!("/v1/keys/{key}"), json!({"name": "n"})),
        ("post", "/v1/keys/{id}/rotate", format!("/v1/keys/{key}/rotate"), json!({})),
        ("post", "/v1/users", "/v1/users".into(), json!({"email": "u@example.com"})),
        ("patch", "/v1/users/{id}", user.into(), json!({"plan": null})),
        ("post", "/v1/users/{id}/ledger", format!("{user}/ledger"), json!({"amount": 5})),
        ("put", "/v1/roles/{name}", "/v1/roles/reader".into(), json!({})),
        ("put", "/v1/plans/{name}", "/v1/plans/gold".into(), json!({})),
        ("put", "/v1/policies/{name}", "/v1/policies/open".into(), json!({})),
        ("post", "/v1/explain", "/v1/explain".into(), json!({})),
    ]
}

/// The schema of a body, without references.
fn schema(document: &Value, method: &str, path: &str) -> Value {
    let content = &document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"];
    resolved(document, content)
}

fn resolved(document: &Value, schema: &Value) -> Value {
    if let Some(reference) = schema["$ref"].as_str() {
        return document.pointer(reference.trim_start_matches('#')).unwrap().clone();
    }
    match schema["oneOf"].as_array() {
        Some(choices) => resolved(document, choices.iter().find(|choice| choice["type"] != "null").unwrap()),
        None => schema.clone(),
    }
}

fn optional(schema: &Value) -> Vec<(String, Value)> {
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let properties = schema["properties"].as_object().unwrap().iter();
    properties
        .filter(|(name, _)| !required.contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

async fn fixture(pool: PgPool) -> (Fixture, contract::key::Secret, Uuid) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (key, _) = fixture.key("u@example.com", &[]).await;
    let quota = json!({"quota": {"requests": 9, "period": "day"}});
    fixture.patch(&format!("/v1/keys/{key}"), &admin, &quota).await.expect(200);
    (fixture, admin, key)
}

#[sqlx::test(migrations = "./migrations")]
async fn a_body_that_is_no_object_is_refused_by_every_call(pool: PgPool) {
    let (fixture, admin, key) = fixture(pool).await;
    let user = fixture.user("u@example.com").await;
    let (calls, document) = (calls(key, &user), document());
    let with_body = document["paths"].as_object().unwrap().iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().iter();
        methods
            .filter(|(_, call)| call["requestBody"]["content"]["application/json"].is_object())
            .map(move |(method, _)| (method, path))
    });
    for (method, path) in with_body {
        assert!(calls.iter().any(|call| (call.0, call.1) == (method, path)), "{method} {path} is not tested here");
    }
    for (method, _, uri, _) in &calls {
        for body in
            [json!([5, "top_up", "x"]), json!(["u@example.com", "n"]), json!([]), json!(5), json!("x"), json!(null)]
        {
            let reply = fixture.call(&method.to_uppercase(), uri, &admin, Some(&body)).await;
            reply.assert_problem(400, "invalid", "The body must be an object.", None);
        }
    }
    let user = fixture.get(&user, &admin).await.json();
    assert_eq!((&user["balance"], &user["metered"]), (&json!(0), &json!(false)));
}

#[sqlx::test(migrations = "./migrations")]
async fn null_means_the_same_as_no_field_in_every_body(pool: PgPool) {
    let (fixture, admin, key) = fixture(pool).await;
    let (user, document) = (fixture.user("u@example.com").await, document());
    for (method, path, uri, least) in calls(key, &user) {
        let schema = schema(&document, method, path);
        // An empty patch is refused, and the schema of its fields documents null.
        for (name, property) in optional(&schema) {
            let types = property["type"].as_array().cloned().unwrap_or_default();
            let choices = property["oneOf"].as_array().cloned().unwrap_or_default();
            let nullable = types.contains(&json!("null")) || choices.iter().any(|choice| choice["type"] == "null");
            assert!(nullable || property["type"].is_null() && choices.is_empty(), "{method} {path}: {name} {property}");
            let mut body = least.clone();
            body[&name] = Value::Null;
            let least_alone = least.get(&name).is_some();
            let reply = fixture.call(&method.to_uppercase(), &uri, &admin, Some(&body)).await;
            let status = reply.status;
            let empty_patch =
                least_alone && status == 400 && reply.json()["detail"].as_str().unwrap().starts_with("Set ");
            assert!((200..300).contains(&status) || empty_patch, "{method} {path} {body}: {}", text(&reply));
        }
    }
    // So in objects within a body.
    let limit = json!({"name": "n", "requests": 1, "window_seconds": 1, "burst": null, "shared": null});
    let quota = json!({"requests": 1, "period": "day", "time_zone": null, "window_seconds": null});
    let plan = json!({"rate_limits": [limit], "quota": quota});
    let reply = fixture.put("/v1/plans/silver", &admin, &plan).await;
    assert_eq!(
        reply.json()["rate_limits"][0],
        json!({"name": "n", "requests": 1, "window_seconds": 1, "burst": 1, "shared": true})
    );
    let refill = json!({"refill": {"amount": 1, "period": "day", "time_zone": null, "up_to": null}});
    let reply = fixture.patch(&user, &admin, &refill).await;
    assert_eq!((reply.status, &reply.json()["refill"]["time_zone"]), (200, &json!("UTC")));
}

fn text(reply: &Reply) -> String {
    String::from_utf8_lossy(&reply.body).into_owned()
}

/// Longer than a screen: one table.
#[sqlx::test(migrations = "./migrations")]
async fn an_error_names_the_field_by_its_path_and_no_type_of_the_program(pool: PgPool) {
    let (fixture, admin, key) = fixture(pool).await;
    let key_with = |field: &str, value: Value| {
        let mut body = json!({"email": "u@example.com", "name": "n"});
        body[field] = value;
        ("POST", "/v1/keys".to_owned(), body)
    };
    let limit = json!({"name": "n", "requests": 1, "window_seconds": 1});
    let user = fixture.user("u@example.com").await;
    let explain = |policy: Value| ("POST", "/v1/explain".to_owned(), json!({"policy": policy}));
    let unknown = "is not a known field; the fields are `name`, `requests`, `window_seconds`, `burst`, `shared`, `per`";
    for ((method, uri, body), field, detail) in [
        (key_with("rate_limits", json!([["n", 1, 1]])), "rate_limits[0]", "must be an object"),
        (key_with("rate_limits", json!([limit, 5])), "rate_limits[1]", "must be an object"),
        (key_with("rate_limits", json!([{"name": "n", "requests": 1}])), "rate_limits[0].window_seconds", "is missing"),
        (key_with("rate_limits", json!([{"name": "n", "rate": 1}])), "rate_limits[0].rate", unknown),
        (key_with("quota", json!([1, "day"])), "quota", "must be an object"),
        (
            key_with("quota", json!({"requests": 1, "period": "year"})),
            "quota.period",
            "must be one of `day`, `week`, `month`, `rolling`",
        ),
        (key_with("scopes", json!(["a", 1])), "scopes[1]", "must be a string"),
        (key_with("kind", json!("prod")), "kind", "must be `live` or `test`"),
        (key_with("cost", json!(1.5)), "cost", "must be a whole number"),
        (key_with("expires_in_seconds", json!("60")), "expires_in_seconds", "must be a whole number"),
        (("PATCH", format!("/v1/keys/{key}"), json!({"disabled": "yes"})), "disabled", "must be true or false"),
        (("POST", format!("{user}/ledger"), json!({"amount": "5"})), "amount", "must be a whole number"),
        (("PATCH", user, json!({"refill": [1, "day"]})), "refill", "must be an object"),
        (explain(json!(["required"])), "policy", "must be an object"),
        (explain(json!({"rate_limits": [[1, 1]]})), "policy.rate_limits[0]", "must be an object"),
        (explain(json!({"scopes": {"all": [1]}})), "policy.scopes.all[0]", "must be a string"),
    ] {
        let reply = fixture.call(method, &uri, &admin, Some(&body)).await;
        assert_eq!(reply.status, 400, "{body}: {}", text(&reply));
        reply.assert_invalid(field, detail);
    }
    let twice = r#"{"email": "u@example.com", "name": "n", "email": "v@example.com"}"#;
    let reply = fixture.send(request("POST", "/v1/keys", Some(&admin), twice)).await;
    reply.assert_invalid("email", "is given twice");
    // Paths and queries name their field too.
    for (uri, field, detail) in [
        ("/v1/keys/5".to_owned(), "id", "must be a UUID"),
        ("/v1/keys?limit=many".into(), "limit", "must be a whole number"),
        ("/v1/keys?colour=red".into(), "colour", "is not a known field"),
        ("/v1/keys?limit=1&limit=2".into(), "limit", "is given twice"),
    ] {
        let reply = fixture.get(&uri, &admin).await;
        let problem = reply.json();
        assert_eq!((reply.status, &problem["field"]), (400, &json!(field)), "{uri}: {problem}");
        assert!(problem["detail"].as_str().unwrap().starts_with(detail), "{uri}: {problem}");
    }
}
