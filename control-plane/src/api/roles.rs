//! `/v1/roles`: named sets of scopes that keys have.

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
use crate::domain::Timestamp;
use crate::error::ApiError;

/// What a role is to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"description": "For the support team", "scopes": ["orders:read"]}))]
pub struct RoleBody {
    /// For people: at most 500 characters.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_length = 500)]
    description: String,
    /// Scopes that it grants: at most 32; not `admin` and `sync`, which are granted to a key only.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = json!(["orders:read"]), max_items = 32)]
    scopes: Vec<String>,
}

/// A role: a named set of scopes.
#[derive(Debug, Serialize, ToSchema)]
pub struct RoleView {
    /// What keys call it.
    #[schema(example = "support")]
    name: String,
    /// For people.
    description: String,
    /// Scopes that it grants.
    scopes: Vec<String>,
    /// Since when there is one of that name.
    created_at: Timestamp,
}

impl RoleView {
    fn of(definition: Definition) -> Self {
        Self {
            name: definition.name,
            description: definition.description,
            scopes: definition.scopes,
            created_at: definition.created_at.into(),
        }
    }
}

/// A page of roles, by name.
#[derive(Debug, Serialize, ToSchema)]
pub struct RolePage {
    /// The roles.
    roles: Vec<RoleView>,
    /// What to send as `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// List roles by name.
#[utoipa::path(
    operation_id = "listRoles",
    get, path = "/v1/roles", tag = "roles", params(PageQuery), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "A page of roles", body = RolePage,
            headers(("link" = String, description = "The next page, if there is one (RFC 8288)"))),
    )
)]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    List { page, .. }: List<All, String>,
) -> Result<Response, ApiError> {
    let (found, next) = definitions::list(&app, &caller, page, Kind::Role).await?;
    let roles = found.into_iter().map(RoleView::of).collect();
    Ok(pagination::reply(RolePage { roles, next_cursor: next.cursor }, next.link))
}

/// Get a role.
#[utoipa::path(
    operation_id = "getRole",
    get, path = "/v1/roles/{name}", tag = "roles", params(ByName), security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 200, description = "The role", body = RoleView,
            headers(("etag" = String, description = "Its version, for If-Match"))),
        (status = 404, description = "No such role", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn get(State(app): State<App>, caller: Caller, Path(path): Path<ByName>) -> Result<Response, ApiError> {
    definitions::get(&app, &caller, &path, Kind::Role, RoleView::of).await
}

/// Create a role, or replace it as a whole.
///
/// A change reaches every Envoy as fast as a revocation does.
#[utoipa::path(
    operation_id = "putRole",
    put, path = "/v1/roles/{name}", tag = "roles", params(ByName, Conditions),
    request_body = RoleBody, security(("api_key" = [])),
    responses(
        WriteErrors,
        (status = 200, description = "The role as it is now", body = RoleView,
            headers(("etag" = String, description = "Its version, for If-Match"))),
        (status = 201, description = "The new role", body = RoleView,
            headers(("etag" = String, description = "Its version, for If-Match"))),
        (status = 409, description = "There are too many roles", body = Problem, content_type = "application/problem+json"),
        (status = 412, description = "It is not what If-Match or If-None-Match asks for", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn put(
    State(app): State<App>,
    caller: Caller,
    Path(path): Path<ByName>,
    preconditions: Preconditions,
    Json(body): Json<RoleBody>,
) -> Result<Response, ApiError> {
    let content = Content::parse(&body.description, body.scopes, Vec::new(), None)?;
    definitions::put(&app, &caller, (Kind::Role, &path), &content, &preconditions, RoleView::of).await
}

/// Delete a role that no key has.
#[utoipa::path(
    operation_id = "deleteRole",
    delete, path = "/v1/roles/{name}", tag = "roles", params(ByName, Conditions),
    security(("api_key" = [])),
    responses(
        ReadErrors,
        (status = 204, description = "The role is gone"),
        (status = 404, description = "No such role", body = Problem, content_type = "application/problem+json"),
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
    definitions::remove(&app, &caller, (Kind::Role, &path), &preconditions).await
}
