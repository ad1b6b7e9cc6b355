//! Users: the owners of keys, with the settings that apply to all their keys.

pub mod lock;

use serde_json::json;
use sqlx::{PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use self::lock::lock_or_create_user;
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::definitions::store::numbers;
use crate::definitions::{Kind, Name};
use crate::domain::{Email, Preconditions};
use crate::error::ApiError;
use crate::quota::{Whose, refresh_starters};

/// A user.
#[derive(Clone, Debug)]
pub struct User {
    /// The id of the user, which the upstream gets as the consumer.
    pub id: Uuid,
    /// The address, in lower case.
    pub email: String,
    /// The plan of keys that have none of their own.
    pub plan: Option<String>,
    pub balance: i64,
    /// Whether requests cost credits.
    pub metered: bool,
    /// When the user was created.
    pub created_at: OffsetDateTime,
    /// Keys that are neither revoked nor expired.
    pub live_keys: i64,
    /// All keys, ended ones included.
    pub total_keys: i64,
    /// Incremented by each change of the settings of the user.
    pub version: i64,
}

/// Reads one.
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

/// Reads users by address: at most `limit` whose address starts with `prefix` and is greater than `after`.
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

/// Sets or clears the plan of a user. Creates the user if there is none. A plan that is set already stays as it is.
///
/// # Errors
/// 412 by the preconditions, 400 for an unknown plan.
pub async fn set_plan(
    change: &mut Change,
    email: &Email,
    plan: Option<&Name>,
    preconditions: &Preconditions,
) -> Result<User, ApiError> {
    let (user, is_new) = lock_or_create_user(change, email).await?;
    preconditions.check((!is_new).then_some(user.version))?;
    let number = match plan {
        Some(plan) => numbers(change, Kind::Plan, std::slice::from_ref(plan)).await?.first().copied(),
        None => None,
    };
    let changed = sqlx::query!(
        "update user_preferences set plan_number = $2 where id = $1 and plan_number is distinct from $2",
        user.id,
        number
    )
    .execute(&mut **change)
    .await?;
    if changed.rows_affected() > 0 {
        refresh_starters(change, Whose::Owner(user.id)).await?;
        let detail = json!({"plan": plan.map(Name::as_str)});
        change.record(AuditEvent::on("user.update", email.as_str(), detail)).await?;
    }
    Ok(get(&mut **change, email).await?.ok_or(sqlx::Error::RowNotFound)?)
}
