//! Deletion of allowances, pools and Envoys that are no longer in use.

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::change::transact;

/// Most rows that one statement deletes.
const TOGETHER: i64 = 10_000;

/// Deletes allowances of Envoys that have been silent for too long, allowances of which nothing is held and that were not used
/// for a while, pools without either, and Envoys that are gone. Returns how many rows.
pub async fn tidy(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let mut gone = expired(pool).await?.saturating_add(unused(pool).await?);
    gone = gone.saturating_add(transact(pool, async |connection| full_pools(connection).await).await?);
    let callers = sqlx::query!("delete from allowance_callers where heard_at < now() - interval '10 minutes'");
    gone = gone.saturating_add(callers.execute(pool).await?.rows_affected());
    count(pool).await?;
    Ok(gone)
}

/// Deletes the allowances of Envoys that have not called for [`limits::EXPIRES_AFTER_MS`].
async fn expired(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let gone = sqlx::query!(
        "delete from allowances where (kind, subject, tag, reporter) in (
            select a.kind, a.subject, a.tag, a.reporter from allowances a
            left join allowance_callers c on c.reporter = a.reporter
            where coalesce(c.heard_at, 'epoch') < now() - interval '60 seconds'
            limit $1 for update of a skip locked
        )",
        TOGETHER
    );
    Ok(gone.execute(pool).await?.rows_affected())
}

/// An Envoy hands back what it has not used for five to ten minutes.
async fn unused(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let gone = sqlx::query!(
        "delete from allowances where (kind, subject, tag, reporter) in (
            select kind, subject, tag, reporter from allowances
            where used_at < now() - interval '15 minutes' and granted <= spent + returned
            limit $1 for update skip locked
        )",
        TOGETHER
    );
    Ok(gone.execute(pool).await?.rows_affected())
}

/// Pools of which nothing is used or held. The second statement sees what was committed before the locks were taken.
async fn full_pools(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let full = sqlx::query!(
        "select p.kind, p.subject, p.tag from pools p
        where not exists (select from allowances a where a.kind = p.kind and a.subject = p.subject and a.tag = p.tag)
            and (p.kind <> 0 or p.arrival_ns < extract(epoch from now()) * 1000000000)
        limit $1 for update skip locked",
        TOGETHER
    )
    .fetch_all(&mut *connection)
    .await?;
    if full.is_empty() {
        return Ok(0);
    }
    let kinds: Vec<i16> = full.iter().map(|row| row.kind).collect();
    let subjects: Vec<Uuid> = full.iter().map(|row| row.subject).collect();
    let tags: Vec<i64> = full.iter().map(|row| row.tag).collect();
    let gone = sqlx::query!(
        "delete from pools p using unnest($1::smallint[], $2::uuid[], $3::bigint[]) as of (kind, subject, tag)
        where p.kind = of.kind and p.subject = of.subject and p.tag = of.tag
            and not exists (select from allowances a where a.kind = p.kind and a.subject = p.subject and a.tag = p.tag)
            and (p.kind <> 0 or p.arrival_ns < extract(epoch from now()) * 1000000000)",
        &kinds,
        &subjects,
        &tags
    );
    Ok(gone.execute(connection).await?.rows_affected())
}

/// Counts what is held.
async fn count(pool: &PgPool) -> Result<(), sqlx::Error> {
    let held = sqlx::query!(
        r#"select k.kind as "kind!", count(h.subject) as "held!" from unnest('{0, 1, 2}'::smallint[]) as k (kind)
        left join held_tokens h on h.kind = k.kind and h.held > 0 group by k.kind"#
    )
    .fetch_all(pool)
    .await?;
    for row in held {
        let kind = ["rate", "quota", "credits"].get(usize::try_from(row.kind).unwrap_or(usize::MAX));
        metrics::gauge!("portcullis_allowance_pools", "kind" => *kind.unwrap_or(&"other")).set(row.held as f64);
    }
    Ok(())
}
