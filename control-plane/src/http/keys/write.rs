//! Making, changing and revoking keys: a body or an id comes in, the key goes out, its secret once. Refused are scopes
//! that the caller does not have to give, and changes of a key that was revoked.

#![allow(unused_qualifications, reason = "what utoipa makes of the handlers' arguments")]

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::json::null_is_default;
use contract::key::{KeyKind, Secret};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{ById, KeyView, held, show, there_is_none};
use crate::App;
use crate::auth::Caller;
use crate::condition::{Condition, etag};
use crate::error::{ApiError, Problem};
use crate::http::extract::{Json, Path};
use crate::http::once::{Answer, Once};
use crate::http::user::reveal;
use crate::key::allowance::{self, Act};
use crate::key::change::{Changes, change};
use crate::key::domain::{Email, KeyName, RateLimitBody, Scopes, default_expiry, parse_expiry, parse_rate_limits};
use crate::key::permissions::{self, Permissions, Said, said};
use crate::key::quota::QuotaBody;
use crate::key::revoke;
use crate::key::store::{self, Made, NewKey};
use crate::transaction::transact;

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

impl From<Kind> for KeyKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Live => Self::Live,
            Kind::Test => Self::Test,
        }
    }
}

/// A key to be made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"email": "user@example.com", "name": "Production Key", "expires_in_seconds": 86_400}))]
pub struct CreateBody {
    /// Whom the key is for.
    #[schema(example = "user@example.com", max_length = 254)]
    email: String,
    /// What people call it.
    #[schema(example = "Production Key", min_length = 1, max_length = 100)]
    name: String,
    /// Live unless given.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, inline)]
    kind: Kind,
    /// Scopes to grant: at most 32, each of 1 to 64 characters out of a-z, 0-9 and `: _ . * -`.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = json!(["orders:read"]), max_items = 32)]
    scopes: Vec<String>,
    /// Its own rate limits, at most 8; without any the filter's default applies.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_items = 8)]
    rate_limits: Vec<RateLimitBody>,
    /// Names of its roles, at most 16. Set by admins only.
    #[schema(example = json!(["support"]), max_items = 16)]
    roles: Option<Vec<String>>,
    /// The name of its plan; without one that of its owner applies. Set by admins only.
    #[serde(default, deserialize_with = "said")]
    #[schema(value_type = Option<String>, example = "gold", max_length = 64)]
    plan: Option<Option<String>>,
    /// Networks (CIDR) or addresses that it may be used from, at most 32; without any from everywhere.
    #[schema(example = json!(["192.0.2.0/24", "2001:db8::7"]), max_items = 32)]
    allowed_addresses: Option<Vec<String>>,
    /// Its own quota; without one that of its plan applies. Set by admins only.
    #[serde(default, deserialize_with = "said")]
    #[schema(value_type = Option<QuotaBody>)]
    quota: Option<Option<QuotaBody>>,
    /// Credits that a request costs unless its route says otherwise; 1 unless given. Set by admins only.
    #[schema(minimum = 0, maximum = 1_000_000)]
    cost: Option<i64>,
    /// When it ends: RFC 3339, at most ten years from now. Not with `expires_in_seconds`. Without either it never ends, but for
    /// a key with the scope `admin`, which ends after 90 days.
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
    pub(super) key: Secret,
    /// What there is to see of it from now on.
    #[serde(flatten)]
    pub(super) view: KeyView,
}

