//! Replies to refused requests. The body is a problem (RFC 9457) with the name of the outcome as `code`. It repeats nothing of the
//! request but its id, by which the request is found in the access log.

use contract::outcome::Outcome;
use contract::record::RateLimit;

use crate::extract::source::{Source, places};
use crate::host::Reply;
use crate::limits::charge::Left;
use crate::limits::retry_after::{Exceeded, RetryAfter};

/// Most bytes of a request's id. The ids of Envoy are UUIDs.
const REQUEST_ID_BYTES: usize = 128;

/// The gRPC status `RESOURCE_EXHAUSTED`. By itself Envoy turns 429 into `UNAVAILABLE`, which gRPC clients retry.
const RESOURCE_EXHAUSTED: &str = "8";

/// `Retry-After` while the filter has no keys, in seconds.
const RETRY_NOT_READY_S: u64 = 1;

/// `Retry-After` while a quota or credits are exhausted for an unknown time, in seconds. The filter learns of new ones at once.
const RETRY_EXHAUSTED_S: u64 = 60;

/// The detail of a request that costs more credits than its key's owner has.
const PRICE_ABOVE_BALANCE: &str =
    "This request costs more credits than the owner of this API key has. Top them up to go on: waiting does not help.";

/// How a 401 tells the client to send its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// The values of `WWW-Authenticate` (RFC 9110, section 11.6.1). `ApiKey` is not a registered scheme; there is none for API
    /// keys. If keys may be bearer tokens, `Bearer` follows (RFC 6750, section 3).
    schemes: Vec<String>,
    /// The `detail` of the problem for a request without a key.
    missing: String,
}

impl Challenge {
    /// The challenges for a realm; `None` if the realm has characters that a quoted string must escape.
    #[must_use]
    pub fn new(realm: &str, sources: &[Source]) -> Option<Self> {
        let plain = realm.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\');
        let bearer = sources.contains(&Source::Bearer(true));
        let schemes = ["ApiKey", "Bearer"].into_iter().take(if bearer { 2 } else { 1 });
        plain.then(|| Self {
            schemes: schemes.map(|scheme| format!("{scheme} realm=\"{realm}\"")).collect(),
            missing: format!("Send your API key {}.", places(sources)),
        })
    }
}

/// What the reply depends on besides the outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestFacts {
    /// The request's id, if it can be repeated without escaping.
    pub id: Option<String>,
    /// Whether the request is a gRPC call.
    pub is_grpc: bool,
}

/// The id in the value of `x-request-id`. It may come from the client: `None` if it would need escaping or is too long.
#[must_use]
pub fn request_id(value: &[u8]) -> Option<String> {
    let plain = value.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=~".contains(byte));
    let id = std::str::from_utf8(value).ok().filter(|_| plain && (1..=REQUEST_ID_BYTES).contains(&value.len()))?;
    Some(id.to_owned())
}

/// Whether the value of `content-type` is that of a gRPC call, by the rules of Envoy. gRPC-Web is not.
#[must_use]
pub fn is_grpc(content_type: &[u8]) -> bool {
    let rest = content_type.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The reply to an outcome; `None` if the request goes upstream. `facts` is called only for a reply, with its status.
#[must_use]
pub fn reply(
    outcome: Outcome,
    challenge: &Challenge,
    wait: &RetryAfter,
    facts: impl FnOnce(u16) -> RequestFacts,
) -> Option<Reply> {
    let refusal = outcome.refusal()?;
    let facts = facts(refusal.status);
    let mut headers =
        vec![("content-type", "application/problem+json".to_owned()), ("cache-control", "no-store".to_owned())];
    match (refusal.status, wait) {
        (401, _) => headers.extend(challenge.schemes.iter().map(|value| ("www-authenticate", value.clone()))),
        (429, RetryAfter::Usual) => headers.extend(stock_headers(outcome, RETRY_EXHAUSTED_S, false)),
        // `Retry-After` would make clients retry for ever.
        (429, RetryAfter::Hopeless) => {}
        (429, RetryAfter::Seconds(seconds)) => headers.extend(stock_headers(outcome, *seconds, true)),
        (429, RetryAfter::Limits(limits, refused)) => headers.extend(limit_headers(limits, *refused)),
        (503, _) => headers.push(("retry-after", RETRY_NOT_READY_S.to_string())),
        _ => {}
    }
    if refusal.status == 429 && facts.is_grpc {
        headers.push(("grpc-status", RESOURCE_EXHAUSTED.to_owned()));
    }
    let detail = match wait {
        _ if outcome == Outcome::Missing => challenge.missing.as_str(),
        RetryAfter::Hopeless => PRICE_ABOVE_BALANCE,
        _ => refusal.detail,
    };
    let id = facts.id.as_ref().map(|id| format!(",\"request_id\":\"{id}\"")).unwrap_or_default();
    let body = format!(
        "{{\"type\":\"{}\",\"title\":\"{}\",\"status\":{},\"detail\":\"{detail}\",\"code\":\"{}\"{id}}}\n",
        outcome.problem_type(),
        refusal.title,
        refusal.status,
        outcome.name()
    );
    headers.extend(facts.id.map(|id| ("x-request-id", id)));
    Some(Reply { status: refusal.status, headers, body })
}

/// What is left of the limits of an allowed request: the values of `RateLimit` and `RateLimit-Policy`. `t` is the time until a
/// limit is full, unlike that of a refusal, and left out if it is unknown. `None` for a request without limits.
#[must_use]
pub fn left_fields(left: &[Left]) -> Option<(String, String)> {
    if left.is_empty() {
        return None;
    }
    let name = |left: &Left| match (&left.limit, left.outcome) {
        (Some(limit), _) => limit.name.clone(),
        (None, outcome) => stock_name(outcome).to_owned(),
    };
    let one = |of: &Left| {
        let until = of.full_s.map(|seconds| format!(";t={seconds}")).unwrap_or_default();
        format!("\"{}\";r={}{until}", name(of), of.tokens)
    };
    let policies: Vec<String> = left.iter().filter_map(|left| left.limit.as_ref()).map(policy).collect();
    Some((left.iter().map(one).collect::<Vec<_>>().join(", "), policies.join(", ")))
}

const fn stock_name(outcome: Outcome) -> &'static str {
    if matches!(outcome, Outcome::CreditsExhausted) { "credits" } else { "quota" }
}

