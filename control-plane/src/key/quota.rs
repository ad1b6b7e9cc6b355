//! Quotas: what clients say of one comes in, what the database keeps of it goes out. Refused are numbers out of range,
//! time zones that PostgreSQL does not know, and fields that do not go with the period.
//!
//! A key has its own quota or that of its plan. What an Envoy may let in before it was leased any of it, the *starter*,
//! stands in the row of the key, so that records come from one table; [`refresh_starters`] keeps it right.

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::ApiError;
use crate::quota::{Period, Quota, reconsider};

const REQUESTS: i64 = 1_000_000_000_000;
const WINDOW_S: std::ops::RangeInclusive<i64> = 60..=31_622_400;
const TIME_ZONE_CHARS: usize = 64;
const UTC: &str = "UTC";

/// A quota as clients write and read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotaBody {
    /// How many requests are allowed.
    #[schema(example = 100_000, minimum = 1, maximum = 1_000_000_000_000_i64)]
    pub requests: i64,
    /// In which time.
    #[schema(inline, example = "month")]
    pub period: Period,
    /// In which time zone a day, week or month begins (IANA); UTC unless given. Not with `rolling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "Europe/Berlin", max_length = 64)]
    pub time_zone: Option<String>,
    /// How long the window is, in seconds. With `rolling`, and only then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 60, maximum = 31_622_400)]
    pub window_seconds: Option<i64>,
}

impl QuotaBody {
    /// Shows a quota.
    #[must_use]
    pub fn of(quota: &Quota) -> Self {
        Self {
            requests: quota.requests,
            period: quota.period,
            time_zone: quota.time_zone.clone(),
            window_seconds: quota.window_s,
        }
    }

    /// Parses a quota, but for the name of its time zone, which the database judges: [`check_time_zone`].
    ///
    /// # Errors
    /// What is wrong with `quota`.
    pub fn parse(self) -> Result<Quota, ApiError> {
        let bad = |detail: String| ApiError::invalid("quota", detail);
        if !(1..=REQUESTS).contains(&self.requests) {
            return Err(bad(format!("requests must be a number from 1 to {REQUESTS}")));
        }
        let rolling = self.period == Period::Rolling;
        let (least, most) = (WINDOW_S.start(), WINDOW_S.end());
        let (time_zone, window_s) = match (rolling, self.time_zone, self.window_seconds) {
            (true, None, Some(window)) if WINDOW_S.contains(&window) => (None, Some(window)),
            (true, None, _) => {
                return Err(bad(format!("a rolling quota needs window_seconds, a number from {least} to {most}")));
            }
            (true, Some(_), _) => return Err(bad("a rolling quota has no time_zone".into())),
            (false, _, Some(_)) => return Err(bad("window_seconds goes with the period rolling only".into())),
            (false, zone, None) => (Some(parse_time_zone(zone)?), None),
        };
        Ok(Quota { requests: self.requests, period: self.period, time_zone, window_s })
    }
}

fn parse_time_zone(zone: Option<String>) -> Result<String, ApiError> {
    let Some(zone) = zone else { return Ok(UTC.into()) };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'+' | b'-' | b'/');
    // The system's files have further ways to say the same.
    let foreign = ["posix", "right/", "localtime", "Factory"].iter().any(|start| zone.starts_with(start));
    if !(1..=TIME_ZONE_CHARS).contains(&zone.len()) || !zone.bytes().all(allowed) || foreign {
        return Err(unknown_time_zone());
    }
    Ok(zone)
}

fn unknown_time_zone() -> ApiError {
    ApiError::invalid("quota", "time_zone must be a time zone of the IANA database such as Europe/Berlin")
}

