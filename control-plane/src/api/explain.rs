//! `POST /v1/explain`: why a request is decided as it is, with the result of each check. It uses the records and
//! definitions that Envoys have, and the same decision function.
//!
//! A secret in the request is hashed and dropped. It is neither logged nor part of the response.

use std::collections::BTreeMap;
use std::net::IpAddr;

use contract::decision::{Check, Facts, Presented, cost, decide};
use contract::definition::Definitions;
use contract::hash::KeyHash;
use contract::json::{InputError, null_is_default, read_value};
use contract::key::{PRESENTED_BYTES, Secret, check};
use contract::outcome::Outcome;
use contract::pepper::hashes;
use contract::policy::{DEFAULT_NAME, Policy, PolicyLimits};
use contract::record::{Per, RateLimit, Record};
use contract::rules::{AmbiguousTarget, Target};
use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::App;
use crate::api::auth::Caller;
use crate::api::call::Call;
use crate::api::extract::Json;
use crate::api::openapi::NotFound;
use crate::definitions::Name;
use crate::definitions::policy::PolicyBody;
use crate::domain::parse_time;
use crate::error::ApiError;
use crate::explain::{budgets, hash_of, shared_limits};

/// Longest path that is looked at, in bytes.
const PATH_BYTES: usize = 4_096;
/// The name of a policy that stands in the request.
const INLINE: &str = "inline";
/// Most headers, and most bytes of a host.
const HEADERS: usize = 16;
const HOST_BYTES: usize = 253;

/// The request to explain: with a key, named by its secret or its id, or without any.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"key": "sk_live_…", "path": "/orders"}))]
pub struct ExplainBody {
    /// The key of the request. It is neither stored nor logged.
    #[serde(default, deserialize_with = "secret")]
    #[schema(value_type = Option<String>, example = "sk_live_…", max_length = 8192)]
    key: Option<Secret>,
    /// Instead, the id of a key; its present secret is meant.
    key_id: Option<Uuid>,
    /// The method of the request; GET unless given.
    #[schema(example = "GET", max_length = 32)]
    method: Option<String>,
    /// The path of the request, as Envoy normalises it. The policy with the most specific match applies, or the default one: what
    /// an Envoy decides whose route names no policy.
    #[schema(example = "/orders?page=2", max_length = 4096)]
    path: Option<String>,
    /// The host of the request, for policies that match by host.
    #[schema(example = "api.example.com", max_length = 253)]
    host: Option<String>,
    /// The headers of the request that policies match by, at most 16.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = json!({"x-model": "gpt-5"}))]
    headers: BTreeMap<String, String>,
    /// Instead, the policy that the route names, or a policy as `PUT /v1/policies/{name}` takes it.
    #[schema(value_type = Option<serde_json::Value>, example = "orders-read")]
    policy: Option<serde_json::Value>,
    /// Which source of Envoy's configuration names the policy; `route_metadata` unless given. An annotation and the name of a
    /// route cannot name a policy with `from_annotation: false`.
    #[schema(inline)]
    policy_source: Option<PolicySource>,
    /// The client's address, as Envoy trusts it.
    #[schema(example = "192.0.2.7")]
    address: Option<String>,
    /// When (RFC 3339); now unless given. Keys and roles are those of now all the same.
    #[schema(example = "2026-05-15T14:30:00Z")]
    time: Option<String>,
}

/// A source of a policy's name, as `policy_sources` of the filter has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PolicySource {
    /// The metadata of the route.
    RouteMetadata,
    /// The metadata of the virtual host.
    VirtualHostMetadata,
    /// An annotation of the route.
    Annotation,
    /// The name of the route. If there is no policy of this name, the next source decides: here, the matches.
    RouteName,
    /// The name of the route after a prefix.
    RouteNamePrefix,
}

impl PolicySource {
    const fn words(self) -> &'static str {
        match self {
            Self::RouteMetadata => "the metadata of the route",
            Self::VirtualHostMetadata => "the metadata of the virtual host",
            Self::Annotation => "the annotation of the route",
            Self::RouteName => "the name of the route",
            Self::RouteNamePrefix => "the name of the route, after its prefix,",
        }
    }

    /// Whether the owner of a route chooses the name, who may not name every policy.
    const fn is_of_route_owner(self) -> bool {
        matches!(self, Self::Annotation | Self::RouteName | Self::RouteNamePrefix)
    }
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Secret>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(Secret::from_presented))
}

