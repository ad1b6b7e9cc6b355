//! Policies that routes of Envoys name. A policy that a route named lately is in use and is not deleted by mistake.

use contract::sightings::POLICIES;
use sqlx::{PgConnection, PgPool};

use crate::domain::Timestamp;
use crate::error::ApiError;

/// Stores the names of policies that routes of an Envoy named.
///
/// # Errors
/// 400 for more than [`POLICIES`].
pub async fn store(pool: &PgPool, names: &[String]) -> Result<(), ApiError> {
    if names.len() > POLICIES {
        return Err(ApiError::invalid("policies", format!("must have at most {POLICIES} entries")));
    }
    // Sorted, so that concurrent calls lock rows in one order and cannot deadlock.
    sqlx::query!(
        "insert into policy_uses (number)
        select number from definitions where kind = 'policy' and not removed and name = any($1) order by number
        on conflict (number) do update set last_named_at = now()",
        names
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// The last report that a route named a policy, and whether a route may have named it within the last two hours: each VM of an
/// Envoy reports a name every ten minutes.
pub async fn last_named(connection: &mut PgConnection, number: i32) -> Result<Option<(Timestamp, bool)>, sqlx::Error> {
    let row = sqlx::query!(
        r#"select last_named_at as "at: Timestamp", last_named_at > now() - interval '130 minutes' as "is_recent!"
        from policy_uses where number = $1"#,
        number
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| (row.at, row.is_recent)))
}