/// Refuses a quota whose time zone the database does not know.
///
/// # Errors
/// What is wrong with `quota`; those of the database.
pub async fn check_time_zone(quota: &Quota, connection: &mut PgConnection) -> Result<(), ApiError> {
    let Some(zone) = quota.time_zone.as_deref().filter(|zone| *zone != UTC) else { return Ok(()) };
    let known =
        sqlx::query_scalar!(r#"select exists (select from pg_timezone_names where name = $1) as "known!""#, zone)
            .fetch_one(connection)
            .await?;
    if known { Ok(()) } else { Err(unknown_time_zone()) }
}

/// Keys whose quota may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose<'a> {
    /// Single keys.
    Keys(&'a [Uuid]),
    /// All keys that a plan applies to, by its number.
    Plan(i32),
    /// All keys of a user.
    Owner(Uuid),
}

/// Sets the starters of keys to a sixteenth of their quota (at least 1, at most 1,000,000, none without a quota), then opens
/// those whose quota was used up and is not any more, because it grew or is gone, and shuts those that it shrank for. Says
/// how many keys changed; a statement that changes none would wake every filter, and is not made.
///
/// To be called in the transaction that changes the quota, the plan or the assignment, after that change: its lock of
/// `store_state` keeps other changes out.
///
/// # Errors
/// Those of the database.
pub async fn refresh_starters(connection: &mut PgConnection, whose: Whose<'_>) -> Result<u64, sqlx::Error> {
    let (keys, plan, owner) = match whose {
        Whose::Keys(ids) => (Some(ids), None, None),
        Whose::Plan(number) => (None, Some(number), None),
        Whose::Owner(id) => (None, None, Some(id)),
    };
    let of = sqlx::query!(
        r#"select id as "id!", starter as "starter!", starter <> present as "differs!", exceeded as "exceeded!" from (
            select k.id, coalesce(k.quota_starter, 0) as present, k.quota_exceeded as exceeded,
                case when q.requests is null then 0 else least(greatest(q.requests / 16, 1), 1000000) end::integer
                    as starter
            from api_keys k
            left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number)
            cross join lateral (select (coalesce(k.quota, d.quota) ->> 'requests')::bigint as requests) q
            where k.revoked_at is null
                and ($1::uuid[] is null or k.id = any($1))
                and ($2::integer is null or coalesce(k.plan_number, k.owner_plan_number) = $2)
                and ($3::uuid is null or k.owner_id = $3)
        ) keys where starter <> 0 or present <> 0 or exceeded"#,
        keys,
        plan,
        owner
    )
    .fetch_all(&mut *connection)
    .await?;
    let due: Vec<_> = of.iter().filter(|key| key.differs).collect();
    let mut changed = due.len();
    if !due.is_empty() {
        let ids: Vec<_> = due.iter().map(|key| key.id).collect();
        let starters: Vec<_> = due.iter().map(|key| key.starter).collect();
        sqlx::query!(
            "update api_keys k set quota_starter = nullif(due.starter, 0)
            from unnest($1::uuid[], $2::integer[]) due (id, starter) where k.id = due.id",
            &ids,
            &starters
        )
        .execute(&mut *connection)
        .await?;
    }
    let with_quota: Vec<_> = of.iter().map(|key| key.id).collect();
    changed = changed.saturating_add(reconsider(connection, &with_quota).await?);
    Ok(u64::try_from(changed).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(period: Period) -> QuotaBody {
        QuotaBody { requests: 1, period, time_zone: None, window_seconds: None }
    }

    #[test]
    fn a_calendar_has_a_time_zone_and_a_rolling_window_a_length() {
        let month = QuotaBody { time_zone: Some("Europe/Berlin".into()), ..body(Period::Month) }.parse().unwrap();
        assert_eq!((month.time_zone.as_deref(), month.window_s), (Some("Europe/Berlin"), None));
        assert_eq!(body(Period::Day).parse().unwrap().time_zone.as_deref(), Some("UTC"));
        let rolling = QuotaBody { window_seconds: Some(60), ..body(Period::Rolling) };
        assert_eq!(QuotaBody::of(&rolling.clone().parse().unwrap()), rolling);
        for bad in [
            QuotaBody { requests: 0, ..body(Period::Day) },
            QuotaBody { requests: 1_000_000_000_001, ..body(Period::Day) },
            QuotaBody { time_zone: Some("a b".into()), ..body(Period::Week) },
            QuotaBody { time_zone: Some(String::new()), ..body(Period::Week) },
            QuotaBody { time_zone: Some("posix/UTC".into()), ..body(Period::Week) },
            QuotaBody { window_seconds: Some(60), ..body(Period::Day) },
            body(Period::Rolling),
            QuotaBody { window_seconds: Some(59), ..body(Period::Rolling) },
            QuotaBody { window_seconds: Some(31_622_401), ..body(Period::Rolling) },
            QuotaBody { time_zone: Some("UTC".into()), window_seconds: Some(60), ..body(Period::Rolling) },
        ] {
            let refused = bad.clone().parse();
            assert!(
                matches!(&refused, Err(ApiError::Invalid { field: Some(field), .. }) if field == "quota"),
                "{bad:?}: {refused:?}"
            );
        }
    }
}
