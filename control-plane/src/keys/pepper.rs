//! Checks that the pepper of imported keys is the one that they were imported with.

use contract::hash::KeyHash;
use contract::pepper::Pepper;
use sqlx::PgPool;

use crate::config::PEPPER;

/// What stands for the pepper in the database is the hash of this under it.
const CHECKED: &[u8] = b"portcullis: the pepper of imported keys";

/// Compares the pepper with the one that the database knows of, which is this one if there was none.
///
/// # Errors
/// Those of the database. Within: if it is another, or none where there was one.
pub async fn check(pool: &PgPool, pepper: Option<&Pepper>) -> Result<Result<(), String>, sqlx::Error> {
    let ours = pepper.map(|pepper| pepper.hash(&KeyHash::of(CHECKED)).0.to_vec());
    sqlx::query!(
        "update store_state set pepper_check = $1 where pepper_check is null and $1::bytea is not null",
        ours.as_deref()
    )
    .execute(pool)
    .await?;
    let known = sqlx::query_scalar!("select pepper_check from store_state").fetch_one(pool).await?;
    Ok(match (known, ours) {
        (Some(known), Some(ours)) if known != ours => {
            Err(format!("{PEPPER}: differs from the pepper that keys were imported with; set that one"))
        }
        (Some(_), None) => Err(format!(
            "{PEPPER}: is not set, but keys may have been imported with a pepper; set it, or set store_state.pepper_check to null in SQL to \
             give those keys up"
        )),
        _ => Ok(()),
    })
}
