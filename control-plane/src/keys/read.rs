//! Reads keys: one by its id or its hash, the primary key of a user, or a page of those that a search finds.

use contract::hash::KeyHash;
use contract::network::Network;
use sqlx::types::Json;
use sqlx::{PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::model::{Key, OwnTerms, PrimaryStatus, StoredKey};
use crate::domain::record::{networks, record_of};
use crate::domain::{Email, Quota, StoredLimit};
use crate::error::ApiError;

/// Finds a key by its hash.
pub async fn find_by_hash(pool: &PgPool, hash: &KeyHash) -> Result<Option<StoredKey>, ApiError> {
    let row = sqlx::query!(
        r#"select k.id, k.owner_id, s.generation as "generation!", k.scopes,
            k.rate_limits as "rate_limits: Json<Vec<StoredLimit>>", k.cost, least(k.expires_at, s.ends_at) as expires_at,
            k.disabled, k.quota_exceeded, k.credits_exhausted, k.revoked_at,
            coalesce(k.plan_number, k.owner_plan_number) as plan_number, k.role_numbers, k.networks, k.quota_starter,
            k.quota_turn, k.quota_resets_at, k.credits_starter, k.credits_turn, p.email,
            k.plan_number as own_plan, k.quota as "quota: Json<Quota>"
        from (
            select id, generation, null::timestamptz as ends_at from api_keys where hash = $1
            union all
            select key_id, generation, ends_at from retired_secrets where hash = $1
        ) s
        join api_keys k on k.id = s.id join user_preferences p on p.id = k.owner_id"#,
        hash.0.as_slice()
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| {
        let own = OwnTerms { plan: row.own_plan, quota: row.quota.map(|quota| quota.0) };
        StoredKey { record: record_of!(row), email: row.email, own }
    }))
}

