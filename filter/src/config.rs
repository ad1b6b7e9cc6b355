//! What the operator chose: the plugin configuration of the filter, JSON, comes in; a checked [`Config`] or one sentence
//! that names the field and the remedy goes out. Unknown fields are refused, so that a misspelt limit is not no limit.

use serde::Deserialize;

use crate::limiter::Limit;
use crate::reply::Challenge;

/// The least that may be asked as `max_staleness_seconds`: twice what passes between two answers of a control plane that
/// has no news.
pub const MIN_STALENESS_S: u64 = 60;

/// The usual names of the identity headers: consumer, credential, scopes.
const IDENTITY_HEADERS: [&str; 3] = ["x-consumer-id", "x-credential-identifier", "x-credential-scopes"];

/// The checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Envoy's cluster that reaches the control plane.
    pub cluster: String,
    /// `:authority` of the calls to it.
    pub authority: String,
    /// The environment variable of the VM that holds the key with the scope `sync`.
    pub sync_key_variable: String,
    /// Tells stores apart that are fed through the same cluster.
    pub store: String,
    /// Where the key stands, in lower case.
    pub key_header: String,
    /// Whether the key is removed from what goes upstream.
    pub strip_key: bool,
    /// Headers that tell the upstream who calls.
    pub identity: IdentityHeaders,
    /// The limit of keys that have none of their own.
    pub rate_limit: Option<Limit>,
    /// What to do with requests before the first sync.
    pub on_not_ready: WhenBlind,
    /// After how long without a word from the control plane the store is stale. `None`: never.
    pub max_staleness_ms: Option<u64>,
    /// What to do with requests when the store is stale.
    pub on_stale: WhenBlind,
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
    /// The usual names where others are used instead, or none. Upstreams may trust them all the same, so a client must
    /// not get them through.
    pub unused: Vec<String>,
}

/// What to do with a request that cannot be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenBlind {
    /// Answer 503.
    Refuse,
    /// Let it through unchecked and without identity.
    Allow,
}

