//! `POST /v1/keys/lookup`.

use contract::hash::KeyHash;
use contract::key::{PRESENTED_BYTES, Secret};
use serde::{Deserialize, Deserializer};
use utoipa::ToSchema;

use super::view::KeyView;
use super::{managed, show};
use crate::api::call::Call;
use crate::api::extract::Json;
use crate::api::openapi::NotFound;
use crate::error::ApiError;
use crate::keys::read::find_by_secret;

/// A key to find.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"key": "sk_live_…"}))]
pub struct LookupBody {
    /// The whole key. It is neither stored nor logged.
    #[serde(deserialize_with = "secret")]
    #[schema(value_type = String, example = "sk_live_…", min_length = 1, max_length = 1024)]
    key: Secret,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
    String::deserialize(deserializer).map(Secret::from_presented)
}

/// Find the key that a secret belongs to.
///
/// Also by a secret that was rotated away or revoked, until the row of its key is deleted. The secret stands in the body, so no
/// log has it.
#[utoipa::path(
    operation_id = "findKey",
    post, path = "/v1/keys/lookup", tag = "keys", request_body = LookupBody,
    responses(NotFound, (status = 200, description = "The key", body = KeyView))
)]
pub async fn lookup(Call { app, caller, .. }: Call, Json(body): Json<LookupBody>) -> Result<Json<KeyView>, ApiError> {
    caller.require_manager()?;
    let bytes = body.key.reveal().as_bytes();
    if !(1..=PRESENTED_BYTES).contains(&bytes.len()) {
        return Err(ApiError::invalid("key", format!("must have 1 to {PRESENTED_BYTES} bytes")));
    }
    let found = find_by_secret(&app.pool, KeyHash::of(bytes), app.pepper.as_ref()).await?;
    // A key of somebody else is answered like one that does not exist.
    let found = found.filter(|found| caller.manages(found.record.owner_id.into()));
    let found = found.ok_or_else(|| ApiError::NotFound("There is no key with this secret.".into()))?;
    let key = managed(&app, &caller, found.record.key_id.into()).await?;
    Ok(Json(show(&app.pool, key).await?))
}
