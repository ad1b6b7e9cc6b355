//! Policies as clients write and read them.

use contract::json::null_is_default;
use contract::key::KeyKind;
use contract::policy::{KeyNeed, NamedPolicy, Policy, PolicyError, PolicyLimits, ScopeNeed};
use contract::record::RateLimit;
use contract::rules::{HeaderMatch, Match, PathMatch};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Content, Name, parse_description};
use crate::domain::{KindBody, PerBody, RateLimitBody, parse_rate_limits};
use crate::error::ApiError;

/// Most entries of `match`.
const MATCHES: usize = 100;

/// What a policy requires of requests, and which requests it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"scopes": {"all": ["orders:read"]}, "match": [{"path": {"prefix": "/orders"}, "methods": ["GET", "HEAD"]}]}))]
pub struct PolicyBody {
    /// For people: at most 500 characters.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_length = 500)]
    pub description: String,
    /// Whether a request needs a key.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, inline)]
    pub key: KeyNeedBody,
    /// Kinds of keys that are accepted, so that test keys open no route for production; null for both.
    #[serde(default)]
    #[schema(example = json!(["live"]), min_items = 1, max_items = 2)]
    pub kinds: Option<Vec<KindBody>>,
    /// Scopes that the key must have; null if it needs none.
    #[serde(default)]
    #[schema(inline)]
    pub scopes: Option<ScopesBody>,
    /// Credits that a request costs; null if that is the cost of the key.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1_000_000, example = 5)]
    pub cost: Option<u32>,
    /// Limits of the requests under this policy, at most 8. They apply in addition to the limits of the key, and each Envoy
    /// enforces them by itself.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_items = 8)]
    pub rate_limits: Vec<PolicyRateLimitBody>,
    /// Refuse nothing, but report what would have been refused.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable)]
    pub shadow: bool,
    /// Capture the hashes of keys that Envoys do not know, for `GET /v1/unknown-keys`. Requires `shadow`.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable)]
    pub capture_unknown: bool,
    /// Whether the owner of a route may name the policy by an annotation or the name of the route. Policies with `false` are for
    /// the platform alone, which names them in metadata or by `match`.
    #[serde(default = "yes", deserialize_with = "null_is_yes")]
    #[schema(nullable)]
    pub from_annotation: bool,
    /// The requests that the policy is for although their route names no policy, at most 100 entries. Of all policies, the most
    /// specific entry that matches a request applies. If an entry and one of another policy
    /// match the same request and neither is more specific, the answer is 409.
    #[serde(default, deserialize_with = "null_is_default", rename = "match")]
    #[schema(nullable, max_items = 100)]
    pub matches: Vec<MatchBody>,
}

const fn yes() -> bool {
    true
}

fn null_is_yes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Option::deserialize(deserializer).map(|text| text.unwrap_or(true))
}

/// Whether a request needs a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyNeedBody {
    /// Requests without a valid key are refused.
    #[default]
    Required,
    /// A request without a key is anonymous. A key that is presented must be valid.
    AnonymousAllowed,
    /// A request without a valid key is anonymous.
    Optional,
}

/// Scopes that a key must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScopesBody {
    /// Each of these.
    All(Vec<String>),
    /// One of these.
    Any(Vec<String>),
}

/// A limit of the requests under a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRateLimitBody {
    /// Tells the limits of the policy apart: 1 to 32 characters of a-z, 0-9, `_` and `-`. Replies show it behind the name of the
    /// policy, as `search.minute`.
    #[schema(example = "minute", min_length = 1, max_length = 32, pattern = "^[a-z0-9_-]+$")]
    name: String,
    /// How many requests the window allows.
    #[schema(example = 100, minimum = 1, maximum = 1_000_000_000)]
    requests: i64,
    /// The window, in seconds.
    #[schema(example = 60, minimum = 1, maximum = 31_622_400)]
    window_seconds: i64,
    /// How many requests may come at once after a pause; `requests` unless given.
    #[schema(example = 20, minimum = 1, maximum = 1_000_000_000)]
    #[serde(default)]
    burst: Option<i64>,
    /// Who has a limit of their own; `key` unless given.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, inline)]
    per: SubjectBody,
}

