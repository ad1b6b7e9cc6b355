//! The plugin configuration of the filter: JSON that is checked as a whole when Envoy loads it. An error names the field and
//! the remedy. Unknown fields are errors, so that a misspelt limit does not silently become no limit.

use std::collections::BTreeMap;

use contract::json::{Milliseconds, Seconds, null_is_default, read};
use contract::pepper::Pepper;
use contract::policy::LimitText;
use contract::record::RateLimit;
use limits::LONGEST_WAIT_MS;
use serde::Deserialize;

use crate::extract::source::{self, Source};
use crate::identity::{FOREIGN, USUAL};
use crate::reply::Challenge;

/// The least value of `max_staleness`, in seconds: twice the time between two responses of a control plane without changes.
pub const MIN_STALENESS_S: u64 = 60;

/// The value of `limits.wait`, unless it is given.
const LIMITS_WAIT_MS: u64 = 250;

/// Most headers in `identity_headers.attributes`.
const ATTRIBUTES: usize = 16;

/// Most names in `remove_headers`.
const REMOVED_HEADERS: usize = 64;

/// The header with the outcome of a request that shadow mode let through. Values of the client are removed.
pub const SHADOW_HEADER: &str = "x-portcullis-shadow";

/// Where the name of a policy is looked for, unless the configuration says it.
const POLICY_SOURCES: [PolicySource; 3] =
    [PolicySource::RouteMetadata, PolicySource::VirtualHostMetadata, PolicySource::Rules];

/// Most sources, and most bytes of the name of an annotation or the prefix of route names.
const SOURCES: usize = 8;
const SOURCE_BYTES: usize = 128;

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
    /// Whether the filter sets filter state with what is left of the limits of an allowed request, for response headers.
    pub rate_limit_state: bool,
    /// Where the name of a request's policy is looked for, in this order. If none names one, the default policy applies.
    pub policy_sources: Vec<PolicySource>,
    /// Whether the operator has configured these sources. Otherwise none is asked before the first policy is written.
    pub are_sources_given: bool,
    /// Shadow mode on all routes: requests are decided and counted, but none is refused.
    pub shadow: bool,
    /// The decisions on requests without a usable store.
    pub failure_mode: FailureModes,
    /// After this time without a response of the control plane the store is stale. `None`: never.
    pub max_staleness_ms: Option<u64>,
    /// The longest time for which a request waits for an answer about shared limits, in milliseconds. 0: none waits.
    pub limits_wait_ms: u64,
    /// What to do with requests while that answer does not come.
    pub on_limits_unreachable: LimitModes,
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
    /// Each attribute of the key or its owner that upstreams get, with its header.
    pub attributes: Vec<AttributeHeader>,
    /// Usual names that are not in use. Upstreams may trust them all the same, so they are removed from requests of clients.
    pub unused: Vec<String>,
}

/// A header with an attribute, see [`Attribute`](contract::record::Attribute).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttributeHeader {
    /// The name of the header, in lower case.
    pub header: String,
    /// The name of the attribute.
    pub attribute: String,
}

/// Where the name of a request's policy is looked for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicySource {
    /// `filter_metadata.portcullis.policy` of the route.
    RouteMetadata,
    /// The same of the virtual host.
    VirtualHostMetadata,
    /// This annotation of the resource that Envoy Gateway made the route of. It names only policies that allow that.
    Annotation(String),
    /// The name of the route, if it is that of a policy.
    RouteName,
    /// The name of the route after this prefix, for routes whose name has it.
    RouteNamePrefix(String),
    /// The rules, which are part of policies.
    Rules,
}

impl PolicySource {
    /// Whether the filter must read a property of Envoy.
    #[must_use]
    pub const fn is_property(&self) -> bool {
        !matches!(self, Self::Rules)
    }
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

/// The decision on a request that cannot be checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureMode {
    /// Refuse it with 503.
    #[default]
    Deny,
    /// Let it through: without identity if its key is not checked. It is counted all the same.
    Allow,
}

/// The decisions on requests that find no allowance of a shared limit while the control plane does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitModes {
    /// By rate limits.
    #[serde(deserialize_with = "null_is_default")]
    pub rate_limits: RateMode,
    /// By quotas.
    #[serde(deserialize_with = "null_is_default")]
    pub quotas: FailureMode,
    /// By credits.
    #[serde(deserialize_with = "null_is_default")]
    pub credits: FailureMode,
}

