//! Every Envoy that syncs, and how far it is: from what its polls say, through whichever replica.

#![allow(unused_qualifications, reason = "what utoipa makes of the handlers' arguments")]

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::App;
use crate::auth::Caller;
use crate::error::{ApiError, Problem};
use crate::http::extract::{Json, Query};
use crate::key::domain::Timestamp;
use crate::sync::filters::{self, Filter, Present};

const LIMIT: i64 = 200;
const MOST: i64 = 1_000;

/// How many Envoys.
#[derive(Debug, Deserialize, IntoParams)]
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
    /// Its version of the filter, if it says so.
    #[schema(required, example = "0.3.0")]
    version: Option<String>,
    /// Whether it was heard of within the last 60 seconds. A poll that is held counts.
    live: bool,
    /// When it was last heard of.
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
    /// When it last said what it has.
    #[schema(required)]
    synced_at: Option<Timestamp>,
    /// How long ago that was, in seconds. An Envoy that has everything says so again within some 25 seconds.
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
    /// For how long its requests have waited at most, in seconds: 0 if none wait, null if that is not known.
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
    /// Every Envoy that was heard of within 24 hours, by id.
    filters: Vec<FilterView>,
    /// What to send as `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<Uuid>,
}

impl FilterView {
    fn of(filter: Filter, present: &Present) -> Self {
        let seconds_since = |at: time::OffsetDateTime| (present.now - at).as_seconds_f64().max(0.0);
        let complete = !filter.epoch.is_nil();
        let ours = filter.epoch == present.epoch;
        let lag_seconds = match filter.pending_requests {
            Some(0) => Some(0.0),
            // Before its first report it has counted for no longer than it has been there, which nobody noted.
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
    /// Envoys that were heard of within the last 60 seconds.
    #[schema(example = 8)]
    filters: i64,
    /// Those of them that have the change.
    #[schema(example = 7)]
    applied: i64,
    /// For how long the slowest of the others has lagged behind, in seconds; null if all have the change.
    #[schema(required, example = 1.2)]
    oldest_seconds: Option<f64>,
    /// Further Envoys that were heard of within 24 hours but not within the last 60 seconds, and did not have the change
    /// then. They have ended, or are cut off and still serve what they had: `GET /v1/filters` names them.
    #[schema(example = 0)]
    silent: i64,
}

/// By how many Envoys a change with this revision was applied.
///
/// # Errors
/// Those of the database.
pub async fn applied_on(app: &App, revision: i64) -> Result<AppliedOn, ApiError> {
    let filters::Applied { filters, applied, oldest_seconds, silent } =
        filters::applied(&app.pool, &app.filters, revision).await?;
    Ok(AppliedOn { filters, applied, oldest_seconds, silent })
}

/// The same for the last change of a key, of a secret that it had, of its roles and its plan.
///
/// # Errors
/// Those of the database.
pub async fn key_applied_on(app: &App, key_id: Uuid) -> Result<AppliedOn, ApiError> {
    let revision = filters::revision_of(&app.pool, key_id).await?;
    applied_on(app, revision.unwrap_or_default()).await
}

/// Admits admins only, to what concerns the whole service.
///
/// # Errors
/// 403 for anybody else.
pub(super) fn require_admin(caller: &Caller) -> Result<(), ApiError> {
    if caller.is_admin() {
        return Ok(());
    }
    Err(ApiError::Forbidden("This is for admins. Use a key with the scope admin.".into()))
}

/// List the Envoys that sync.
#[utoipa::path(
    operation_id = "listFilters",
    get, path = "/v1/filters", tag = "insight", params(FiltersQuery), security(("api_key" = [])),
    responses(
        (status = 200, description = "A page of Envoys", body = FilterPage,
            headers(("link" = String, description = "The next page, if there is one (RFC 8288)"))),
        (status = 400, description = "A parameter is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "Not an admin's key", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn filters(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<FiltersQuery>,
) -> Result<Response, ApiError> {
    require_admin(&caller)?;
    let limit = query.limit.unwrap_or(LIMIT);
    if !(1..=MOST).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("must be a number from 1 to {MOST}")));
    }
    // One more than asked for tells whether there is a next page.
    let (present, mut found) = filters::list(&app.pool, query.cursor, limit + 1).await?;
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = found.len() > shown;
    found.truncate(shown);
    let next_cursor = found.last().map(|filter| filter.reporter).filter(|_| more);
    let filters = found.into_iter().map(|filter| FilterView::of(filter, &present)).collect();
    let page = FilterPage { epoch: present.epoch, revision: present.revision, filters, next_cursor };
    let mut response = Json(page).into_response();
    if let Some(cursor) = next_cursor
        && let Ok(link) = HeaderValue::try_from(format!("</v1/filters?cursor={cursor}&limit={limit}>; rel=\"next\""))
    {
        response.headers_mut().insert(header::LINK, link);
    }
    Ok(response)
}