/// Who has a limit of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SubjectBody {
    /// Each key.
    #[default]
    Key,
    /// Each user, over all keys.
    Owner,
    /// Each client address, for requests without a key.
    Address,
}

/// What a request must be like. Everything that is given must match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"hosts": ["api.example.com"], "path": {"template": "/orders/{id}"}, "methods": ["GET", "HEAD"]}))]
pub struct MatchBody {
    /// Its host must be one of these, such as `api.example.com`, or have one of these suffixes, such as `*.example.com`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 16)]
    hosts: Option<Vec<String>>,
    /// What its path must be. The query is no part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(inline)]
    path: Option<PathBody>,
    /// Its method must be one of these, in capitals. `HEAD` is a method of its own, which upstreams treat like `GET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 10)]
    methods: Option<Vec<String>>,
    /// A header that it must have. Of several lines the first counts, so a client that may send any header can choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    header: Option<HeaderBody>,
}

/// What a path must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathBody {
    /// This path.
    Exact(String),
    /// This path, or one below it.
    Prefix(String),
    /// A path such as `/orders/{id}/items`, with any segment in place of `{id}`.
    Template(String),
}

/// A header that a request must have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderBody {
    /// Its name, in lower case.
    #[schema(example = "x-model")]
    name: String,
    /// Its value. With `*` at the end: what its value begins with.
    #[schema(example = "gpt-*")]
    value: String,
}

impl PolicyBody {
    /// Parses the policy of this name.
    pub fn parse(self, name: &Name) -> Result<Content, ApiError> {
        let invalid = |path: &str, PolicyError { field, why }: PolicyError| {
            let field =
                if field.is_empty() || path.is_empty() { format!("{path}{field}") } else { format!("{path}.{field}") };
            ApiError::invalid(field, why)
        };
        let description = parse_description(&self.description)?;
        let policy = Policy {
            key: self.key.into(),
            kinds: kinds(self.kinds.as_deref())?,
            scopes: match self.scopes {
                None => ScopeNeed::None,
                Some(ScopesBody::All(scopes)) => ScopeNeed::All(scopes),
                Some(ScopesBody::Any(scopes)) => ScopeNeed::Any(scopes),
            },
            cost: self.cost,
            rate_limits: limits(name, self.key, self.rate_limits)?,
            shadow: self.shadow,
            capture_unknown: self.capture_unknown,
        };
        policy.check().map_err(|error| invalid("", error))?;
        if self.matches.len() > MATCHES {
            return Err(ApiError::invalid("match", format!("must have at most {MATCHES} entries")));
        }
        for (place, MatchBody { hosts, methods, .. }) in self.matches.iter().enumerate() {
            for (field, list) in [("hosts", hosts), ("methods", methods)] {
                if list.as_ref().is_some_and(Vec::is_empty) {
                    let detail = "name at least one, or leave it out to match all";
                    return Err(ApiError::invalid(format!("match[{place}].{field}"), detail));
                }
            }
        }
        let matches: Vec<Match> = self.matches.into_iter().map(Match::from).collect();
        for (place, matches) in matches.iter().enumerate() {
            matches.check().map_err(|error| invalid(&format!("match[{place}]"), error))?;
        }
        let from_annotation = self.from_annotation;
        let policy = NamedPolicy { name: name.as_str().into(), policy, matches, from_annotation };
        Ok(Content { description, policy: Some(policy), ..Content::default() })
    }

    /// The policy as it is shown once it is stored.
    pub fn normalize(self, name: &Name) -> Result<Self, ApiError> {
        let Content { description, policy, .. } = self.parse(name)?;
        Ok(Self::of(&description, &policy.unwrap_or_default()))
    }

