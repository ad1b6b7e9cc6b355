//! Scheduled credits. Each period is booked once, by the replica that comes first.

use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;

use super::store::{Locked, book, open};
use super::{Kind, Refill};
use crate::change::transact;

/// Most periods that are made up for at once. Beyond, the schedule goes on from now.
const MISSED: i32 = 400;

/// Books refills that are due, of one owner after the other. Says of how many owners.
///
/// # Errors
/// Those of the database; what was booked until then stays booked.
pub async fn refill(pool: &PgPool) -> Result<usize, sqlx::Error> {
    let mut owners = 0;
    while transact(pool, async |connection| refill_one(connection).await).await? {
        owners += 1;
    }
    Ok(owners)
}

/// Books what is due of one owner whom no other replica is at. Says whether there was one.
async fn refill_one(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let due = sqlx::query!(
        r#"select id, balance, metered, credits_starter, credits_turn, refill as "refill: Json<serde_json::Value>",
            refill_at as "refill_at!"
        from user_preferences where refill_at <= now() order by refill_at limit 1 for no key update skip locked"#
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = due else { return Ok(false) };
    let owner = Locked {
        id: row.id,
        balance: row.balance,
        metered: row.metered,
        credits_starter: row.credits_starter,
        credits_turn: row.credits_turn,
    };
    let refill: Option<Refill> = row.refill.and_then(|refill| serde_json::from_value(refill.0).ok());
    let next = match &refill {
        Some(refill) => book_all(connection, &owner, refill, row.refill_at).await?,
        // Put there by hand, and nothing that can be booked.
        None => None,
    };
    sqlx::query!("update user_preferences set refill_at = $2 where id = $1", owner.id, next)
        .execute(&mut *connection)
        .await?;
    Ok(true)
}

/// Books every period from the one that is due up to now. Gives when the next one is due.
async fn book_all(
    connection: &mut PgConnection,
    owner: &Locked,
    refill: &Refill,
    due: OffsetDateTime,
) -> Result<Option<OffsetDateTime>, sqlx::Error> {
    let times = sqlx::query!(
        r#"with recursive due (at, number) as (
            select $3::timestamptz, 1
            union all
            select (select ends from calendar_window($1, $2, due.at)), due.number + 1
            from due where due.at <= now() and due.number <= $4
        )
        select at as "at!", at <= now() as "is_due!",
            exists (select from ledger l where l.owner_id = $5 and l.refill_due = due.at) as "is_booked!", (select ends from calendar_window($1, $2, now())) as "after_now!"
        from due order by number"#,
        refill.period.name(),
        refill.time_zone,
        due,
        MISSED,
        owner.id
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut amounts = Vec::new();
    let mut balance = owner.balance;
    let due = times.iter().filter(|time| time.is_due).take(usize::try_from(MISSED).unwrap_or(0));
    for time in due.filter(|time| !time.is_booked) {
        let amount = refill.amount(balance);
        balance = balance.saturating_add(amount);
        if amount > 0 {
            amounts.push((time.at, amount));
        }
    }
    if !amounts.is_empty() {
        open(connection, owner, owner.metered, balance).await?;
    }
    for (at, amount) in amounts {
        book(connection, owner.id, Kind::Refill, amount, "", None, Some(at)).await?;
    }
    Ok(times.last().map(|last| if last.is_due { last.after_now } else { last.at }))
}
