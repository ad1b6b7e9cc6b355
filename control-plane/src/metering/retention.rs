//! Retention of usage: hours are rolled up to days, and old days are deleted.
//!
//! One statement moves rows from one table to the other, so that no row is ever in both or in neither. Hours without their events
//! stay. A late report for an hour that was rolled up makes a row of its own, which the next round moves. A lock keeps
//! replicas from working at the same time.

use sqlx::{PgConnection, PgPool};

use super::events;
use crate::change::transact;
use crate::job_lock::JobLock;

/// Most rows that move together.
const TOGETHER: i64 = 10_000;

/// How long the number of an Envoy's last report is kept after the report came, in days. Without the number, a log
/// line could be applied twice, so the import of logs refuses usage that is older.
pub const REPORTER_DAYS: i32 = 90;

/// Retention times, in days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Usage by the hour.
    pub hourly_days: i32,
    /// Usage by the day; `None`: for ever.
    pub daily_days: Option<i32>,
    /// Usage events.
    pub event_days: i32,
}

/// Rolls up and deletes old usage. Returns the number of moved and deleted rows.
pub async fn tidy(pool: &PgPool, retention: Retention) -> Result<u64, sqlx::Error> {
    let rolled_up = roll_up(pool, retention.hourly_days).await?;
    let forgotten = if let Some(days) = retention.daily_days { forget(pool, days).await? } else { 0 };
    let events = events::forget(pool, retention.event_days).await?;
    let reporters = forget_reporters(pool).await?;
    Ok(rolled_up.saturating_add(forgotten).saturating_add(events).saturating_add(reporters))
}

/// Rolls up hours of days that ended more than `days` ago. Returns how many rows moved.
pub async fn roll_up(pool: &PgPool, days: i32) -> Result<u64, sqlx::Error> {
    let mut all = 0;
    loop {
        let moved = transact(pool, async |connection| roll_up_some(connection, days).await).await?;
        if moved == 0 {
            return Ok(all);
        }
        metrics::counter!("portcullis_usage_rows_rolled_up_total").increment(moved);
        all += moved;
    }
}

/// Rolls up a bounded number of hours. Returns how many rows moved; none while another replica holds the lock.
async fn roll_up_some(connection: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    if !JobLock::UsageRetention.try_take(connection).await? {
        return Ok(0);
    }
    // Rows that a report is changing are left for the next round, so that neither waits for a lock.
    let keyed = sqlx::query_scalar!(
        r#"with old as materialized (
            select key_id, hour, outcome, generation from usage_hourly
            where hour < date_trunc('day', now() - make_interval(days => $1), 'UTC') and not unexported
            limit $2 for update skip locked
        ),
        moved as (
            delete from usage_hourly u using old
            where u.key_id = old.key_id and u.hour = old.hour and u.outcome = old.outcome
                and u.generation = old.generation
            returning u.key_id, u.hour, u.outcome, u.requests, u.cost
        ),
        added as (
            insert into usage_daily (key_id, day, outcome, requests, cost)
            select key_id, date_trunc('day', hour, 'UTC'), outcome, saturate(sum(requests)), saturate(sum(cost))
            from moved group by 1, 2, 3
            on conflict (key_id, day, outcome) do update set
                requests = saturating_add(usage_daily.requests, excluded.requests),
                cost = saturating_add(usage_daily.cost, excluded.cost)
        )
        select count(*) as "moved!" from moved"#,
        days,
        TOGETHER
    )
    .fetch_one(&mut *connection)
    .await?;
    let keyless = sqlx::query_scalar!(
        r#"with old as materialized (
            select hour, outcome from usage_keyless_hourly
            where hour < date_trunc('day', now() - make_interval(days => $1), 'UTC')
            limit $2 for update skip locked
        ),
        moved as (
            delete from usage_keyless_hourly u using old where u.hour = old.hour and u.outcome = old.outcome
            returning u.hour, u.outcome, u.requests
        ),
        added as (
            insert into usage_keyless_daily (day, outcome, requests)
            select date_trunc('day', hour, 'UTC'), outcome, saturate(sum(requests))
            from moved group by 1, 2
            on conflict (day, outcome) do update set
                requests = saturating_add(usage_keyless_daily.requests, excluded.requests)
        )
        select count(*) as "moved!" from moved"#,
        days,
        TOGETHER
    )
    .fetch_one(&mut *connection)
    .await?;
    Ok(keyed.saturating_add(keyless).cast_unsigned())
}

/// Deletes days that began more than `days` ago. Returns how many rows.
pub async fn forget(pool: &PgPool, days: i32) -> Result<u64, sqlx::Error> {
    let mut all = 0;
    loop {
        let gone = transact(pool, async |connection| forget_some(connection, days).await).await?;
        if gone == 0 {
            return Ok(all);
        }
        all += gone;
    }
}

/// Deletes a bounded number of days. Returns how many rows; none while another replica holds the lock.
async fn forget_some(connection: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    if !JobLock::UsageRetention.try_take(connection).await? {
        return Ok(0);
    }
    let keyed = sqlx::query!(
        "delete from usage_daily where ctid = any(array(
            select ctid from usage_daily
            where day < date_trunc('day', now() - make_interval(days => $1), 'UTC') limit $2
        ))",
        days,
        TOGETHER
    )
    .execute(&mut *connection)
    .await?;
    let keyless = sqlx::query!(
        "delete from usage_keyless_daily
        where day < date_trunc('day', now() - make_interval(days => $1), 'UTC')",
        days
    )
    .execute(&mut *connection)
    .await?;
    Ok(keyed.rows_affected() + keyless.rows_affected())
}

/// Deletes Envoys whose last report came more than [`REPORTER_DAYS`] ago. Returns how many.
pub async fn forget_reporters(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let gone = sqlx::query!(
        "delete from usage_reporters where reported_at < now() - make_interval(days => $1)",
        REPORTER_DAYS
    );
    Ok(gone.execute(pool).await?.rows_affected())
}
