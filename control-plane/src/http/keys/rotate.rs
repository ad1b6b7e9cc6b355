//! Rotating keys: an id and a grace come in, the new secret goes out once; an old secret is cut off when nobody uses it any
//! more. Refused are keys that open nothing any more.

#![allow(unused_qualifications, reason = "what utoipa makes of the handlers' arguments")]

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use contract::json::null_is_default;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::write::{CreateReply, Kind};
use super::{ById, held, show, there_is_none};
use crate::App;
use crate::auth::Caller;
use crate::condition::{Condition, etag};
use crate::error::{ApiError, Problem};
use crate::http::extract::Path;
use crate::http::once::{Answer, Once};
use crate::key::allowance::{self, Act};
use crate::key::{rotate as rotation, store};
use crate::transaction::transact;

/// How to rotate. All of it may be left out.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"grace_seconds": 86_400}))]
pub struct RotateBody {
    /// For how many seconds the old secret goes on working, at most thirty days; not at all unless given.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = 86_400, minimum = 0, maximum = 2_592_000, default = 0)]
    grace_seconds: i64,
    /// Of the new secret; live unless given.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, inline)]
    kind: Kind,
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

/// Give a key a new secret.
///
/// The key keeps its expiry, limits, credits and usage. The old secret works until the grace period ends.
#[utoipa::path(
    operation_id = "rotateKey",
    post, path = "/v1/keys/{id}/rotate", tag = "keys", security(("api_key" = [])),
    request_body(content = Option<RotateBody>),
    params(
        ById,
        ("Idempotency-Key" = Option<String>, Header, description = "Names the request, so that it can be sent again"),
        ("If-Match" = Option<String>, Header, description = "The ETag that the change is meant for"),
    ),
    responses(
        (status = 201, description = "The key, its new secret told this once", body = CreateReply,
            headers(("location" = String, description = "Where to find the key"), ("etag" = String, description = "The version of the key"))),
        (status = 400, description = "A field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key, or one for an admin to change", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The key is revoked, has expired, or has too many old secrets; or the same request is being worked on", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "The key was changed since", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Body too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Body not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Another request had this Idempotency-Key", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls, or too many keys and rotations of this user in 24 hours", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn rotate(
    State(app): State<App>,
    caller: Caller,
    condition: Condition,
    Path(path): Path<ById>,
    mut once: Once,
) -> Result<Response, ApiError> {
    let body: RotateBody = once.body_or_default().await?;
    let grace = rotation::parse_grace(body.grace_seconds)?;
    caller.require_manager()?;
    let response = once.answer(&app.pool, &caller, async |connection| {
        if !caller.is_admin() {
            allowance::take(connection, caller.owner_id, Act::Make, app.bounds.owner_keys_per_day).await?;
        }
        let key = held(connection, &caller, path.id, &condition).await?;
        caller.require_rotatable(key.id, key.generation)?;
        let secret = rotation::rotate(connection, &caller.actor, &key, body.kind.into(), grace).await?;
        let key = store::get(&mut *connection, path.id).await?.ok_or_else(|| there_is_none(path.id))?;
        let (location, tag) = (format!("/v1/keys/{}", key.id), etag(key.version));
        let reply = CreateReply { key: secret, view: show(connection, key).await? };
        Ok(Answer::new(StatusCode::CREATED, &reply)?.at(location).tagged(tag))
    });
    let response = response.await?;
    app.store.nudge();
    Ok(response)
}

/// Revoke an old secret of a key.
///
/// Revoking a revoked secret changes nothing.
#[utoipa::path(
    operation_id = "revokeKeySecret",
    delete, path = "/v1/keys/{id}/secrets/{generation}", tag = "keys", security(("api_key" = [])),
    params(BySecret, ("If-Match" = Option<String>, Header, description = "The ETag that the change is meant for")),
    responses(
        (status = 204, description = "The secret has ended"),
        (status = 400, description = "Not an id or not a number", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key, or one for an admin to change", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key or secret", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It is the present secret", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "The key was changed since", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn cut_off(
    State(app): State<App>,
    caller: Caller,
    condition: Condition,
    Path(path): Path<BySecret>,
) -> Result<StatusCode, ApiError> {
    let cut_off = transact(&app.pool, async |connection| {
        let key = held(connection, &caller, path.id, &condition).await?;
        if !rotation::cut_off(connection, &caller.actor, &key, path.generation).await? {
            let detail = format!("There is no secret {} of the key {}.", path.generation, path.id);
            return Err(ApiError::NotFound(detail));
        }
        Ok(())
    });
    cut_off.await?;
    app.store.nudge();
    Ok(StatusCode::NO_CONTENT)
}
