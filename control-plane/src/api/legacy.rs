//! `/api/user`: the primary key of a user. These four routes came before `/v1` and keep their form.

use axum::http::StatusCode;
use axum::response::Response;
use contract::key::Secret;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::extract::Json;
use super::idempotency::{IdempotentRequest, IdempotentResponse};
use super::keys::view::reveal;
use super::openapi::{Conflict, IdempotencyKey, NotFound};
use crate::api::call::Call;
use crate::domain::{Email, KeyName, Timestamp};
use crate::error::ApiError;
use crate::keys::create::replace_primary;
use crate::keys::model::{Key, NewKey};
use crate::keys::read::primary;
use crate::keys::revoke::revoke_primary;

/// Which user.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ByEmail {
    /// The user's email address.
    #[param(example = "user@example.com")]
    pub(super) email: String,
}

/// The primary key of a user. Without a key all but `hasKey` and `balance` are null.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyPreference {
    /// Whether the user has a key that is not revoked.
    has_key: bool,
    /// When the key was made.
    #[schema(required)]
    generated_at: Option<Timestamp>,
    /// When the key was last used, as far as filters reported.
    #[schema(required)]
    last_used: Option<Timestamp>,
    /// Requests that were allowed with the key.
    #[schema(required, example = 127)]
    usage_count: Option<i64>,
    /// A name for people.
    #[schema(required, example = "Production Key")]
    key_name: Option<String>,
    /// The start of the secret, by which people recognise it.
    #[schema(required, example = "sk_abc123")]
    key_prefix: Option<String>,
    /// The user's credits.
    balance: i64,
}

impl From<(i64, Option<Key>)> for KeyPreference {
    fn from((balance, key): (i64, Option<Key>)) -> Self {
        Self {
            has_key: key.is_some(),
            generated_at: key.as_ref().map(|key| key.created_at.into()),
            last_used: key.as_ref().and_then(|key| key.last_used_at).map(Into::into),
            usage_count: key.as_ref().map(|key| key.usage_count),
            key_name: key.as_ref().map(|key| key.name.clone()),
            key_prefix: key.and_then(|key| key.prefix),
            balance,
        }
    }
}

/// The state of a user's key.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatusReply {
    /// Always true.
    success: bool,
    /// The state.
    key_preference: KeyPreference,
}

/// The usage of a user's key.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageReply {
    /// Always true.
    success: bool,
    /// The usage.
    usage: KeyPreference,
}

/// For whom to make a key, and how to call it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"email": "user@example.com", "key_name": "Production Key"}))]
pub struct GenerateBody {
    /// The user's email address.
    #[schema(example = "user@example.com", max_length = 254)]
    email: String,
    /// A name for people.
    #[schema(example = "Production Key", min_length = 1, max_length = 100)]
    key_name: String,
}

/// The new key.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct GenerateReply {
    /// Always true.
    success: bool,
    /// The result in words.
    #[schema(value_type = String)]
    message: &'static str,
    /// The whole key. No later response contains it.
    #[serde(serialize_with = "reveal")]
    #[schema(value_type = String)]
    key: Secret,
    /// The start of the secret, by which people recognise it.
    #[schema(required, example = "sk_abc123")]
    key_prefix: Option<String>,
}

/// The result of a revocation.
#[derive(Debug, Serialize, ToSchema)]
pub struct RevokeReply {
    /// Always true.
    success: bool,
    /// The result in words.
    #[schema(value_type = String)]
    message: &'static str,
}

/// Get the state of a user's primary key.
#[utoipa::path(
    operation_id = "getPrimaryKey",
    get, path = "/api/user/key/{email}", tag = "user", params(ByEmail),
    responses((status = 200, description = "The state of the key", body = StatusReply))
)]
pub async fn status(Call { app, caller, path }: Call<ByEmail>) -> Result<Json<StatusReply>, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let key_preference = primary(&app.pool, &email).await?.into();
    Ok(Json(StatusReply { success: true, key_preference }))
}

/// Create a user's primary key.
///
/// The previous primary key, if there is one, is revoked in the same transaction.
#[utoipa::path(
    operation_id = "createPrimaryKey",
    post, path = "/api/user/key", tag = "user", request_body = GenerateBody, params(IdempotencyKey),
    responses(
        Conflict,
        (status = 200, description = "The new key. This is the only response that contains it", body = GenerateReply),
    )
)]
pub async fn generate(Call { app, caller, .. }: Call, mut request: IdempotentRequest) -> Result<Response, ApiError> {
    let body: GenerateBody = request.body().await?;
    let email = Email::parse(&body.email)?;
    let name = KeyName::parse("key_name", &body.key_name)?;
    caller.require_owner_or_admin(&email)?;
    let mut new = NewKey { kind: caller.require_kind(None)?, ..NewKey::plain(email, name) };
    caller.bind(&mut new, app.owner_keys_per_day);
    let response = request.respond(&app.writer, &caller, async |change| {
        let may = |scopes: &[String]| caller.require_changeable(scopes);
        let key = replace_primary(change, &new, may).await?;
        let key_prefix = key.display_prefix();
        let reply = GenerateReply { success: true, message: "API key generated successfully", key, key_prefix };
        IdempotentResponse::new(StatusCode::OK, &reply)
    });
    response.await
}

/// Revoke a user's primary key.
#[utoipa::path(
    operation_id = "revokePrimaryKey",
    delete, path = "/api/user/key/{email}", tag = "user", params(ByEmail),
    responses(NotFound, Conflict, (status = 200, description = "The key is revoked", body = RevokeReply))
)]
pub async fn revoke(Call { app, caller, path }: Call<ByEmail>) -> Result<Json<RevokeReply>, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let revoked = app.writer.change(&caller.actor, async |change| {
        let may = |scopes: &[String]| caller.require_changeable(scopes);
        if !revoke_primary(change, &email, may).await? {
            return Err(ApiError::NotFound(format!("{email} has no API key.")));
        }
        Ok(())
    });
    revoked.await?;
    Ok(Json(RevokeReply { success: true, message: "API key revoked successfully" }))
}

/// Get the usage of a user's primary key.
#[utoipa::path(
    operation_id = "getUserUsage",
    get, path = "/api/user/usage/{email}", tag = "user", params(ByEmail),
    responses((status = 200, description = "The usage of the key", body = UsageReply))
)]
pub async fn usage(Call { app, caller, path }: Call<ByEmail>) -> Result<Json<UsageReply>, ApiError> {
    let email = Email::parse(&path.email)?;
    caller.require_owner_or_admin(&email)?;
    let usage = primary(&app.pool, &email).await?.into();
    Ok(Json(UsageReply { success: true, usage }))
}
