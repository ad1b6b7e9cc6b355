//! Checks that the pepper of imported keys is the one that they were imported with.

use contract::hash::KeyHash;
use contract::pepper::Pepper;
use sqlx::PgPool;

use crate::config::PEPPER;

/// The database stores the hash of this text under the pepper.
const CHECKED: &[u8] = b"portcullis: the pepper of imported keys";

#[derive(Debug, thiserror::Error)]
pub enum PepperError {
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("{PEPPER}: {0}")]
    Mismatch(&'static str),
}

/// Compares the pepper with the one that keys were imported with, and remembers it if there was none.
pub async fn check(pool: &PgPool, pepper: Option<&Pepper>) -> Result<(), PepperError> {
    let ours = pepper.map(|pepper| pepper.hash(&KeyHash::of(CHECKED)).0.to_vec());
    sqlx::query!(
        "update store_state set pepper_check = $1 where pepper_check is null and $1::bytea is not null",
        ours.as_deref()
    )
    .execute(pool)
    .await?;
    let known = sqlx::query_scalar!("select pepper_check from store_state").fetch_one(pool).await?;
    match (known, ours) {
        (Some(known), Some(ours)) if known != ours => {
            Err(PepperError::Mismatch("differs from the pepper that keys were imported with; set that one"))
        }
        (Some(_), None) => Err(PepperError::Mismatch(
            "is not set, but keys may have been imported with a pepper; set it, or set store_state.pepper_check to null in SQL \
             to give those keys up",
        )),
        _ => Ok(()),
    }
}