/// The outcome of a request, and the reasons.
#[derive(Debug, Serialize, ToSchema)]
pub struct Explanation {
    /// The outcome, without the limits of which each Envoy has a state of its own: those checks have no verdict.
    #[schema(value_type = String, example = "scope_denied")]
    outcome: Outcome,
    /// The status that Envoy answers with; null if the request goes upstream.
    #[schema(required, example = 403)]
    status: Option<u16>,
    /// The policy that applies: its name, `default`, or `inline`.
    #[schema(example = "orders-read")]
    policy: String,
    /// Whether the shadow mode of the policy lets the request pass despite its outcome. Envoys may be in shadow mode as a whole;
    /// that is not known here.
    shadow: bool,
    /// Every check, in the order in which they are asked. The first that fails decides.
    checks: Vec<CheckView>,
}

/// One check.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckView {
    /// Its name.
    #[schema(value_type = String, example = "scopes")]
    name: &'static str,
    /// Whether it passes; null for limits, whose state the Envoys have.
    #[schema(required)]
    passed: Option<bool>,
    /// The values that it compared.
    #[schema(example = "the route asks for all of orders:read, the key has none")]
    saw: String,
    /// The outcome of a request that fails it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "scope_denied")]
    outcome: Option<Outcome>,
}

impl CheckView {
    fn judged(name: &'static str, refusal: Option<Outcome>, saw: String) -> Self {
        Self { name, passed: Some(refusal.is_none()), saw, outcome: refusal }
    }

    const fn without_verdict(name: &'static str, saw: String) -> Self {
        Self { name, passed: None, saw, outcome: None }
    }
}

/// Explain the decision on a request.
#[utoipa::path(
    operation_id = "explainRequest",
    post, path = "/v1/explain", tag = "insight", request_body = ExplainBody,
    responses(NotFound, (status = 200, description = "The outcome, and each check", body = Explanation))
)]
pub async fn explain(
    Call { app, caller, .. }: Call,
    Json(body): Json<ExplainBody>,
) -> Result<Json<Explanation>, ApiError> {
    caller.require_manager()?;
    let now = OffsetDateTime::now_utc();
    let at = body.time.as_deref().map_or(Ok(now), |text| parse_time("time", text))?;
    let address: Option<IpAddr> = match body.address.as_deref() {
        Some(text) => {
            let bad = |_| ApiError::invalid("address", "must be an IPv4 or IPv6 address such as 192.0.2.7");
            Some(text.parse::<IpAddr>().map_err(bad)?.to_canonical())
        }
        None => None,
    };
    // The result includes a change that the caller has just made. Without the database, it is what Envoys have.
    let _ = app.feed.refresh(None).await;
    let definitions = app.store.definitions();
    let applies = applies(&definitions, &body)?;
    let (record, credential) = credential(&app, &caller, &body).await?;

    let mut checks = vec![credential];
    let found = if applies.policy.is_some() { None } else { Some(Outcome::PolicyUnknown) };
    checks.push(CheckView::judged("policy", found, format!("{}: {}", applies.name, applies.how)));
    let Some(policy) = applies.policy else {
        return Ok(Json(explanation(Outcome::PolicyUnknown, applies.name, false, checks)));
    };
    let facts = Facts {
        policy: &policy,
        definitions: &definitions,
        address,
        ..Facts::at(u64::try_from(at.unix_timestamp()).unwrap_or_default())
    };
    let presented = match &record {
        Some(record) => Presented::Key(record),
        None if presents_nothing(&body) => Presented::Missing,
        None => Presented::Unknown,
    };
    let outcome = decide(presented, &facts);
    let identified = record.as_ref().filter(|_| outcome != Outcome::Anonymous);
    if let Some(record) = &record {
        checks.extend(
            Check::ALL.map(|check| {
                CheckView::judged(check.name(), check.refusal(record, &facts), check.detail(record, &facts))
            }),
        );
    }
    if let Some(record) = identified {
        checks.push(CheckView::without_verdict("rate_limit", limits(record, &facts)));
        let left = shared_limits(&app.pool, record, &definitions.rate_limits(record)).await?;
        checks.extend(left.map(|saw| CheckView::without_verdict("rate_limit_left", saw)));
        let left = budgets(&app.pool, record.key_id.into(), cost(record, &policy)).await?;
        checks.extend(left.quota.map(|saw| CheckView::without_verdict("quota_left", saw)));
        checks.extend(left.credits.map(|saw| CheckView::without_verdict("credits_left", saw)));
    } else {
        checks.extend(policy.rate_limits.address.iter().map(|limit| {
            let saw = format!("of the policy, for each client address: {}", figures(limit));
            CheckView::without_verdict("rate_limit", saw)
        }));
    }
    Ok(Json(explanation(outcome, applies.name, policy.shadow, checks)))
}

