//! `PATCH /v1/keys/{id}`.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::view::KeyView;
use super::{ById, lock, not_found, show};
use crate::api::call::Call;
use crate::api::extract::Json;
use crate::api::openapi::{Conflict, IfMatch};
use crate::api::preconditions::etag;
use crate::domain::{AttributesPatch, KeyName, Metadata, Patch, Preconditions, QuotaBody, RateLimitBody, parse_expiry};
use crate::error::ApiError;
use crate::keys::daily_limit::{self, Act};
use crate::keys::permissions::{Permissions, PermissionsPatch};
use crate::keys::update::KeyPatch;
use crate::keys::{self, read};

/// What to change of a key: at least one field.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "Laptop", "disabled": false}))]
pub struct PatchBody {
    /// A name for people.
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
    /// Whether it is disabled.
    disabled: Option<bool>,
    /// When it expires: RFC 3339, at most ten years from now; null: never. Not with `expires_in_seconds`.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Patch<String>,
    /// In how many seconds it expires, at most ten years; null: never. Not with `expires_at`.
    #[serde(default)]
    #[schema(value_type = Option<i64>, minimum = 1, maximum = 315_360_000)]
    expires_in_seconds: Patch<i64>,
    /// Names of its roles, at most 16. Set by admins only.
    #[schema(example = json!(["support"]), max_items = 16)]
    roles: Option<Vec<String>>,
    /// The name of its plan, null for that of its owner. Set by admins only.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "gold", max_length = 64)]
    plan: Patch<String>,
    /// Networks (CIDR) or addresses that it may be used from, at most 32; an empty list for everywhere. Widened by admins
    /// only.
    #[schema(example = json!(["192.0.2.0/24"]), max_items = 32)]
    allowed_addresses: Option<Vec<String>>,
    /// Its own quota, null for that of its plan. Set by admins only.
    #[serde(default)]
    #[schema(value_type = Option<QuotaBody>)]
    quota: Patch<QuotaBody>,
    /// Credits that a request costs unless its route says otherwise. Set by admins only.
    #[schema(minimum = 0, maximum = 1_000_000)]
    cost: Option<i64>,
    /// Its own rate limits, at most 8; an empty list for those of its plan or the filter's default. Set by admins only.
    #[schema(max_items = 8)]
    rate_limits: Option<Vec<RateLimitBody>>,
    /// Its id in another system; null removes it. Set by admins only.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "key_42", min_length = 1, max_length = 128)]
    external_id: Patch<String>,
    /// Metadata that the filter can pass upstream, at most 16 entries; replaces all present entries. Set by admins only.
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>, example = json!({"project": "search"}))]
    metadata: Option<Metadata>,
}

impl PatchBody {
    fn parse(self, now: OffsetDateTime) -> Result<KeyPatch, ApiError> {
        let expires_at = match (self.expires_at, self.expires_in_seconds) {
            (Patch::Keep, Patch::Keep) => Patch::Keep,
            (at, Patch::Keep) => at.try_map(|at| parse_expiry(Some(&at), None, now))?.flatten(),
            (Patch::Keep, seconds) => seconds.try_map(|seconds| parse_expiry(None, Some(seconds), now))?.flatten(),
            _ => {
                let detail = "give either expires_at or expires_in_seconds, not both";
                return Err(ApiError::invalid("expires_at", detail));
            }
        };
        let name = self.name.map(|name| KeyName::parse("name", &name)).transpose()?;
        let permissions = Permissions::parse(PermissionsPatch {
            roles: self.roles,
            plan: self.plan,
            allowed_addresses: self.allowed_addresses,
            quota: self.quota,
            cost: self.cost,
            rate_limits: self.rate_limits,
            attributes: AttributesPatch { external_id: self.external_id, metadata: self.metadata },
        })?;
        Ok(KeyPatch { name, disabled: self.disabled, expires_at, permissions })
    }
}

/// Change a key.
///
/// Fields that are not given keep their values. A user's own key cannot let a key expire later than itself. It cannot
/// enable a key that an admin disabled.
#[utoipa::path(
    operation_id = "updateKey",
    patch, path = "/v1/keys/{id}", tag = "keys", request_body = PatchBody, params(ById, IfMatch),
    responses(Conflict, (status = 200, description = "The key as it is now", body = KeyView))
)]
pub async fn update(
    Call { app, caller, path }: Call<ById>,
    preconditions: Preconditions,
    Json(body): Json<PatchBody>,
) -> Result<Response, ApiError> {
    let now = OffsetDateTime::now_utc();
    let patch = body.parse(now)?;
    if patch.is_empty() {
        return Err(ApiError::Invalid { field: None, detail: "Set at least one field.".into() });
    }
    caller.require_privileges(&patch.permissions)?;
    let changed = app.writer.change(&caller.actor, async |change| {
        if !caller.is_admin() {
            daily_limit::take(change, caller.owner_id, Act::Change, app.owner_keys_per_day).await?;
        }
        let permissions = patch.permissions.resolve(change).await?;
        let key = lock(change, &caller, path.id, &preconditions).await?;
        if let Some(end) = patch.expires_at.clone().given() {
            caller.require_end(end, key.expires_at, now)?;
        }
        if !patch.permissions.is_empty() {
            caller.require_permissible(&patch.permissions, &read::allowed_networks(&mut **change, path.id).await?)?;
        }
        keys::update::update(change, caller.is_admin(), &key, patch, &permissions).await?;
        let key = read::get(&mut **change, path.id).await?.ok_or_else(|| not_found(path.id))?;
        let tag = etag(key.version);
        Ok::<_, ApiError>((tag, show(&mut **change, key).await?))
    });
    let (tag, view) = changed.await?;
    Ok(([(header::ETAG, tag)], Json(view)).into_response())
}
