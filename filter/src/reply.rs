//! Refusals: an outcome comes in, status, headers and body of the reply go out. The body is a problem (RFC 9457) with the
//! outcome's name as `code`; nothing of the request stands in it.

use contract::outcome::Outcome;
use contract::record::RateLimit;

use crate::limiter::Refused;

/// How long a client should wait before it tries again when the filter has no keys, in seconds.
const RETRY_NOT_READY_S: u64 = 1;

/// How long a client should wait while a lease is being renewed, in seconds.
pub const RETRY_RENEWAL_S: u64 = 1;

/// The same when a stock is used up and nobody knows until when: the filter hears at once when there is more.
const RETRY_EXHAUSTED_S: u64 = 60;

/// The values of `WWW-Authenticate` (RFC 9110, section 11.6.1). The first scheme is not registered; API keys have none.
/// Where keys may come as bearer tokens, there is one for those too (RFC 6750, section 3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge(Vec<String>);

impl Challenge {
    /// The challenges for a realm; `None` if the realm cannot stand in a quoted string as it is.
    #[must_use]
    pub fn new(realm: &str, bearer: bool) -> Option<Self> {
        let plain = realm.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\');
        let schemes = ["ApiKey", "Bearer"].into_iter().take(if bearer { 2 } else { 1 });
        plain.then(|| Self(schemes.map(|scheme| format!("{scheme} realm=\"{realm}\"")).collect()))
    }
}

/// How long a refused client should wait, where it is not always the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// As long as is usual for the outcome.
    #[default]
    Usual,
    /// Until a lease is renewed: there is some left, but not here.
    Renewal,
    /// So many seconds.
    Seconds(u64),
    /// As one of these limits, all those that the request was judged by, says.
    Limits(Vec<RateLimit>, Refused),
}

/// A reply to be sent instead of going upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Headers, beside those that Envoy adds.
    pub headers: Vec<(&'static str, String)>,
    /// The problem.
    pub body: String,
}

/// The reply to an outcome; `None` if the request goes upstream.
#[must_use]
pub fn reply(outcome: Outcome, challenge: &Challenge, wait: &Wait) -> Option<Reply> {
    let refusal = outcome.refusal()?;
    let mut headers =
        vec![("content-type", "application/problem+json".to_owned()), ("cache-control", "no-store".to_owned())];
    match (refusal.status, wait) {
        (401, _) => headers.extend(challenge.0.iter().map(|value| ("www-authenticate", value.clone()))),
        (429, Wait::Usual) => headers.extend(stock_headers(outcome, RETRY_EXHAUSTED_S, false)),
        (429, Wait::Renewal) => headers.push(("retry-after", RETRY_RENEWAL_S.to_string())),
        (429, Wait::Seconds(seconds)) => headers.extend(stock_headers(outcome, *seconds, true)),
        (429, Wait::Limits(limits, refused)) => headers.extend(limit_headers(limits, *refused)),
        (503, _) => headers.push(("retry-after", RETRY_NOT_READY_S.to_string())),
        _ => {}
    }
    let body = format!(
        "{{\"type\":\"{}\",\"title\":\"{}\",\"status\":{},\"detail\":\"{}\",\"code\":\"{}\"}}",
        outcome.problem_type(),
        refusal.title,
        refusal.status,
        refusal.detail,
        outcome.name()
    );
    Some(Reply { status: refusal.status, headers, body })
}

/// draft-ietf-httpapi-ratelimit-headers-10: structured fields, a parameter q for the quota and w for its window, r for what
/// remains and t for the seconds until there is more.
fn limit_headers(limits: &[RateLimit], refused: Refused) -> impl Iterator<Item = (&'static str, String)> {
    let Refused { limit, retry_after_s } = refused;
    let policy =
        |RateLimit { name, requests, window_s, .. }: &RateLimit| format!("\"{name}\";q={requests};w={window_s}");
    let policies: Vec<String> = limits.iter().map(policy).collect();
    let left = limits.get(limit).map(|limit| ("ratelimit", format!("\"{}\";r=0;t={retry_after_s}", limit.name)));
    let headers = [("retry-after", retry_after_s.to_string()), ("ratelimit-policy", policies.join(", "))];
    headers.into_iter().chain(left)
}

