//! Users: the owners of keys, with the settings that apply to all their keys.

pub mod lock;

use serde_json::{Value, json};
use sqlx::{PgConnection, PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use self::lock::lock_or_create_user;
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::definitions::store::numbers;
use crate::definitions::{Kind, Name};
use crate::domain::Email;
use crate::error::ApiError;
use crate::quota::{Whose, apply_quotas};

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
    /// Scheduled credits, see [`crate::credits::Refill`].
    pub refill: Option<Value>,
    /// When the next refill is due.
    pub refill_at: Option<OffsetDateTime>,
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
pub async fn get(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Option<User>, ApiError> {
    let user = sqlx::query_as!(
        User,
        r#"select id as "id!", email as "email!", plan, balance as "balance!", metered as "metered!",
            refill, refill_at, created_at as "created_at!", version as "version!", live_keys as "live_keys!", total_keys as "total_keys!"
        from users_with_counts where id = $1"#,
        id
    )
    .fetch_optional(executor)
    .await?;
    Ok(user)
}

/// Reads users by address: at most `limit` whose address starts with `prefix` and is greater than `after`, or only the user
/// with the address `email`.
pub async fn list(
    pool: &PgPool,
    email: Option<&Email>,
    prefix: &str,
    after: &str,
    limit: i64,
) -> Result<Vec<User>, ApiError> {
    let users = sqlx::query_as!(
        User,
        r#"select id as "id!", email as "email!", plan, balance as "balance!", metered as "metered!",
            refill, refill_at, created_at as "created_at!", version as "version!", live_keys as "live_keys!", total_keys as "total_keys!"
        from users_with_counts where email > $3 and starts_with(email, $2) and ($1::text is null or email = $1)
        order by email limit $4"#,
        email.map(Email::as_str),
        prefix,
        after,
        limit
    )
    .fetch_all(pool)
    .await?;
    Ok(users)
}

/// Creates a user, or finds the user with this address. Says whether the user is new.
pub async fn create(change: &mut Change, email: &Email) -> Result<(Uuid, bool), ApiError> {
    let (user, is_new) = lock_or_create_user(change, email).await?;
    if is_new {
        change.record(AuditEvent::on("user.create", email.as_str(), json!({}))).await?;
    }
    Ok((user.id, is_new))
}

/// Sets or clears the plan of a user, whose row is locked. Says whether that was a change.
///
/// # Errors
/// 400 for an unknown plan.
pub async fn set_plan(connection: &mut PgConnection, id: Uuid, plan: Option<&Name>) -> Result<bool, ApiError> {
    let number = match plan {
        Some(plan) => numbers(connection, Kind::Plan, std::slice::from_ref(plan)).await?.first().copied(),
        None => None,
    };
    let changed = sqlx::query!(
        "update user_preferences set plan_number = $2 where id = $1 and plan_number is distinct from $2",
        id,
        number
    )
    .execute(&mut *connection)
    .await?;
    let is_changed = changed.rows_affected() > 0;
    if is_changed {
        apply_quotas(connection, Whose::Owner(id)).await?;
    }
    Ok(is_changed)
}
