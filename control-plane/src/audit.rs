//! Who did what: a change and its actor come in, a row of the audit trail goes out, in the transaction of the change, so
//! that neither is there without the other. No secret is ever part of it.

use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

/// Who changes something.
#[derive(Clone, Debug, Default)]
pub struct Actor {
    /// The key that called; none for the command line and for what happens by itself.
    pub key_id: Option<Uuid>,
    /// Its owner's address.
    pub email: Option<String>,
    /// Where the call came from.
    pub address: Option<String>,
    /// The id of the request.
    pub request_id: Option<String>,
}

impl Actor {
    /// The command line, or the control plane itself.
    #[must_use]
    pub fn system() -> Self {
        Self::default()
    }
}

/// What was done. The names are stable: people search for them.
#[derive(Clone, Debug)]
pub struct Deed<'a> {
    /// What, as `key.create`.
    pub action: &'static str,
    /// To which key, if it was one.
    pub key_id: Option<Uuid>,
    /// To what else: a user's address, the name of a role or plan.
    pub target: Option<&'a str>,
    /// What is worth knowing beside: what was set, how many were touched.
    pub detail: Value,
}

impl<'a> Deed<'a> {
    /// Something done to a key.
    #[must_use]
    pub const fn to_key(action: &'static str, key_id: Uuid, detail: Value) -> Self {
        Self { action, key_id: Some(key_id), target: None, detail }
    }

    /// Something done to anything else.
    #[must_use]
    pub const fn to(action: &'static str, target: &'a str, detail: Value) -> Self {
        Self { action, key_id: None, target: Some(target), detail }
    }
}

/// Writes it down.
///
/// # Errors
/// Those of the database.
pub async fn note(connection: &mut PgConnection, actor: &Actor, deed: Deed<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "insert into audit (actor_key_id, actor_email, address, request_id, action, key_id, target, detail)
        values ($1, $2, $3, $4, $5, $6, $7, $8)",
        actor.key_id,
        actor.email,
        actor.address,
        actor.request_id,
        deed.action,
        deed.key_id,
        deed.target,
        deed.detail
    )
    .execute(connection)
    .await?;
    Ok(())
}
