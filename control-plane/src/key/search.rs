//! Finding keys: a filter comes in, a page of keys goes out, the newest first.

use sqlx::PgPool;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::domain::StoredLimit;
use super::store::Key;
use crate::error::ApiError;

/// Which keys; what is none does not matter.
#[derive(Clone, Debug, Default)]
pub struct Filter<'a> {
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
///
/// # Errors
/// Those of the database.
pub async fn search(
    pool: &PgPool,
    filter: &Filter<'_>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Key>, ApiError> {
    let prefix = filter.prefix.map(|prefix| format!("{}%", literally(prefix)));
    let keys = sqlx::query_as!(
        Key,
        r#"select id as "id!", owner_id as "owner_id!", email as "email!", name as "name!", prefix, scopes as "scopes!",
            rate_limits as "rate_limits!: Json<Vec<StoredLimit>>", generation as "generation!", version as "version!",
            disabled as "disabled!", disabled_by_admin as "disabled_by_admin!", created_at as "created_at!", expires_at,
            revoked_at, last_used_at, usage_count as "usage_count!"
        from keys_with_usage
        where id < $1 and ($2::text is null or email = $2)
            and ($3::text is null or prefix like $3 or id in (
                select key_id from retired_secrets where prefix like $3 and not withdrawn
            ))
            and ($4::text is null or strpos(lower(name), lower($4)) > 0)
            and ($5::text is null or $5 = case
                when revoked_at is not null then 'revoked'
                when expires_at <= now() then 'expired'
                when disabled then 'disabled'
                else 'active'
            end)
            and ($6::timestamptz is null or coalesce(last_used_at, created_at) < $6)
        order by id desc limit $7"#,
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