/// Why a configuration was refused, for the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    control_plane: RawControlPlane,
    #[serde(default = "default_store")]
    store: String,
    #[serde(default = "default_key_header")]
    key_header: String,
    #[serde(default = "yes")]
    strip_key: bool,
    #[serde(default)]
    identity_headers: RawIdentityHeaders,
    #[serde(default = "RawRateLimit::filter_default")]
    rate_limit: Option<RawRateLimit>,
    #[serde(default = "refuse")]
    on_not_ready: WhenBlind,
    #[serde(default)]
    max_staleness_seconds: Option<u64>,
    #[serde(default = "refuse")]
    on_stale: WhenBlind,
    #[serde(default = "default_realm")]
    realm: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawControlPlane {
    cluster: String,
    #[serde(default = "default_authority")]
    authority: String,
    #[serde(default = "default_sync_key_variable")]
    sync_key_variable: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawIdentityHeaders {
    consumer: String,
    credential: String,
    scopes: String,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRateLimit {
    requests: u32,
    window_seconds: u32,
    burst: Option<u32>,
}

impl Default for RawIdentityHeaders {
    fn default() -> Self {
        let [consumer, credential, scopes] = IDENTITY_HEADERS.map(str::to_owned);
        Self { consumer, credential, scopes }
    }
}

impl RawRateLimit {
    #[expect(clippy::unnecessary_wraps, reason = "serde wants the type of the field")]
    const fn filter_default() -> Option<Self> {
        Some(Self { requests: 1_000, window_seconds: 1, burst: Some(2_000) })
    }
}

fn default_store() -> String {
    "default".into()
}

fn default_key_header() -> String {
    "x-api-key".into()
}

fn default_authority() -> String {
    "portcullis".into()
}

fn default_sync_key_variable() -> String {
    "PORTCULLIS_SYNC_KEY".into()
}

fn default_realm() -> String {
    "portcullis".into()
}

const fn yes() -> bool {
    true
}

const fn refuse() -> WhenBlind {
    WhenBlind::Refuse
}

impl Config {
    /// Reads and checks the plugin configuration.
    ///
    /// # Errors
    /// The first thing that is wrong, with the field and the remedy.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        if json.is_empty() {
            return Err(ConfigError(
                "the plugin has no configuration; it needs at least {\"control_plane\": {\"cluster\": \"…\"}}".into(),
            ));
        }
        let raw: Raw = serde_json::from_slice(json).map_err(|error| ConfigError(error.to_string()))?;
        let mut config = Self {
            cluster: filled("control_plane.cluster", raw.control_plane.cluster)?,
            authority: filled("control_plane.authority", raw.control_plane.authority)?,
            sync_key_variable: filled("control_plane.sync_key_variable", raw.control_plane.sync_key_variable)?,
            store: filled("store", raw.store)?,
            key_header: header("key_header", &raw.key_header)?,
            strip_key: raw.strip_key,
            identity: IdentityHeaders {
                consumer: optional_header("identity_headers.consumer", &raw.identity_headers.consumer)?,
                credential: optional_header("identity_headers.credential", &raw.identity_headers.credential)?,
                scopes: optional_header("identity_headers.scopes", &raw.identity_headers.scopes)?,
                unused: Vec::new(),
            },
            rate_limit: raw.rate_limit.map(rate_limit).transpose()?,
            on_not_ready: raw.on_not_ready,
            max_staleness_ms: raw.max_staleness_seconds.map(staleness).transpose()?,
            on_stale: raw.on_stale,
            challenge: Challenge::new(&raw.realm)
                .ok_or_else(|| ConfigError("realm: use visible ASCII characters other than \" and \\".into()))?,
        };
        let IdentityHeaders { consumer, credential, scopes, .. } = &config.identity;
        let names = [Some(&config.key_header), consumer.as_ref(), credential.as_ref(), scopes.as_ref()];
        for (place, name) in names.iter().enumerate() {
            if let Some(name) = name
                && names.iter().skip(place.saturating_add(1)).any(|other| *other == Some(*name))
            {
                return Err(ConfigError(format!("the header name {name} is used twice; give each purpose its own")));
            }
        }
        let used = |usual: &&str| names.iter().flatten().any(|name| name == usual);
        config.identity.unused = IDENTITY_HEADERS.into_iter().filter(|usual| !used(usual)).map(str::to_owned).collect();
        Ok(config)
    }
}

fn filled(field: &str, text: String) -> Result<String, ConfigError> {
    if text.is_empty() { Err(ConfigError(format!("{field}: must not be empty"))) } else { Ok(text) }
}

/// A field name (RFC 9110, section 5.1) that a filter may set: no pseudo-header, and none that frames the message.
fn header(field: &str, name: &str) -> Result<String, ConfigError> {
    const FRAMING: [&str; 6] = ["host", "content-length", "transfer-encoding", "connection", "te", "upgrade"];
    let lower = name.to_ascii_lowercase();
    let token =
        !lower.is_empty() && lower.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
    if token && !FRAMING.contains(&lower.as_str()) {
        Ok(lower)
    } else {
        Err(ConfigError(format!(
            "{field}: {name:?} is not a header name that can be used here; choose one like x-api-key"
        )))
    }
}

fn optional_header(field: &str, name: &str) -> Result<Option<String>, ConfigError> {
    if name.is_empty() { Ok(None) } else { header(field, name).map(Some) }
}

fn rate_limit(raw: RawRateLimit) -> Result<Limit, ConfigError> {
    let RawRateLimit { requests, window_seconds: window_s, burst } = raw;
    if requests == 0 {
        return Err(ConfigError(
            "rate_limit.requests: must be at least 1; for no limit, set rate_limit to null".into(),
        ));
    }
    if !(1..=31_622_400).contains(&window_s) {
        return Err(ConfigError("rate_limit.window_seconds: must be from 1 to 31622400, a year".into()));
    }
    let burst = burst.unwrap_or(requests);
    if burst == 0 {
        return Err(ConfigError("rate_limit.burst: must be at least 1; leave it out for as many as requests".into()));
    }
    Ok(Limit { name: "default".into(), requests, window_s, burst })
}

