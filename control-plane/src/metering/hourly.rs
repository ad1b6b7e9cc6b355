//! Hourly counts of one key.

use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use super::spans::{Interval, refuse_cut};
use crate::domain::TimeRange;
use crate::error::ApiError;

/// Requests of one hour and outcome, over all secrets of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hour {
    /// The start of the hour.
    pub hour: OffsetDateTime,
    /// The code of the outcome, possibly of a newer version.
    pub outcome: i16,
    /// How many requests.
    pub requests: i64,
    /// Credits that they cost together.
    pub cost: i64,
}

/// Reads the hours of a range, the oldest first. A day that hours were rolled up to counts as its first hour.
///
/// # Errors
/// The range cuts a day that is stored as a whole, or the database fails.
pub async fn hourly(pool: &PgPool, key_id: Uuid, range: &TimeRange) -> Result<Vec<Hour>, ApiError> {
    let rows = sqlx::query!(
        r#"select hour as "hour!", outcome as "outcome!", saturate(sum(requests)) as "requests!",
            saturate(sum(cost)) as "cost!", bool_or(is_cut) as "is_cut!"
        from (
            select hour, outcome, requests, cost, false as is_cut from usage_hourly
            where key_id = $1 and hour >= $2 and hour < $3
            union all
            select day, outcome, requests, cost, day < $2 or day + interval '24 hours' > $3 from usage_daily
            where key_id = $1 and day > $2 - interval '24 hours' and day < $3
        ) counted
        group by hour, outcome order by hour, outcome"#,
        key_id,
        range.from,
        range.to
    )
    .fetch_all(pool)
    .await?;
    if let Some(day) = rows.iter().rev().find(|row| row.is_cut) {
        return Err(refuse_cut(day.hour, Interval::Total, range));
    }
    let hours = rows.into_iter();
    Ok(hours.map(|row| Hour { hour: row.hour, outcome: row.outcome, requests: row.requests, cost: row.cost }).collect())
}
