//! Balances and the ledger in PostgreSQL. A booking locks the row of the user first, so that the rows of an owner
//! stand in the order in which the balance changed.

use serde_json::{Map, Value};
use sqlx::types::Json;
use sqlx::{PgConnection, PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{BALANCE, Kind, Refill};
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::domain::Patch;
use crate::error::ApiError;
use crate::users::lock::{LockedUser, lock_user};

/// Lowest balance that usage leads to. Forged usage must not overflow a balance and stop the reports that are applied with it.
const LOWEST: i64 = -1_000_000_000_000_000_000;

/// A row of the ledger.
#[derive(Clone, Debug)]
pub struct LedgerRow {
    /// Counted up with each row of all owners.
    pub id: i64,
    pub at: OffsetDateTime,
    /// What it is: see [`Kind`].
    pub kind: String,
    /// Credits that came in, or, below zero, went out.
    pub amount: i64,
    /// The balance with it.
    pub balance: i64,
    pub note: String,
    /// The key that made it, if one did.
    pub actor_key_id: Option<Uuid>,
    /// Of a refill: when it was due.
    pub refill_due: Option<OffsetDateTime>,
}

/// The account of a user.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// The sum of the ledger.
    pub balance: i64,
    /// Credits that all requests so far have cost.
    pub spent: i64,
    /// Whether requests cost credits.
    pub metered: bool,
    /// Credits that Envoys hold and have not reported as spent.
    pub held: i64,
}

/// A user whose row is locked.
#[derive(Clone, Copy, Debug)]
pub struct Locked {
    pub id: Uuid,
    pub balance: i64,
    /// Whether requests cost credits.
    pub metered: bool,
    /// How often the balance was changed other than by usage, as filters know it.
    pub credits_fill: i32,
}

impl From<&LockedUser> for Locked {
    fn from(user: &LockedUser) -> Self {
        let &LockedUser { id, balance, metered, credits_fill, .. } = user;
        Self { id, balance, metered, credits_fill }
    }
}

/// Locks the rows of users in the order of their ids.
pub async fn lock(connection: &mut PgConnection, owners: &[Uuid]) -> Result<Vec<Locked>, sqlx::Error> {
    sqlx::query_as!(
        Locked,
        "select id, balance, metered, credits_fill from user_preferences
        where id = any($1) order by id for no key update",
        owners
    )
    .fetch_all(connection)
    .await
}

/// Books a top-up or a correction. A top-up makes the user metered.
///
/// # Errors
/// 404 if there is no such user, 409 if the balance would grow out of bounds.
pub async fn credit(
    change: &mut Change,
    owner_id: Uuid,
    kind: Kind,
    amount: i64,
    note: &str,
) -> Result<LedgerRow, ApiError> {
    let user = lock_user(change, owner_id).await?;
    let owner = Locked::from(&user);
    let balance = owner.balance.saturating_add(amount);
    if balance.checked_abs().is_none_or(|size| size > BALANCE) {
        let detail = format!("The balance would be {balance}. It must stay between -{BALANCE} and {BALANCE}.");
        return Err(ApiError::Conflict(detail));
    }
    let metered = owner.metered || kind == Kind::TopUp;
    fill(change, &owner, metered).await?;
    let actor_key_id = change.actor().key_id;
    let entry = book(change, owner.id, kind, amount, note, actor_key_id, None).await?;
    let detail = serde_json::json!({"kind": kind.name(), "amount": amount, "balance": entry.balance});
    change.record(AuditEvent::on("ledger.create", &user.email, detail)).await?;
    Ok(entry)
}

/// Changes whether the requests of a user cost credits, and the refill of the user, whose row is locked. A new refill makes
/// the user metered unless `metered` says otherwise. Returns what changed.
pub async fn update(
    connection: &mut PgConnection,
    owner: &Locked,
    metered: Option<bool>,
    refill: Patch<Refill>,
) -> Result<Map<String, Value>, ApiError> {
    let metered = metered.unwrap_or(owner.metered || matches!(refill, Patch::Set(_)));
    let mut changed = Map::new();
    if metered != owner.metered {
        fill(connection, owner, metered).await?;
        changed.insert("metered".into(), metered.into());
    }
    if let Some(refill) = refill.given() {
        set_refill(connection, owner.id, refill.as_ref()).await?;
        changed.insert("refill".into(), serde_json::to_value(refill).unwrap_or_default());
    }
    Ok(changed)
}