fn staleness(seconds: u64) -> Result<u64, ConfigError> {
    if seconds < MIN_STALENESS_S {
        let why = "the control plane answers every 25 s when it has no news";
        return Err(ConfigError(format!("max_staleness_seconds: must be at least {MIN_STALENESS_S}: {why}")));
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
    fn the_least_configuration_has_safe_defaults() {
        let config = Config::parse(MINIMAL.as_bytes()).unwrap();
        assert_eq!(
            config,
            Config {
                cluster: "cp".into(),
                authority: "portcullis".into(),
                sync_key_variable: "PORTCULLIS_SYNC_KEY".into(),
                store: "default".into(),
                key_header: "x-api-key".into(),
                strip_key: true,
                identity: IdentityHeaders {
                    consumer: Some("x-consumer-id".into()),
                    credential: Some("x-credential-identifier".into()),
                    scopes: Some("x-credential-scopes".into()),
                    unused: vec![],
                },
                rate_limit: Some(Limit { name: "default".into(), requests: 1_000, window_s: 1, burst: 2_000 }),
                on_not_ready: WhenBlind::Refuse,
                max_staleness_ms: None,
                on_stale: WhenBlind::Refuse,
                challenge: Challenge::new("portcullis").unwrap(),
            }
        );
    }

    #[test]
    fn every_field_can_be_set() {
        let json = r#"{
            "control_plane": {"cluster": "cp", "authority": "keys.internal", "sync_key_variable": "KEY"},
            "store": "second", "key_header": "Authorization-Key", "strip_key": false,
            "identity_headers": {"consumer": "X-Who", "credential": "", "scopes": ""},
            "rate_limit": {"requests": 5, "window_seconds": 60},
            "on_not_ready": "allow", "max_staleness_seconds": 90, "on_stale": "allow", "realm": "orders"
        }"#;
        let config = Config::parse(json.as_bytes()).unwrap();
        assert_eq!(config.key_header, "authorization-key");
        let unused = IDENTITY_HEADERS.map(str::to_owned).to_vec();
        assert_eq!(
            config.identity,
            IdentityHeaders { consumer: Some("x-who".into()), credential: None, scopes: None, unused }
        );
        assert_eq!(config.rate_limit, Some(Limit { name: "default".into(), requests: 5, window_s: 60, burst: 5 }));
        assert_eq!((config.on_not_ready, config.on_stale), (WhenBlind::Allow, WhenBlind::Allow));
        assert_eq!((config.max_staleness_ms, config.strip_key), (Some(90_000), false));
        assert_eq!(Config::parse(with(r#""rate_limit": null"#).as_bytes()).unwrap().rate_limit, None);
    }

    #[test]
    fn what_is_wrong_is_said_with_field_and_remedy() {
        assert!(error("").contains("at least {\"control_plane\""));
        assert!(error("{}").contains("missing field `control_plane`"));
        assert!(error("{").contains("EOF"));
        assert!(error(&with(r#""rate_limits": {}"#)).contains("unknown field `rate_limits`"));
        assert!(error(r#"{"control_plane": {"cluster": ""}}"#).contains("control_plane.cluster: must not be empty"));
        assert!(error(&with(r#""key_header": ":path""#)).contains("key_header: \":path\" is not a header name"));
        assert!(error(&with(r#""key_header": "host""#)).contains("key_header"));
        assert!(error(&with(r#""key_header": "X-Consumer-Id""#)).contains("x-consumer-id is used twice"));
        assert!(
            error(&with(r#""rate_limit": {"requests": 0, "window_seconds": 1}"#)).contains("set rate_limit to null")
        );
        assert!(error(&with(r#""rate_limit": {"requests": 1, "window_seconds": 0}"#)).contains("window_seconds"));
        assert!(error(&with(r#""rate_limit": {"requests": 1, "window_seconds": 1, "burst": 0}"#)).contains("burst"));
        assert!(error(&with(r#""max_staleness_seconds": 5"#)).contains("at least 60"));
        assert!(error(&with(r#""on_stale": "open""#)).contains("expected `refuse` or `allow`"));
        assert!(error(&with(r#""realm": "a\"b""#)).contains("realm"));
    }
}
