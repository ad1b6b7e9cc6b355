//! The OpenAPI document as generators of clients need it. A linter and two generators examine it as a whole in `cargo
//! xtask test --only openapi`; these tests check what those do not.

use std::collections::BTreeSet;

use control_plane::api;
use serde_json::{Value, json};

/// The verbs that ids of operations begin with.
const VERBS: [&str; 14] = [
    "add", "create", "delete", "erase", "explain", "find", "get", "import", "list", "put", "reset", "revoke", "rotate",
    "update",
];

pub fn document() -> Value {
    serde_json::to_value(api::openapi_document()).unwrap()
}

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
    let document = document();
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
    let document = document();
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
    let document = document();
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

#[test]
fn every_route_that_takes_a_body_says_what_becomes_of_a_slow_one() {
    let document = document();
    let mut with_body = 0;
    for (of, operation) in operations(&document) {
        let late = &operation["responses"]["408"]["content"]["application/problem+json"]["schema"]["$ref"];
        let takes_a_body = operation.get("requestBody").is_some();
        assert_eq!(late == "#/components/schemas/Problem", takes_a_body, "{of}");
        with_body += usize::from(takes_a_body);
    }
    assert!(with_body > 5);
    let import = &document["paths"]["/v1/keys/import"]["post"]["responses"]["408"]["description"];
    assert_eq!(import, "The body did not arrive in time; what was written until then stays");
}

#[test]
fn the_document_names_each_parameter_once_and_shows_secrets_as_text() {
    let document = document();
    for (of, operation) in operations(&document) {
        let mut names = BTreeSet::new();
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            assert!(names.insert(parameter["name"].as_str().unwrap()), "{of}: {parameter}");
        }
    }
    let whole = json!({"description": "The whole key. No later response contains it.", "type": "string"});
    for pointer in ["/GenerateReply/properties/key", "/CreateReply/allOf/1/properties/secret"] {
        assert_eq!(document["components"]["schemas"].pointer(pointer), Some(&whole), "{pointer}");
    }
}
