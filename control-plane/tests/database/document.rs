//! The OpenAPI document as generators of clients need it. A linter and two generators examine it as a whole in `cargo
//! xtask test --only openapi`; these tests check what those do not.

use std::collections::BTreeSet;

use control_plane::api;
use serde_json::{Value, json};

/// The verbs that ids of operations begin with.
const VERBS: [&str; 11] =
    ["add", "create", "delete", "explain", "get", "import", "list", "put", "revoke", "rotate", "update"];

/// Each operation with its method and path.
fn operations(document: &Value) -> Vec<(String, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap();
        methods.iter().map(move |(method, operation)| (format!("{method} {path}"), operation))
    });
    operations.collect()
}

#[test]
fn each_operation_has_an_id_of_its_own_that_is_a_verb_and_a_noun() {
    let document = serde_json::to_value(api::openapi_document()).unwrap();
    let all = operations(&document);
    let mut ids = BTreeSet::new();
    for (of, operation) in &all {
        let id = operation["operationId"].as_str().unwrap_or_default();
        let verb = VERBS.iter().find_map(|verb| id.strip_prefix(verb));
        assert!(verb.is_some_and(|noun| noun.starts_with(|first: char| first.is_ascii_uppercase())), "{of}: {id}");
        assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{of}: {id}");
        assert!(ids.insert(id), "{of}: {id} stands twice");
    }
    assert!(all.len() > 30);
    for id in ["createKey", "listKeys", "getKey", "updateKey", "revokeKey", "rotateKey", "getUserUsage"] {
        assert!(ids.contains(id), "{id}");
    }
}

#[test]
fn texts_are_for_users_of_the_api_and_carry_no_marks_of_rust_documentation() {
    let document = serde_json::to_value(api::openapi_document()).unwrap();
    for (of, operation) in operations(&document) {
        let summary = operation["summary"].as_str().unwrap_or_default();
        assert!(summary.ends_with('.') && summary.len() <= 80 && !summary.contains('\n'), "{of}: {summary}");
        assert!(operation["tags"].as_array().is_some_and(|tags| tags.len() == 1), "{of}");
    }
    let text = document.to_string();
    for mark in ["# Errors", "# Panics", "[`", "crate::"] {
        assert!(!text.contains(mark), "{mark}");
    }
}

#[test]
fn refusals_that_every_caller_can_meet_are_described_with_their_headers() {
    let document = serde_json::to_value(api::openapi_document()).unwrap();
    assert_eq!(document["servers"][0]["url"], "/");
    let mut with_key = 0;
    for (of, operation) in operations(&document) {
        let responses = operation["responses"].as_object().unwrap();
        for (status, response) in responses {
            for (name, header) in response["headers"].as_object().unwrap() {
                // Those of one route stand there themselves; those of all are named.
                let header = match header["$ref"].as_str() {
                    Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap_or(&Value::Null),
                    None => header,
                };
                let described = header["description"].as_str().is_some_and(|text| !text.is_empty());
                assert!(described, "{of}: {status}: {name}: {header}");
            }
            assert!(response["headers"].get("x-request-id").is_some(), "{of}: {status}");
        }
        if operation["security"] == json!([]) {
            continue;
        }
        with_key += 1;
        for (status, header) in [
            ("401", Some("www-authenticate")),
            ("403", None),
            ("429", Some("retry-after")),
            ("503", Some("retry-after")),
        ] {
            let response = &operation["responses"][status];
            let schema = &response["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(schema, "#/components/schemas/Problem", "{of}: {status}");
            assert!(header.is_none_or(|header| response["headers"].get(header).is_some()), "{of}: {status}");
        }
    }
    assert!(with_key > 30);
}
