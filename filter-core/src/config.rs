//! The plugin configuration of the filter: JSON that is checked as a whole when Envoy loads it. An error names the field and
//! the remedy. Unknown fields are errors, so that a misspelt limit does not silently become no limit.

use std::collections::BTreeMap;

use contract::json::{Seconds, null_is_default, read};
use contract::pepper::Pepper;
use contract::policy::{LimitText, Policies, PolicyError, PolicyText};
use contract::record::RateLimit;
use serde::Deserialize;

use crate::extract::source::{self, Source};
use crate::identity::{FOREIGN, USUAL};
use crate::reply::Challenge;

/// The least value of `max_staleness`, in seconds: twice the time between two responses of a control plane without changes.
pub const MIN_STALENESS_S: u64 = 60;

/// Most names in `remove_headers`.
const REMOVED_HEADERS: usize = 64;

/// The header with the outcome of a request that shadow mode let through. Values of the client are removed.
pub const SHADOW_HEADER: &str = "x-portcullis-shadow";

/// The name in replies for the limit of the default policy. The limit of the filter is called `default`.
const DEFAULT_POLICY_LIMIT: &str = "default_policy";

/// The checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cluster of Envoy that reaches the control plane.
    pub cluster: String,
    /// `:authority` of calls to the control plane.
    pub authority: String,
    /// The environment variable of the key with the scope `sync`.
    pub sync_key_env: String,
    /// The environment variable of the pepper of imported keys, if the configuration names one.
    pub pepper_env: Option<String>,
    /// The pepper. It comes from the environment and not from the JSON.
    pub pepper: Option<Pepper>,
    /// The name of the key store: several stores can use one cluster.
    pub store: String,
    /// The places of a key, in the order in which they are searched. At least one.
    pub key_sources: Vec<Source>,
    /// Whether the key is removed before the request goes upstream.
    pub strip_key: bool,
    /// The headers with the identity of the key.
    pub identity: IdentityHeaders,
    /// Whether Envoy itself removes identity headers of clients before the filter runs, so that the filter need not do so for
    /// requests with a good key.
    pub envoy_removes_identity_headers: bool,
    /// More headers that are removed before the request goes upstream, in lower case.
    pub remove_headers: Vec<String>,
    /// Trailers that are removed: the headers that the filter sets or removes, and those of other gateways.
    pub trailers_removed: Vec<String>,
    /// The rate limit of keys without limits of their own.
    pub rate_limit: Option<RateLimit>,
    /// Whether the filter sets filter state for the access log, where no header can show it.
    pub access_log_state: bool,
    /// The policies of routes.
    pub policies: Policies,
    /// Shadow mode on all routes: requests are decided and counted, but none is refused.
    pub shadow: bool,
    /// The decisions on requests without a usable store.
    pub failure_mode: FailureModes,
    /// After this time without a response of the control plane the store is stale. `None`: never.
    pub max_staleness_ms: Option<u64>,
    /// The challenge of a 401.
    pub challenge: Challenge,
}

/// Names of the identity headers, in lower case; `None` for those that are switched off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityHeaders {
    /// The owner's id.
    pub consumer: Option<String>,
    /// The key's id.
    pub credential: Option<String>,
    /// The key's scopes, separated by spaces (RFC 6749, section 3.3).
    pub scopes: Option<String>,
    /// All of these in one header, see [`crate::identity::packed`].
    pub packed: Option<String>,
    /// Usual names that are not in use. Upstreams may trust them all the same, so they are removed from requests of clients.
    pub unused: Vec<String>,
}

/// The decisions on requests without a usable store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FailureModes {
    /// Before the first sync.
    #[serde(deserialize_with = "null_is_default")]
    pub not_ready: FailureMode,
    /// While the store is older than `max_staleness`.
    #[serde(deserialize_with = "null_is_default")]
    pub stale: FailureMode,
}