/// What to change of a key: at least one field.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "Laptop", "disabled": false}))]
pub struct PatchBody {
    /// What people call it.
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
    /// Whether it is switched off.
    disabled: Option<bool>,
    /// When it ends: RFC 3339, at most ten years from now; null: never. Not with `expires_in_seconds`.
    #[serde(default, deserialize_with = "said")]
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Option<String>>,
    /// After how many seconds from now it ends, at most ten years; null: never. Not with `expires_at`.
    #[serde(default, deserialize_with = "said")]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 315_360_000)]
    expires_in_seconds: Option<Option<i64>>,
    /// Names of its roles, at most 16. Set by admins only.
    #[schema(example = json!(["support"]), max_items = 16)]
    roles: Option<Vec<String>>,
    /// The name of its plan, null for that of its owner. Set by admins only.
    #[serde(default, deserialize_with = "said")]
    #[schema(value_type = Option<String>, example = "gold", max_length = 64)]
    plan: Option<Option<String>>,
    /// Networks (CIDR) or addresses that it may be used from, at most 32; an empty list for everywhere. Widened by admins
    /// only.
    #[schema(example = json!(["192.0.2.0/24"]), max_items = 32)]
    allowed_addresses: Option<Vec<String>>,
    /// Its own quota, null for that of its plan. Set by admins only.
    #[serde(default, deserialize_with = "said")]
    #[schema(value_type = Option<QuotaBody>)]
    quota: Option<Option<QuotaBody>>,
    /// Credits that a request costs unless its route says otherwise. Set by admins only.
    #[schema(minimum = 0, maximum = 1_000_000)]
    cost: Option<i64>,
    /// Its own rate limits, at most 8; an empty list for those of its plan or the filter's default. Set by admins only.
    #[schema(max_items = 8)]
    rate_limits: Option<Vec<RateLimitBody>>,
}

impl PatchBody {
    fn parse(self, now: OffsetDateTime) -> Result<(Changes, Permissions), ApiError> {
        let expires_at = match (self.expires_at, self.expires_in_seconds) {
            (None, None) => None,
            (at, seconds) => Some(match (at, seconds) {
                (Some(_), Some(_)) => {
                    let detail = "give either expires_at or expires_in_seconds, not both";
                    return Err(ApiError::invalid("expires_at", detail));
                }
                (at, seconds) => parse_expiry(at.flatten().as_deref(), seconds.flatten(), now)?,
            }),
        };
        let name = self.name.map(|name| KeyName::parse("name", &name)).transpose()?;
        let permissions = Permissions::parse(Said {
            roles: self.roles,
            plan: self.plan,
            allowed_addresses: self.allowed_addresses,
            quota: self.quota,
            cost: self.cost,
            rate_limits: self.rate_limits,
        })?;
        Ok((Changes { name, disabled: self.disabled, expires_at }, permissions))
    }
}

