//! `GET /v1/envoys`: the Envoys that sync, and how far each is.

use axum::response::Response;
use contract::id::Epoch;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::App;
use crate::api::call::Call;
use crate::api::pagination::{self, All, List, PageQuery};
use crate::domain::Timestamp;
use crate::error::ApiError;
use crate::sync::filters::{self, DatabasePosition, EnvoyStatus, Rollout};

/// One Envoy.
#[derive(Debug, Serialize, ToSchema)]
pub struct EnvoyView {
    /// Names the process: drawn anew when Envoy starts.
    id: Uuid,
    /// The key that it syncs with.
    #[schema(required)]
    sync_key_id: Option<Uuid>,
    /// Where its polls come from; that of a proxy, if there is one between.
    #[schema(required, example = "192.0.2.7")]
    address: Option<String>,
    /// Its version of the filter, if it reports one.
    #[schema(required, example = "0.1.0")]
    version: Option<String>,
    /// Whether it polled or reported within the last 60 seconds. A poll that is held counts.
    live: bool,
    /// When it last polled or reported.
    seen_at: Timestamp,
    /// The life of the database that its store comes from; null until its store is complete.
    #[schema(required)]
    epoch: Option<Uuid>,
    /// Every change up to this revision is in its store; null until its store is complete.
    #[schema(required)]
    revision: Option<i64>,
    /// Revisions between the database and its store; null if its store is of another epoch.
    #[schema(required)]
    revisions_behind: Option<i64>,
    /// Whether it has every change that there is.
    up_to_date: bool,
    /// When it last confirmed its revision.
    #[schema(required)]
    synced_at: Option<Timestamp>,
    /// How long ago that was, in seconds. An Envoy that is up to date confirms it about every 25 seconds.
    #[schema(required, example = 3.2)]
    age_seconds: Option<f64>,
    /// Its counts.
    usage: EnvoyUsage,
}

/// Counts of an Envoy that the control plane has received.
#[derive(Debug, Serialize, ToSchema)]
pub struct EnvoyUsage {
    /// Requests that it had counted and not seen acknowledged when it polled last; null if it does not say.
    #[schema(required)]
    pending_requests: Option<i64>,
    /// When reports of it last came into the database.
    #[schema(required)]
    reported_at: Option<Timestamp>,
    /// How long its requests have waited at most, in seconds: 0 if none wait, null if that is not known.
    #[schema(required, example = 0.0)]
    lag_seconds: Option<f64>,
}

/// A page of Envoys.
#[derive(Debug, Serialize, ToSchema)]
pub struct EnvoyPage {
    /// The present life of the database.
    epoch: Uuid,
    /// The newest revision of the database.
    revision: i64,
    /// Every Envoy that polled or reported within 24 hours, by id.
    envoys: Vec<EnvoyView>,
    /// The `cursor` for the next page; null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

impl EnvoyView {
    fn new(envoy: EnvoyStatus, present: &DatabasePosition) -> Self {
        let seconds_since = |at: time::OffsetDateTime| (present.now - at).as_seconds_f64().max(0.0);
        let complete = !envoy.epoch.is_nil();
        let ours = envoy.epoch == present.epoch;
        let lag_seconds = match envoy.pending_requests {
            Some(0) => Some(0.0),
            // Before its first report, the time since it started counting is not known.
            Some(_) => envoy.reported_at.map(seconds_since),
            None => None,
        };
        Self {
            id: envoy.reporter,
            sync_key_id: envoy.sync_key_id,
            address: envoy.address,
            version: envoy.version,
            live: envoy.live,
            seen_at: envoy.seen_at.into(),
            epoch: complete.then_some(envoy.epoch),
            revision: complete.then_some(envoy.revision),
            revisions_behind: ours.then(|| present.revision.saturating_sub(envoy.revision).max(0)),
            up_to_date: ours && envoy.revision >= present.revision,
            synced_at: complete.then(|| envoy.confirmed_at.into()),
            age_seconds: complete.then(|| seconds_since(envoy.confirmed_at)),
            usage: EnvoyUsage {
                pending_requests: envoy.pending_requests,
                reported_at: envoy.reported_at.map(Into::into),
                lag_seconds,
            },
        }
    }
}

/// By how many Envoys the last change of a key was applied, as they say themselves.
#[derive(Debug, Serialize, ToSchema)]
pub struct AppliedOn {
    /// Envoys that polled or reported within the last 60 seconds.
    #[schema(example = 8)]
    envoys: i64,
    /// Those of them that have the change.
    #[schema(example = 7)]
    applied: i64,
    /// How long the slowest of the others has lagged behind, in seconds; null if all have the change.
    #[schema(required, example = 1.2)]
    max_lag_seconds: Option<f64>,
    /// Further Envoys that polled or reported within 24 hours but not within the last 60 seconds, and did not have the change
    /// then. They have ended, or are cut off and still serve what they had: `GET /v1/envoys` names them.
    #[schema(example = 0)]
    unreachable: i64,
}

/// By how many Envoys the last change of a key was applied, of a secret that it had, of its roles and its plan.
pub async fn key_applied_on(app: &App, key_id: Uuid) -> Result<AppliedOn, ApiError> {
    let revision = filters::revision_of(&app.pool, key_id).await?.unwrap_or_default();
    applied_on(app, revision).await
}

/// By how many Envoys the changes up to a revision were applied.
pub async fn applied_on(app: &App, revision: i64) -> Result<AppliedOn, ApiError> {
    let Rollout { epoch, filters: envoys, applied, confirmed_s, silent: unreachable } =
        filters::rollout(&app.pool, revision).await?;
    // An Envoy lags since the change came, or since it last confirmed an older revision, whichever was later.
    let arrived = app.filters.since_arrival(Epoch::from(epoch), revision.cast_unsigned());
    let arrived_s = arrived.map_or(f64::INFINITY, |arrived| arrived.as_secs_f64());
    let max_lag_seconds = confirmed_s.map(|confirmed_s| confirmed_s.min(arrived_s).max(0.0));
    Ok(AppliedOn { envoys, applied, max_lag_seconds, unreachable })
}

/// List the Envoys that sync.
#[utoipa::path(
    operation_id = "listEnvoys",
    get, path = "/v1/envoys", tag = "insight", params(PageQuery),
    responses((status = 200, description = "A page of Envoys", body = EnvoyPage))
)]
pub async fn list(Call { app, caller, .. }: Call, List { page, .. }: List<All, Uuid>) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let (present, mut envoys) = filters::list(&app.pool, page.after, page.read()).await?;
    let next = page.cut(&mut envoys, |envoy| envoy.reporter);
    let envoys = envoys.into_iter().map(|envoy| EnvoyView::new(envoy, &present)).collect();
    let page = EnvoyPage { epoch: present.epoch, revision: present.revision, envoys, next_cursor: next.cursor };
    Ok(pagination::reply(page, next.link))
}