/// The decision on a request without a usable store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureMode {
    /// Refuse it with 503.
    #[default]
    Deny,
    /// Let it through, unchecked and without identity.
    Allow,
}

/// The first mistake in a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// The JSON of the configuration. For an optional field, null means the same as leaving it out. Only for `rate_limit` null
/// means no limit.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    control_plane: RawControlPlane,
    store: Option<String>,
    pepper_env: Option<String>,
    key_header: Option<String>,
    key_sources: Option<Vec<Source>>,
    strip_key: Option<bool>,
    #[serde(default, deserialize_with = "null_is_default")]
    identity_headers: RawIdentityHeaders,
    #[serde(default, deserialize_with = "null_is_default")]
    envoy_removes_identity_headers: bool,
    #[serde(default, deserialize_with = "null_is_default")]
    remove_headers: Vec<String>,
    #[serde(default = "default_rate_limit")]
    rate_limit: Option<LimitText>,
    access_log_state: Option<bool>,
    #[serde(default, deserialize_with = "null_is_default")]
    default_policy: PolicyText,
    #[serde(default, deserialize_with = "null_is_default")]
    policies: BTreeMap<String, PolicyText>,
    #[serde(default, deserialize_with = "null_is_default")]
    shadow: bool,
    #[serde(default, deserialize_with = "null_is_default")]
    failure_mode: FailureModes,
    max_staleness: Option<Seconds>,
    realm: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawControlPlane {
    cluster: String,
    authority: Option<String>,
    sync_key_env: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIdentityHeaders {
    consumer: Option<String>,
    credential: Option<String>,
    scopes: Option<String>,
    packed: Option<String>,
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants the type of the field")]
const fn default_rate_limit() -> Option<LimitText> {
    Some(LimitText { requests: 1_000, window: Seconds(1), burst: Some(2_000) })
}

impl Config {
    /// Reads and checks the plugin configuration.
    ///
    /// # Errors
    /// The first mistake, with the field and the remedy.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        if json.is_empty() {
            return Err(ConfigError(
                "the plugin has no configuration; it needs at least {\"control_plane\": {\"cluster\": \"…\"}}".into(),
            ));
        }
        let raw: Raw = read(json).map_err(|error| ConfigError(error.to_string()))?;
        let key_sources = source::check(raw.key_header, raw.key_sources).map_err(ConfigError)?;
        let challenge = Challenge::new(raw.realm.as_deref().unwrap_or("portcullis"), &key_sources)
            .ok_or_else(|| ConfigError("realm: use visible ASCII characters other than \" and \\".into()))?;
        let mut policies = Policies::check(raw.default_policy, raw.policies)?;
        if let Some(limit) = &mut policies.default.rate_limit {
            limit.name = DEFAULT_POLICY_LIMIT.into();
        }
        let mut config = Self {
            cluster: filled("control_plane.cluster", raw.control_plane.cluster)?,
            authority: filled_or("control_plane.authority", raw.control_plane.authority, "portcullis")?,
            sync_key_env: filled_or(
                "control_plane.sync_key_env",
                raw.control_plane.sync_key_env,
                "PORTCULLIS_SYNC_KEY",
            )?,
            pepper_env: raw.pepper_env.map(|name| filled("pepper_env", name)).transpose()?,
            pepper: None,
            store: filled_or("store", raw.store, "default")?,
            key_sources,
            strip_key: raw.strip_key.unwrap_or(true),
            identity: raw.identity_headers.check()?,
            envoy_removes_identity_headers: raw.envoy_removes_identity_headers,
            remove_headers: removed(&raw.remove_headers)?,
            trailers_removed: Vec::new(),
            rate_limit: raw.rate_limit.map(|limit| limit.check("rate_limit", "default")).transpose()?,
            access_log_state: raw.access_log_state.unwrap_or(true),
            policies,
            shadow: raw.shadow,
            failure_mode: raw.failure_mode,
            max_staleness_ms: raw.max_staleness.map(staleness).transpose()?,
            challenge,
        };
        let IdentityHeaders { consumer, credential, scopes, packed, .. } = &config.identity;
        let identity = [consumer, credential, scopes, packed].into_iter().flatten().map(String::as_str);
        let mut names: Vec<&str> = Vec::new();
        for source in &config.key_sources {
            // Several parameters, or several cookies, are in one header.
            if !names.contains(&source.header()) {
                names.push(source.header());
            }
        }
        names.extend(identity.chain([SHADOW_HEADER]));
        names.extend(config.remove_headers.iter().map(String::as_str));
        for (place, name) in names.iter().enumerate() {
            if names.iter().skip(place.saturating_add(1)).any(|other| other == name) {
                return Err(ConfigError(format!("the header name {name} is used twice; give each purpose its own")));
            }
        }
        let used = |usual: &&str| names.contains(usual);
        let unused: Vec<&str> = USUAL.into_iter().filter(|usual| !used(usual)).collect();
        let trailers = names.iter().copied().chain(unused.iter().copied()).chain(FOREIGN);
        config.trailers_removed = trailers.filter(|name| !name.starts_with(':')).map(str::to_owned).collect();
        config.identity.unused = unused.into_iter().map(str::to_owned).collect();
        Ok(config)
    }
}

