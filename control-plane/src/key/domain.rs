//! What clients say about keys, parsed once at the edge: texts and numbers come in, values that need no further check go
//! out. Whatever is too long, out of range or of the wrong form is refused with the field's name and the remedy. No value
//! holds a NUL or another control character, which PostgreSQL or a log could choke on.

use std::collections::{BTreeSet, HashSet};
use std::fmt;

use contract::record::RateLimit;
use serde::{Deserialize, Serialize};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, UtcOffset};
use utoipa::ToSchema;

pub use super::email::Email;
use crate::error::ApiError;

/// The scope that opens every management call.
pub const ADMIN: &str = "admin";
/// The scope of filters: sync and usage reports.
pub const SYNC: &str = "sync";

const NAME_CHARS: usize = 100;
const SCOPES: usize = 32;
const SCOPE_CHARS: usize = 64;
const RATE_LIMITS: usize = 8;
const RATE_LIMIT_NAME_CHARS: usize = 32;
const RATE_LIMIT_REQUESTS: i64 = 1_000_000_000;
const RATE_LIMIT_WINDOW_S: i64 = 31_622_400;
/// How long an admin key lives unless it is said how long.
const ADMIN_LIFETIME: Duration = Duration::days(90);
const LIFETIME_S: i64 = 10 * 365 * 86_400;

/// What people call a key: 1 to 100 characters, without space around them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyName(String);

impl KeyName {
    /// Parses a name that stands in `field`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, ApiError> {
        let text = text.trim();
        if text.is_empty() || text.chars().count() > NAME_CHARS {
            return Err(ApiError::invalid(field, format!("must have 1 to {NAME_CHARS} characters")));
        }
        if text.chars().any(char::is_control) {
            return Err(ApiError::invalid(field, "must not contain control characters"));
        }
        Ok(Self(text.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Scopes of a key: at most 32, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scopes(Vec<String>);

impl Scopes {
    /// Parses a list of scopes; repeated ones count once.
    ///
    /// # Errors
    /// What is wrong with `scopes`.
    pub fn parse(scopes: Vec<String>) -> Result<Self, ApiError> {
        if scopes.len() > SCOPES {
            return Err(ApiError::invalid("scopes", format!("must have at most {SCOPES} entries")));
        }
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b':' | b'_' | b'.' | b'*' | b'-');
        if !scopes.iter().all(|scope| (1..=SCOPE_CHARS).contains(&scope.len()) && scope.bytes().all(allowed)) {
            let detail = format!("each scope must have 1 to {SCOPE_CHARS} characters of a-z, 0-9 and : _ . * -");
            return Err(ApiError::invalid("scopes", detail));
        }
        let mut seen = HashSet::new();
        Ok(Self(scopes.into_iter().filter(|scope| seen.insert(scope.clone())).collect()))
    }

    /// The scopes, in the order in which they were given.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

/// A rate limit as the database keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLimit {
    /// The limit.
    #[serde(flatten)]
    pub limit: RateLimit,
    /// Whether each Envoy judges it alone, rather than a share of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub alone: bool,
}

impl StoredLimit {
    /// The limits, and which of them each Envoy judges alone, as records have it.
    #[must_use]
    pub fn apart(limits: Vec<Self>) -> (Vec<RateLimit>, u32) {
        let alone =
            limits.iter().zip(0..).filter(|(limit, _)| limit.alone).fold(0, |bits, (_, place)| bits | 1 << place);
        (limits.into_iter().map(|stored| stored.limit).collect(), alone)
    }

    /// The limits of a record.
    #[must_use]
    pub fn together(limits: &[RateLimit], alone: u32) -> Vec<Self> {
        let limits = limits.iter().cloned().zip(0_u32..);
        limits.map(|(limit, place)| Self { limit, alone: alone & (1 << place) != 0 }).collect()
    }
}

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
}

const fn yes() -> bool {
    true
}

fn null_is_yes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Option::deserialize(deserializer).map(|shared| shared.unwrap_or(true))
}

