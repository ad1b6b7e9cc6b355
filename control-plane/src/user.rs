//! Users in PostgreSQL: the owners of keys, with what applies to all their keys. An email address comes in, a row goes out.

use serde_json::json;
use sqlx::{PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::audit::{self, Actor, Deed};
use crate::condition::Condition;
use crate::definition::store::numbers;
use crate::definition::{Kind, Name};
use crate::error::ApiError;
use crate::key::domain::Email;
use crate::key::quota::{Whose, refresh_starters};
use crate::key::store::lock_user;
use crate::transaction::transact;

/// A user.
#[derive(Clone, Debug)]
pub struct User {
    /// Names the user for ever; the upstream hears of it as the consumer.
    pub id: Uuid,
    /// The address, in lower case.
    pub email: String,
    /// The plan of keys that have none of their own.
    pub plan: Option<String>,
    /// Credits.
    pub balance: i64,
    /// Whether requests cost credits.
    pub metered: bool,
    /// Since when there is the user.
    pub created_at: OffsetDateTime,
    /// Keys that are neither revoked nor expired.
    pub live_keys: i64,
    /// Keys that were ever made.
    pub total_keys: i64,
    /// Counted up whenever what is set of the user changes.
    pub version: i64,
}

/// Reads one.
///
/// # Errors
/// Those of the database.
pub async fn get(executor: impl PgExecutor<'_>, email: &Email) -> Result<Option<User>, ApiError> {
    let user = sqlx::query_as!(
        User,
        r#"select id as "id!", email as "email!", plan, balance as "balance!", metered as "metered!",
            created_at as "created_at!", version as "version!", live_keys as "live_keys!", total_keys as "total_keys!"
        from users_with_counts where email = $1"#,
        email.as_str()
    )
    .fetch_optional(executor)
    .await?;
    Ok(user)
}

/// Reads those whose address starts with `prefix` and comes after `after`, by address, at most `limit`.
///
/// # Errors
/// Those of the database.
pub async fn list(pool: &PgPool, prefix: &str, after: &str, limit: i64) -> Result<Vec<User>, ApiError> {
    let users = sqlx::query_as!(
        User,
        r#"select id as "id!", email as "email!", plan, balance as "balance!", metered as "metered!",
            created_at as "created_at!", version as "version!", live_keys as "live_keys!", total_keys as "total_keys!"
        from users_with_counts where email > $2 and starts_with(email, $1) order by email limit $3"#,
        prefix,
        after,
        limit
    )
    .fetch_all(pool)
    .await?;
    Ok(users)
}

/// Gives a user a plan, or takes it away, if they are as `condition` says; makes the user if not one yet. What is so already
/// is left alone. The user as they are then.
///
/// # Errors
/// 412 by the condition, a plan that is unknown, those of the database.
pub async fn set_plan(
    pool: &PgPool,
    actor: &Actor,
    email: &Email,
    plan: Option<&Name>,
    condition: &Condition,
) -> Result<User, ApiError> {
    transact(pool, async |connection| {
        let user = lock_user(connection, email).await?;
        condition.check(user.version)?;
        let number = match plan {
            Some(plan) => numbers(connection, Kind::Plan, std::slice::from_ref(plan)).await?.first().copied(),
            None => None,
        };
        let changed = sqlx::query!(
            "update user_preferences set plan_number = $2 where id = $1 and plan_number is distinct from $2",
            user.id,
            number
        )
        .execute(&mut *connection)
        .await?;
        if changed.rows_affected() > 0 {
            refresh_starters(connection, Whose::Owner(user.id)).await?;
            let detail = json!({"plan": plan.map(Name::as_str)});
            audit::note(connection, actor, Deed::to("user.change", email.as_str(), detail)).await?;
        }
        Ok(get(&mut *connection, email).await?.ok_or(sqlx::Error::RowNotFound)?)
    })
    .await
}
