//! Scheduled credits. Each period is booked once, by one of the replicas.

use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;

use super::store::{Locked, book, fill};
use super::{Kind, Refill};
use crate::change::transact;

/// Most missed periods that are booked at once. After these, the schedule goes on from now.
const MISSED: usize = 400;

/// Books refills that are due, for one user after the other. Returns for how many users.
pub async fn refill(pool: &PgPool) -> Result<usize, sqlx::Error> {
    let mut owners = 0;
    while transact(pool, async |connection| refill_one(connection).await).await? {
        owners += 1;
    }
    Ok(owners)
}

/// Books the refills of one user that no other replica has locked. Returns whether there was one.
async fn refill_one(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let due = sqlx::query!(
        r#"select id, balance, metered, credits_fill, refill as "refill: Json<serde_json::Value>",
            refill_at as "refill_at!", now() as "now!"
        from user_preferences where refill_at <= now() order by refill_at limit 1 for no key update skip locked"#
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = due else { return Ok(false) };
    let owner = Locked { id: row.id, balance: row.balance, metered: row.metered, credits_fill: row.credits_fill };
    let refill: Option<Refill> = row.refill.and_then(|refill| serde_json::from_value(refill.0).ok());
    let next = match &refill {
        Some(refill) => Some(book_all(connection, &owner, refill, row.refill_at, row.now).await?),
        // Invalid, so it was written by hand.
        None => None,
    };
    sqlx::query!("update user_preferences set refill_at = $2 where id = $1", owner.id, next)
        .execute(&mut *connection)
        .await?;
    Ok(true)
}

/// Books every period from the one that is due up to now. Returns when the next one is due.
async fn book_all(
    connection: &mut PgConnection,
    owner: &Locked,
    refill: &Refill,
    due: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<OffsetDateTime, sqlx::Error> {
    let periods = std::iter::successors(Some(due), |at| Some(refill.next(*at)));
    let due: Vec<_> = periods.take(MISSED).take_while(|at| *at <= now).collect();
    let booked = sqlx::query_scalar!(
        r#"select refill_due as "at!" from ledger where owner_id = $1 and refill_due = any($2)"#,
        owner.id,
        &due
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut amounts = Vec::new();
    let mut balance = owner.balance;
    for at in due.into_iter().filter(|at| !booked.contains(at)) {
        let amount = refill.amount(balance);
        balance = balance.saturating_add(amount);
        if amount > 0 {
            amounts.push((at, amount));
        }
    }
    if !amounts.is_empty() {
        fill(connection, owner, owner.metered).await?;
    }
    for (at, amount) in amounts {
        book(connection, owner.id, Kind::Refill, amount, "", None, Some(at)).await?;
    }
    Ok(refill.next(now))
}
