//! Making, changing and revoking keys: a body or an id comes in, the key goes out, its secret once. Refused are scopes
//! that the caller does not have to give, and changes of a key that was revoked.

#![allow(unused_qualifications, reason = "what utoipa makes of the handlers' arguments")]

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::key::{KeyKind, Secret};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{ById, KeyView, managed};
use crate::App;
use crate::auth::Caller;
use crate::error::{ApiError, Problem};
use crate::http::extract::{Json, Path};
use crate::http::user::reveal;
use crate::key::domain::{Email, KeyName, RateLimitBody, Scopes, parse_expiry, parse_rate_limits};
use crate::key::store::{self, NewKey};

/// Which environments a key is for. Filters treat both alike.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `sk_live_…`
    #[default]
    Live,
    /// `sk_test_…`
    Test,
}

/// A key to be made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateBody {
    /// Whom the key is for.
    #[schema(example = "user@example.com", max_length = 254)]
    email: String,
    /// What people call it.
    #[schema(example = "Production Key", min_length = 1, max_length = 100)]
    name: String,
    /// Live unless given.
    #[serde(default)]
    #[schema(inline)]
    kind: Kind,
    /// Scopes to grant: at most 32, each of 1 to 64 characters out of a-z, 0-9 and `: _ . * -`.
    #[serde(default)]
    #[schema(example = json!(["orders:read"]), max_items = 32)]
    scopes: Vec<String>,
    /// Its own rate limits, at most 8; without any the filter's default applies.
    #[serde(default)]
    #[schema(max_items = 8)]
    rate_limits: Vec<RateLimitBody>,
    /// When it ends: RFC 3339, at most ten years from now. Not with `expires_in_seconds`.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// After how many seconds it ends, at most ten years. Not with `expires_at`.
    #[schema(minimum = 1, maximum = 315_360_000)]
    expires_in_seconds: Option<i64>,
}

/// A new key.
#[derive(Debug, Serialize, ToSchema)]
pub struct CreateReply {
    /// The whole key, told this once.
    #[serde(serialize_with = "reveal")]
    #[schema(value_type = String)]
    key: Secret,
    /// What there is to see of it from now on.
    #[serde(flatten)]
    view: KeyView,
}

/// What to change of a key: at least one field.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchBody {
    /// What people call it.
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
    /// Whether it is switched off.
    disabled: Option<bool>,
}

/// Make a key. One that a user's own key makes ends no later than that and keeps to its rate limits.
///
/// # Errors
/// 400, 401, 403, 409, 413, 415, 429, 503.
#[utoipa::path(
    post, path = "/v1/keys", tag = "keys", request_body = CreateBody, security(("api_key" = [])),
    responses(
        (status = 201, description = "The new key, its secret told this once", body = CreateReply,
            headers(("location" = String, description = "Where to find the key"))),
        (status = 400, description = "A field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "Not the caller's to give", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The user has too many keys", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Body too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Body not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    Json(body): Json<CreateBody>,
) -> Result<Response, ApiError> {
    let now = OffsetDateTime::now_utc();
    let mut new = NewKey {
        email: Email::parse(&body.email)?,
        name: KeyName::parse("name", &body.name)?,
        kind: match body.kind {
            Kind::Live => KeyKind::Live,
            Kind::Test => KeyKind::Test,
        },
        scopes: Scopes::parse(body.scopes)?,
        rate_limits: parse_rate_limits(body.rate_limits)?,
        expires_at: parse_expiry(body.expires_at.as_deref(), body.expires_in_seconds, now)?,
        at_most: None,
    };
    caller.require_owner_or_admin(&new.email)?;
    caller.require_grantable(&new.scopes)?;
    caller.bind(&mut new);
    let (key, secret) = store::create(&app.pool, new).await?;
    app.store.nudge();
    let location = format!("/v1/keys/{}", key.id);
    let reply = Json(CreateReply { key: secret, view: KeyView::of(key, now) });
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], reply).into_response())
}

/// Rename a key, switch it off or on.
///
/// # Errors
/// 400, 401, 403, 404, 409, 413, 415, 429, 503.
#[utoipa::path(
    patch, path = "/v1/keys/{id}", tag = "keys", params(ById), request_body = PatchBody, security(("api_key" = [])),
    responses(
        (status = 200, description = "The key as it is now", body = KeyView),
        (status = 400, description = "A field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key, or one for an admin to change", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The key is revoked", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Body too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Body not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn patch(
    State(app): State<App>,
    caller: Caller,
    Path(path): Path<ById>,
    Json(body): Json<PatchBody>,
) -> Result<Json<KeyView>, ApiError> {
    let name = body.name.map(|name| KeyName::parse("name", &name)).transpose()?;
    if name.is_none() && body.disabled.is_none() {
        return Err(ApiError::Invalid { field: None, detail: "Give name, disabled or both.".into() });
    }
    caller.require_changeable(&managed(&app, &caller, path.id).await?.scopes)?;
    if !store::change(&app.pool, path.id, name.as_ref(), body.disabled).await? {
        return Err(ApiError::Conflict("This key is revoked for good and cannot be changed.".into()));
    }
    app.store.nudge();
    let key = managed(&app, &caller, path.id).await?;
    Ok(Json(KeyView::of(key, OffsetDateTime::now_utc())))
}

/// Revoke a key for good. To revoke it once more changes nothing.
///
/// # Errors
/// 400, 401, 403, 404, 429, 503.
#[utoipa::path(
    delete, path = "/v1/keys/{id}", tag = "keys", params(ById), security(("api_key" = [])),
    responses(
        (status = 204, description = "The key is revoked"),
        (status = 400, description = "Not an id", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key, or one for an admin to change", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn revoke(State(app): State<App>, caller: Caller, Path(path): Path<ById>) -> Result<StatusCode, ApiError> {
    let key = managed(&app, &caller, path.id).await?;
    caller.require_changeable(&key.scopes)?;
    store::revoke(&app.pool, key.id).await?;
    app.store.nudge();
    Ok(StatusCode::NO_CONTENT)
}
