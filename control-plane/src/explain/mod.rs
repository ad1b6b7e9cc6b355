//! What `explain` reads beside the record that Envoys have: the hash of a key, what is left of its quota and credits, and the
//! policies of Envoys.

pub mod policies;

use contract::hash::KeyHash;
use sqlx::PgPool;
use uuid::Uuid;

use crate::domain::Timestamp;
use crate::error::ApiError;
use crate::{credits, quota};

/// How Envoys know a key.
#[derive(Clone, Copy, Debug)]
pub struct CurrentSecret {
    pub owner_id: Uuid,
    /// The hash of its present secret.
    pub hash: KeyHash,
}

/// What is left of the stocks of a key, in words; nothing for stocks that it does not draw from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// Of its quota.
    pub quota: Option<String>,
    /// Of its owner's credits.
    pub credits: Option<String>,
}

/// Finds the hash of a key's present secret.
pub async fn hash_of(pool: &PgPool, key_id: Uuid) -> Result<Option<CurrentSecret>, ApiError> {
    let row = sqlx::query!("select owner_id, hash from api_keys where id = $1", key_id).fetch_optional(pool).await?;
    let Some(row) = row else { return Ok(None) };
    let hash = row.hash.as_slice().try_into().map_err(|_| ApiError::Internal(format!("the hash of key {key_id}")))?;
    Ok(Some(CurrentSecret { owner_id: row.owner_id, hash: KeyHash(hash) }))
}

/// Reads what is left of a key's stocks for a request of a price, as the control plane has it; what Envoys hold in leases is
/// spoken of beside it.
pub async fn budgets(pool: &PgPool, key_id: Uuid, price: u32) -> Result<Remaining, ApiError> {
    let quota = quota::view(pool, key_id).await?.map(|view| {
        let end = Timestamp::from(view.used.window_end);
        let (used, most, leased) = (view.used.used, view.quota.requests, view.leased);
        format!("{used} of {most} requests are used in the window that ends at {end}; {leased} are leased to Envoys")
    });
    let owner = sqlx::query_scalar!("select owner_id from api_keys where id = $1", key_id);
    let account = match owner.fetch_optional(pool).await? {
        Some(owner) => credits::account(pool, owner).await?,
        None => None,
    };
    let credits = account.filter(|account| account.metered).map(|account| {
        let (balance, leased) = (account.balance, account.leased);
        let above = i64::from(price) > balance && balance > 0;
        let above = if above {
            format!("; the request costs {price}, which is more: waiting does not help")
        } else {
            String::new()
        };
        format!("the balance is {balance}, of which {leased} are leased to Envoys{above}")
    });
    Ok(Remaining { quota, credits })
}