    /// Shows a policy.
    pub fn of(description: &str, named: &NamedPolicy) -> Self {
        let NamedPolicy { name, policy, matches, from_annotation } = named;
        let show = |limits: &[RateLimit], per| -> Vec<PolicyRateLimitBody> {
            limits.iter().map(|limit| PolicyRateLimitBody::of(name, limit, per)).collect()
        };
        let PolicyLimits { key, owner, address } = &policy.rate_limits;
        Self {
            description: description.to_owned(),
            key: policy.key.into(),
            kinds: (!policy.kinds.is_empty()).then(|| policy.kinds.iter().copied().map(Into::into).collect()),
            scopes: match &policy.scopes {
                ScopeNeed::None => None,
                ScopeNeed::All(scopes) => Some(ScopesBody::All(scopes.clone())),
                ScopeNeed::Any(scopes) => Some(ScopesBody::Any(scopes.clone())),
            },
            cost: policy.cost,
            rate_limits: [
                show(key, SubjectBody::Key),
                show(owner, SubjectBody::Owner),
                show(address, SubjectBody::Address),
            ]
            .concat(),
            shadow: policy.shadow,
            capture_unknown: policy.capture_unknown,
            from_annotation: *from_annotation,
            matches: matches.iter().map(MatchBody::of).collect(),
        }
    }
}

/// Parses the kinds of keys that a policy accepts. An empty list accepts all kinds.
fn kinds(bodies: Option<&[KindBody]>) -> Result<Vec<KeyKind>, ApiError> {
    match bodies {
        None => Ok(Vec::new()),
        Some([kind]) => Ok(vec![(*kind).into()]),
        Some([one, other]) if one != other => Ok(vec![KeyKind::Live, KeyKind::Test]),
        Some(_) => {
            Err(ApiError::invalid("kinds", "must name live, test or both, each once; leave it out to accept both"))
        }
    }
}

/// Parses the limits of a policy.
fn limits(policy: &Name, key: KeyNeedBody, bodies: Vec<PolicyRateLimitBody>) -> Result<PolicyLimits, ApiError> {
    let subjects: Vec<SubjectBody> = bodies.iter().map(|body| body.per).collect();
    if key == KeyNeedBody::Required && subjects.contains(&SubjectBody::Address) {
        let detail = "a limit per address is for requests without a key: let key be anonymous_allowed or optional";
        return Err(ApiError::invalid("rate_limits", detail));
    }
    let plain = bodies.into_iter().map(|body| RateLimitBody {
        name: body.name,
        requests: body.requests,
        window_seconds: body.window_seconds,
        burst: body.burst,
        shared: false,
        per: PerBody::Key,
    });
    let mut limits = PolicyLimits::default();
    for (mut limit, subject) in parse_rate_limits(plain.collect())?.into_iter().zip(subjects) {
        limit.name = format!("{}.{}", policy.as_str(), limit.name);
        match subject {
            SubjectBody::Key => limits.key.push(limit),
            SubjectBody::Owner => limits.owner.push(limit),
            SubjectBody::Address => limits.address.push(limit),
        }
    }
    Ok(limits)
}

impl PolicyRateLimitBody {
    fn of(policy: &str, limit: &RateLimit, per: SubjectBody) -> Self {
        let own = limit.name.strip_prefix(policy).and_then(|name| name.strip_prefix('.'));
        Self {
            name: own.unwrap_or(&limit.name).to_owned(),
            requests: limit.requests.into(),
            window_seconds: limit.window_s.into(),
            burst: Some(limit.burst.into()),
            per,
        }
    }
}

impl From<KeyNeedBody> for KeyNeed {
    fn from(body: KeyNeedBody) -> Self {
        match body {
            KeyNeedBody::Required => Self::Required,
            KeyNeedBody::AnonymousAllowed => Self::AnonymousAllowed,
            KeyNeedBody::Optional => Self::Optional,
        }
    }
}

impl From<KeyNeed> for KeyNeedBody {
    fn from(need: KeyNeed) -> Self {
        match need {
            KeyNeed::Required => Self::Required,
            KeyNeed::AnonymousAllowed => Self::AnonymousAllowed,
            KeyNeed::Optional => Self::Optional,
        }
    }
}

impl From<MatchBody> for Match {
    fn from(MatchBody { hosts, path, methods, header }: MatchBody) -> Self {
        let path = path.map(|path| match path {
            PathBody::Exact(path) => PathMatch::Exact(path),
            PathBody::Prefix(path) => PathMatch::Prefix(path),
            PathBody::Template(path) => PathMatch::Template(path),
        });
        let header = header.map(|HeaderBody { name, value }| HeaderMatch { name, value });
        Self { hosts: hosts.unwrap_or_default(), path, methods: methods.unwrap_or_default(), header }
    }
}

