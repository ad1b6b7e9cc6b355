//! Policies for filters without a control plane, from the JSON that `PUT /v1/policies/{name}` takes.

use contract::policy::{NamedPolicy, Policy, PolicyLimits};
use contract::record::{Per, RateLimit};
use contract::rules::Match;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The fields that [`named`] reads.
const FIELDS: [&str; 9] =
    ["key", "kinds", "scopes", "cost", "rate_limits", "shadow", "capture_unknown", "from_annotation", "match"];

/// The policy of this name.
///
/// # Panics
/// If the JSON is no policy.
pub fn named(name: &str, body: &Value) -> NamedPolicy {
    let fields = body.as_object().expect("a policy is an object");
    assert!(fields.keys().all(|field| FIELDS.contains(&field.as_str())), "{body}");
    let mut limits = PolicyLimits::default();
    for limit in body["rate_limits"].as_array().into_iter().flatten() {
        let number = |field: &str| u32::try_from(limit[field].as_u64().expect("a number")).expect("a small number");
        let text = |field: &str| limit[field].as_str();
        let requests = number("requests");
        let parsed = RateLimit {
            name: format!("{name}.{}", text("name").expect("a name")),
            requests,
            window_s: number("window_seconds"),
            burst: if limit["burst"].is_null() { requests } else { number("burst") },
            shared: false,
            per: Per::Key,
        };
        match text("per").unwrap_or("key") {
            "address" => limits.address.push(parsed),
            "owner" => limits.owner.push(parsed),
            _ => limits.key.push(parsed),
        }
    }
    let policy = Policy {
        key: field(body, "key").unwrap_or_default(),
        kinds: field(body, "kinds").unwrap_or_default(),
        scopes: field(body, "scopes").unwrap_or_default(),
        cost: field(body, "cost"),
        rate_limits: limits,
        shadow: field(body, "shadow").unwrap_or_default(),
        capture_unknown: field(body, "capture_unknown").unwrap_or_default(),
    };
    let matches = body["match"].as_array().into_iter().flatten().map(rule).collect();
    NamedPolicy { name: name.into(), policy, matches, from_annotation: field(body, "from_annotation").unwrap_or(true) }
}

fn rule(body: &Value) -> Match {
    let rule = Match {
        hosts: field(body, "hosts").unwrap_or_default(),
        path: field(body, "path"),
        methods: field(body, "methods").unwrap_or_default(),
        header: field(body, "header"),
    };
    assert_eq!(rule.check(), Ok(()));
    rule
}

fn field<T: DeserializeOwned>(body: &Value, name: &str) -> Option<T> {
    let value = &body[name];
    (!value.is_null()).then(|| serde_json::from_value(value.clone()).expect("a field of a policy"))
}
