//! Points in time: RFC 3339, in UTC. Filters decide by whole seconds, so keys and secrets end on a whole second.

use std::fmt;

use serde::Serialize;
use sqlx::Postgres;
use sqlx::error::BoxDynError;
use sqlx::postgres::PgValueRef;
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, UtcOffset};
use utoipa::ToSchema;

use super::scopes::{ADMIN, Scopes};
use crate::error::ApiError;

/// Lifetime of an admin key that was created without an expiry.
const ADMIN_LIFETIME: Duration = Duration::days(90);
const LIFETIME_S: i64 = 10 * 365 * 86_400;

/// The expiry of a key that was created without one. Admin keys expire unless the operator chose otherwise.
pub fn default_expiry(scopes: &Scopes, now: OffsetDateTime) -> Option<OffsetDateTime> {
    let admin = scopes.as_slice().iter().any(|scope| scope == ADMIN);
    admin.then(|| whole_seconds(now).saturating_add(ADMIN_LIFETIME))
}

/// Parses when a key ends: at a time, after some seconds, or never. Keys end on a whole second.
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
    Ok(Some(round_up_to_second(expiry)))
}

/// Parses a time of RFC 3339 that stands in `field`; the result is in UTC.
pub fn parse_time(field: &'static str, text: &str) -> Result<OffsetDateTime, ApiError> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok().and_then(|time| time.checked_to_offset(UtcOffset::UTC));
    time.ok_or_else(|| ApiError::invalid(field, "must be a time of RFC 3339 such as 2027-01-31T12:00:00Z"))
}

/// A point in time as replies carry it: RFC 3339, whole seconds, and in UTC unless the reply is about a time zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, format = DateTime, example = "2026-05-15T14:30:00Z")]
pub struct Timestamp(#[serde(with = "time::serde::rfc3339")] OffsetDateTime);

impl Timestamp {
    /// Keeps the offset from UTC.
    pub fn with_offset(time: OffsetDateTime) -> Self {
        Self(whole_seconds(time))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.format(&Rfc3339).map_err(|_| fmt::Error)?)
    }
}

impl<'r> sqlx::Decode<'r, Postgres> for Timestamp {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        <OffsetDateTime as sqlx::Decode<Postgres>>::decode(value).map(Into::into)
    }
}

impl From<OffsetDateTime> for Timestamp {
    fn from(time: OffsetDateTime) -> Self {
        Self(whole_seconds(time.to_offset(UtcOffset::UTC)))
    }
}

/// The first whole second that is not before `time`.
pub fn round_up_to_second(time: OffsetDateTime) -> OffsetDateTime {
    let second = whole_seconds(time);
    if second == time { time } else { second + Duration::SECOND }
}

fn whole_seconds(time: OffsetDateTime) -> OffsetDateTime {
    time - Duration::nanoseconds(time.nanosecond().into())
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

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
            assert_eq!(bad.unwrap_err().field(), Some(field));
        }
    }

    #[test]
    fn times_are_shown_in_utc_and_whole_seconds() {
        let shown = serde_json::to_value(Timestamp::from(datetime!(2026-05-15 16:30:00.987 +2))).unwrap();
        assert_eq!(shown, "2026-05-15T14:30:00Z");
    }
}