fn explanation(outcome: Outcome, policy: String, shadow: bool, checks: Vec<CheckView>) -> Explanation {
    let status = outcome.refusal().filter(|_| !shadow).map(|refusal| refusal.status);
    Explanation { outcome, status, policy, shadow, checks }
}

/// The policy of a request.
struct Applying {
    name: String,
    /// What it requires; `None` if there is none of the name.
    policy: Option<Policy>,
    /// How it was found, in words.
    how: String,
}

/// A request as rules see it.
struct Explained<'a> {
    body: &'a ExplainBody,
    method: &'a str,
}

impl Target for Explained<'_> {
    fn host(&self) -> Option<Vec<u8>> {
        self.body.host.as_ref().map(|host| host.clone().into_bytes())
    }

    fn path(&self) -> Option<Vec<u8>> {
        self.body.path.as_ref().map(|path| path.clone().into_bytes())
    }

    fn method(&self) -> Option<Vec<u8>> {
        Some(self.method.as_bytes().to_vec())
    }

    fn header(&self, name: &str) -> Option<Vec<u8>> {
        // Envoy has one value for both.
        if name.eq_ignore_ascii_case("host") {
            return self.host();
        }
        let found = self.body.headers.iter().find(|(own, _)| own.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.trim().as_bytes().to_vec())
    }
}

fn applies(definitions: &Definitions, body: &ExplainBody) -> Result<Applying, ApiError> {
    let request = target(body)?;
    match &body.policy {
        Some(serde_json::Value::String(name)) => {
            let source = body.policy_source.unwrap_or(PolicySource::RouteMetadata);
            if source == PolicySource::RouteName && definitions.policy(name).is_none() {
                return by_match(definitions, body, &request);
            }
            Ok(by_name(definitions, name, source))
        }
        _ if body.policy_source.is_some() => {
            Err(ApiError::invalid("policy_source", "needs the name of a policy in the field policy"))
        }
        Some(inline) => {
            let field = |path: &str| if path.is_empty() { "policy".into() } else { format!("policy.{path}") };
            let body: PolicyBody = read_value(inline)
                .map_err(|InputError { path, detail, .. }| ApiError::invalid(field(&path), detail))?;
            let content = body.parse(&Name::parse("policy", INLINE)?).map_err(|error| error.below("policy"))?;
            let policy = content.policy.map(|policy| policy.policy);
            Ok(Applying { name: INLINE.into(), policy, how: "it stands in the request".into() })
        }
        None => by_match(definitions, body, &request),
    }
}

/// The policy that a source names.
fn by_name(definitions: &Definitions, name: &str, source: PolicySource) -> Applying {
    let words = source.words();
    let (policy, how) = match definitions.policy(name) {
        Some(found) if source.is_of_route_owner() && !found.from_annotation => {
            (None, format!("{words} names it, which it may not: the policy has from_annotation false"))
        }
        Some(found) => (Some(found.policy.clone()), format!("{words} names it")),
        None if definitions.has_no_policies() => {
            let how = format!(
                "{words} names it, and no policy exists yet: an Envoy asks for a key and nothing else, and answers 503 \
                 policy_unknown if it has policy_sources"
            );
            (Some(Policy::default()), how)
        }
        None => (None, format!("{words} names it, and there is no policy of this name")),
    };
    Applying { name: name.into(), policy, how }
}

/// The policy with the most specific match, or the default one.
fn by_match(definitions: &Definitions, body: &ExplainBody, request: &Explained<'_>) -> Result<Applying, ApiError> {
    let default = |how: &str| {
        let policy = definitions.default_policy().clone();
        Applying { name: DEFAULT_NAME.into(), policy: Some(policy), how: how.into() }
    };
    if body.path.is_none() {
        if body.host.is_some() || !body.headers.is_empty() {
            let detail = "is needed with host or headers: policies match all of them together";
            return Err(ApiError::invalid("path", detail));
        }
        return Ok(default("the request names neither a policy nor a path"));
    }
    Ok(match definitions.rules().find(request) {
        Ok(Some(rule)) => Applying {
            name: rule.policy.clone(),
            policy: definitions.policy(&rule.policy).map(|found| found.policy.clone()),
            how: format!("the most specific match is: {}", rule.matches),
        },
        Ok(None) => default("no policy matches the request"),
        Err(AmbiguousTarget) => Applying {
            name: "unknown".into(),
            policy: None,
            // A host that is too long is refused above.
            how: "the path has dot segments or encoded slashes, which Envoy should resolve or refuse".into(),
        },
    })
}

