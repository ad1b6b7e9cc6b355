//! Refusals: an outcome comes in, status, headers and body of the reply go out. The body is a problem (RFC 9457) with the
//! outcome's name as `code`; nothing of the request stands in it.

use contract::outcome::Outcome;

use crate::limiter::{Limit, Refused};

/// How long a client should wait before it tries again when the filter has no keys, in seconds.
const RETRY_NOT_READY_S: u64 = 1;

/// The same when a quota or a balance is used up: the filter hears at once when there is more, so ask now and then.
const RETRY_EXHAUSTED_S: u64 = 60;

/// The value of `WWW-Authenticate` (RFC 9110, section 11.6.1). The scheme is not registered; API keys have none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge(String);

impl Challenge {
    /// The challenge for a realm; `None` if the realm cannot stand in a quoted string as it is.
    #[must_use]
    pub fn new(realm: &str) -> Option<Self> {
        let plain = realm.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\');
        plain.then(|| Self(format!("ApiKey realm=\"{realm}\"")))
    }
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

/// The reply to an outcome; `None` if the request goes upstream. `refused` names the limit in case of a refusal by one.
#[must_use]
pub fn reply(outcome: Outcome, challenge: &Challenge, refused: Option<(&Limit, Refused)>) -> Option<Reply> {
    let refusal = outcome.refusal()?;
    let mut headers =
        vec![("content-type", "application/problem+json".to_owned()), ("cache-control", "no-store".to_owned())];
    match refusal.status {
        401 => headers.push(("www-authenticate", challenge.0.clone())),
        429 if refused.is_none() => headers.push(("retry-after", RETRY_EXHAUSTED_S.to_string())),
        503 => headers.push(("retry-after", RETRY_NOT_READY_S.to_string())),
        _ => {}
    }
    if let Some((limit, Refused { retry_after_s, .. })) = refused {
        // draft-ietf-httpapi-ratelimit-headers-10: structured fields, a parameter q for the quota and w for its window,
        // r for what remains and t for the seconds until there is more.
        let Limit { name, requests, window_s, .. } = limit;
        headers.push(("retry-after", retry_after_s.to_string()));
        headers.push(("ratelimit-policy", format!("\"{name}\";q={requests};w={window_s}")));
        headers.push(("ratelimit", format!("\"{name}\";r=0;t={retry_after_s}")));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge() -> Challenge {
        Challenge::new("portcullis").unwrap()
    }

    #[test]
    fn every_refusal_is_a_problem_with_its_code() {
        for outcome in Outcome::ALL {
            let Some(reply) = reply(outcome, &challenge(), None) else {
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

    #[test]
    fn a_refusal_by_a_limit_says_which_and_how_long() {
        let limit = Limit { name: "default".into(), requests: 100, window_s: 60, burst: 10 };
        let reply =
            reply(Outcome::RateLimited, &challenge(), Some((&limit, Refused { limit: 0, retry_after_s: 7 }))).unwrap();
        assert_eq!(reply.status, 429);
        let expected = [
            ("content-type", "application/problem+json"),
            ("cache-control", "no-store"),
            ("retry-after", "7"),
            ("ratelimit-policy", "\"default\";q=100;w=60"),
            ("ratelimit", "\"default\";r=0;t=7"),
        ];
        assert_eq!(reply.headers.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_realm_that_would_break_out_of_its_quotes_is_refused() {
        assert_eq!(Challenge::new("orders \"x\""), None);
        assert_eq!(Challenge::new("ordérs"), None);
        assert_eq!(Challenge::new("orders api"), Some(Challenge("ApiKey realm=\"orders api\"".into())));
    }
}
