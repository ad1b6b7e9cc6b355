//! `DELETE /v1/keys/{id}`.

use axum::extract::State;
use axum::http::StatusCode;

use super::{ById, lock};
use crate::App;
use crate::api::auth::Caller;
use crate::api::extract::Path;
use crate::api::openapi::{Conflict, IfMatch, ReadErrors};
use crate::domain::Preconditions;
use crate::error::ApiError;
use crate::keys;

/// Revoke a key.
///
/// Revoking a revoked key changes nothing.
#[utoipa::path(
    operation_id = "revokeKey",
    delete, path = "/v1/keys/{id}", tag = "keys", security(("api_key" = [])),
    params(ById, IfMatch),
    responses(
        ReadErrors, Conflict,
        (status = 204, description = "The key is revoked"),
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
