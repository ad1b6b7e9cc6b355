//! Policies: what routes require of requests. API owners keep them in the control plane, which sends them to filters with roles
//! and plans, as a [`Definition`](crate::definition::Definition).
//!
//! A policy applies to requests whose route names it, and to those that one of its [matches](crate::rules::Match) picks.

use serde::{Deserialize, Serialize};

use crate::json::Seconds;
use crate::key::KeyKind;
use crate::record::{Per, RateLimit};
use crate::rules::Match;

/// Most credits that a request costs.
pub const COST: u32 = 1_000_000;
/// The name of the policy of requests for which no other policy is named or picked.
pub const DEFAULT_NAME: &str = "default";

const SCOPES: usize = 32;
const SCOPE_BYTES: usize = 64;
const WINDOW_S: u32 = 31_622_400;

/// What a route requires of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Whether a key is required.
    pub key: KeyNeed,
    /// Kinds of keys that the route accepts. Empty: all.
    pub kinds: Vec<KeyKind>,
    /// Scopes that the key must have.
    pub scopes: ScopeNeed,
    /// Credits that a request costs. `None`: the cost of the key.
    pub cost: Option<u32>,
    /// Limits of the requests under this policy. They apply in addition to the limits of the key, and each Envoy enforces them
    /// by itself.
    pub rate_limits: PolicyLimits,
    /// Refuse nothing, but report and count what would have been refused.
    pub shadow: bool,
    /// Capture the hashes of keys that the store does not have, see [`crate::sightings`]. Requires `shadow`.
    pub capture_unknown: bool,
}

/// The limits of a policy. Their names begin with that of the policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyLimits {
    /// For each key.
    pub key: Vec<RateLimit>,
    /// For all keys of an owner together.
    pub owner: Vec<RateLimit>,
    /// For each client address without a key.
    pub address: Vec<RateLimit>,
}

impl PolicyLimits {
    /// No limits.
    pub const NONE: &'static Self = &Self { key: Vec::new(), owner: Vec::new(), address: Vec::new() };
}

/// Whether a route requires a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    pub const PLAIN: &'static Self = &Self {
        key: KeyNeed::Required,
        kinds: Vec::new(),
        scopes: ScopeNeed::None,
        cost: None,
        rate_limits: PolicyLimits { key: Vec::new(), owner: Vec::new(), address: Vec::new() },
        shadow: false,
        capture_unknown: false,
    };

    /// Checks everything but the rate limits.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), PolicyError> {
        let bad = |field: &str, why: &str| Err(PolicyError { field: field.to_owned(), why: why.to_owned() });
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
            return bad("key", "a policy that asks for scopes needs a key: use \"required\", or ask for no scopes");
        }
        if self.capture_unknown && self.key == KeyNeed::Optional {
            return bad(
                "capture_unknown",
                "finds no unknown keys where key is \"optional\", which counts them as none",
            );
        }
        if self.capture_unknown && !self.shadow {
            return bad("capture_unknown", "requires shadow mode: set shadow to true, or leave capture_unknown out");
        }
        if self.cost.is_some_and(|cost| cost > COST) {
            return bad("cost", &format!("must be a number from 0 to {COST}"));
        }
        Ok(())
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::PLAIN.clone()
    }
}

/// A policy with its name, and what picks it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedPolicy {
    /// Its name.
    pub name: String,
    /// What it requires.
    pub policy: Policy,
    /// The requests that it applies to although their route names no policy.
    pub matches: Vec<Match>,
    /// Whether the owner of a route may name it by an annotation or the name of the route.
    pub from_annotation: bool,
}

/// Why a policy was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct PolicyError {
    /// The path of the field in the policy.
    pub field: String,
    /// The remedy.
    pub why: String,
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
    pub fn check(self, field: &str, name: &str) -> Result<RateLimit, String> {
        let Self { requests, window: Seconds(window_s), burst } = self;
        let bad = |what: &str, why: &str| Err(format!("{field}.{what}: {why}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_field() {
        let asks = |scopes: &[&str]| ScopeNeed::All(scopes.iter().map(ToString::to_string).collect());
        assert_eq!(Policy::PLAIN.check(), Ok(()));
        for (policy, field) in [
            (Policy { scopes: asks(&[]), ..Policy::default() }, "scopes"),
            (Policy { scopes: asks(&["a b"]), ..Policy::default() }, "scopes"),
            (Policy { scopes: asks(&["a:*"]), ..Policy::default() }, "scopes"),
            (Policy { scopes: asks(&["a"; 33]), ..Policy::default() }, "scopes"),
            (Policy { scopes: asks(&["a"]), key: KeyNeed::Optional, ..Policy::default() }, "key"),
            (Policy { cost: Some(1_000_001), ..Policy::default() }, "cost"),
            (Policy { capture_unknown: true, ..Policy::default() }, "capture_unknown"),
            (
                Policy { capture_unknown: true, shadow: true, key: KeyNeed::Optional, ..Policy::default() },
                "capture_unknown",
            ),
        ] {
            assert_eq!(policy.check().unwrap_err().field, field);
        }
        let all = Policy { scopes: asks(&["a", "b:c", "Api/Read"]), cost: Some(0), ..Policy::default() };
        assert_eq!(all.check(), Ok(()));
    }

    #[test]
    fn a_limit_of_the_filter_is_checked() {
        let read = |json: &str| serde_json::from_str::<LimitText>(json).unwrap().check("rate_limit", "default");
        let limit =
            RateLimit { name: "default".into(), requests: 5, window_s: 60, burst: 5, shared: false, per: Per::Key };
        assert_eq!(read(r#"{"requests": 5, "window": "60s"}"#), Ok(limit));
        for (json, field) in [
            (r#"{"requests": 0, "window": "1s"}"#, "rate_limit.requests: "),
            (r#"{"requests": 1, "window": "0s"}"#, "rate_limit.window: "),
            (r#"{"requests": 1, "window": "1s", "burst": 0}"#, "rate_limit.burst: "),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