impl RateLimitBody {
    /// Shows a limit.
    #[must_use]
    pub fn of(StoredLimit { limit, alone }: &StoredLimit) -> Self {
        Self {
            shared: !alone,
            name: limit.name.clone(),
            requests: limit.requests.into(),
            window_seconds: limit.window_s.into(),
            burst: Some(limit.burst.into()),
        }
    }

    fn parse(self) -> Result<StoredLimit, ApiError> {
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
        let limit = RateLimit {
            requests: within("requests", self.requests, RATE_LIMIT_REQUESTS)?,
            window_s: within("window_seconds", self.window_seconds, RATE_LIMIT_WINDOW_S)?,
            burst: within("burst", self.burst.unwrap_or(self.requests), RATE_LIMIT_REQUESTS)?,
            name: self.name,
        };
        Ok(StoredLimit { limit, alone: !self.shared })
    }
}

/// Parses the rate limits of one key: at most 8, whose names differ.
///
/// # Errors
/// What is wrong with `rate_limits`.
pub fn parse_rate_limits(limits: Vec<RateLimitBody>) -> Result<Vec<StoredLimit>, ApiError> {
    if limits.len() > RATE_LIMITS {
        return Err(ApiError::invalid("rate_limits", format!("must have at most {RATE_LIMITS} entries")));
    }
    let limits = limits.into_iter().map(RateLimitBody::parse).collect::<Result<Vec<_>, _>>()?;
    let names: BTreeSet<_> = limits.iter().map(|stored| &stored.limit.name).collect();
    if names.len() < limits.len() {
        return Err(ApiError::invalid("rate_limits", "the names must differ"));
    }
    Ok(limits)
}

/// When a key ends of which nobody said when: one that opens everything does not stay good for ever by oversight.
#[must_use]
pub fn default_expiry(scopes: &Scopes, now: OffsetDateTime) -> Option<OffsetDateTime> {
    let admin = scopes.as_slice().iter().any(|scope| scope == ADMIN);
    admin.then(|| whole_seconds(now).saturating_add(ADMIN_LIFETIME))
}

/// Parses when a key ends: at a time, after some seconds, or never. Keys end on a whole second.
///
/// # Errors
/// What is wrong with `expires_at` or `expires_in_seconds`.
pub fn parse_expiry(
    at: Option<&str>,
    in_seconds: Option<i64>,
    now: OffsetDateTime,
) -> Result<Option<OffsetDateTime>, ApiError> {
    let (field, expiry) = match (at, in_seconds) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => {
            let detail = "give either expires_at or expires_in_seconds, not both";
            return Err(ApiError::invalid("expires_at", detail));
        }
        (Some(text), None) => ("expires_at", parse_time("expires_at", text)?),
        (None, Some(seconds)) if (1..=LIFETIME_S).contains(&seconds) => {
            ("expires_in_seconds", now + Duration::seconds(seconds))
        }
        (None, Some(_)) => {
            let detail = format!("must be a number from 1 to {LIFETIME_S}, which is ten years");
            return Err(ApiError::invalid("expires_in_seconds", detail));
        }
    };
    if expiry <= now {
        return Err(ApiError::invalid(field, "must be in the future"));
    }
    if expiry - now > Duration::seconds(LIFETIME_S) {
        return Err(ApiError::invalid(field, "must be at most ten years from now"));
    }
    let started = if expiry.nanosecond() == 0 { Duration::ZERO } else { Duration::SECOND };
    Ok(Some(whole_seconds(expiry) + started))
}

/// Parses a time of RFC 3339 that stands in `field`; the result is in UTC.
///
/// # Errors
/// What is wrong with it.
pub fn parse_time(field: &'static str, text: &str) -> Result<OffsetDateTime, ApiError> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok().and_then(|time| time.checked_to_offset(UtcOffset::UTC));
    time.ok_or_else(|| ApiError::invalid(field, "must be a time of RFC 3339 such as 2027-01-31T12:00:00Z"))
}