fn policy(RateLimit { name, requests, window_s, .. }: &RateLimit) -> String {
    format!("\"{name}\";q={requests};w={window_s}")
}

/// By draft-ietf-httpapi-ratelimit-headers-10, as structured fields: q is the quota, w its window, r the remainder and t the
/// seconds until there is more.
fn limit_headers(limits: &[RateLimit], refused: Exceeded) -> impl Iterator<Item = (&'static str, String)> {
    let Exceeded { limit, retry_after_s } = refused;
    let policies: Vec<String> = limits.iter().map(policy).collect();
    let left = limits.get(limit).map(|limit| ("ratelimit", format!("\"{}\";r=0;t={retry_after_s}", limit.name)));
    let headers = [("retry-after", retry_after_s.to_string()), ("ratelimit-policy", policies.join(", "))];
    headers.into_iter().chain(left)
}

/// The same for a quota or credits. The filter does not know how large they are, so there is no policy; t is left out unless the
/// time is `known`.
fn stock_headers(outcome: Outcome, retry_after_s: u64, known: bool) -> impl Iterator<Item = (&'static str, String)> {
    let name = stock_name(outcome);
    let until = if known { format!(";t={retry_after_s}") } else { String::new() };
    let left = format!("\"{name}\";r=0{until}");
    [("retry-after", retry_after_s.to_string()), ("ratelimit", left)].into_iter()
}

#[cfg(test)]
mod tests {
    use contract::record::Per;

    use super::*;

    fn challenge() -> Challenge {
        Challenge::new("portcullis", &[Source::Header("x-api-key".into())]).unwrap()
    }

    #[test]
    fn every_refusal_is_a_problem_with_its_code() {
        for outcome in Outcome::ALL {
            let facts = |_| RequestFacts { id: Some("1f-2".into()), is_grpc: false };
            let Some(reply) = reply(outcome, &challenge(), &RetryAfter::Usual, facts) else {
                assert!(outcome.goes_upstream());
                continue;
            };
            let refusal = outcome.refusal().unwrap();
            let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
            let missing = outcome == Outcome::Missing;
            let detail = if missing { "Send your API key in the header x-api-key." } else { refusal.detail };
            let expected = serde_json::json!({
                "type": outcome.problem_type(), "title": refusal.title, "status": reply.status,
                "detail": detail, "code": outcome.name(), "request_id": "1f-2",
            });
            assert_eq!(body, expected);
            let has = |name| reply.headers.iter().any(|(header, _)| *header == name);
            assert!(has("content-type") && has("cache-control") && has("x-request-id") && !has("grpc-status"));
            assert_eq!(has("www-authenticate"), reply.status == 401, "{outcome:?}");
            assert_eq!(has("retry-after"), matches!(reply.status, 429 | 503), "{outcome:?}");
        }
    }

