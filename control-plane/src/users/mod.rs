//! Users: the owners of keys, with the settings that apply to all their keys.

pub mod erase;
pub mod lock;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::types::Json;
use sqlx::{PgConnection, PgExecutor, PgPool};
use utoipa::ToSchema;
use uuid::Uuid;

use self::erase::rename_in_audit;
use self::lock::{LockedUser, lock_or_create_user};
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::credits::Refill;
use crate::definitions::store::numbers;
use crate::definitions::{Kind, Name};
use crate::domain::{AttributesPatch, Email, Metadata, Timestamp};
use crate::error::ApiError;
use crate::quota::{Whose, apply_quotas};

/// Numbers of keys of a user.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyCounts {
    /// Keys that are neither revoked nor expired.
    live: i64,
    /// Keys that were ever made.
    total: i64,
}

/// A user.
#[derive(Debug, Serialize, ToSchema)]
pub struct UserView {
    /// The id of the user, which the upstream gets as the consumer.
    pub id: Uuid,
    /// The email address.
    #[schema(example = "user@example.com")]
    pub email: String,
    /// The user's id in another system.
    #[schema(required, example = "cus_42")]
    external_id: Option<String>,
    /// Metadata that the filter can pass upstream.
    #[schema(value_type = BTreeMap<String, serde_json::Value>, example = json!({"tenant": "acme"}))]
    metadata: Json<Metadata>,
    /// The time zone of quotas and usage whose `time_zone` is `owner`; null for UTC.
    #[schema(required, example = "Europe/Berlin")]
    time_zone: Option<String>,
    /// The plan of keys that have none of their own.
    #[schema(required, example = "gold")]
    plan: Option<String>,
    /// Credits.
    balance: i64,
    /// Whether requests cost credits. Otherwise they are free.
    metered: bool,
    /// Scheduled credits.
    #[schema(required, value_type = Option<Refill>)]
    refill: Option<Value>,
    /// When the next refill is due.
    #[schema(required)]
    refill_at: Option<Timestamp>,
    /// Since when there is the user.
    created_at: Timestamp,
    /// Numbers of keys of the user.
    #[schema(value_type = KeyCounts)]
    keys: Json<KeyCounts>,
    /// Incremented by each change of the settings of the user.
    #[serde(skip)]
    pub version: i64,
}

/// The query of users, from its condition on.
macro_rules! select_users {
    ($rest:tt, $($argument:expr),+) => {
        sqlx::query_as!(
            UserView,
            r#"select id as "id!", email as "email!", attributes ->> 'external_id' as external_id,
                coalesce(attributes -> 'metadata', '{}') as "metadata!: Json<Metadata>", time_zone, plan, balance as "balance!", metered as "metered!", refill,
                refill_at as "refill_at: Timestamp", created_at as "created_at!", version as "version!",
                jsonb_build_object('live', live_keys, 'total', total_keys) as "keys!: Json<KeyCounts>"
            from users_with_counts where "# + $rest,
            $($argument),+
        )
    };
}

