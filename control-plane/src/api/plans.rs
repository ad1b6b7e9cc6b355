//! `/v1/plans`: named bundles of scopes, limits and a quota that keys and users have.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use contract::json::null_is_default;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::definitions::{self, ByName, Conditions};
use super::extract::{Json, Path};
use super::openapi::{ReadErrors, WriteErrors};
use super::pagination::{self, All, List, PageQuery};
use crate::App;
use crate::api::auth::Caller;
use crate::api::problem::Problem;
use crate::definitions::store::Definition;
use crate::definitions::{Content, Kind};
use crate::domain::Preconditions;
use crate::domain::quota::QuotaBody;
use crate::domain::{RateLimitBody, Timestamp};
use crate::error::ApiError;

/// What a plan is to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"description": "For production", "scopes": ["orders:read"]}))]
pub struct PlanBody {
    /// For people: at most 500 characters.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_length = 500)]
    description: String,
    /// Scopes that it grants: at most 32; not `admin` and `sync`, which are granted to a key only.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = json!(["orders:read"]), max_items = 32)]
    scopes: Vec<String>,
    /// Limits of keys that have none of their own, at most 8.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_items = 8)]
    rate_limits: Vec<RateLimitBody>,
    /// The quota of each key that has none of its own.
    quota: Option<QuotaBody>,
}

/// A plan: a named bundle of scopes, limits and a quota.
#[derive(Debug, Serialize, ToSchema)]
pub struct PlanView {
    /// What keys call it.
    #[schema(example = "gold")]
    name: String,
    /// For people.
    description: String,
    /// Scopes that it grants.
    scopes: Vec<String>,
    /// Limits of keys that have none of their own.
    rate_limits: Vec<RateLimitBody>,
    /// The quota of each key that has none of its own.
    #[schema(required)]
    quota: Option<QuotaBody>,
    /// Since when there is one of that name.
    created_at: Timestamp,
}

impl PlanView {
    fn of(definition: Definition) -> Self {
        Self {
            name: definition.name,
            description: definition.description,
            scopes: definition.scopes,
            rate_limits: definition.rate_limits.iter().map(RateLimitBody::of).collect(),
            quota: definition.quota.map(|quota| QuotaBody::of(&quota)),
            created_at: definition.created_at.into(),
        }
    }
}

/// A page of plans, by name.
#[derive(Debug, Serialize, ToSchema)]
pub struct PlanPage {
    /// The plans.
    plans: Vec<PlanView>,
    /// What to send as `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// List plans by name.
#[utoipa::path(
    operation_id = "listPlans",
    get, path = "/v1/plans", tag = "plans", params(PageQuery), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "A page of plans", body = PlanPage,
            headers(("link" = String, description = "The next page, if there is one (RFC 8288)"))),
    )
)]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    List { page, .. }: List<All, String>,
) -> Result<Response, ApiError> {
    let (found, next) = definitions::list(&app, &caller, page, Kind::Plan).await?;
    let plans = found.into_iter().map(PlanView::of).collect();
    Ok(pagination::reply(PlanPage { plans, next_cursor: next.cursor }, next.link))
}

/// Get a plan.
#[utoipa::path(
    operation_id = "getPlan",
    get, path = "/v1/plans/{name}", tag = "plans", params(ByName), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "The plan", body = PlanView,
            headers(("etag" = String, description = "Its version, for If-Match"))),
        (status = 404, description = "No such plan", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn get(State(app): State<App>, caller: Caller, Path(path): Path<ByName>) -> Result<Response, ApiError> {
    definitions::get(&app, &caller, &path, Kind::Plan, PlanView::of).await
}

/// Create a plan, or replace it as a whole.
///
/// A change reaches every Envoy as fast as a revocation does.
#[utoipa::path(
    operation_id = "putPlan",
    put, path = "/v1/plans/{name}", tag = "plans", params(ByName, Conditions),
    request_body = PlanBody, security(("api_key" = [])),
    responses(
        WriteErrors,
        (status = 200, description = "The plan as it is now", body = PlanView,
            headers(("etag" = String, description = "Its version, for If-Match"))),
        (status = 201, description = "The new plan", body = PlanView,
            headers(("etag" = String, description = "Its version, for If-Match"))),
        (status = 409, description = "There are too many plans", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "It is not what If-Match or If-None-Match asks for", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn put(
    State(app): State<App>,
    caller: Caller,
    Path(path): Path<ByName>,
    preconditions: Preconditions,
    Json(body): Json<PlanBody>,
) -> Result<Response, ApiError> {
    let content = Content::parse(&body.description, body.scopes, body.rate_limits, body.quota)?;
    definitions::put(&app, &caller, (Kind::Plan, &path), &content, &preconditions, PlanView::of).await
}

/// Delete a plan that no key and no user has.
#[utoipa::path(
    operation_id = "deletePlan",
    delete, path = "/v1/plans/{name}", tag = "plans", params(ByName, Conditions),
    security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 204, description = "The plan is gone"),
        (status = 404, description = "No such plan", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It is in use", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "It is not what If-Match asks for", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Path(path): Path<ByName>,
    preconditions: Preconditions,
) -> Result<StatusCode, ApiError> {
    definitions::remove(&app, &caller, (Kind::Plan, &path), &preconditions).await
}