fn filled(field: &str, text: String) -> Result<String, ConfigError> {
    if text.is_empty() { Err(ConfigError(format!("{field}: must not be empty"))) } else { Ok(text) }
}

fn filled_or(field: &str, text: Option<String>, usual: &str) -> Result<String, ConfigError> {
    filled(field, text.unwrap_or_else(|| usual.to_owned()))
}

impl RawIdentityHeaders {
    /// An empty name switches a header off. Usually three headers are on, or only the packed one if it has a name.
    fn check(&self) -> Result<IdentityHeaders, ConfigError> {
        let usual = if self.packed.as_deref().is_none_or(str::is_empty) { USUAL } else { [""; 3] };
        let [consumer, credential, scopes] = usual;
        let header = |field: &str, name: &Option<String>, usual| match name.as_deref().unwrap_or(usual) {
            "" => Ok(None),
            name => source::header_name(&format!("identity_headers.{field}"), name).map(Some).map_err(ConfigError),
        };
        Ok(IdentityHeaders {
            consumer: header("consumer", &self.consumer, consumer)?,
            credential: header("credential", &self.credential, credential)?,
            scopes: header("scopes", &self.scopes, scopes)?,
            packed: header("packed", &self.packed, "")?,
            unused: Vec::new(),
        })
    }
}

fn removed(names: &[String]) -> Result<Vec<String>, ConfigError> {
    if names.len() > REMOVED_HEADERS {
        return Err(ConfigError(format!("remove_headers: name at most {REMOVED_HEADERS}")));
    }
    names.iter().map(|name| source::header_name("remove_headers", name).map_err(ConfigError)).collect()
}

impl From<PolicyError> for ConfigError {
    fn from(PolicyError(why): PolicyError) -> Self {
        Self(why)
    }
}