impl MatchBody {
    fn of(Match { hosts, path, methods, header }: &Match) -> Self {
        let path = path.clone().map(|path| match path {
            PathMatch::Exact(path) => PathBody::Exact(path),
            PathMatch::Prefix(path) => PathBody::Prefix(path),
            PathMatch::Template(path) => PathBody::Template(path),
        });
        let header = header.clone().map(|HeaderMatch { name, value }| HeaderBody { name, value });
        let given = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
        Self { hosts: given(hosts), path, methods: given(methods), header }
    }
}

#[cfg(test)]
mod tests {
    use contract::json;
    use serde_json::{Value, json};

    use super::*;

    fn parse(body: &Value) -> Result<NamedPolicy, ApiError> {
        let body: PolicyBody = json::read_value(body).map_err(|error| ApiError::invalid(error.path, error.detail))?;
        let content = body.parse(&Name::parse("name", "search")?)?;
        content.policy.ok_or_else(|| ApiError::Internal("no policy".into()))
    }

    #[test]
    fn a_policy_is_shown_as_it_was_written() {
        let body = json!({
            "description": "d", "key": "anonymous_allowed", "kinds": ["test"], "scopes": null, "cost": 5,
            "rate_limits": [
                {"name": "a", "requests": 1, "window_seconds": 60, "burst": 1, "per": "key"},
                {"name": "b", "requests": 2, "window_seconds": 60, "burst": 3, "per": "owner"},
                {"name": "c", "requests": 4, "window_seconds": 60, "burst": 4, "per": "address"},
            ],
            "shadow": true, "capture_unknown": true, "from_annotation": false,
            "match": [
                {"hosts": ["*.a.b"], "path": {"template": "/x/{id}"}, "methods": ["GET"],
                    "header": {"name": "x-model", "value": "gpt-*"}},
                {"path": {"prefix": "/y"}},
            ],
        });
        let policy = parse(&body).unwrap();
        assert_eq!(policy.policy.rate_limits.owner[0].name, "search.b");
        assert_eq!(serde_json::to_value(PolicyBody::of("d", &policy)).unwrap(), body);
        let plain = parse(&json!({"scopes": {"any": ["a"]}})).unwrap();
        assert!(plain.from_annotation && plain.policy.scopes == ScopeNeed::Any(vec!["a".into()]));
        assert_eq!(parse(&json!({"key": null, "shadow": null, "match": null})).unwrap().policy, Policy::default());
    }

    #[test]
    fn an_error_names_the_field() {
        let limit = json!({"name": "a", "requests": 1, "window_seconds": 60, "per": "address"});
        for (body, field) in [
            (json!({"scope": []}), "scope"),
            (json!({"scopes": {"all": []}}), "scopes"),
            (json!({"scopes": {"all": ["a"]}, "key": "optional"}), "key"),
            (json!({"cost": 1_000_001}), "cost"),
            (json!({"capture_unknown": true}), "capture_unknown"),
            (json!({"kinds": []}), "kinds"),
            (json!({"kinds": ["live", "live"]}), "kinds"),
            (json!({"rate_limits": [limit]}), "rate_limits"),
            (json!({"key": "optional", "rate_limits": [limit, limit]}), "rate_limits"),
            (json!({"match": [{}]}), "match[0]"),
            (json!({"match": [{"hosts": []}]}), "match[0].hosts"),
            (json!({"match": [{"path": {"exact": "/a"}, "methods": []}]}), "match[0].methods"),
            (json!({"match": [{"path": {"prefix": "/"}}, {"path": {"exact": "a"}}]}), "match[1].path"),
            (json!({"match": [{"header": {"name": "X", "value": "a"}}]}), "match[0].header.name"),
            (json!({"match": vec![json!({"path": {"exact": "/a"}}); 101]}), "match"),
        ] {
            assert_eq!(parse(&body).unwrap_err().field(), Some(field), "{body}");
        }
    }
}
