//! `POST /v1/keys`.

use axum::http::StatusCode;
use axum::response::Response;
use contract::json::null_is_default;
use serde::Deserialize;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::show;
use super::view::{CreateReply, KeyView};
use crate::api::call::Call;
use crate::api::idempotency::{IdempotentRequest, IdempotentResponse};
use crate::api::openapi::{Conflict, IdempotencyKey};
use crate::domain::{
    AttributesPatch, Email, KeyName, KindBody, Metadata, Patch, QuotaBody, RateLimitBody, Scopes, default_expiry,
    parse_expiry, parse_key_rate_limits,
};
use crate::error::ApiError;
use crate::keys;
use crate::keys::model::{CreatedKey, NewKey};
use crate::keys::permissions::{Permissions, PermissionsPatch};

/// A key to be made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"email": "user@example.com", "name": "Production Key", "expires_in_seconds": 86_400}))]
pub struct CreateBody {
    /// The email address of its owner.
    #[schema(example = "user@example.com", max_length = 254)]
    email: String,
    /// A name for people.
    #[schema(example = "Production Key", min_length = 1, max_length = 100)]
    name: String,
    /// Without it, the kind of the caller's own key, and live for admins. A test key creates test keys only.
    #[schema(inline)]
    kind: Option<KindBody>,
    /// Scopes to grant: at most 32, each of 1 to 64 characters out of a-z, A-Z, 0-9 and `: / _ . * -`.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = json!(["orders:read"]), max_items = 32)]
    scopes: Vec<String>,
    /// Its own rate limits, at most 8; without any, those of its plan, else of its owner's plan, else the filter's.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_items = 8)]
    rate_limits: Vec<RateLimitBody>,
    /// Names of its roles, at most 16. Set by admins only.
    #[schema(example = json!(["support"]), max_items = 16)]
    roles: Option<Vec<String>>,
    /// The name of its plan; without one that of its owner applies. Set by admins only.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "gold", max_length = 64)]
    plan: Patch<String>,
    /// Networks (CIDR) or addresses that it may be used from, at most 32; without any from everywhere.
    #[schema(example = json!(["192.0.2.0/24", "2001:db8::7"]), max_items = 32)]
    allowed_addresses: Option<Vec<String>>,
    /// Its own quota; without one that of its plan applies. Set by admins only.
    #[serde(default)]
    #[schema(value_type = Option<QuotaBody>)]
    quota: Patch<QuotaBody>,
    /// Credits that a request costs unless its route says otherwise; 1 unless given. Set by admins only.
    #[schema(minimum = 0, maximum = 1_000_000)]
    cost: Option<i64>,
    /// Its id in another system. Set by admins only.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "key_42", min_length = 1, max_length = 128)]
    external_id: Patch<String>,
    /// Metadata that the filter can pass upstream: at most 16 entries of any JSON, with names of 1 to 32 characters, and 2,048
    /// bytes in all. A text goes upstream as it is, anything else as JSON. Set by admins only.
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>, example = json!({"project": "search"}))]
    metadata: Option<Metadata>,
    /// When it expires: RFC 3339, at most ten years from now. Not with `expires_in_seconds`. Without either it never expires, except
    /// that a key with the scope `admin` expires after 90 days.
    #[schema(format = DateTime)]
    expires_at: Option<String>,
    /// In how many seconds it expires, at most ten years. Not with `expires_at`.
    #[schema(minimum = 1, maximum = 315_360_000)]
    expires_in_seconds: Option<i64>,
}

/// Create a key.
///
/// The response is the only one that contains the secret. A key that a user's own key creates expires no later than that
/// key. It keeps that key's networks, plan, quota, cost and rate limits.
#[utoipa::path(
    operation_id = "createKey",
    post, path = "/v1/keys", tag = "keys", request_body = CreateBody, params(IdempotencyKey),
    responses(
        Conflict,
        (status = 201, description = "The new key with its secret. No later response contains the secret", body = CreateReply),
    )
)]
pub async fn create(Call { app, caller, .. }: Call, mut request: IdempotentRequest) -> Result<Response, ApiError> {
    let body: CreateBody = request.body().await?;
    let now = OffsetDateTime::now_utc();
    let mut new = NewKey {
        email: Email::parse(&body.email)?,
        name: KeyName::parse("name", &body.name)?,
        kind: caller.require_kind(body.kind.map(Into::into))?,
        scopes: Scopes::parse(body.scopes)?,
        rate_limits: parse_key_rate_limits(body.rate_limits)?,
        permissions: Permissions::parse(PermissionsPatch {
            roles: body.roles,
            plan: body.plan,
            allowed_addresses: body.allowed_addresses,
            quota: body.quota,
            cost: body.cost,
            rate_limits: None,
            attributes: AttributesPatch { external_id: body.external_id, metadata: body.metadata },
        })?,
        expires_at: parse_expiry(body.expires_at.as_deref(), body.expires_in_seconds, now)?,
        at_most: None,
        per_day: None,
    };
    new.expires_at = new.expires_at.or(default_expiry(&new.scopes, now));
    caller.require_owner_or_admin(&new.email)?;
    caller.require_grantable(&new.scopes)?;
    caller.require_permissible(&new.permissions, caller.networks())?;
    caller.bind(&mut new, app.owner_keys_per_day);
    let response = request.respond(&app.writer, &caller, async |change| {
        let CreatedKey { key, secret, effective } = keys::create::create(change, new).await?;
        let (id, version) = (key.id, key.version);
        let view = match effective {
            Some(effective) => KeyView::new(key, effective, now),
            None => show(&mut **change, key).await?,
        };
        let reply = CreateReply { secret, view };
        Ok(IdempotentResponse::new(StatusCode::CREATED, &reply)?.of_key(id, version))
    });
    response.await
}
