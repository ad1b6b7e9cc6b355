//! Locks of users. Keys, credits and the plan of one user change one after the other.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::domain::Email;
use crate::error::ApiError;

/// A user whose row is locked until the transaction ends.
#[derive(Clone, Debug)]
pub struct LockedUser {
    pub id: Uuid,
    pub email: String,
    pub primary_key_id: Option<Uuid>,
    pub balance: i64,
    pub metered: bool,
    pub credits_fill: i32,
    /// The version of the user's settings.
    pub version: i64,
}

/// The id of the user with this address.
pub async fn find_user(connection: &mut PgConnection, email: &Email) -> Result<Option<Uuid>, ApiError> {
    let id = sqlx::query_scalar!("select id from user_preferences where email = $1", email.as_str());
    Ok(id.fetch_optional(connection).await?)
}

/// Locks a user. 404 if there is none.
pub async fn lock_user(connection: &mut PgConnection, id: Uuid) -> Result<LockedUser, ApiError> {
    let user = sqlx::query_as!(
        LockedUser,
        "select id, email, primary_key_id, balance, metered, credits_fill, version from user_preferences
        where id = $1 for no key update",
        id
    );
    user.fetch_optional(connection).await?.ok_or_else(|| unknown(id))
}

/// There is no user with this id.
pub fn unknown(id: Uuid) -> ApiError {
    ApiError::NotFound(format!("There is no user {id}."))
}

/// Locks a user, and creates the user first if there is none. Returns whether the user is new.
pub async fn lock_or_create_user(connection: &mut PgConnection, email: &Email) -> Result<(LockedUser, bool), ApiError> {
    let new = Uuid::now_v7();
    let user = sqlx::query_as!(
        LockedUser,
        "insert into user_preferences (id, email) values ($1, $2)
        on conflict (email) do update set email = excluded.email
        returning id, email, primary_key_id, balance, metered, credits_fill, version",
        new,
        email.as_str()
    )
    .fetch_one(connection)
    .await;
    let user = user.map_err(|error| match error.as_database_error().and_then(|error| error.constraint()) {
        // PostgreSQL and Rust may disagree about the lower case of a letter that is new to one of them.
        Some("user_preferences_email_lower") => ApiError::invalid("email", "must be in lower case"),
        _ => error.into(),
    })?;
    let is_new = user.id == new;
    Ok((user, is_new))
}
