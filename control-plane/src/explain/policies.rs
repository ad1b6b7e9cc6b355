//! The file `--policies-file`: a copy of the policies in the configuration of Envoys, and their routes. `explain` finds the policy of
//! a request in it. Envoys do not get their policies from here.
//!
//! ```json
//! { "policies": {"orders-read": {"scopes": {"all": ["orders:read"]}}},
//!   "default_policy": {}, "shadow": false,
//!   "routes": [{"prefix": "/orders", "methods": ["GET"], "policy": "orders-read"}] }
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use contract::json::{self, null_is_default};
use contract::policy::{DEFAULT_NAME, Policies, Policy, PolicyText};
use serde::Deserialize;

/// Most routes of the file.
const ROUTES: usize = 10_000;

/// Policies by name and by path.
#[derive(Clone, Debug, Default)]
pub struct ConfiguredPolicies {
    /// Whether Envoys are in shadow mode as a whole, whatever a policy says.
    pub shadow: bool,
    policies: Policies,
    routes: Vec<Route>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Route {
    prefix: String,
    methods: Option<Vec<String>>,
    policy: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    #[serde(deserialize_with = "null_is_default")]
    policies: BTreeMap<String, PolicyText>,
    #[serde(deserialize_with = "null_is_default")]
    default_policy: PolicyText,
    #[serde(deserialize_with = "null_is_default")]
    shadow: bool,
    #[serde(deserialize_with = "null_is_default")]
    routes: Vec<Route>,
}

/// A policy that was looked for.
#[derive(Clone, Debug)]
pub struct MatchedPolicy {
    pub name: String,
    /// What it asks for; `None` if there is none of the name.
    pub policy: Option<Policy>,
    /// How it was found, in words.
    pub how: String,
}

impl ConfiguredPolicies {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let in_file = |error: String| format!("--policies-file {}: {error}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| in_file(error.to_string()))?;
        Self::parse(&text).map_err(in_file)
    }

    /// Reads the text of the file. An error names the field and the remedy.
    pub fn parse(text: &str) -> Result<Self, String> {
        let File { policies, default_policy, shadow, routes } =
            json::read(text.as_bytes()).map_err(|error| error.to_string())?;
        let policies = Policies::check(default_policy, policies).map_err(|error| error.to_string())?;
        if routes.len() > ROUTES {
            return Err(format!("routes: name at most {ROUTES}"));
        }
        for (place, route) in routes.iter().enumerate() {
            let bad = |field: &str, why: &str| Err(format!("routes[{place}].{field}: {why}"));
            if !route.prefix.starts_with('/') {
                return bad("prefix", "must start with /, as paths do");
            }
            let methods = route.methods.as_deref();
            if methods.is_some_and(|methods| methods.is_empty() || !methods.iter().all(|method| is_method(method))) {
                return bad("methods", "name at least one method in capitals, as GET, or leave it out for any");
            }
            if route.policy != DEFAULT_NAME && !policies.named.contains_key(&route.policy) {
                let why = format!("there is no policy {:?}: add it to policies, or name default", route.policy);
                return bad("policy", &why);
            }
        }
        Ok(Self { shadow, policies, routes })
    }

    /// The policy of this name.
    pub fn named(&self, name: &str) -> MatchedPolicy {
        let policy = self.policies.find((name != DEFAULT_NAME).then_some(name));
        let how = if policy.is_some() { "the request names it" } else { "there is no policy of this name" };
        MatchedPolicy { name: name.into(), policy: policy.cloned(), how: how.into() }
    }

    /// The policy of the first route that a request matches; the default one if there is none.
    pub fn of_request(&self, method: &str, path: &str) -> MatchedPolicy {
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let matches = |route: &&Route| {
            let takes = route.methods.as_ref().is_none_or(|methods| methods.iter().any(|taken| taken == method));
            takes && path.starts_with(&route.prefix)
        };
        match self.routes.iter().find(matches) {
            Some(route) => {
                let how = format!("{method} {path} is of the route with the prefix {}", route.prefix);
                MatchedPolicy { how, ..self.named(&route.policy) }
            }
            None => MatchedPolicy { how: format!("no route is for {method} {path}"), ..self.named(DEFAULT_NAME) },
        }
    }

