//! Changes of a key: the fields to set come in, one statement sets them. What filters do not see is set without waking
//! them.

use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::domain::{KeyName, Timestamp};
use super::quota::{Whose, refresh_starters};
use super::store::Held;
use crate::audit::{self, Actor, Deed};
use crate::error::ApiError;

/// What to set; what is none stays as it is.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// What people call it.
    pub name: Option<KeyName>,
    /// Whether it is switched off.
    pub disabled: Option<bool>,
    /// When it ends, if ever.
    pub expires_at: Option<Option<OffsetDateTime>>,
}

impl Changes {
    /// Whether there is nothing to set.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        let Self { name, disabled, expires_at } = self;
        name.is_none() && disabled.is_none() && expires_at.is_none()
    }

    /// Without what the key has already.
    fn beyond(mut self, key: &Held) -> Self {
        self.name = self.name.filter(|name| name.as_str() != key.name);
        self.disabled = self.disabled.filter(|disabled| *disabled != key.disabled);
        self.expires_at = self.expires_at.filter(|end| *end != key.expires_at);
        self
    }

    /// Whether filters see any of it.
    const fn seen(&self) -> bool {
        self.disabled.is_some() || self.expires_at.is_some()
    }

    /// What the audit trail tells: each field that changes, as it was and as it is.
    fn told(&self, key: &Held) -> Value {
        let mut told = Map::new();
        let end = |end: Option<OffsetDateTime>| end.map(Timestamp::from);
        if let Some(name) = &self.name {
            told.insert("name".into(), json!({"from": key.name, "to": name.as_str()}));
        }
        if let Some(disabled) = self.disabled {
            told.insert("disabled".into(), json!({"from": key.disabled, "to": disabled}));
        }
        if let Some(expires_at) = self.expires_at {
            told.insert("expires_at".into(), json!({"from": end(key.expires_at), "to": end(expires_at)}));
        }
        Value::Object(told)
    }
}

/// Changes a key that is held. What an admin has switched off, only an admin switches on again.
///
/// # Errors
/// 403 for a key that is an admin's to switch on; 409 for one that was revoked; those of the database.
pub async fn change(
    connection: &mut PgConnection,
    actor: &Actor,
    by_admin: bool,
    key: &Held,
    changes: Changes,
) -> Result<(), ApiError> {
    if key.revoked_at.is_some() {
        return Err(ApiError::Conflict("This key is revoked for good and cannot be changed.".into()));
    }
    match changes.disabled {
        Some(true) if key.disabled && !key.disabled_by_admin && by_admin => keep_off(connection, actor, key).await?,
        Some(false) if key.disabled_by_admin && !by_admin => {
            let detail = "An admin has switched this key off: ask one to switch it on again.";
            return Err(ApiError::Forbidden(detail.into()));
        }
        _ => {}
    }
    if changes.expires_at.is_some() {
        return_to_filters(connection, key.id).await?;
    }
    let changes = changes.beyond(key);
    if changes.is_empty() {
        return Ok(());
    }
    let name = changes.name.as_ref().map(KeyName::as_str);
    // A statement that names a column that filters see wakes them, even if it sets what stands there.
    if changes.seen() {
        sqlx::query!(
            "update api_keys set name = coalesce($2, name), disabled = coalesce($3, disabled),
                disabled_by_admin = case when $3 is null then disabled_by_admin else $3 and $4 end,
                expires_at = case when $5 then $6 else expires_at end
            where id = $1",
            key.id,
            name,
            changes.disabled,
            by_admin,
            changes.expires_at.is_some(),
            changes.expires_at.flatten()
        )
        .execute(&mut *connection)
        .await?;
    } else {
        sqlx::query!("update api_keys set name = coalesce($2, name) where id = $1", key.id, name)
            .execute(&mut *connection)
            .await?;
    }
    audit::note(connection, actor, Deed::to_key("key.change", key.id, changes.told(key))).await?;
    Ok(())
}

/// Lets filters know a key again that they forgot after it expired.
async fn return_to_filters(connection: &mut PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    let forgotten =
        sqlx::query_scalar!("select withdrawn from api_keys where id = $1", id).fetch_one(&mut *connection).await?;
    if forgotten {
        sqlx::query!("update api_keys set withdrawn = false where id = $1", id).execute(&mut *connection).await?;
        refresh_starters(connection, Whose::Keys(&[id])).await?;
    }
    Ok(())
}

/// Makes what its owner has switched off an admin's to switch on.
async fn keep_off(connection: &mut PgConnection, actor: &Actor, key: &Held) -> Result<(), ApiError> {
    sqlx::query!("update api_keys set disabled_by_admin = true where id = $1", key.id)
        .execute(&mut *connection)
        .await?;
    let detail = json!({"disabled_by_admin": {"from": false, "to": true}});
    audit::note(connection, actor, Deed::to_key("key.change", key.id, detail)).await?;
    Ok(())
}
