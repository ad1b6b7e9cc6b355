//! Rate limits of keys and plans.

use std::collections::BTreeSet;

use contract::json::null_is_default;
use contract::record::RateLimit;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::per::{PER_OWNER, PerBody};
use crate::error::ApiError;

const RATE_LIMITS: usize = 8;
const RATE_LIMIT_NAME_CHARS: usize = 32;
const RATE_LIMIT_REQUESTS: i64 = 1_000_000_000;
const RATE_LIMIT_WINDOW_S: i64 = 31_622_400;

/// A rate limit as clients write and read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimitBody {
    /// Tells the limits of one key apart: 1 to 32 characters out of a-z, 0-9, `_` and `-`.
    #[schema(example = "burst", min_length = 1, max_length = 32, pattern = "^[a-z0-9_-]+$")]
    pub name: String,
    /// How many requests the window allows.
    #[schema(example = 100, minimum = 1, maximum = 1_000_000_000)]
    pub requests: i64,
    /// The window, in seconds.
    #[schema(example = 60, minimum = 1, maximum = 31_622_400)]
    pub window_seconds: i64,
    /// How many requests may come at once after a pause; `requests` unless given.
    #[schema(example = 20, minimum = 1, maximum = 1_000_000_000)]
    #[serde(default)]
    pub burst: Option<i64>,
    /// Whether it counts over all Envoys together; otherwise each Envoy judges it alone.
    #[serde(default = "yes", deserialize_with = "null_is_yes")]
    #[schema(nullable)]
    pub shared: bool,
    /// Plans only: `owner` if all keys of a user that have the plan share one limit; `key` unless given.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "PerBody::is_key")]
    #[schema(nullable, inline)]
    pub per: PerBody,
}

const fn yes() -> bool {
    true
}

fn null_is_yes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Option::deserialize(deserializer).map(|shared| shared.unwrap_or(true))
}

impl RateLimitBody {
    /// Shows a limit.
    pub fn of(limit: &RateLimit) -> Self {
        Self {
            name: limit.name.clone(),
            requests: limit.requests.into(),
            window_seconds: limit.window_s.into(),
            burst: Some(limit.burst.into()),
            shared: limit.shared,
            per: limit.per.into(),
        }
    }

    fn parse(self) -> Result<RateLimit, ApiError> {
        let bad = |detail: String| ApiError::invalid("rate_limits", detail);
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        if !(1..=RATE_LIMIT_NAME_CHARS).contains(&self.name.len()) || !self.name.bytes().all(allowed) {
            let detail = format!("each name must have 1 to {RATE_LIMIT_NAME_CHARS} characters of a-z, 0-9, _ and -");
            return Err(bad(detail));
        }
        let within = |what: &str, value: i64, most: i64| {
            let in_range = u32::try_from(value).ok().filter(|_| (1..=most).contains(&value));
            in_range.ok_or_else(|| bad(format!("{what} of {:?} must be a number from 1 to {most}", self.name)))
        };
        if self.per == PerBody::Owner && !self.shared {
            return Err(bad(format!("{:?} is per owner, so shared must be true", self.name)));
        }
        Ok(RateLimit {
            requests: within("requests", self.requests, RATE_LIMIT_REQUESTS)?,
            window_s: within("window_seconds", self.window_seconds, RATE_LIMIT_WINDOW_S)?,
            burst: within("burst", self.burst.unwrap_or(self.requests), RATE_LIMIT_REQUESTS)?,
            name: self.name,
            shared: self.shared,
            per: self.per.into(),
        })
    }
}

/// Parses the rate limits of one key: at most 8, whose names differ.
pub fn parse_rate_limits(limits: Vec<RateLimitBody>) -> Result<Vec<RateLimit>, ApiError> {
    if limits.len() > RATE_LIMITS {
        return Err(ApiError::invalid("rate_limits", format!("must have at most {RATE_LIMITS} entries")));
    }
    let limits = limits.into_iter().map(RateLimitBody::parse).collect::<Result<Vec<_>, _>>()?;
    let names: BTreeSet<_> = limits.iter().map(|limit| &limit.name).collect();
    if names.len() < limits.len() {
        return Err(ApiError::invalid("rate_limits", "the names must differ"));
    }
    Ok(limits)
}

/// Parses the rate limits of a single key, which are never those of an owner.
///
/// # Errors
/// What is wrong with `rate_limits`.
pub fn parse_key_rate_limits(limits: Vec<RateLimitBody>) -> Result<Vec<RateLimit>, ApiError> {
    if limits.iter().any(|limit| limit.per == PerBody::Owner) {
        return Err(ApiError::invalid("rate_limits", PER_OWNER));
    }
    parse_rate_limits(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_limits_are_bounded_and_the_burst_defaults_to_the_requests() {
        let limit = |name: &str, requests, window_seconds, burst| RateLimitBody {
            name: name.into(),
            requests,
            window_seconds,
            burst,
            shared: true,
            per: PerBody::Key,
        };
        let parsed = parse_rate_limits(vec![limit("a", 5, 60, None), limit("b", 5, 60, Some(9))]).unwrap();
        assert_eq!(parsed.iter().map(|limit| limit.burst).collect::<Vec<_>>(), [5, 9]);
        for bad in [
            vec![limit("A", 1, 1, None)],
            vec![limit("", 1, 1, None)],
            vec![limit("a", 0, 1, None)],
            vec![limit("a", 1_000_000_001, 1, Some(1))],
            vec![limit("a", 1, 31_622_401, None)],
            vec![limit("a", 1, 1, Some(0))],
            vec![limit("a", 1, 1, None), limit("a", 2, 2, None)],
            vec![limit("a", 1, 1, None); 9],
        ] {
            assert_eq!(parse_rate_limits(bad).unwrap_err().field(), Some("rate_limits"));
        }
    }
}
