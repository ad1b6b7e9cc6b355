//! All that belongs to a user, below `/v1/users`: an address comes in, all of its keys are revoked.

#![allow(unused_qualifications, reason = "what utoipa makes of the handlers' arguments")]

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::extract::{Json, Path};
use super::user::ByEmail;
use crate::App;
use crate::auth::Caller;
use crate::error::{ApiError, Problem};
use crate::key::domain::Email;
use crate::key::revoke::revoke_all;

/// What became of a user's keys.
#[derive(Debug, Serialize, ToSchema)]
pub struct RevokeKeysReply {
    /// Keys that were revoked now.
    #[schema(minimum = 0)]
    revoked: i64,
    /// Keys with the scope admin or sync, which only an admin's key revokes.
    #[schema(minimum = 0)]
    kept: i64,
}

/// Revoke all keys of a user for good, the caller's own among them.
///
/// # Errors
/// 400, 401, 403, 404, 429, 503.
#[utoipa::path(
    post, path = "/v1/users/{email}/revoke-keys", tag = "users", params(ByEmail), security(("api_key" = [])),
    responses(
        (status = 200, description = "How many were revoked", body = RevokeKeysReply),
        (status = 400, description = "Not an email address", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "Another user's keys", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn revoke_keys(
    State(app): State<App>,
    caller: Caller,
    Path(path): Path<ByEmail>,
) -> Result<Json<RevokeKeysReply>, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let mut transaction = app.pool.begin().await?;
    let all = revoke_all(&mut transaction, &caller.actor, &email, caller.is_admin()).await?;
    let all = all.ok_or_else(|| ApiError::NotFound(format!("There is no user {email}.")))?;
    transaction.commit().await?;
    app.store.nudge();
    Ok(Json(RevokeKeysReply { revoked: all.revoked, kept: all.kept }))
}