/// Create a key.
///
/// The response is the only one that contains the secret. A key that a user's own key creates expires no later than that
/// key. It keeps that key's networks, plan, quota, cost and rate limits.
#[utoipa::path(
    operation_id = "createKey",
    post, path = "/v1/keys", tag = "keys", request_body = CreateBody, security(("api_key" = [])),
    params(("Idempotency-Key" = Option<String>, Header, description = "Names the request, so that it can be sent again")),
    responses(
        (status = 201, description = "The new key, its secret told this once", body = CreateReply,
            headers(("location" = String, description = "Where to find the key"), ("etag" = String, description = "The version of the key"))),
        (status = 400, description = "A field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "Not the caller's to give", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The user has too many keys, or the same request is being worked on", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Body too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Body not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Another request had this Idempotency-Key", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls, or too many keys and rotations of this user in 24 hours", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn create(State(app): State<App>, caller: Caller, mut once: Once) -> Result<Response, ApiError> {
    let body: CreateBody = once.body().await?;
    let now = OffsetDateTime::now_utc();
    let mut new = NewKey {
        email: Email::parse(&body.email)?,
        name: KeyName::parse("name", &body.name)?,
        kind: body.kind.into(),
        scopes: Scopes::parse(body.scopes)?,
        rate_limits: parse_rate_limits(body.rate_limits)?,
        permissions: Permissions::parse(Said {
            roles: body.roles,
            plan: body.plan,
            allowed_addresses: body.allowed_addresses,
            quota: body.quota,
            cost: body.cost,
            rate_limits: None,
        })?,
        expires_at: parse_expiry(body.expires_at.as_deref(), body.expires_in_seconds, now)?,
        at_most: None,
        per_day: None,
    };
    new.expires_at = new.expires_at.or(default_expiry(&new.scopes, now));
    caller.require_owner_or_admin(&new.email)?;
    caller.require_grantable(&new.scopes)?;
    caller.require_permissible(&new.permissions, caller.networks())?;
    caller.bind(&mut new, app.bounds.owner_keys_per_day);
    let response = once.answer(&app.pool, &caller, async |connection| {
        let Made { key, secret, permitted } = store::create(connection, &caller.actor, new).await?;
        let (location, tag) = (format!("/v1/keys/{}", key.id), etag(key.version));
        let view = match permitted {
            Some(permitted) => KeyView::of(key, permitted, now),
            None => show(connection, key).await?,
        };
        let reply = CreateReply { key: secret, view };
        Ok(Answer::new(StatusCode::CREATED, &reply)?.at(location).tagged(tag))
    });
    let response = response.await?;
    app.store.nudge();
    Ok(response)
}

/// Change a key.
///
/// Fields that are not given keep their values. A user's own key cannot let a key expire later than itself. It cannot
/// enable a key that an admin disabled.
#[utoipa::path(
    operation_id = "updateKey",
    patch, path = "/v1/keys/{id}", tag = "keys", request_body = PatchBody, security(("api_key" = [])),
    params(ById, ("If-Match" = Option<String>, Header, description = "The ETag that the change is meant for")),
    responses(
        (status = 200, description = "The key as it is now", body = KeyView,
            headers(("etag" = String, description = "The version of the key"))),
        (status = 400, description = "A field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key, or one for an admin to change", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The key is revoked, or the last admin key", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "The key was changed since", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Body too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Body not JSON", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn patch(
    State(app): State<App>,
    caller: Caller,
    condition: Condition,
    Path(path): Path<ById>,
    Json(body): Json<PatchBody>,
) -> Result<Response, ApiError> {
    let now = OffsetDateTime::now_utc();
    let (changes, permissions) = body.parse(now)?;
    if changes.is_empty() && permissions.is_empty() {
        return Err(ApiError::Invalid { field: None, detail: "Give at least one field to change.".into() });
    }
    caller.require_privileges(&permissions)?;
    let changed = transact(&app.pool, async |connection| {
        if !caller.is_admin() {
            allowance::take(connection, caller.owner_id, Act::Change, app.bounds.owner_keys_per_day).await?;
        }
        let wanted = permissions.resolve(connection).await?;
        let key = held(connection, &caller, path.id, &condition).await?;
        if let Some(end) = changes.expires_at {
            caller.require_end(end, key.expires_at, now)?;
        }
        if !permissions.is_empty() {
            caller.require_permissible(&permissions, &permissions::networks(connection, path.id).await?)?;
            permissions::change(connection, &caller.actor, &key, &permissions, &wanted).await?;
        }
        change(connection, &caller.actor, caller.is_admin(), &key, changes).await?;
        let key = store::get(&mut *connection, path.id).await?.ok_or_else(|| there_is_none(path.id))?;
        let tag = etag(key.version);
        Ok::<_, ApiError>((tag, show(connection, key).await?))
    });
    let (tag, view) = changed.await?;
    app.store.nudge();
    Ok(([(header::ETAG, tag)], Json(view)).into_response())
}

/// Revoke a key for good.
///
/// Revoking a revoked key changes nothing.
#[utoipa::path(
    operation_id = "revokeKey",
    delete, path = "/v1/keys/{id}", tag = "keys", security(("api_key" = [])),
    params(ById, ("If-Match" = Option<String>, Header, description = "The ETag that the change is meant for")),
    responses(
        (status = 204, description = "The key is revoked"),
        (status = 400, description = "Not an id", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key, or one for an admin to change", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The last admin key", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "The key was changed since", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn revoke(
    State(app): State<App>,
    caller: Caller,
    condition: Condition,
    Path(path): Path<ById>,
) -> Result<StatusCode, ApiError> {
    let revoked = transact(&app.pool, async |connection| {
        let key = held(connection, &caller, path.id, &condition).await?;
        revoke::revoke(connection, &caller.actor, &key).await
    });
    revoked.await?;
    app.store.nudge();
    Ok(StatusCode::NO_CONTENT)
}
