//! `POST /v1/keys/{id}/rotate`.

use axum::http::StatusCode;
use axum::response::Response;
use contract::json::null_is_default;
use serde::Deserialize;
use utoipa::ToSchema;

use super::view::CreateReply;
use super::{ById, lock, not_found, show};
use crate::api::call::Call;
use crate::api::idempotency::{IdempotentRequest, IdempotentResponse};
use crate::api::openapi::{Conflict, IdempotencyKey, IfMatch};
use crate::domain::Preconditions;
use crate::error::ApiError;
use crate::keys::daily_limit::{self, Act};
use crate::keys::{self, read};

/// How to rotate. All of it may be left out.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"grace_seconds": 86_400}))]
pub struct RotateBody {
    /// For how many seconds the old secret goes on working, at most thirty days; not at all unless given.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = 86_400, minimum = 0, maximum = 2_592_000, default = 0)]
    grace_seconds: i64,
}

/// Give a key a new secret.
///
/// The key keeps its kind, expiry, limits, credits and usage. The old secret works until the grace period ends.
#[utoipa::path(
    operation_id = "rotateKey",
    post, path = "/v1/keys/{id}/rotate", tag = "keys",
    request_body(content = Option<RotateBody>),
    params(ById, IdempotencyKey, IfMatch),
    responses(
        Conflict,
        (status = 201, description = "The key with its new secret. No later response contains the secret", body = CreateReply),
    )
)]
pub async fn rotate(
    Call { app, caller, path }: Call<ById>,
    preconditions: Preconditions,
    mut request: IdempotentRequest,
) -> Result<Response, ApiError> {
    let body: RotateBody = request.body_or_default().await?;
    let grace = keys::rotate::parse_grace(body.grace_seconds)?;
    caller.require_manager()?;
    let response = request.respond(&app.writer, &caller, async |change| {
        if !caller.is_admin() {
            daily_limit::take(change, caller.owner_id, Act::Create, app.owner_keys_per_day).await?;
        }
        let key = lock(change, &caller, path.id, &preconditions).await?;
        caller.require_rotatable(key.id, key.generation)?;
        let secret = keys::rotate::rotate(change, &key, grace).await?;
        let key = read::get(&mut **change, path.id).await?.ok_or_else(|| not_found(path.id))?;
        let (id, version) = (key.id, key.version);
        let reply = CreateReply { secret, view: show(&mut **change, key).await? };
        Ok(IdempotentResponse::new(StatusCode::CREATED, &reply)?.of_key(id, version))
    });
    response.await
}
