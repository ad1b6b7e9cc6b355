//! `/v1/keys`: all keys, several per user. A key that the caller does not manage is answered like a key that does not exist.

pub mod view;

pub mod create;
pub mod get;
pub mod import;
pub mod list;
pub mod lookup;
pub mod quota;
pub mod revoke;
pub mod rotate;
pub mod unknown;
pub mod update;
pub mod usage;

use serde::Deserialize;
use sqlx::PgExecutor;
use time::OffsetDateTime;
use utoipa::IntoParams;
use uuid::Uuid;

use self::view::KeyView;
use crate::App;
use crate::api::auth::Caller;
use crate::change::Change;
use crate::domain::Preconditions;
use crate::error::ApiError;
use crate::keys::effective::read_effective;
use crate::keys::lock::{LockedKey, lock_key};
use crate::keys::model::Key;
use crate::keys::read;
use crate::keys::revoke::set_caller_address;

/// Which key.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ById {
    /// The id of the key.
    id: Uuid,
}

/// Shows keys. Their permissions are read after them: an ETag that is older than the rest of its key makes a change fail, and
/// does not overwrite another.
async fn show_all(executor: impl PgExecutor<'_>, keys: Vec<Key>) -> Result<Vec<KeyView>, ApiError> {
    let ids: Vec<_> = keys.iter().map(|key| key.id).collect();
    let mut effective = read_effective(executor, &ids).await?;
    let now = OffsetDateTime::now_utc();
    let view = |key: Key| effective.remove(&key.id).map(|effective| KeyView::new(key, effective, now));
    Ok(keys.into_iter().filter_map(view).collect())
}

async fn show(executor: impl PgExecutor<'_>, key: Key) -> Result<KeyView, ApiError> {
    let id = key.id;
    let view = show_all(executor, vec![key]).await?.pop();
    view.ok_or_else(|| ApiError::Internal(format!("key {id} is gone")))
}

/// Reads a key that the caller manages.
async fn managed(app: &App, caller: &Caller, id: Uuid) -> Result<Key, ApiError> {
    caller.require_manager()?;
    let key = read::get(&app.pool, id).await?.filter(|key| caller.manages(key.owner_id));
    key.ok_or_else(|| not_found(id))
}

/// Locks a key that the caller may change, and checks its version. The key is read twice: a caller without permission must not
/// take the lock, and the key may change until it is locked.
async fn lock(
    change: &mut Change,
    caller: &Caller,
    id: Uuid,
    preconditions: &Preconditions,
) -> Result<LockedKey, ApiError> {
    caller.require_manager()?;
    let may = |key: &Key| {
        if caller.manages(key.owner_id) { caller.require_changeable(&key.scopes) } else { Err(not_found(id)) }
    };
    may(&read::get(&mut **change, id).await?.ok_or_else(|| not_found(id))?)?;
    let locked = lock_key(change, id).await?.ok_or_else(|| not_found(id))?;
    may(&locked)?;
    preconditions.check(Some(locked.version))?;
    set_caller_address(change, &locked.scopes).await?;
    Ok(locked)
}

fn not_found(id: Uuid) -> ApiError {
    ApiError::NotFound(format!("There is no key {id}."))
}