/// Reads one.
pub async fn get(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Option<UserView>, ApiError> {
    Ok(select_users!("id = $1", id).fetch_optional(executor).await?)
}

/// Reads users by address: at most `limit` whose address starts with `prefix` and is greater than `after`, or only the user
/// with the address `email` or this external id.
pub async fn list(
    pool: &PgPool,
    email: Option<&Email>,
    external_id: Option<&str>,
    prefix: &str,
    after: &str,
    limit: i64,
) -> Result<Vec<UserView>, ApiError> {
    let users = select_users!(
        "email > $3 and starts_with(email, $2) and ($1::text is null or email = $1)
            and ($5::text is null or id in (select id from user_preferences where attributes ->> 'external_id' = $5))
        order by email limit $4",
        email.map(Email::as_str),
        prefix,
        after,
        limit,
        external_id
    );
    Ok(users.fetch_all(pool).await?)
}

/// Creates a user, or finds the user with this address. Says whether the user is new.
pub async fn create(
    change: &mut Change,
    email: &Email,
    attributes: &AttributesPatch,
) -> Result<(Uuid, bool), ApiError> {
    let (user, is_new) = lock_or_create_user(change, email).await?;
    if is_new {
        set_attributes(change, user.id, attributes).await?;
        let detail = attributes.column().unwrap_or_else(|| json!({}));
        change.record(AuditEvent::on("user.create", email.as_str(), detail)).await?;
    }
    Ok((user.id, is_new))
}

/// Sets the address of a user, whose row is locked, also in the audit trail. Says whether that was a change. 409 if another user
/// has the address.
pub async fn set_email(connection: &mut PgConnection, user: &LockedUser, email: &Email) -> Result<bool, ApiError> {
    if user.email == email.as_str() {
        return Ok(false);
    }
    let changed = sqlx::query!("update user_preferences set email = $2 where id = $1", user.id, email.as_str())
        .execute(&mut *connection)
        .await;
    changed.map_err(|error| match error.as_database_error().and_then(|error| error.constraint()) {
        Some("user_preferences_email_key") => {
            ApiError::Conflict(format!("Another user has the address {}.", email.as_str()))
        }
        _ => error.into(),
    })?;
    rename_in_audit(connection, &user.email, email.as_str(), false).await?;
    Ok(true)
}

/// Changes the attributes of a user, whose row is locked. Says whether that was a change. 409 if another user has the external
/// id.
pub async fn set_attributes(
    connection: &mut PgConnection,
    id: Uuid,
    attributes: &AttributesPatch,
) -> Result<bool, ApiError> {
    let Some(merge) = attributes.merge() else { return Ok(false) };
    let changed = sqlx::query!(
        "update user_preferences set attributes = merge_attributes(attributes, $2)
        where id = $1 and attributes is distinct from merge_attributes(attributes, $2)",
        id,
        merge
    )
    .execute(connection)
    .await;
    let changed = changed.map_err(|error| match error.as_database_error().and_then(|error| error.constraint()) {
        Some("user_preferences_external_id") => {
            ApiError::Conflict("Another user has this external_id. Give each user their own.".into())
        }
        _ => error.into(),
    })?;
    Ok(changed.rows_affected() > 0)
}

/// Sets or clears the time zone of a user, whose row is locked. Says whether that was a change. Quotas in that time zone begin
/// new windows.
pub async fn set_time_zone(connection: &mut PgConnection, id: Uuid, time_zone: Option<&str>) -> Result<bool, ApiError> {
    let changed = sqlx::query!(
        "update user_preferences set time_zone = $2 where id = $1 and time_zone is distinct from $2",
        id,
        time_zone
    )
    .execute(&mut *connection)
    .await?;
    apply_if_changed(connection, id, changed.rows_affected()).await
}

/// Reads the time zone of a user, UTC if the user has none or does not exist.
pub async fn time_zone(pool: &PgPool, id: Uuid) -> Result<String, ApiError> {
    let zone =
        sqlx::query_scalar!(r#"select coalesce(time_zone, 'UTC') as "zone!" from user_preferences where id = $1"#, id);
    Ok(zone.fetch_optional(pool).await?.unwrap_or_else(|| "UTC".into()))
}

/// Sets or clears the plan of a user, whose row is locked. Says whether that was a change. 400 for an unknown plan.
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
    apply_if_changed(connection, id, changed.rows_affected()).await
}

/// Copies the quotas that apply now to the keys of a user if a row was changed. Says whether one was.
async fn apply_if_changed(connection: &mut PgConnection, id: Uuid, rows: u64) -> Result<bool, ApiError> {
    if rows > 0 {
        apply_quotas(connection, Whose::Owner(id)).await?;
    }
    Ok(rows > 0)
}
