//! `GET /v1/keys/{id}/quota` and `POST /v1/keys/{id}/quota/reset`.

use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::PgExecutor;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ById, lock, managed};
use crate::api::call::Call;
use crate::api::extract::Json;
use crate::api::idempotency::{IdempotentRequest, IdempotentResponse};
use crate::api::openapi::{Conflict, IdempotencyKey, IfMatch};
use crate::audit::AuditEvent;
use crate::credits::parse_note;
use crate::domain::{PerBody, Period, Preconditions, Timestamp};
use crate::error::ApiError;
use crate::quota::{self, View};

/// The quota of a key: its own, or its plan's.
#[derive(Debug, Serialize, ToSchema)]
pub struct QuotaView {
    /// Requests that a window allows.
    requests: i64,
    /// Whose it is: `owner` if all keys of the owner that have the plan share it.
    per: PerBody,
    /// The kind of window.
    period: Period,
    /// Where days begin at midnight; null where the window rolls.
    #[schema(required, example = "Europe/Berlin")]
    time_zone: Option<String>,
    /// The day on which months begin, if it is not the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    anchor_day: Option<i8>,
    /// The length of a rolling window, in seconds; null for calendar windows.
    #[schema(required)]
    window_seconds: Option<i64>,
    /// When the running window began.
    window_start: Timestamp,
    /// When it ends.
    window_end: Timestamp,
    /// Requests that were allowed in it.
    used: i64,
    /// Requests that Envoys hold and have not reported as used.
    held: i64,
    /// Requests that are left beside, never below zero: what Envoys can still be granted.
    remaining: i64,
    /// Whether it is used up.
    exceeded: bool,
    /// If it is: until when.
    #[schema(required)]
    resets_at: Option<Timestamp>,
}

impl QuotaView {
    /// Reads the quota of a key; none if it has none.
    pub async fn read(database: impl PgExecutor<'_>, key: Uuid) -> Result<Option<Self>, ApiError> {
        Ok(quota::view(database, key).await?.map(Self::of))
    }

    fn of(View { quota, used, held, exceeded, resets_at }: View) -> Self {
        let rolls = quota.period == Period::Rolling;
        Self {
            requests: quota.requests,
            per: quota.per.into(),
            period: quota.period,
            time_zone: (!rolls).then(|| quota.zone().to_owned()),
            anchor_day: quota.anchor_day,
            window_seconds: rolls.then(|| quota.window_s()),
            window_start: used.window_start.into(),
            window_end: used.window_end.into(),
            used: used.used,
            held,
            remaining: quota.requests.saturating_sub(used.used).saturating_sub(held).max(0),
            exceeded,
            resets_at: resets_at.map(Into::into),
        }
    }
}

/// Get the quota of a key and what is left of it.
#[utoipa::path(
    operation_id = "getKeyQuota",
    get, path = "/v1/keys/{id}/quota", tag = "keys", params(ById),
    responses((status = 200, description = "The quota and what was used of it", body = QuotaView))
)]
pub async fn quota(Call { app, caller, path }: Call<ById>) -> Result<Json<QuotaView>, ApiError> {
    let key = managed(&app, &caller, path.id).await?;
    let view = QuotaView::read(&app.pool, key.id).await?;
    view.map(Json).ok_or_else(|| no_quota(key.id))
}

/// Why the quota is reset. It may be left out.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"note": "outage on Monday"}))]
pub struct ResetBody {
    /// Why, for people. The audit log has it.
    #[schema(example = "outage on Monday", max_length = 200)]
    note: Option<String>,
}

/// Reset the quota of a key: nothing of the running window counts as used.
///
/// Every Envoy admits requests again at once. If all keys of the owner share the quota, it is reset for all of them. Requests
/// that Envoys have admitted and not yet reported count as used afterwards.
#[utoipa::path(
    operation_id = "resetKeyQuota",
    post, path = "/v1/keys/{id}/quota/reset", tag = "keys",
    request_body(content = Option<ResetBody>),
    params(ById, IdempotencyKey, IfMatch),
    responses(Conflict, (status = 200, description = "The quota afterwards", body = QuotaView))
)]
pub async fn reset(
    Call { app, caller, path }: Call<ById>,
    preconditions: Preconditions,
    mut request: IdempotentRequest,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let body: ResetBody = request.body_or_default().await?;
    let note = parse_note(body.note)?;
    let response = request.respond(&app.writer, &caller, async |change| {
        let key = lock(change, &caller, path.id, &preconditions).await?;
        let used = quota::reset(change, key.id).await?.ok_or_else(|| no_quota(key.id))?;
        change.record(AuditEvent::on_key("key.reset_quota", key.id, json!({"used": used, "note": note}))).await?;
        let view = QuotaView::read(&mut **change, key.id).await?.ok_or_else(|| no_quota(key.id))?;
        IdempotentResponse::new(StatusCode::OK, &view)
    });
    response.await
}

fn no_quota(key: Uuid) -> ApiError {
    ApiError::NotFound(format!("The key {key} has no quota."))
}