/// Sets or clears the refill. The row of the user is locked.
async fn set_refill(connection: &mut PgConnection, owner_id: Uuid, refill: Option<&Refill>) -> Result<(), ApiError> {
    let next = match refill {
        Some(refill) => {
            let now = sqlx::query_scalar!(r#"select now() as "now!""#).fetch_one(&mut *connection).await?;
            Some(refill.next(now))
        }
        None => None,
    };
    sqlx::query!(
        "update user_preferences set refill = $2, refill_at = $3 where id = $1",
        owner_id,
        refill.map(Json) as _,
        next
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Counts a change of the balance that filters must learn of, and sets whether requests cost credits. A filter that knows the
/// balance to be used up asks for credits again.
pub(super) async fn fill(connection: &mut PgConnection, owner: &Locked, metered: bool) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update user_preferences set metered = $2, credits_fill = $3 where id = $1",
        owner.id,
        metered,
        owner.credits_fill.wrapping_add(1)
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes a row of the ledger. The row of the user is locked.
pub(super) async fn book(
    connection: &mut PgConnection,
    owner_id: Uuid,
    kind: Kind,
    amount: i64,
    note: &str,
    actor: Option<Uuid>,
    refill_due: Option<OffsetDateTime>,
) -> Result<LedgerRow, sqlx::Error> {
    let entry = sqlx::query_as!(
        LedgerRow,
        "insert into ledger (owner_id, kind, amount, balance, note, actor_key_id, refill_due)
        values ($1, $2, $3, 0, $4, $5, $6)
        returning id, at, kind, amount, balance, note, actor_key_id, refill_due",
        owner_id,
        kind.name(),
        amount,
        note,
        actor,
        refill_due
    )
    .fetch_one(connection)
    .await?;
    metrics::counter!("portcullis_ledger_rows_total", "kind" => kind.name()).increment(1);
    Ok(entry)
}

/// Books the cost of requests: one row for each user. Their rows are locked.
pub async fn book_usage(connection: &mut PgConnection, costs: &[(Locked, u64)]) -> Result<(), sqlx::Error> {
    let (owners, amounts): (Vec<Uuid>, Vec<i64>) = costs
        .iter()
        .filter(|(owner, _)| owner.metered)
        .map(|(owner, cost)| (owner.id, usage(owner.balance, *cost)))
        .filter(|(_, amount)| *amount != 0)
        .unzip();
    if owners.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "insert into ledger (owner_id, kind, amount, balance)
        select owner_id, 'usage', amount, 0 from unnest($1::uuid[], $2::bigint[]) as new (owner_id, amount)
        order by owner_id",
        &owners,
        &amounts
    )
    .execute(connection)
    .await?;
    metrics::counter!("portcullis_ledger_rows_total", "kind" => "usage").increment(owners.len() as u64);
    Ok(())
}

/// The amount that usage adds to a balance: not above zero, and never below [`LOWEST`] in sum.
pub(crate) fn usage(balance: i64, cost: u64) -> i64 {
    let most = balance.saturating_sub(LOWEST).max(0);
    i64::try_from(cost).unwrap_or(i64::MAX).min(most).saturating_neg()
}

/// Reads an account.
pub async fn account(executor: impl PgExecutor<'_>, owner_id: Uuid) -> Result<Option<Account>, ApiError> {
    let account = sqlx::query_as!(
        Account,
        r#"select p.balance, p.credits_spent as spent, p.metered, coalesce(h.held, 0) as "held!"
        from user_preferences p left join held_tokens h on h.kind = 2 and h.subject = p.id and h.tag = 0 where p.id = $1"#,
        owner_id
    )
    .fetch_optional(executor)
    .await?;
    Ok(account)
}

/// Reads rows of an owner, the newest first: those before `before`, at most `limit`.
pub async fn ledger(
    pool: &PgPool,
    owner_id: Uuid,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<LedgerRow>, ApiError> {
    let entries = sqlx::query_as!(
        LedgerRow,
        "select id, at, kind, amount, balance, note, actor_key_id, refill_due
        from ledger where owner_id = $1 and id < $2 order by id desc limit $3",
        owner_id,
        before.unwrap_or(i64::MAX),
        limit
    )
    .fetch_all(pool)
    .await?;
    Ok(entries)
}
