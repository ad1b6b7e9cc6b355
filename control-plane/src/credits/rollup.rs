//! Keeps the ledger short. Usage rows older than the detail period become one row per owner and UTC day, and per
//! stretch between other rows. The balance beside every remaining row is still the sum of all rows up to it.

use sqlx::{PgConnection, PgPool};

use crate::change::transact;
use crate::job_lock::JobLock;

/// The note of merged rows.
pub const NOTE: &str = "sum of a day";

/// Merges the rows of the oldest day that has any and ended more than `detail_days` ago. Returns how many rows were deleted, at
/// least 1 if there was such a day.
pub async fn roll_up(pool: &PgPool, detail_days: i32) -> Result<u64, sqlx::Error> {
    let gone = transact(pool, async |connection| roll_up_a_day(connection, detail_days).await).await?;
    let Some(gone) = gone else { return Ok(0) };
    metrics::counter!("portcullis_ledger_rows_rolled_up_total").increment(gone);
    // The day was merged, even if each user had only one row.
    Ok(gone.max(1))
}

/// Returns how many rows were deleted; `None` if there is no such day, or another replica holds the lock.
async fn roll_up_a_day(connection: &mut PgConnection, detail_days: i32) -> Result<Option<u64>, sqlx::Error> {
    if !JobLock::LedgerRollUp.try_take(connection).await? {
        return Ok(None);
    }
    let day = sqlx::query_scalar!(
        "select date_trunc('day', min(at), 'UTC') from ledger where kind = 'usage' and note = ''
            and at < date_trunc('day', now() - make_interval(days => $1), 'UTC')",
        detail_days
    )
    .fetch_one(&mut *connection)
    .await?;
    let Some(day) = day else { return Ok(None) };
    sqlx::query!("set local portcullis.ledger = 'on'").execute(&mut *connection).await?;
    // The last row of each stretch has the balance at its end, so it takes the amounts of the others.
    let gone = sqlx::query_scalar!(
        r#"with spans as (
            select owner_id, min(id) as first, max(id) as last from ledger
            where kind = 'usage' and note = '' and at >= $1 and at < $1 + interval '1 day' group by owner_id
        ),
        rows as (
            select l.id, l.owner_id, l.amount, w.is_detail,
                count(*) filter (where not w.is_detail) over (partition by l.owner_id order by l.id) as stretch
            from spans s join ledger l on l.owner_id = s.owner_id and l.id between s.first and s.last
            cross join lateral (
                select l.kind = 'usage' and l.note = '' and l.at >= $1 and l.at < $1 + interval '1 day' as is_detail
            ) w
        ),
        stretches as (
            select owner_id, stretch, max(id) as last, sum(amount)::bigint as amount
            from rows where is_detail group by owner_id, stretch
        ),
        merged as (
            update ledger set amount = s.amount, note = $2 from stretches s where ledger.id = s.last
        ),
        deleted as (
            delete from ledger using rows r, stretches s
            where ledger.id = r.id and r.is_detail and s.owner_id = r.owner_id and s.stretch = r.stretch and r.id <> s.last
            returning ledger.id
        )
        select count(*) as "gone!" from deleted"#,
        day,
        NOTE
    )
    .fetch_one(&mut *connection)
    .await?;
    Ok(Some(gone.cast_unsigned()))
}
