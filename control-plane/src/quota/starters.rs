//! Initial allowances of keys with a quota. A key has its own quota or that of its plan. The row of the key holds what an
//! Envoy may admit before it was leased any, the *starter*, so that records come from one table.

use sqlx::PgConnection;
use uuid::Uuid;

use super::reconsider;
use crate::domain::Quota;
use crate::domain::quota::{UTC, unknown_time_zone};
use crate::error::ApiError;

/// Refuses a quota whose time zone the database does not know.
///
/// # Errors
/// What is wrong with `quota`.
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
