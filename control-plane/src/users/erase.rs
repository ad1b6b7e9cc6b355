//! Erasure of a user: revokes the keys, replaces the address and the names, and removes networks, attributes and notes wherever
//! they stand. Ids and counts stay.

use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;
use utoipa::ToSchema;
use uuid::Uuid;

use super::lock::lock_user;
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::error::ApiError;
use crate::keys::revoke::revoke_all;

/// What an erasure did.
#[derive(Debug, Serialize, ToSchema)]
pub struct EraseReply {
    /// What stands in place of the user's address now.
    #[schema(example = "erased-01890a5d-ac96-774b-bcce-b302099a8057@erased.invalid")]
    email: String,
    /// How many keys were revoked.
    #[schema(minimum = 0)]
    revoked: i64,
}

/// Erases a user. 404 if there is no such user, 409 for the last admin key.
pub async fn erase(change: &mut Change, id: Uuid) -> Result<EraseReply, ApiError> {
    let user = lock_user(change, id).await?;
    let email = format!("erased-{id}@erased.invalid");
    // All entries are searched, which can take long. The lock on the store, which changes of other keys need, comes later.
    rename_in_audit(change, &user.email, &email, true).await?;
    erase_attributes_in_audit(change, &email).await?;
    erase_in_audit_of_keys(change, id, &email).await?;
    sqlx::query!(
        "update user_preferences set email = $2, attributes = null, time_zone = null, refill = null, refill_at = null where id = $1",
        id,
        email
    )
    .execute(&mut **change)
    .await?;
    let revoked = revoke_all(change, id, true).await?.revoked;
    erase_in_keys(change, id).await?;
    erase_in_ledger(change, id).await?;
    change.record(AuditEvent::on("user.erase", &email, json!({"revoked": revoked}))).await?;
    Ok(EraseReply { email, revoked })
}

/// Replaces the email address of a user in all entries. So the trail has the present address of each user, and a new user with
/// the old one does not see the entries of the former. `forgets_clients` removes the client addresses of what the user did.
pub(super) async fn rename_in_audit(
    connection: &mut PgConnection,
    old: &str,
    new: &str,
    forgets_clients: bool,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update audit set
            actor_email = case when actor_email = $1 then $2 else actor_email end,
            address = case when actor_email = $1 and $3 then null else address end,
            target = case when target = $1 then $2 else target end,
            detail = replace(detail::text, to_jsonb($1::text)::text, to_jsonb($2::text)::text)::jsonb
        where actor_email = $1 or target = $1 or strpos(detail::text, to_jsonb($1::text)::text) > 0",
        old,
        new,
        forgets_clients
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Removes attributes from the entries about the user, whose address is replaced already.
async fn erase_attributes_in_audit(connection: &mut PgConnection, email: &str) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update audit set detail = (detail - '{external_id, metadata, time_zone}'::text[]) #- '{refill, time_zone}'
        where target = $1 and detail ?| '{external_id, metadata, time_zone, refill}'",
        email
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Removes names, networks, attributes and notes from the entries about keys of the user, whose address is replaced already.
/// Entries outlive the rows of ended keys.
async fn erase_in_audit_of_keys(connection: &mut PgConnection, id: Uuid, email: &str) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"update audit set detail = case when detail ? 'name' then detail || '{"name": "erased"}' else detail end
            - '{allowed_addresses, external_id, metadata, note}'::text[]
        where key_id in (
                select id from api_keys where owner_id = $1
                union all select key_id from audit where detail ->> 'email' = $2 and key_id is not null
            )
            and detail ?| '{name, allowed_addresses, external_id, metadata, note}'"#,
        id,
        email
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn erase_in_keys(connection: &mut PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update api_keys set name = 'erased', networks = '{}', attributes = null, owner_attributes = null,
            owner_time_zone = null
        where owner_id = $1 and (
            name <> 'erased' or networks <> '{}' or coalesce(attributes, owner_attributes) is not null
            or owner_time_zone is not null
        )",
        id
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query!(
        "delete from idempotent_replies where caller_key_id in (select id from api_keys where owner_id = $1)",
        id
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Replaces the notes of bookings. The amounts stay.
async fn erase_in_ledger(connection: &mut PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!("set local portcullis.ledger = 'on'").execute(&mut *connection).await?;
    sqlx::query!(
        "update ledger set note = 'erased' where owner_id = $1 and note not in ('', 'erased') and kind in ('top_up', 'correction')",
        id
    )
    .execute(connection)
    .await?;
    Ok(())
}