fn staleness(Seconds(seconds): Seconds) -> Result<u64, ConfigError> {
    if seconds < MIN_STALENESS_S {
        let why = "the control plane answers every 25 s when it has no news";
        return Err(ConfigError(format!("max_staleness: must be at least \"{MIN_STALENESS_S}s\": {why}")));
    }
    Ok(seconds.saturating_mul(1_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"control_plane": {"cluster": "cp"}}"#;

    fn error(json: &str) -> String {
        Config::parse(json.as_bytes()).unwrap_err().to_string()
    }

    fn with(fields: &str) -> String {
        format!(r#"{{"control_plane": {{"cluster": "cp"}}, {fields}}}"#)
    }

    #[test]
    fn the_smallest_configuration_has_safe_defaults() {
        let config = Config::parse(MINIMAL.as_bytes()).unwrap();
        let expected = Config {
            cluster: "cp".into(),
            authority: "portcullis".into(),
            sync_key_env: "PORTCULLIS_SYNC_KEY".into(),
            pepper_env: None,
            pepper: None,
            store: "default".into(),
            key_sources: vec![Source::Header("x-api-key".into())],
            strip_key: true,
            identity: IdentityHeaders {
                consumer: Some("x-consumer-id".into()),
                credential: Some("x-credential-identifier".into()),
                scopes: Some("x-credential-scopes".into()),
                packed: None,
                unused: vec![],
            },
            envoy_removes_identity_headers: false,
            remove_headers: vec![],
            trailers_removed: {
                let [consumer, credential, scopes] = USUAL;
                let own = ["x-api-key", consumer, credential, scopes, "x-portcullis-shadow"];
                own.into_iter().chain(FOREIGN).map(str::to_owned).collect()
            },
            rate_limit: Some(RateLimit {
                name: "default".into(),
                requests: 1_000,
                window_s: 1,
                burst: 2_000,
                shared: false,
            }),
            access_log_state: true,
            policies: Policies::default(),
            shadow: false,
            failure_mode: FailureModes { not_ready: FailureMode::Deny, stale: FailureMode::Deny },
            max_staleness_ms: None,
            challenge: Challenge::new("portcullis", &[Source::Header("x-api-key".into())]).unwrap(),
        };
        assert_eq!(format!("{config:?}"), format!("{expected:?}"));
        let fields = [
            "store",
            "pepper_env",
            "key_header",
            "key_sources",
            "strip_key",
            "identity_headers",
            "envoy_removes_identity_headers",
            "remove_headers",
            "access_log_state",
            "default_policy",
            "policies",
            "shadow",
            "failure_mode",
            "max_staleness",
            "realm",
        ];
        let nulls = fields.map(|field| format!("\"{field}\": null")).join(", ");
        let control_plane = r#"{"cluster": "cp", "authority": null, "sync_key_env": null}"#;
        let nulls = format!(r#"{{"control_plane": {control_plane}, {nulls}}}"#);
        assert_eq!(format!("{:?}", Config::parse(nulls.as_bytes()).unwrap()), format!("{expected:?}"));
    }

    #[test]
    fn every_field_can_be_set() {
        let json = r#"{
            "control_plane": {"cluster": "cp", "authority": "keys.internal", "sync_key_env": "KEY"},
            "store": "second", "key_header": "Authorization-Key", "strip_key": false,
            "identity_headers": {"consumer": "X-Who", "credential": "", "scopes": ""},
            "rate_limit": {"requests": 5, "window": "60s"}, "access_log_state": false, "remove_headers": ["X-Tenant"],
            "failure_mode": {"not_ready": "allow", "stale": "allow"}, "max_staleness": "90s", "realm": "orders"
        }"#;
        let config = Config::parse(json.as_bytes()).unwrap();
        assert_eq!(config.key_sources, [Source::Header("authorization-key".into())]);
        let unused = USUAL.map(str::to_owned).to_vec();
        assert_eq!(
            config.identity,
            IdentityHeaders { consumer: Some("x-who".into()), credential: None, scopes: None, packed: None, unused }
        );
        let packed = with(
            r#""identity_headers": {"packed": "X-Identity", "scopes": "x-scopes"}, "envoy_removes_identity_headers": true"#,
        );
        let Config { identity, envoy_removes_identity_headers, .. } = Config::parse(packed.as_bytes()).unwrap();
        assert_eq!((identity.packed, identity.scopes), (Some("x-identity".into()), Some("x-scopes".into())));
        assert_eq!(
            (identity.credential, identity.unused, envoy_removes_identity_headers),
            (None, USUAL.map(str::to_owned).to_vec(), true)
        );
        assert_eq!(config.remove_headers, ["x-tenant"]);
        for name in
            ["x-tenant", "x-who", "authorization-key", "x-consumer-id", "x-portcullis-shadow", "x-consumer-groups"]
        {
            assert!(config.trailers_removed.iter().any(|removed| removed == name), "{name}");
        }
        assert_eq!(
            config.rate_limit,
            Some(RateLimit { name: "default".into(), requests: 5, window_s: 60, burst: 5, shared: false })
        );
        let open = FailureModes { not_ready: FailureMode::Allow, stale: FailureMode::Allow };
        assert_eq!(config.failure_mode, open);
        let failure_mode = |json: &str| Config::parse(with(json).as_bytes()).unwrap().failure_mode;
        let stale = FailureModes { stale: FailureMode::Allow, ..FailureModes::default() };
        assert_eq!(failure_mode(r#""failure_mode": {"not_ready": null, "stale": "allow"}"#), stale);
        assert_eq!((config.max_staleness_ms, config.strip_key, config.access_log_state), (Some(90_000), false, false));
        assert_eq!(Config::parse(with(r#""rate_limit": null"#).as_bytes()).unwrap().rate_limit, None);
    }

    #[test]
    fn a_mistake_is_named_with_its_field_and_remedy() {
        assert!(error("").contains("at least {\"control_plane\""));
        assert_eq!(error("{}"), "control_plane: is missing");
        assert_eq!(error(r#"[{"cluster": "cp"}]"#), "must be an object");
        assert_eq!(error(r#"{"control_plane": ["cp", "portcullis", "KEY"]}"#), "control_plane: must be an object");
        assert_eq!(error(&with(r#""identity_headers": ["a", "b", "c"]"#)), "identity_headers: must be an object");
        assert_eq!(error(&with(r#""policies": {"a": ["optional"]}"#)), "policies.a: must be an object");
        assert_eq!(error(&with(r#""rate_limit": [5, 60, 5]"#)), "rate_limit: must be an object");
        assert_eq!(error(&with(r#""rate_limit": {"requests": 5}"#)), "rate_limit.window: is missing");
        assert!(error("{").contains("EOF"));
        assert!(error(&with(r#""rate_limits": {}"#)).starts_with("rate_limits: is not a known field; the fields are "));
        assert!(error(r#"{"control_plane": {"cluster": ""}}"#).contains("control_plane.cluster: must not be empty"));
        for field in ["control_plane.authority", "control_plane.sync_key_env", "store", "pepper_env"] {
            let json = match field.split_once('.') {
                Some((_, field)) => format!(r#"{{"control_plane": {{"cluster": "cp", "{field}": ""}}}}"#),
                None => with(&format!(r#""{field}": """#)),
            };
            assert_eq!(error(&json), format!("{field}: must not be empty"));
        }
        for field in ["consumer", "credential", "scopes", "packed"] {
            let json = with(&format!(r#""identity_headers": {{"{field}": ":path"}}"#));
            assert!(error(&json).starts_with(&format!("identity_headers.{field}: \":path\" is not a header name")));
        }
        assert!(error(&with(r#""key_header": ":path""#)).contains("key_header: \":path\" is not a header name"));
        assert!(error(&with(r#""key_header": "host""#)).contains("key_header"));
        assert!(error(&with(r#""key_header": "X-Consumer-Id""#)).contains("x-consumer-id is used twice"));
        assert!(
            error(&with(r#""rate_limit": {"requests": 0, "window": "1s"}"#)).contains("set the whole field to null")
        );
        assert!(
            error(&with(r#""rate_limit": {"requests": 1, "window": "0s"}"#))
                .contains("rate_limit.window: must be from")
        );
        for window in ["60", r#""60""#, r#""1m""#, r#""0.5s""#, r#""+5s""#, r#""s""#] {
            let limit = format!(r#""rate_limit": {{"requests": 1, "window": {window}}}"#);
            let expected = "rate_limit.window: must be whole seconds with their unit, such as \"60s\"";
            assert_eq!(error(&with(&limit)), expected, "{window}");
        }
        assert!(error(&with(r#""rate_limit": {"requests": 1, "window": "1s", "burst": 0}"#)).contains("burst"));
        assert!(error(&with(r#""max_staleness": "5s""#)).contains("max_staleness: must be at least \"60s\": "));
        let failure_mode = error(&with(r#""failure_mode": {"stale": "open"}"#));
        assert_eq!(failure_mode, "failure_mode.stale: must be `deny` or `allow`");
        let unknown = error(&with(r#""failure_mode": {"on_stale": "deny"}"#));
        assert_eq!(unknown, "failure_mode.on_stale: is not a known field; the fields are `not_ready` or `stale`");
        let packed = r#""identity_headers": {"packed": "X-Consumer-Id", "consumer": "x-consumer-id"}"#;
        assert!(error(&with(packed)).contains("x-consumer-id is used twice"));
        assert!(
            error(&with(r#""identity_headers": {"packed": ":path"}"#))
                .starts_with("identity_headers.packed: \":path\"")
        );
        assert!(error(&with(r#""realm": "a\"b""#)).contains("realm"));
        assert!(
            error(&with(r#""remove_headers": ["host"]"#)).contains("remove_headers: \"host\" is not a header name")
        );
        assert!(error(&with(r#""remove_headers": ["X-Consumer-Id"]"#)).contains("x-consumer-id is used twice"));
        let many = serde_json::to_string(&vec!["x"; 65]).unwrap();
        assert!(error(&with(&format!(r#""remove_headers": {many}"#))).contains("remove_headers: name at most 64"));
    }

    #[test]
    fn keys_may_be_in_several_places() {
        let sources = r#""key_sources": [{"header": "X-Api-Key"}, {"bearer": true}, {"query": "a"}, {"query": "b"}]"#;
        let config = Config::parse(with(sources).as_bytes()).unwrap();
        let expected = [
            Source::Header("x-api-key".into()),
            Source::Bearer(true),
            Source::Query("a".into()),
            Source::Query("b".into()),
        ];
        assert_eq!(config.key_sources, expected);
        assert_eq!(config.challenge, Challenge::new("portcullis", &expected).unwrap());
        let wrong = |fields: &str| error(&with(&format!(r#""key_sources": [{{"bearer": true}}], {fields}"#)));
        assert!(wrong(r#""key_header": "x-key""#).contains("key_header is given too"));
        assert!(wrong(r#""identity_headers": {"consumer": "authorization"}"#).contains("used twice"));
        assert!(error(&with(r#""key_sources": [{"url": "a"}]"#)).starts_with("key_sources[0]"));
        assert!(error(&with(r#""key_header": "x-portcullis-shadow""#)).contains("used twice"));
    }

    #[test]
    fn policies_are_checked_and_the_default_limit_has_its_own_name() {
        let json = with(
            r#""policies": {"search": {"cost": 5}}, "shadow": true,
            "default_policy": {"key": "optional", "rate_limit": {"requests": 1, "window": "1s"}}"#,
        );
        let config = Config::parse(json.as_bytes()).unwrap();
        assert!(config.shadow);
        assert_eq!(config.policies.find(Some("search")).unwrap().cost, Some(5));
        let limit = config.policies.default.rate_limit.unwrap();
        assert_eq!(
            limit,
            RateLimit { name: "default_policy".into(), requests: 1, window_s: 1, burst: 1, shared: false }
        );
        assert!(error(&with(r#""policies": {"a b": {}}"#)).contains("policies: the name \"a b\""));
        assert!(
            error(&with(r#""policies": {"a": {"scope": "x"}}"#)).contains("policies.a.scope: is not a known field")
        );
        assert!(error(&with(r#""default_policy": {"scopes": {"any": []}}"#)).contains("default_policy.scopes"));
    }
}
