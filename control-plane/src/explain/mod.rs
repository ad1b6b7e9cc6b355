//! Input of `explain` in addition to the record of the key: its hash, and the remainder of its quota and credits.

use contract::hash::KeyHash;
use contract::rate::Rate;
use contract::record::{Per, RateLimit, Record};
use limits::pool::PoolId;
use sqlx::PgPool;
use uuid::Uuid;

use crate::domain::Timestamp;
use crate::error::ApiError;
use crate::{credits, quota};

/// Owner and hash of a key.
#[derive(Clone, Copy, Debug)]
pub struct CurrentSecret {
    pub owner_id: Uuid,
    /// The hash of its present secret.
    pub hash: KeyHash,
}

/// The remainder of the quota and the credits of a key, in words. `None` if the key has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    pub quota: Option<String>,
    /// Credits of the owner.
    pub credits: Option<String>,
}

/// Finds the hash of a key's present secret.
pub async fn hash_of(pool: &PgPool, key_id: Uuid) -> Result<Option<CurrentSecret>, ApiError> {
    let row = sqlx::query!("select owner_id, hash from api_keys where id = $1", key_id).fetch_optional(pool).await?;
    let Some(row) = row else { return Ok(None) };
    let hash = row.hash.as_slice().try_into().map_err(|_| ApiError::Internal(format!("the hash of key {key_id}")))?;
    Ok(Some(CurrentSecret { owner_id: row.owner_id, hash: KeyHash(hash) }))
}

/// Reads the remainder of the limits that all Envoys share, in words. `None` if the key has none.
pub async fn shared_limits(pool: &PgPool, record: &Record, limits: &[RateLimit]) -> Result<Option<String>, ApiError> {
    let shared: Vec<&RateLimit> = limits.iter().filter(|limit| limit.shared).collect();
    if shared.is_empty() {
        return Ok(None);
    }
    let pools = shared.iter().map(|limit| PoolId::of_limit(limit, record));
    let (subjects, tags): (Vec<Uuid>, Vec<i64>) =
        pools.map(|id| (Uuid::from_bytes(id.subject.0), id.tag.cast_signed())).unzip();
    let rows = sqlx::query!(
        r#"select coalesce(p.arrival_ns, 0) as "arrival_ns!", coalesce(h.held, 0) as "held!", now() as "now!"
        from unnest($1::uuid[], $2::bigint[]) with ordinality as of (subject, tag, place)
        left join pools p on p.kind = 0 and p.subject = of.subject and p.tag = of.tag
        left join held_tokens h on h.kind = 0 and h.subject = of.subject and h.tag = of.tag
        order by of.place"#,
        &subjects,
        &tags
    )
    .fetch_all(pool)
    .await?;
    let left = shared.iter().zip(rows).map(|(limit, row)| {
        let now_ns = u64::try_from(row.now.unix_timestamp_nanos()).unwrap_or_default();
        let room = Rate::of(limit).room(row.arrival_ns.cast_unsigned(), now_ns);
        let left = room.saturating_sub(row.held.cast_unsigned());
        format!("{}: Envoys hold {}, {left} are left", limit.name, row.held)
    });
    Ok(Some(left.collect::<Vec<_>>().join("; ")))
}

/// Reads the remainder of the quota and the credits of a key for a request of this price, and what Envoys hold.
pub async fn budgets(pool: &PgPool, key_id: Uuid, price: u32) -> Result<Remaining, ApiError> {
    let quota = quota::view(pool, key_id).await?.map(|view| {
        let end = Timestamp::from(view.used.window_end);
        let (used, most, held) = (view.used.used, view.quota.requests, view.held);
        let left = most.saturating_sub(used).saturating_sub(held).max(0);
        let whose = if view.quota.per == Per::Owner { " of the owner's quota" } else { "" };
        format!(
            "{used} of {most} requests{whose} are used in the window that ends at {end}; Envoys hold {held}, {left} are left"
        )
    });
    let owner = sqlx::query_scalar!("select owner_id from api_keys where id = $1", key_id);
    let account = match owner.fetch_optional(pool).await? {
        Some(owner) => credits::account(pool, owner).await?,
        None => None,
    };
    let credits = account.filter(|account| account.metered).map(|account| {
        let (balance, held) = (account.balance, account.held);
        let left = balance.saturating_sub(held).max(0);
        let above = i64::from(price) > balance && balance > 0;
        let above = if above {
            format!("; the request costs {price}, which is more: waiting does not help")
        } else {
            String::new()
        };
        format!("the balance is {balance}; Envoys hold {held}, {left} are left{above}")
    });
    Ok(Remaining { quota, credits })
}
