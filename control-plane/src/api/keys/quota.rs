//! `GET /v1/keys/{id}/quota`.

use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{ById, managed};
use crate::App;
use crate::api::call::Call;
use crate::api::extract::Json;
use crate::domain::{PerBody, Period, Timestamp};
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
    pub async fn read(app: &App, key: Uuid) -> Result<Option<Self>, ApiError> {
        Ok(quota::view(&app.pool, key).await?.map(Self::of))
    }

    fn of(View { quota, used, held, exceeded, resets_at }: View) -> Self {
        let rolls = quota.period == Period::Rolling;
        Self {
            requests: quota.requests,
            per: quota.per.into(),
            period: quota.period,
            time_zone: (!rolls).then(|| quota.zone().to_owned()),
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
    let view = QuotaView::read(&app, key.id).await?;
    view.map(Json).ok_or_else(|| ApiError::NotFound(format!("The key {} has no quota.", key.id)))
}
