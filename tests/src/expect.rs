//! Assertions on whole responses: status, every header, every field of the body.

use contract::outcome::Outcome;
use serde_json::{Value, json};

use crate::http::Reply;

/// The headers with the identity of a key without scopes.
pub const IDENTITY: [&str; 2] = ["x-consumer-id", "x-credential-identifier"];

/// The headers with the identity of a key with scopes.
pub const SCOPED: [&str; 3] = ["x-consumer-id", "x-credential-identifier", "x-credential-scopes"];

/// Asserts a whole refusal of the filter. `more` names the headers that only this outcome has; the test checks their values.
#[track_caller]
pub fn assert_refused(reply: &Reply, outcome: Outcome, more: &[&str]) {
    let refusal = outcome.refusal().expect("an outcome that is refused");
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    // Which places keys may stand in is for the test to judge, where there are others than usual.
    let detail = if outcome == Outcome::Missing { &body["detail"] } else { &json!(refusal.detail) };
    assert!(outcome != Outcome::Missing || detail.as_str().is_some_and(|text| text.starts_with("Send your API key ")));
    let id = reply.header("x-request-id").unwrap_or_default();
    let expected = json!({
        "type": outcome.problem_type(),
        "title": refusal.title,
        "status": refusal.status,
        "detail": detail,
        "code": outcome.name(),
        "request_id": id,
    });
    assert_eq!((reply.status, &body, id.len()), (refusal.status, &expected, 36));
    assert!(reply.body.ends_with(b"}\n"), "a terminal's next prompt would stand behind it");
    assert_eq!(reply.header("content-type"), Some("application/problem+json"));
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    let mut names = vec!["cache-control", "content-length", "content-type", "date", "server", "x-request-id"];
    match refusal.status {
        401 => {
            assert_eq!(reply.header("www-authenticate"), Some("ApiKey realm=\"portcullis\""));
            names.push("www-authenticate");
        }
        429 => {
            let seconds = reply.header("retry-after").and_then(|seconds| seconds.parse::<u64>().ok());
            assert!(seconds.is_some_and(|seconds| seconds >= 1), "retry-after: {seconds:?}");
            names.push("retry-after");
            if matches!(outcome, Outcome::QuotaExceeded | Outcome::CreditsExhausted) {
                names.push("ratelimit");
            }
        }
        503 => {
            assert_eq!(reply.header("retry-after"), Some("1"));
            names.push("retry-after");
        }
        _ => {}
    }
    names.extend(more);
    names.sort_unstable();
    let mut found: Vec<_> = reply.headers.iter().map(|(name, _)| name.as_str()).collect();
    found.sort_unstable();
    assert_eq!(found, names);
}

/// Asserts a response of the demo API and the names of the headers that it received, with these identity headers among
/// them. Returns the headers as `{name: [values]}`.
#[track_caller]
pub fn assert_upstream(reply: &Reply, identity: &[&str]) -> Value {
    assert_eq!(reply.status, 200, "{:?}", reply.body);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    let fields: Vec<_> = body.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    assert_eq!(fields, ["headers", "method", "path"]);
    let mut names = vec!["host", "x-envoy-external-address", "x-forwarded-for", "x-forwarded-proto", "x-request-id"];
    names.extend(identity);
    names.sort_unstable();
    let received: Vec<_> = body["headers"].as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    assert_eq!(received, names);
    body["headers"].clone()
}
