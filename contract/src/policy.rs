//! Policies: what routes require of requests. An error names the field and the remedy.
//!
//! ```json
//! { "key": "required", "scopes": {"all": ["orders:read"]}, "cost": 5,
//!   "rate_limit": {"requests": 10, "window": "1s", "burst": 20}, "shadow": false }
//! ```
//! Every field is optional. The filter has policies in its configuration; `explain` also takes one from its request.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::json::{Seconds, null_is_default};
use crate::record::{Per, RateLimit};

/// Most policies of one filter.
pub const POLICIES: usize = 1_000;
/// Most credits that a request costs.
pub const COST: u32 = 1_000_000;
/// The name of the default policy in errors and replies.
pub const DEFAULT_NAME: &str = "default";

const SCOPES: usize = 32;
const SCOPE_BYTES: usize = 64;
const NAME_BYTES: usize = 64;
const WINDOW_S: u32 = 31_622_400;

/// What a route requires of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether a key is required.
    pub key: KeyNeed,
    /// Scopes that the key must have.
    pub scopes: ScopeNeed,
    /// Credits that a request costs. `None`: the cost of the key.
    pub cost: Option<u32>,
    /// A limit for each key on this route, and for each client address without a key. It applies in addition to the limits
    /// of the key, and each Envoy enforces it by itself.
    pub rate_limit: Option<RateLimit>,
    /// Refuse nothing, but report and count what would have been refused.
    pub shadow: bool,
}

/// Whether a route requires a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyNeed {
    /// Requests without a valid key are refused.
    #[default]
    Required,
    /// A request without a key is anonymous. A key that is presented must be valid.
    AnonymousAllowed,
    /// A request without a valid key is anonymous.
    Optional,
}

/// Scopes that a route requires.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScopeNeed {
    /// None.
    #[default]
    None,
    /// Each of these.
    All(Vec<String>),
    /// One of these.
    Any(Vec<String>),
}

impl ScopeNeed {
    /// The scopes.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::None => &[],
            Self::All(scopes) | Self::Any(scopes) => scopes,
        }
    }
}

impl Policy {
    /// Requires a valid key and nothing else.
    pub const PLAIN: &'static Self =
        &Self { key: KeyNeed::Required, scopes: ScopeNeed::None, cost: None, rate_limit: None, shadow: false };
}

impl Default for Policy {
    fn default() -> Self {
        Self::PLAIN.clone()
    }
}

/// Why a policy was refused: the field and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PolicyError(pub String);

/// A policy as operators write it, not checked yet.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyText {
    #[serde(deserialize_with = "null_is_default")]
    key: KeyNeed,
    #[serde(deserialize_with = "null_is_default")]
    scopes: ScopeNeed,
    cost: Option<u32>,
    rate_limit: Option<LimitText>,
    #[serde(deserialize_with = "null_is_default")]
    shadow: bool,
}

impl PolicyText {
    /// Checks the policy. `field` is its path in the text, for errors; `name` becomes the name of its rate limit.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(self, field: &str, name: &str) -> Result<Policy, PolicyError> {
        let bad = |what: &str, why: &str| Err(PolicyError(format!("{field}.{what}: {why}")));
        let asked = self.scopes.as_slice();
        if self.scopes != ScopeNeed::None && asked.is_empty() {
            return bad("scopes", "name at least one scope, or leave it out");
        }
        if asked.len() > SCOPES {
            return bad("scopes", &format!("name at most {SCOPES} scopes"));
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'/' | b'_' | b'.' | b'-');
        if !asked.iter().all(|scope| (1..=SCOPE_BYTES).contains(&scope.len()) && scope.bytes().all(allowed)) {
            return bad(
                "scopes",
                &format!("each scope must have 1 to {SCOPE_BYTES} characters of a-z, A-Z, 0-9 and : / _ . -"),
            );
        }
        if !asked.is_empty() && self.key != KeyNeed::Required {
            return bad("key", "a route that asks for scopes needs a key: use \"required\", or ask for no scopes");
        }
        if self.cost.is_some_and(|cost| cost > COST) {
            return bad("cost", &format!("must be a number from 0 to {COST}"));
        }
        let rate_limit = self.rate_limit.map(|limit| limit.check(&format!("{field}.rate_limit"), name)).transpose()?;
        Ok(Policy { key: self.key, scopes: self.scopes, cost: self.cost, rate_limit, shadow: self.shadow })
    }
}

/// A rate limit as operators write it, not checked yet.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitText {
    /// Requests that the window allows.
    pub requests: u32,
    /// The window.
    pub window: Seconds,
    /// Requests that may come at once after a pause; `requests` unless given.
    pub burst: Option<u32>,
}

