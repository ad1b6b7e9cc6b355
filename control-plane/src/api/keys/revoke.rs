//! `DELETE /v1/keys/{id}`.

use axum::http::StatusCode;

use super::{ById, lock};
use crate::api::call::Call;
use crate::api::openapi::{Conflict, IfMatch};
use crate::domain::Preconditions;
use crate::error::ApiError;
use crate::keys;

/// Revoke a key.
///
/// Revoking a revoked key changes nothing.
#[utoipa::path(
    operation_id = "revokeKey",
    delete, path = "/v1/keys/{id}", tag = "keys", params(ById, IfMatch),
    responses(Conflict, (status = 204, description = "The key is revoked"))
)]
pub async fn revoke(
    Call { app, caller, path }: Call<ById>,
    preconditions: Preconditions,
) -> Result<StatusCode, ApiError> {
    let revoked = app.writer.change(&caller.actor, async |change| {
        let key = lock(change, &caller, path.id, &preconditions).await?;
        keys::revoke::revoke(change, &key).await
    });
    revoked.await?;
    Ok(StatusCode::NO_CONTENT)
}