/// A point in time as replies carry it: RFC 3339, UTC, whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, format = DateTime, example = "2026-05-15T14:30:00Z")]
pub struct Timestamp(#[serde(with = "time::serde::rfc3339")] OffsetDateTime);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

impl From<OffsetDateTime> for Timestamp {
    fn from(time: OffsetDateTime) -> Self {
        Self(whole_seconds(time.to_offset(UtcOffset::UTC)))
    }
}

fn whole_seconds(time: OffsetDateTime) -> OffsetDateTime {
    time - Duration::nanoseconds(time.nanosecond().into())
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn detail<T: fmt::Debug>(result: Result<T, ApiError>) -> (Option<String>, String) {
        match result {
            Err(ApiError::Invalid { field, detail }) => (field.map(Into::into), detail),
            other => panic!("not refused as invalid: {other:?}"),
        }
    }

    #[test]
    fn a_name_is_trimmed_and_bounded_in_characters() {
        assert_eq!(KeyName::parse("name", "  Ключ ").unwrap().as_str(), "Ключ");
        assert!(KeyName::parse("name", &"é".repeat(100)).is_ok());
        for bad in ["", "   ", "a\0b", "a\nb", &"é".repeat(101)] {
            assert_eq!(detail(KeyName::parse("key_name", bad)).0.as_deref(), Some("key_name"), "{bad:?}");
        }
    }

    #[test]
    fn scopes_are_deduplicated_in_order_and_bounded() {
        let list = |scopes: &[&str]| Scopes::parse(scopes.iter().map(|scope| (*scope).into()).collect());
        assert_eq!(list(&["b:*", "a.r_w-1", "b:*"]).unwrap().as_slice(), ["b:*", "a.r_w-1"]);
        assert!(Scopes::parse(vec!["x".repeat(64)]).is_ok());
        for bad in [vec![String::new()], vec!["x".repeat(65)], vec!["Admin".into()], vec!["a".into(); 33]] {
            assert_eq!(detail(Scopes::parse(bad)).0.as_deref(), Some("scopes"));
        }
    }

    #[test]
    fn rate_limits_are_bounded_and_the_burst_defaults_to_the_requests() {
        let limit = |name: &str, requests, window_seconds, burst| RateLimitBody {
            name: name.into(),
            requests,
            window_seconds,
            burst,
            shared: true,
        };
        let parsed = parse_rate_limits(vec![limit("a", 5, 60, None), limit("b", 5, 60, Some(9))]).unwrap();
        assert_eq!(parsed.iter().map(|stored| stored.limit.burst).collect::<Vec<_>>(), [5, 9]);
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
            assert_eq!(detail(parse_rate_limits(bad)).0.as_deref(), Some("rate_limits"));
        }
    }

    #[test]
    fn a_key_ends_on_a_whole_second_in_the_future_and_within_ten_years() {
        let now = datetime!(2026-01-01 00:00:00.5 UTC);
        assert_eq!(parse_expiry(None, None, now).unwrap(), None);
        assert_eq!(parse_expiry(None, Some(1), now).unwrap(), Some(datetime!(2026-01-01 00:00:02 UTC)));
        let at = parse_expiry(Some("2026-01-01T03:00:00+02:00"), None, now).unwrap();
        assert_eq!(at, Some(datetime!(2026-01-01 01:00:00 UTC)));
        for (bad, field) in [
            (parse_expiry(Some("2026-01-01T00:00:00Z"), None, now), "expires_at"),
            (parse_expiry(Some("9999-12-31T23:59:59-23:59"), None, now), "expires_at"),
            (parse_expiry(Some("2037-01-01T00:00:00Z"), None, now), "expires_at"),
            (parse_expiry(Some("tomorrow"), None, now), "expires_at"),
            (parse_expiry(Some("2027-01-01T00:00:00Z"), Some(1), now), "expires_at"),
            (parse_expiry(None, Some(0), now), "expires_in_seconds"),
            (parse_expiry(None, Some(i64::MAX), now), "expires_in_seconds"),
        ] {
            assert_eq!(detail(bad).0.as_deref(), Some(field));
        }
    }

    #[test]
    fn times_are_shown_in_utc_and_whole_seconds() {
        let shown = serde_json::to_value(Timestamp::from(datetime!(2026-05-15 16:30:00.987 +2))).unwrap();
        assert_eq!(shown, "2026-05-15T14:30:00Z");
    }
}
