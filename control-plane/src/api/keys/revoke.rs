//! `DELETE /v1/keys/{id}` and `DELETE /v1/keys/{id}/secrets/{generation}`.

use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;

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

/// Which secret of which key.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct BySecret {
    /// The key's id.
    id: Uuid,
    /// Which of its secrets, from 1.
    #[param(minimum = 1)]
    generation: i32,
}

/// Revoke an old secret of a key.
///
/// Revoking a revoked secret changes nothing.
#[utoipa::path(
    operation_id = "revokeKeySecret",
    delete, path = "/v1/keys/{id}/secrets/{generation}", tag = "keys", params(BySecret, IfMatch),
    responses(Conflict, (status = 204, description = "The secret has ended"))
)]
pub async fn revoke_secret(
    Call { app, caller, path }: Call<BySecret>,
    preconditions: Preconditions,
) -> Result<StatusCode, ApiError> {
    let revoked = app.writer.change(&caller.actor, async |change| {
        let key = lock(change, &caller, path.id, &preconditions).await?;
        if !keys::rotate::revoke_secret(change, &key, path.generation).await? {
            let detail = format!("Key {} has no secret {}.", path.id, path.generation);
            return Err(ApiError::NotFound(detail));
        }
        Ok(())
    });
    revoked.await?;
    Ok(StatusCode::NO_CONTENT)
}