/// The request for the rules.
fn target(body: &ExplainBody) -> Result<Explained<'_>, ApiError> {
    let method = body.method.as_deref().unwrap_or("GET");
    if !is_method(method) {
        return Err(ApiError::invalid("method", "must be a method in capitals, such as GET"));
    }
    let path = body.path.as_deref();
    if path.is_some_and(|path| !path.starts_with('/') || path.len() > PATH_BYTES || path.chars().any(char::is_control))
    {
        return Err(ApiError::invalid("path", format!("must start with / and have at most {PATH_BYTES} bytes")));
    }
    let is_host =
        |host: &String| (1..=HOST_BYTES).contains(&host.len()) && host.bytes().all(|byte| byte.is_ascii_graphic());
    if !body.host.iter().all(is_host) {
        return Err(ApiError::invalid("host", format!("must have 1 to {HOST_BYTES} visible ASCII characters")));
    }
    if body.headers.len() > HEADERS {
        return Err(ApiError::invalid("headers", format!("must have at most {HEADERS} entries")));
    }
    Ok(Explained { body, method })
}

/// Whether this is the name of a method, in capitals (RFC 9110, section 9.1).
fn is_method(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_uppercase() || b"-_".contains(&byte))
}

fn presents_nothing(body: &ExplainBody) -> bool {
    body.key_id.is_none() && body.key.as_ref().is_none_or(|key| key.reveal().is_empty())
}

/// The record of the key, if Envoys know it and the caller may know of it, and the check of that.
async fn credential(app: &App, caller: &Caller, body: &ExplainBody) -> Result<(Option<Record>, CheckView), ApiError> {
    let (stored, form) = match (&body.key, body.key_id) {
        (Some(_), Some(_)) => return Err(ApiError::invalid("key_id", "give either key or key_id, not both")),
        (None, Some(id)) => {
            let key = hash_of(&app.pool, id).await?.filter(|key| caller.manages(key.owner_id));
            let key = key.ok_or_else(|| ApiError::NotFound(format!("There is no key {id}.")))?;
            (vec![key.hash], "named by its id".to_owned())
        }
        (Some(key), None) if !key.reveal().is_empty() => {
            let bytes = key.reveal().as_bytes();
            let form = match check(key.reveal()) {
                Ok(_) => "well-formed".to_owned(),
                Err(error) => format!("not of the form of keys that are made here: {error}"),
            };
            let plain = (bytes.len() <= PRESENTED_BYTES).then(|| KeyHash::of(bytes));
            (plain.into_iter().flat_map(|plain| hashes(plain, app.pepper.as_ref())).collect(), form)
        }
        (_, None) => {
            let saw = "the request presents no key".to_owned();
            return Ok((None, CheckView::judged("credential", Some(Outcome::Missing), saw)));
        }
    };
    // A key of somebody else is explained like one that does not exist.
    let record =
        stored.iter().find_map(|hash| app.store.find(hash)).filter(|record| caller.manages(record.owner_id.into()));
    let view = match &record {
        Some(record) => {
            let saw = format!("the key {}, its secret number {}; {form}", record.key_id, record.generation);
            CheckView::judged("credential", None, saw)
        }
        None => {
            CheckView::judged("credential", Some(Outcome::Unknown), format!("a key that Envoys do not know; {form}"))
        }
    };
    Ok((record, view))
}

/// The limits that an Envoy applies after all checks.
fn limits(record: &Record, facts: &Facts<'_>) -> String {
    let limits = facts.definitions.rate_limits(record);
    let of = |limit: &RateLimit| {
        if record.rate_limits.is_empty() || limit.per == Per::Owner { "plan" } else { "key" }
    };
    let of_key = limits.iter().map(|limit| format!("of the {}: {}", of(limit), figures(limit)));
    let PolicyLimits { key, owner, .. } = &facts.policy.rate_limits;
    let of_policy = key.iter().map(|limit| format!("of the policy: {}", figures(limit)));
    let of_owner = owner.iter().map(|limit| format!("of the policy, for all keys of the owner: {}", figures(limit)));
    let mut all: Vec<String> = of_key.chain(of_policy).chain(of_owner).collect();
    if limits.is_empty() {
        all.insert(0, "of neither the key nor a plan: the default of each Envoy applies".into());
    }
    all.join("; ")
}

fn figures(limit: &RateLimit) -> String {
    let RateLimit { name, requests, window_s, burst, shared, per } = limit;
    let whose = if *shared { "shared by all Envoys" } else { "each Envoy by itself" };
    let per = if *per == Per::Owner { ", for all keys of the owner that have the plan" } else { "" };
    format!("{name} {requests} in {window_s} s, {burst} at once, {whose}{per}")
}