/// The decision by a rate limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RateMode {
    /// Admit requests at the limit divided by the number of live Envoys, at least one in a window.
    #[default]
    SafeRate,
    /// Refuse the request with 503.
    Deny,
    /// Let it through.
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
    rate_limit_state: bool,
    policy_sources: Option<Vec<PolicySource>>,
    #[serde(default, deserialize_with = "null_is_default")]
    shadow: bool,
    #[serde(default, deserialize_with = "null_is_default")]
    failure_mode: FailureModes,
    max_staleness: Option<Seconds>,
    #[serde(default, deserialize_with = "null_is_default")]
    limits: RawLimits,
    #[serde(default, deserialize_with = "null_is_default")]
    on_limits_unreachable: LimitModes,
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
struct RawLimits {
    wait: Option<Milliseconds>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIdentityHeaders {
    consumer: Option<String>,
    credential: Option<String>,
    scopes: Option<String>,
    packed: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    attributes: BTreeMap<String, String>,
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
            rate_limit: raw
                .rate_limit
                .map(|limit| limit.check("rate_limit", "default"))
                .transpose()
                .map_err(ConfigError)?,
            access_log_state: raw.access_log_state.unwrap_or(true),
            rate_limit_state: raw.rate_limit_state,
            are_sources_given: raw.policy_sources.is_some(),
            policy_sources: policy_sources(raw.policy_sources)?,
            shadow: raw.shadow,
            failure_mode: raw.failure_mode,
            max_staleness_ms: raw.max_staleness.map(staleness).transpose()?,
            limits_wait_ms: raw.limits.wait.map_or(Ok(LIMITS_WAIT_MS), wait)?,
            on_limits_unreachable: raw.on_limits_unreachable,
            challenge,
        };
        let IdentityHeaders { consumer, credential, scopes, packed, attributes, .. } = &config.identity;
        let attributes = attributes.iter().map(|attribute| &attribute.header);
        let identity =
            [consumer, credential, scopes, packed].into_iter().flatten().chain(attributes).map(String::as_str);
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
            attributes: attributes(&self.attributes)?,
            unused: Vec::new(),
        })
    }
}

fn attributes(headers: &BTreeMap<String, String>) -> Result<Vec<AttributeHeader>, ConfigError> {
    if headers.len() > ATTRIBUTES {
        return Err(ConfigError(format!("identity_headers.attributes: name at most {ATTRIBUTES} headers")));
    }
    let header = |(header, attribute): (&String, &String)| {
        let field = format!("identity_headers.attributes.{header}");
        let name = attribute.strip_prefix("key.").or_else(|| attribute.strip_prefix("owner."));
        let is_known =
            |name: &str| name == "external_id" || name.strip_prefix("metadata.").is_some_and(|name| !name.is_empty());
        if !name.is_some_and(is_known) {
            let forms = "key.external_id, owner.external_id, key.metadata.NAME or owner.metadata.NAME";
            return Err(ConfigError(format!("{field}: must be {forms}")));
        }
        let header = source::header_name(&field, header).map_err(ConfigError)?;
        Ok(AttributeHeader { header, attribute: attribute.clone() })
    };
    headers.iter().map(header).collect()
}

fn removed(names: &[String]) -> Result<Vec<String>, ConfigError> {
    if names.len() > REMOVED_HEADERS {
        return Err(ConfigError(format!("remove_headers: name at most {REMOVED_HEADERS}")));
    }
    names.iter().map(|name| source::header_name("remove_headers", name).map_err(ConfigError)).collect()
}

fn policy_sources(sources: Option<Vec<PolicySource>>) -> Result<Vec<PolicySource>, ConfigError> {
    let sources = sources.unwrap_or_else(|| POLICY_SOURCES.to_vec());
    let bad = |why: String| Err(ConfigError(format!("policy_sources: {why}")));
    if sources.len() > SOURCES {
        return bad(format!("name at most {SOURCES}"));
    }
    for (place, source) in sources.iter().enumerate() {
        if sources.iter().skip(place.saturating_add(1)).any(|other| other == source) {
            return bad("name each source once".into());
        }
        if let PolicySource::Annotation(text) | PolicySource::RouteNamePrefix(text) = source
            && !((1..=SOURCE_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return bad(format!("annotation and route_name_prefix need 1 to {SOURCE_BYTES} visible ASCII characters"));
        }
    }
    Ok(sources)
}

fn wait(Milliseconds(ms): Milliseconds) -> Result<u64, ConfigError> {
    if ms > LONGEST_WAIT_MS {
        return Err(ConfigError("limits.wait: must be at most \"0.8s\"; with \"0s\" no request waits".into()));
    }
    Ok(ms)
}

fn staleness(Seconds(seconds): Seconds) -> Result<u64, ConfigError> {
    if seconds < MIN_STALENESS_S {
        let why = "the control plane answers every 25 s when it has no news";
        return Err(ConfigError(format!("max_staleness: must be at least \"{MIN_STALENESS_S}s\": {why}")));
    }
    Ok(seconds.saturating_mul(1_000))
}

#[cfg(test)]
mod tests;
