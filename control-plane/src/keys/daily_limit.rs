//! Daily limits of an owner: on keys created and rotated, and on changes of keys. Each leaves rows in the database,
//! and most wake every filter. Revocations do not count, so nothing keeps a user from revoking a stolen key.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::error::ApiError;

/// Changes of keys per key that may be created.
const CHANGES: u32 = 10;

/// A counted action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// A key is created or rotated.
    Create,
    /// A key is changed in any way but rotation and revocation.
    Change,
}

/// Counts one action of the keys of an owner, in the 24 hours since the first. It locks the row of the owner, so call it before
/// the first change of a key. If the transaction fails, nothing is counted.
pub async fn take(connection: &mut PgConnection, owner_id: Uuid, act: Act, per_day: u32) -> Result<(), ApiError> {
    let signed = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    let changes = per_day.saturating_mul(CHANGES);
    let (make, change) = match act {
        Act::Create => (1, 0),
        Act::Change => (0, 1),
    };
    let taken = sqlx::query!(
        "update user_preferences set
            makes = case when makes_since > now() - interval '1 day' then makes + $2 else $2 end,
            changes = case when makes_since > now() - interval '1 day' then changes + $3 else $3 end,
            makes_since = case when makes_since > now() - interval '1 day' then makes_since else now() end
        where id = $1 and (
            makes_since is null or makes_since <= now() - interval '1 day'
            or (makes + $2 <= $4 and changes + $3 <= $5)
        )",
        owner_id,
        make,
        change,
        signed(per_day),
        signed(changes)
    )
    .execute(&mut *connection)
    .await?;
    if taken.rows_affected() > 0 {
        return Ok(());
    }
    let left_s = sqlx::query_scalar!(
        r#"select greatest(ceil(extract(epoch from makes_since + interval '1 day' - now())), 1)::bigint as "left!"
        from user_preferences where id = $1"#,
        owner_id
    )
    .fetch_one(connection)
    .await?;
    let retry_after_s = left_s.cast_unsigned();
    let most = match act {
        Act::Create => format!("make {per_day} keys and rotations"),
        Act::Change => format!("change keys {changes} times"),
    };
    let detail = format!(
        "The keys of this user may {most} in 24 hours; this limit is reached. Retry in {retry_after_s} seconds, or ask \
         an admin."
    );
    Err(ApiError::BoundReached { detail, retry_after_s })
}