/// The same for a quota or credits, without a policy: how large they are is not the filter's to know; nor, unless the wait is
/// `known`, when there will be more.
fn stock_headers(outcome: Outcome, retry_after_s: u64, known: bool) -> impl Iterator<Item = (&'static str, String)> {
    let name = if outcome == Outcome::CreditsExhausted { "credits" } else { "quota" };
    let until = if known { format!(";t={retry_after_s}") } else { String::new() };
    let left = format!("\"{name}\";r=0{until}");
    [("retry-after", retry_after_s.to_string()), ("ratelimit", left)].into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge() -> Challenge {
        Challenge::new("portcullis", false).unwrap()
    }

    #[test]
    fn every_refusal_is_a_problem_with_its_code() {
        for outcome in Outcome::ALL {
            let Some(reply) = reply(outcome, &challenge(), &Wait::Usual) else {
                assert!(outcome.goes_upstream());
                continue;
            };
            let refusal = outcome.refusal().unwrap();
            let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
            let expected = serde_json::json!({
                "type": outcome.problem_type(), "title": refusal.title, "status": reply.status,
                "detail": refusal.detail, "code": outcome.name(),
            });
            assert_eq!(body, expected);
            let has = |name| reply.headers.iter().any(|(header, _)| *header == name);
            assert!(has("content-type") && has("cache-control"));
            assert_eq!(has("www-authenticate"), reply.status == 401, "{outcome:?}");
            assert_eq!(has("retry-after"), matches!(reply.status, 429 | 503), "{outcome:?}");
        }
    }

    fn headers(outcome: Outcome, challenge: &Challenge, wait: &Wait) -> Vec<(&'static str, String)> {
        reply(outcome, challenge, wait).unwrap().headers.split_off(2)
    }

    #[test]
    fn a_refusal_by_a_limit_says_which_of_all_and_how_long() {
        let limit = |name: &str, requests, window_s| RateLimit { name: name.into(), requests, window_s, burst: 10 };
        let limits = vec![limit("second", 10, 1), limit("hour", 1_000, 3_600)];
        let wait = Wait::Limits(limits, Refused { limit: 1, retry_after_s: 7 });
        let expected = [
            ("retry-after", "7"),
            ("ratelimit-policy", "\"second\";q=10;w=1, \"hour\";q=1000;w=3600"),
            ("ratelimit", "\"hour\";r=0;t=7"),
        ];
        let expected = expected.map(|(name, value)| (name, value.to_owned()));
        assert_eq!(headers(Outcome::RateLimited, &challenge(), &wait), expected);
    }

    #[test]
    fn a_refusal_for_the_lack_of_a_stock_says_how_long() {
        for (outcome, wait, seconds, left) in [
            (Outcome::QuotaExceeded, Wait::Seconds(5), "5", "\"quota\";r=0;t=5"),
            (Outcome::CreditsExhausted, Wait::Usual, "60", "\"credits\";r=0"),
        ] {
            let expected = [("retry-after", seconds.to_owned()), ("ratelimit", left.to_owned())];
            assert_eq!(headers(outcome, &challenge(), &wait), expected);
        }
        // While a lease is being renewed there is something left.
        let renewal = headers(Outcome::QuotaExceeded, &challenge(), &Wait::Renewal);
        assert_eq!(renewal, [("retry-after", "1".to_owned())]);
    }

    #[test]
    fn where_keys_may_be_bearer_tokens_both_schemes_are_offered() {
        let challenge = Challenge::new("orders", true).unwrap();
        let expected = ["ApiKey realm=\"orders\"", "Bearer realm=\"orders\""];
        let expected = expected.map(|value| ("www-authenticate", value.to_owned()));
        assert_eq!(headers(Outcome::Missing, &challenge, &Wait::Usual), expected);
    }

    #[test]
    fn a_realm_that_would_break_out_of_its_quotes_is_refused() {
        assert_eq!(Challenge::new("orders \"x\"", false), None);
        assert_eq!(Challenge::new("ordérs", false), None);
        assert_eq!(Challenge::new("orders api", false), Some(Challenge(vec!["ApiKey realm=\"orders api\"".into()])));
    }
}