    /// The policy of routes that name none.
    pub fn default_policy(&self) -> MatchedPolicy {
        MatchedPolicy { how: "the request names neither a policy nor a path".into(), ..self.named(DEFAULT_NAME) }
    }
}

/// Whether this is the name of a method, in capitals (RFC 9110, section 9.1).
pub(crate) fn is_method(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_uppercase() || b"-_".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{
        "policies": {"read": {"scopes": {"all": ["orders:read"]}}, "free": {"key": "optional"}},
        "default_policy": {"cost": 7},
        "routes": [
            {"prefix": "/orders", "methods": ["GET", "HEAD"], "policy": "read"},
            {"prefix": "/orders/public", "policy": "free"},
            {"prefix": "/old", "policy": "default"}
        ]
    }"#;

    #[test]
    fn the_first_route_that_matches_names_the_policy_and_the_default_is_for_the_rest() {
        let configured = ConfiguredPolicies::parse(FILE).unwrap();
        for (method, path, name) in [
            ("GET", "/orders?page=2", "read"),
            ("GET", "/orders/public", "read"),
            ("POST", "/orders/public", "free"),
            ("POST", "/orders", "default"),
            ("GET", "/old", "default"),
            ("GET", "/?x=/orders", "default"),
        ] {
            let found = configured.of_request(method, path);
            assert_eq!((&*found.name, found.policy.is_some()), (name, true), "{method} {path}");
        }
        let nulls = r#"{"policies": {"a": {"key": null, "scopes": null, "cost": null, "rate_limit": null, "shadow": null}},
            "default_policy": null, "shadow": null, "routes": null}"#;
        assert!(ConfiguredPolicies::parse(nulls).unwrap().named("a").policy.is_some());
        assert_eq!(configured.default_policy().policy.unwrap().cost, Some(7));
        assert!(configured.named("wrong").policy.is_none() && configured.named("free").policy.is_some());
        assert_eq!(ConfiguredPolicies::default().of_request("GET", "/").policy.as_ref(), Some(Policy::PLAIN));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line_with_the_field() {
        for (text, start) in [
            ("{", "is not JSON: EOF while parsing an object at line 1 column 1"),
            (r#"[{}, {}, false, []]"#, "must be an object"),
            (r#"{"policies": {"a": ["required"]}}"#, "policies.a: must be an object"),
            (r#"{"routes": [["/", null, "default"]]}"#, "routes[0]: must be an object"),
            (r#"{"routes": [{"prefix": "/"}]}"#, "routes[0].policy: is missing"),
            (r#"{"policy": {}}"#, "policy: is not a known field; the fields are `policies`"),
            (r#"{"policies": {"a": {"scopes": {"all": []}}}}"#, "policies.a.scopes: name at least one scope"),
            (
                r#"{"default_policy": {"rate_limit": {"requests": 0, "window": "1s"}}}"#,
                "default_policy.rate_limit.requests: ",
            ),
            (r#"{"routes": [{"prefix": "x", "policy": "default"}]}"#, "routes[0].prefix: must start with /"),
            (
                r#"{"routes": [{"prefix": "/", "methods": ["get"], "policy": "default"}]}"#,
                "routes[0].methods: name at least",
            ),
            (
                r#"{"routes": [{"prefix": "/", "methods": [], "policy": "default"}]}"#,
                "routes[0].methods: name at least",
            ),
            (r#"{"routes": [{"prefix": "/", "policy": "a"}]}"#, "routes[0].policy: there is no policy \"a\": add it"),
        ] {
            let error = ConfiguredPolicies::parse(text).unwrap_err();
            assert!(error.starts_with(start) && !error.contains('\n'), "{error}");
        }
    }
}
