//! `DELETE /v1/keys/{id}`.

use axum::extract::State;
use axum::http::StatusCode;

use super::{ById, lock};
use crate::App;
use crate::api::auth::Caller;
use crate::api::extract::Path;
use crate::api::openapi::ReadErrors;
use crate::api::problem::Problem;
use crate::domain::Preconditions;
use crate::error::ApiError;
use crate::keys;

/// Revoke a key.
///
/// Revoking a revoked key changes nothing.
#[utoipa::path(
    operation_id = "revokeKey",
    delete, path = "/v1/keys/{id}", tag = "keys", security(("api_key" = [])),
    params(ById, ("If-Match" = Option<String>, Header, description = "The ETag that the change is meant for")),
    responses(
        ReadErrors,
        (status = 204, description = "The key is revoked"),
        (status = 403, description = "A key with the scope sync, or a change that only an admin makes", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The last admin key", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "The key was changed since", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn revoke(
    State(app): State<App>,
    caller: Caller,
    preconditions: Preconditions,
    Path(path): Path<ById>,
) -> Result<StatusCode, ApiError> {
    let revoked = app.writer.change(&caller.actor, async |change| {
        let key = lock(change, &caller, path.id, &preconditions).await?;
        keys::revoke::revoke(change, &key).await
    });
    revoked.await?;
    Ok(StatusCode::NO_CONTENT)
}
