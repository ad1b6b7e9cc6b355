//! What `explain` needs from the database beside the record that Envoys have: which hash a key has, and what is left of its
//! stocks.

use contract::budget::Stock;
use contract::hash::KeyHash;
use sqlx::PgPool;
use uuid::Uuid;

use crate::error::ApiError;

/// How Envoys know a key.
#[derive(Clone, Copy, Debug)]
pub struct Hashed {
    /// Whom it belongs to.
    pub owner_id: Uuid,
    /// The hash of its present secret.
    pub hash: KeyHash,
}

/// What is left of the stocks of a key, in words; nothing for stocks that it does not draw from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Of its quota.
    pub quota: Option<String>,
    /// Of its owner's credits.
    pub credits: Option<String>,
}

/// Finds the hash of a key's present secret.
///
/// # Errors
/// Those of the database.
pub async fn hash_of(pool: &PgPool, key_id: Uuid) -> Result<Option<Hashed>, ApiError> {
    let row = sqlx::query!("select owner_id, hash from api_keys where id = $1", key_id).fetch_optional(pool).await?;
    let Some(row) = row else { return Ok(None) };
    let hash = row.hash.as_slice().try_into().map_err(|_| ApiError::Internal(format!("the hash of key {key_id}")))?;
    Ok(Some(Hashed { owner_id: row.owner_id, hash: KeyHash(hash) }))
}

/// Reads what is left of a key's stocks, as the control plane has it; what Envoys hold in leases is spoken of beside it.
///
/// # Errors
/// Those of the database.
pub async fn budgets(pool: &PgPool, key_id: Uuid) -> Result<Left, ApiError> {
    let row = sqlx::query!(
        r#"select coalesce(k.quota, d.quota) as quota, coalesce(q.used, 0) as "used!", q.window_end as "window_end?",
            p.metered, p.balance, coalesce(quota_leases.held, 0)::bigint as "quota_leased!",
            coalesce(credit_leases.held, 0)::bigint as "credits_leased!"
        from api_keys k join user_preferences p on p.id = k.owner_id
        left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
        left join quota_use q on q.key_id = k.id
        left join lateral (
            select sum(greatest(held - spent, 0)) as held from leases where stock = $2 and subject = k.id
        ) quota_leases on true
        left join lateral (
            select sum(greatest(held - spent, 0)) as held from leases where stock = $3 and subject = k.owner_id
        ) credit_leases on true
        where k.id = $1"#,
        key_id,
        i16::from(Stock::Quota.code()),
        i16::from(Stock::Credits.code())
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(Left::default()) };
    let quota = row.quota.map(|quota| {
        let (most, period) = (&quota["requests"], quota["period"].as_str().unwrap_or_default());
        let end = row.window_end.map_or_else(String::new, |end| format!(", in the window that ends at {end}"));
        format!(
            "{} of {most} requests by the {period} are used{end}; {} are leased to Envoys",
            row.used, row.quota_leased
        )
    });
    let credits = row
        .metered
        .then(|| format!("the balance is {}, of which {} are leased to Envoys", row.balance, row.credits_leased));
    Ok(Left { quota, credits })
}