/// Reads one key.
pub async fn get(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Option<Key>, ApiError> {
    let key = sqlx::query_as!(
        Key,
        r#"select k.id, k.owner_id, p.email, k.name, k.prefix, k.scopes,
            k.rate_limits as "rate_limits: Json<Vec<StoredLimit>>", k.generation, k.version, k.disabled, k.disabled_by_admin,
            k.created_at, k.expires_at, k.revoked_at, u.last_used_at as "last_used_at?", coalesce(u.requests, 0) as "usage_count!"
        from api_keys k join user_preferences p on p.id = k.owner_id
        left join lateral (
            select least(coalesce(sum(requests), 0), 9223372036854775807)::bigint as requests,
                max(last_used_at) as last_used_at
            from key_usage where key_id = k.id
        ) u on true
        where k.id = $1"#,
        id
    )
    .fetch_optional(executor)
    .await?;
    Ok(key)
}

/// Reads a user's balance and primary key, in one statement: a key that is being replaced is there before and after. An
/// unknown user has neither.
pub async fn primary(pool: &PgPool, email: &Email) -> Result<PrimaryStatus, ApiError> {
    let row = sqlx::query!(
        r#"select p.balance, p.id as owner_id, p.email, k.id as "id?", k.name as "name?", k.prefix as "prefix?",
            k.scopes as "scopes?", k.rate_limits as "rate_limits?: Json<Vec<StoredLimit>>", k.generation as "generation?",
            k.version as "version?", k.disabled as "disabled?", k.disabled_by_admin as "disabled_by_admin?",
            k.created_at as "created_at?", k.expires_at as "expires_at?", u.last_used_at as "last_used_at?", coalesce(u.requests, 0) as "usage_count!"
        from user_preferences p left join api_keys k on k.id = p.primary_key_id and k.revoked_at is null
        left join lateral (
            select least(coalesce(sum(requests), 0), 9223372036854775807)::bigint as requests,
                max(last_used_at) as last_used_at
            from key_usage where key_id = k.id
        ) u on true
        where p.email = $1"#,
        email.as_str()
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(PrimaryStatus::default()) };
    // The rest of the key is there if its id is.
    let key = match (row.id, row.created_at) {
        (Some(id), Some(created_at)) => Some(Key {
            id,
            owner_id: row.owner_id,
            email: row.email,
            name: row.name.unwrap_or_default(),
            prefix: row.prefix,
            scopes: row.scopes.unwrap_or_default(),
            rate_limits: row.rate_limits.unwrap_or_default(),
            generation: row.generation.unwrap_or_default(),
            version: row.version.unwrap_or_default(),
            disabled: row.disabled.unwrap_or_default(),
            disabled_by_admin: row.disabled_by_admin.unwrap_or_default(),
            created_at,
            expires_at: row.expires_at,
            revoked_at: None,
            last_used_at: row.last_used_at,
            usage_count: row.usage_count,
        }),
        _ => None,
    };
    Ok(PrimaryStatus { balance: row.balance, key })
}

/// The networks that a key may be used from.
pub async fn allowed_networks(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Vec<Network>, ApiError> {
    let texts = sqlx::query_scalar!("select networks from api_keys where id = $1", id).fetch_optional(executor).await?;
    Ok(networks(&texts.unwrap_or_default()))
}

/// Which keys; what is none does not matter.
#[derive(Clone, Debug, Default)]
pub struct KeySearch<'a> {
    /// Those of the user with this address.
    pub email: Option<&'a str>,
    /// Those with a secret, present or retired, whose prefix starts so.
    pub prefix: Option<&'a str>,
    /// Those whose name contains it, in upper or lower case.
    pub name: Option<&'a str>,
    /// Those in this state: `active`, `disabled`, `expired` or `revoked`.
    pub state: Option<&'a str>,
    /// Those that were last used before then, or made before then and never used.
    pub last_used_before: Option<OffsetDateTime>,
}

/// Reads the keys before `before`, at most `limit`.
pub async fn search(
    pool: &PgPool,
    filter: &KeySearch<'_>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Key>, ApiError> {
    let prefix = filter.prefix.map(|prefix| format!("{}%", literally(prefix)));
    let keys = sqlx::query_as!(
        Key,
        r#"select k.id, k.owner_id, p.email, k.name, k.prefix, k.scopes,
            k.rate_limits as "rate_limits: Json<Vec<StoredLimit>>", k.generation, k.version, k.disabled, k.disabled_by_admin,
            k.created_at, k.expires_at, k.revoked_at, u.last_used_at as "last_used_at?", coalesce(u.requests, 0) as "usage_count!"
        from api_keys k join user_preferences p on p.id = k.owner_id
        left join lateral (
            select least(coalesce(sum(requests), 0), 9223372036854775807)::bigint as requests,
                max(last_used_at) as last_used_at
            from key_usage where key_id = k.id
        ) u on true
        where k.id < $1 and ($2::text is null or p.email = $2)
            and ($3::text is null or k.prefix like $3 or k.id in (
                select key_id from retired_secrets where prefix like $3 and not withdrawn
            ))
            and ($4::text is null or strpos(lower(k.name), lower($4)) > 0)
            and ($5::text is null or $5 = case
                when k.revoked_at is not null then 'revoked'
                when k.expires_at <= now() then 'expired'
                when k.disabled then 'disabled'
                else 'active'
            end)
            and ($6::timestamptz is null or coalesce(u.last_used_at, k.created_at) < $6)
        order by k.id desc limit $7"#,
        before.unwrap_or(Uuid::max()),
        filter.email,
        prefix,
        filter.name,
        filter.state,
        filter.last_used_before,
        limit
    )
    .fetch_all(pool)
    .await?;
    Ok(keys)
}

/// A text that stands for itself in a pattern of `like`.
fn literally(text: &str) -> String {
    text.chars().flat_map(|c| ['\\'].into_iter().filter(move |_| "\\%_".contains(c)).chain([c])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pattern_would_read_as_more_stands_for_itself() {
        assert_eq!(literally("sk_a%\\"), "sk\\_a\\%\\\\");
    }
}