    fn headers(outcome: Outcome, challenge: &Challenge, wait: &RetryAfter) -> Vec<(&'static str, String)> {
        reply(outcome, challenge, wait, |_| RequestFacts::default()).unwrap().headers.split_off(2)
    }

    #[test]
    fn a_refusal_by_a_limit_names_the_limit_and_the_time() {
        let limit = |name: &str, requests, window_s| RateLimit {
            name: name.into(),
            requests,
            window_s,
            burst: 10,
            shared: false,
            per: Per::Key,
        };
        let limits = vec![limit("second", 10, 1), limit("hour", 1_000, 3_600)];
        let wait = RetryAfter::Limits(limits, Exceeded { limit: 1, retry_after_s: 7 });
        let expected = [
            ("retry-after", "7"),
            ("ratelimit-policy", "\"second\";q=10;w=1, \"hour\";q=1000;w=3600"),
            ("ratelimit", "\"hour\";r=0;t=7"),
        ];
        let expected = expected.map(|(name, value)| (name, value.to_owned()));
        assert_eq!(headers(Outcome::RateLimited, &challenge(), &wait), expected);
    }

    #[test]
    fn a_refusal_for_quota_or_credits_says_how_long() {
        for (outcome, wait, seconds, left) in [
            (Outcome::QuotaExceeded, RetryAfter::Seconds(5), "5", "\"quota\";r=0;t=5"),
            (Outcome::CreditsExhausted, RetryAfter::Usual, "60", "\"credits\";r=0"),
        ] {
            let expected = [("retry-after", seconds.to_owned()), ("ratelimit", left.to_owned())];
            assert_eq!(headers(outcome, &challenge(), &wait), expected);
        }
        let hopeless =
            reply(Outcome::CreditsExhausted, &challenge(), &RetryAfter::Hopeless, |_| RequestFacts::default()).unwrap();
        assert!(hopeless.headers.iter().all(|(name, _)| *name != "retry-after"), "{:?}", hopeless.headers);
        let body: serde_json::Value = serde_json::from_str(&hopeless.body).unwrap();
        assert_eq!((&body["code"], &body["detail"]), (&"credits_exhausted".into(), &PRICE_ABOVE_BALANCE.into()));
    }

    #[test]
    fn if_keys_may_be_bearer_tokens_both_schemes_are_offered() {
        let sources = [Source::Bearer(true), Source::Query("k".into()), Source::Cookie("c".into())];
        let challenge = Challenge::new("orders", &sources).unwrap();
        let reply = reply(Outcome::Missing, &challenge, &RetryAfter::Usual, |_| RequestFacts::default()).unwrap();
        let detail = "Send your API key as a bearer token in the header authorization, in the query parameter k or in the cookie c.";
        assert!(reply.body.contains(detail) && !reply.body.contains("request_id"), "{}", reply.body);
        let expected = ["ApiKey realm=\"orders\"", "Bearer realm=\"orders\""];
        let expected = expected.map(|value| ("www-authenticate", value.to_owned()));
        assert_eq!(headers(Outcome::Missing, &challenge, &RetryAfter::Usual), expected);
    }

    #[test]
    fn a_realm_that_needs_escaping_is_refused() {
        let of = |realm| Challenge::new(realm, &[]).map(|challenge| challenge.schemes);
        assert_eq!(of("orders \"x\""), None);
        assert_eq!(of("ordérs"), None);
        assert_eq!(of("orders api"), Some(vec!["ApiKey realm=\"orders api\"".into()]));
    }

    #[test]
    fn only_a_429_sets_the_grpc_status() {
        let grpc = |outcome| {
            let facts = |_| RequestFacts { id: None, is_grpc: true };
            let headers = reply(outcome, &challenge(), &RetryAfter::Usual, facts)?.headers;
            headers.into_iter().find(|(name, _)| *name == "grpc-status").map(|(_, value)| value)
        };
        for outcome in Outcome::ALL {
            let limit = outcome.refusal().is_some_and(|refusal| refusal.status == 429);
            assert_eq!(grpc(outcome).as_deref(), limit.then_some("8"), "{outcome:?}");
        }
        for (content_type, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/json", false),
            ("", false),
        ] {
            assert_eq!(is_grpc(content_type.as_bytes()), expected, "{content_type}");
        }
    }

    #[test]
    fn an_id_that_needs_escaping_is_not_repeated() {
        let id = "0b1c2d3e-0000-4000-8000-0123456789ab";
        assert_eq!(request_id(id.as_bytes()).as_deref(), Some(id));
        for other in [&b""[..], b"a\"b", b"a\\b", b"a b", b"\xff", &[b'a'; REQUEST_ID_BYTES + 1]] {
            assert_eq!(request_id(other), None);
        }
    }
}
