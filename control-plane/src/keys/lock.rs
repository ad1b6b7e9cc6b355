//! Locks of keys. Changes take their locks in one order, so that no two of them deadlock (the whole order is in
//! `migrations/0001_schema.sql`):
//!
//! 1. rows of users (of several: by id), see [`crate::users::lock`];
//! 2. rows of roles and plans, see [`crate::definitions::store`];
//! 3. `store_state`, by `lock_store` or by a trigger with the first change of a key;
//! 4. rows of keys.
//!
//! Pools and quotas come last, where usage is booked or Envoys ask for allowances: see `metering/booking.rs` and
//! [`crate::allowances`].

use sqlx::PgConnection;
use uuid::Uuid;

use super::model::Key;
use super::read::get;
use crate::error::ApiError;

/// A key that no other transaction changes until this one ends.
#[derive(Debug)]
pub struct LockedKey(Key);

impl std::ops::Deref for LockedKey {
    type Target = Key;

    fn deref(&self) -> &Key {
        &self.0
    }
}

/// Takes the lock that orders all changes that filters see, then reads the key. Takes no revision: if nothing is changed
/// afterwards, no filter is woken.
pub async fn lock_key(connection: &mut PgConnection, id: Uuid) -> Result<Option<LockedKey>, ApiError> {
    lock_store(connection).await?;
    Ok(get(connection, id).await?.map(LockedKey))
}

/// Takes the lock of `store_state`.
pub(super) async fn lock_store(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("select one from store_state for no key update").fetch_one(connection).await.map(|_| ())
}
