//! `GET /v1/filters`: the Envoys that sync, and how far each is.

use axum::extract::State;
use axum::response::Response;
use contract::id::Epoch;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::App;
use crate::api::auth::Caller;
use crate::api::extract::Query;
use crate::api::openapi::ReadErrors;
use crate::api::pagination;
use crate::api::problem::Problem;
use crate::domain::Timestamp;
use crate::error::ApiError;
use crate::sync::filters::{self, DatabasePosition, EnvoyStatus, Rollout};

const LIMIT: i64 = 200;
const MOST: i64 = 1_000;

/// How many Envoys.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct FiltersQuery {
    /// `next_cursor` of the page before.
    cursor: Option<Uuid>,
    /// How many Envoys; 200 unless given.
    #[param(minimum = 1, maximum = 1_000)]
    limit: Option<i64>,
}

/// One Envoy.
#[derive(Debug, Serialize, ToSchema)]
pub struct FilterView {
    /// Names the process: drawn anew when Envoy starts.
    id: Uuid,
    /// The key that it syncs with.
    #[schema(required)]
    sync_key_id: Option<Uuid>,
    /// Where its polls come from; that of a proxy, if there is one between.
    #[schema(required, example = "192.0.2.7")]
    address: Option<String>,
    /// Its version of the filter, if it reports one.
    #[schema(required, example = "0.3.0")]
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
    /// How many revisions it is behind the database; null if its store is of another epoch.
    #[schema(required)]
    revisions_behind: Option<i64>,
    /// Whether it has every change that there is.
    in_step: bool,
    /// When it last confirmed its revision.
    #[schema(required)]
    synced_at: Option<Timestamp>,
    /// How long ago that was, in seconds. An Envoy that is up to date confirms it about every 25 seconds.
    #[schema(required, example = 3.2)]
    age_seconds: Option<f64>,
    /// What it has counted.
    usage: FilterUsage,
}

/// What an Envoy has counted and reported.
#[derive(Debug, Serialize, ToSchema)]
pub struct FilterUsage {
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
pub struct FilterPage {
    /// The present life of the database.
    epoch: Uuid,
    /// The newest revision of the database.
    revision: i64,
    /// Every Envoy that polled or reported within 24 hours, by id.
    filters: Vec<FilterView>,
    /// What to send as `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<Uuid>,
}

impl FilterView {
    fn new(filter: EnvoyStatus, present: &DatabasePosition) -> Self {
        let seconds_since = |at: time::OffsetDateTime| (present.now - at).as_seconds_f64().max(0.0);
        let complete = !filter.epoch.is_nil();
        let ours = filter.epoch == present.epoch;
        let lag_seconds = match filter.pending_requests {
            Some(0) => Some(0.0),
            // Before its first report, the time since it started counting is not known.
            Some(_) => filter.reported_at.map(seconds_since),
            None => None,
        };
        Self {
            id: filter.reporter,
            sync_key_id: filter.sync_key_id,
            address: filter.address,
            version: filter.version,
            live: filter.live,
            seen_at: filter.seen_at.into(),
            epoch: complete.then_some(filter.epoch),
            revision: complete.then_some(filter.revision),
            revisions_behind: ours.then(|| present.revision.saturating_sub(filter.revision).max(0)),
            in_step: ours && filter.revision >= present.revision,
            synced_at: complete.then(|| filter.confirmed_at.into()),
            age_seconds: complete.then(|| seconds_since(filter.confirmed_at)),
            usage: FilterUsage {
                pending_requests: filter.pending_requests,
                reported_at: filter.reported_at.map(Into::into),
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
    filters: i64,
    /// Those of them that have the change.
    #[schema(example = 7)]
    applied: i64,
    /// How long the slowest of the others has lagged behind, in seconds; null if all have the change.
    #[schema(required, example = 1.2)]
    oldest_seconds: Option<f64>,
    /// Further Envoys that polled or reported within 24 hours but not within the last 60 seconds, and did not have the change
    /// then. They have ended, or are cut off and still serve what they had: `GET /v1/filters` names them.
    #[schema(example = 0)]
    silent: i64,
}

/// By how many Envoys a change with this revision was applied.
pub async fn applied_on(app: &App, revision: i64) -> Result<AppliedOn, ApiError> {
    let Rollout { epoch, filters, applied, confirmed_s, silent } = filters::rollout(&app.pool, revision).await?;
    // An Envoy lags since the change came, or since it last confirmed an older revision, whichever was later.
    let arrived = app.filters.since_arrival(Epoch::from(epoch), revision.cast_unsigned());
    let arrived_s = arrived.map_or(f64::INFINITY, |arrived| arrived.as_secs_f64());
    let oldest_seconds = confirmed_s.map(|confirmed_s| confirmed_s.min(arrived_s).max(0.0));
    Ok(AppliedOn { filters, applied, oldest_seconds, silent })
}

/// The same for the last change of a key, of a secret that it had, of its roles and its plan.
pub async fn key_applied_on(app: &App, key_id: Uuid) -> Result<AppliedOn, ApiError> {
    let revision = filters::revision_of(&app.pool, key_id).await?;
    applied_on(app, revision.unwrap_or_default()).await
}

/// List the Envoys that sync.
#[utoipa::path(
    operation_id = "listFilters",
    get, path = "/v1/filters", tag = "insight", params(FiltersQuery), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "A page of Envoys", body = FilterPage,
            headers(("link" = String, description = "The next page, if there is one (RFC 8288)"))),
        (status = 403, description = "Not an admin's key", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn filters(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<FiltersQuery>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let limit = pagination::limit_within(query.limit, LIMIT, MOST)?;
    // One entry more than the limit shows whether there is a next page.
    let (present, mut page) = filters::list(&app.pool, query.cursor, limit + 1).await?;
    let next_cursor = pagination::cut(&mut page, limit, |filter| filter.reporter);
    let filters = page.into_iter().map(|filter| FilterView::new(filter, &present)).collect();
    let next = next_cursor
        .map(|cursor| pagination::next_link("/v1/filters", &FiltersQuery { cursor: Some(cursor), limit: Some(limit) }));
    let page = FilterPage { epoch: present.epoch, revision: present.revision, filters, next_cursor };
    Ok(pagination::reply(page, next))
}
