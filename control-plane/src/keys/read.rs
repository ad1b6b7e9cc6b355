//! Reads keys: one by its id or its hash, the primary key of a user, or a page of a search.

use contract::hash::KeyHash;
use contract::network::Network;
use contract::pepper::{Pepper, hashes};
use contract::record::RateLimit;
use sqlx::types::Json;
use sqlx::{PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::model::{Key, OwnTerms, StoredKey};
use crate::domain::record::{networks, record_of};
use crate::domain::{Attributes, Email, Quota};
use crate::error::ApiError;

/// Finds a key by its hash.
pub async fn find_by_hash(pool: &PgPool, hash: &KeyHash) -> Result<Option<StoredKey>, ApiError> {
    let row = sqlx::query!(
        r#"select k.id, k.owner_id, s.generation as "generation!", k.kind,
            k.attributes as "attributes: Json<Attributes>", k.owner_attributes as "owner_attributes: Json<Attributes>",
            k.scopes,
            k.rate_limits as "rate_limits: Json<Vec<RateLimit>>", k.cost, least(k.expires_at, s.ends_at) as expires_at,
            k.disabled, k.quota_exceeded, k.credits_exhausted, k.revoked_at,
            coalesce(k.plan_number, k.owner_plan_number) as plan_number, k.role_numbers, k.networks, k.quota_fill,
            case when k.applied_quota is not null then k.applied_quota ->> 'per' is not distinct from 'owner' end as quota_shared,
            k.quota_resets_at, k.metered, k.credits_fill, p.email,
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

/// Finds a key by a secret that it has or had, of which this is the hash without pepper.
pub async fn find_by_secret(
    pool: &PgPool,
    plain: KeyHash,
    pepper: Option<&Pepper>,
) -> Result<Option<StoredKey>, ApiError> {
    for hash in hashes(plain, pepper) {
        if let Some(found) = find_by_hash(pool, &hash).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The query of keys, from its condition on.
macro_rules! select_keys {
    ($rest:tt, $($argument:expr),+) => {
        sqlx::query_as!(
            Key,
            r#"select id as "id!", owner_id as "owner_id!", email as "email!", name as "name!", prefix, kind as "kind!",
                attributes as "attributes: Json<Attributes>", scopes as "scopes!",
                rate_limits as "rate_limits!: Json<Vec<RateLimit>>", generation as "generation!", version as "version!",
                disabled as "disabled!", disabled_by_admin as "disabled_by_admin!", created_at as "created_at!", expires_at,
                revoked_at, last_used_at, usage_count as "usage_count!"
            from keys_with_usage where "# + $rest,
            $($argument),+
        )
    };
}

/// Reads one key.
pub async fn get(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Option<Key>, ApiError> {
    Ok(select_keys!("id = $1", id).fetch_optional(executor).await?)
}

/// Reads the balance and the primary key of a user, unless that was revoked. One statement finds the key, so that a replacement at the same time does not
/// hide it. An unknown user has neither.
pub async fn primary(pool: &PgPool, email: &Email) -> Result<(i64, Option<Key>), ApiError> {
    let balance = sqlx::query_scalar!("select balance from user_preferences where email = $1", email.as_str())
        .fetch_optional(pool)
        .await?;
    let Some(balance) = balance else { return Ok((0, None)) };
    let key = select_keys!(
        "id = (select primary_key_id from user_preferences where email = $1) and revoked_at is null",
        email.as_str()
    );
    let key = key.fetch_optional(pool).await?;
    Ok((balance, key))
}

/// The networks that a key may be used from.
pub async fn allowed_networks(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Vec<Network>, ApiError> {
    let texts = sqlx::query_scalar!("select networks from api_keys where id = $1", id).fetch_optional(executor).await?;
    Ok(networks(&texts.unwrap_or_default()))
}

/// Conditions on keys. `None` matches all.
#[derive(Clone, Debug, Default)]
pub struct KeySearch<'a> {
    /// The address of the owner.
    pub email: Option<&'a str>,
    /// The id of the owner.
    pub owner_id: Option<Uuid>,
    /// The name of the plan that applies.
    pub plan: Option<&'a str>,
    /// The name of a role.
    pub role: Option<&'a str>,
    /// Expires before then.
    pub expires_before: Option<OffsetDateTime>,
    /// Any of these is the start of the prefix of a present or old secret.
    pub prefixes: Option<Vec<String>>,
    /// A part of the name, in upper or lower case.
    pub name: Option<&'a str>,
    /// `active`, `disabled`, `expired` or `revoked`.
    pub state: Option<&'a str>,
    /// The external id.
    pub external_id: Option<&'a str>,
    /// Last used before then, or created before then and never used.
    pub last_used_before: Option<OffsetDateTime>,
}

/// Reads the keys before `before`, at most `limit`.
pub async fn search(
    pool: &PgPool,
    filter: &KeySearch<'_>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Key>, ApiError> {
    let starts = |prefixes: &Vec<String>| prefixes.iter().map(|prefix| format!("{}%", literally(prefix))).collect();
    let prefixes: Option<Vec<String>> = filter.prefixes.as_ref().map(starts);
    let keys = select_keys!(
        "id < $1 and ($2::text is null or email = $2)
            and ($3::text[] is null or prefix like any ($3) or id in (
                select key_id from retired_secrets where prefix like any ($3) and not withdrawn
            ))
            and ($4::text is null or strpos(lower(name), lower($4)) > 0)
            and ($5::text is null or $5 = case
                when revoked_at is not null then 'revoked'
                when expires_at <= now() then 'expired'
                when disabled then 'disabled'
                else 'active'
            end)
            and ($6::timestamptz is null or coalesce(last_used_at, created_at) < $6)
            and ($8::text is null or id in (select id from api_keys where attributes ->> 'external_id' = $8))
            and ($9::uuid is null or owner_id = $9)
            and ($10::timestamptz is null or expires_at < $10)
            and ($11::text is null or id in (
                select k.id from api_keys k join user_preferences p on p.id = k.owner_id
                join definitions d on d.number = coalesce(k.plan_number, p.plan_number)
                where d.kind = 'plan' and d.name = $11 and not d.removed
            ))
            and ($12::text is null or id in (
                select k.id from api_keys k join definitions d on k.role_numbers @> array[d.number] and k.role_numbers <> '{}'
                where d.kind = 'role' and d.name = $12 and not d.removed
            ))
        order by id desc limit $7",
        before.unwrap_or(Uuid::max()),
        filter.email,
        prefixes.as_deref(),
        filter.name,
        filter.state,
        filter.last_used_before,
        limit,
        filter.external_id,
        filter.owner_id,
        filter.expires_before,
        filter.plan,
        filter.role
    );
    Ok(keys.fetch_all(pool).await?)
}

/// Escapes a text for a pattern of `like`.
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