impl LimitText {
    /// Checks the limit. `field` is its path in the text, for errors. Each Envoy enforces the limit by itself.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(self, field: &str, name: &str) -> Result<RateLimit, PolicyError> {
        let Self { requests, window: Seconds(window_s), burst } = self;
        let bad = |what: &str, why: &str| Err(PolicyError(format!("{field}.{what}: {why}")));
        if requests == 0 {
            return bad("requests", "must be at least 1; for no limit, set the whole field to null");
        }
        let window_s = u32::try_from(window_s).unwrap_or(u32::MAX);
        if !(1..=WINDOW_S).contains(&window_s) {
            return bad("window", "must be from \"1s\" to \"31622400s\", a year");
        }
        let burst = burst.unwrap_or(requests);
        if burst == 0 {
            return bad("burst", "must be at least 1; leave it out for as many as requests");
        }
        Ok(RateLimit { name: name.into(), requests, window_s, burst, shared: false, per: Per::Key })
    }
}

/// The policies of a filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    /// For routes that name none.
    pub default: Policy,
    /// By the names that routes use.
    pub named: BTreeMap<String, Policy>,
}

impl Policies {
    /// Checks the fields `default_policy` and `policies`.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(default: PolicyText, named: BTreeMap<String, PolicyText>) -> Result<Self, PolicyError> {
        if named.len() > POLICIES {
            return Err(PolicyError(format!("policies: name at most {POLICIES}")));
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let mut checked = BTreeMap::new();
        for (name, text) in named {
            if !(1..=NAME_BYTES).contains(&name.len()) || !name.bytes().all(allowed) || name == DEFAULT_NAME {
                let why =
                    format!("must have 1 to {NAME_BYTES} characters of a-z, A-Z, 0-9 and _ . -, and not be default");
                return Err(PolicyError(format!("policies: the name {name:?} {why}")));
            }
            let policy = text.check(&format!("policies.{name}"), &name)?;
            checked.insert(name, policy);
        }
        Ok(Self { default: default.check("default_policy", DEFAULT_NAME)?, named: checked })
    }

    /// The policy of this name, or the default policy for a route without a name. `None` if no policy has the name.
    #[must_use]
    pub fn find(&self, name: Option<&str>) -> Option<&Policy> {
        name.map_or(Some(&self.default), |name| self.named.get(name))
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn policy(json: &str) -> Result<Policy, PolicyError> {
        serde_json::from_str::<PolicyText>(json).unwrap().check("policies.orders", "orders")
    }

    #[test]
    fn an_empty_policy_requires_a_valid_key_and_every_field_can_be_set() {
        assert_eq!(policy("{}"), Ok(Policy::default()));
        let json = r#"{"key": "required", "scopes": {"any": ["a", "b:c", "Api/Read"]}, "cost": 0, "shadow": true,
            "rate_limit": {"requests": 5, "window": "60s"}}"#;
        let limit =
            RateLimit { name: "orders".into(), requests: 5, window_s: 60, burst: 5, shared: false, per: Per::Key };
        let expected = Policy {
            key: KeyNeed::Required,
            scopes: ScopeNeed::Any(vec!["a".into(), "b:c".into(), "Api/Read".into()]),
            cost: Some(0),
            rate_limit: Some(limit),
            shadow: true,
        };
        assert_eq!(policy(json), Ok(expected));
        assert_eq!(policy(r#"{"key": "anonymous_allowed"}"#).unwrap().key, KeyNeed::AnonymousAllowed);
    }

    #[test]
    fn an_error_names_the_field() {
        for (json, field) in [
            (r#"{"scopes": {"all": []}}"#, "policies.orders.scopes: "),
            (r#"{"scopes": {"all": ["a b"]}}"#, "policies.orders.scopes: "),
            (r#"{"scopes": {"all": ["a:*"]}}"#, "policies.orders.scopes: "),
            (r#"{"scopes": {"all": ["a"]}, "key": "optional"}"#, "policies.orders.key: "),
            (r#"{"cost": 1000001}"#, "policies.orders.cost: "),
            (r#"{"rate_limit": {"requests": 0, "window": "1s"}}"#, "policies.orders.rate_limit.requests: "),
            (r#"{"rate_limit": {"requests": 1, "window": "0s"}}"#, "policies.orders.rate_limit.window: "),
            (r#"{"rate_limit": {"requests": 1, "window": "1s", "burst": 0}}"#, "policies.orders.rate_limit.burst: "),
        ] {
            let error = policy(json).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
        assert!(serde_json::from_str::<PolicyText>(r#"{"scope": "a"}"#).is_err());
    }

    #[test]
    fn a_route_gets_the_policy_that_it_names_or_the_default_and_an_unknown_name_gets_none() {
        let shadow = PolicyText { shadow: true, ..PolicyText::default() };
        let policies = Policies::check(PolicyText::default(), [("dark".into(), shadow)].into()).unwrap();
        assert_eq!(policies.find(None), Some(Policy::PLAIN));
        assert!(policies.find(Some("dark")).unwrap().shadow);
        assert_eq!(policies.find(Some("drak")), None);
        for name in ["", "default", "a b", "é"] {
            assert!(Policies::check(PolicyText::default(), [(name.into(), PolicyText::default())].into()).is_err());
        }
    }
}
