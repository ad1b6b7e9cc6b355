//! Hourly counts of one key.

use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

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

/// Reads the hours that start within `from..to`, the oldest first. A day that hours were rolled up to counts as its first
/// hour.
pub async fn hourly(
    pool: &PgPool,
    key_id: Uuid,
    from: OffsetDateTime,
    to: OffsetDateTime,
) -> Result<Vec<Hour>, ApiError> {
    let hours = sqlx::query_as!(
        Hour,
        r#"select hour as "hour!", outcome as "outcome!", saturate(sum(requests)) as "requests!",
            saturate(sum(cost)) as "cost!"
        from (
            select hour, outcome, requests, cost from usage_hourly where key_id = $1 and hour >= $2 and hour < $3
            union all
            select day, outcome, requests, cost from usage_daily where key_id = $1 and day >= $2 and day < $3
        ) counted
        group by hour, outcome order by hour, outcome"#,
        key_id,
        from,
        to
    )
    .fetch_all(pool)
    .await?;
    Ok(hours)
}
