//! `/v1/unknown-keys`: keys of another system that clients still use. Only admins see them.

use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::call::Call;
use crate::api::extract::Json;
use crate::api::pagination::{self, All, List, PageQuery};
use crate::error::ApiError;
use crate::keys::unknown::{UnknownKeyView, forget_all, list};

pagination::page!(UnknownKeyPage "A page of unknown keys, by hash." { keys: UnknownKeyView = "The keys." });

/// How many were forgotten.
#[derive(Debug, Serialize, ToSchema)]
pub struct ForgetReply {
    /// How many.
    #[schema(minimum = 0)]
    forgotten: u64,
}

/// List unknown keys that clients use.
///
/// These are the hashes of keys that Envoys do not know and that came with requests under a policy with `capture_unknown`:
/// about 100,000 at most, each until 30 days after it was last seen. Import those that you know by their `hash`.
#[utoipa::path(
    operation_id = "listUnknownKeys",
    get, path = "/v1/unknown-keys", tag = "keys", params(PageQuery),
    responses((status = 200, description = "A page of unknown keys", body = UnknownKeyPage))
)]
pub async fn list_all(
    Call { app, caller, .. }: Call,
    List { page, .. }: List<All, String>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let mut keys = list(&app.pool, page.after.as_deref(), page.read()).await?;
    let next = page.cut(&mut keys, |last| last.hash().to_owned());
    Ok(pagination::reply(UnknownKeyPage { keys, next_cursor: next.cursor }, next.link))
}

/// Forget all unknown keys.
///
/// Keys that clients still use under a policy with `capture_unknown` are captured again, after an hour at most.
#[utoipa::path(
    operation_id = "deleteUnknownKeys",
    delete, path = "/v1/unknown-keys", tag = "keys",
    responses((status = 200, description = "How many were forgotten", body = ForgetReply))
)]
pub async fn forget(Call { app, caller, .. }: Call) -> Result<Json<ForgetReply>, ApiError> {
    caller.require_admin()?;
    let forgotten = app.writer.change(&caller.actor, async |change| forget_all(change).await).await?;
    Ok(Json(ForgetReply { forgotten }))
}
