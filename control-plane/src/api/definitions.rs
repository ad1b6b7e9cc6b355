//! Handlers that `/v1/roles` and `/v1/plans` share. All of them are for admins.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::extract::Json;
use super::pagination;
use crate::App;
use crate::api::auth::Caller;
use crate::api::preconditions::etag;
use crate::definitions::store::{self, Definition};
use crate::definitions::{Content, Kind, Name};
use crate::domain::Preconditions;
use crate::error::ApiError;

/// Which one.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ByName {
    /// The name: 1 to 64 characters of a-z, 0-9, `_` and `-`.
    #[param(example = "gold", min_length = 1, max_length = 64, pattern = "^[a-z0-9_-]+$")]
    name: String,
}

/// Which part of the list.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// How many; 50 unless given.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
}

/// On what condition to change.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "for the OpenAPI document; `Condition` reads the headers")]
pub struct Conditions {
    /// The ETag that it must have, or `*`: it must be there.
    #[param(rename = "If-Match", required = false)]
    if_match: Option<String>,
    /// `*`: it must not be there yet.
    #[param(rename = "If-None-Match", required = false)]
    if_none_match: Option<String>,
}

/// A page, before it is shown.
pub(super) struct Page {
    pub(super) definitions: Vec<Definition>,
    pub(super) next_cursor: Option<String>,
    pub(super) next: Option<HeaderValue>,
}

pub(super) async fn list(app: &App, caller: &Caller, query: ListQuery, kind: Kind) -> Result<Page, ApiError> {
    let limit = pagination::limit(query.limit)?;
    let after = query.cursor.map(|cursor| Name::parse("cursor", &cursor)).transpose()?;
    caller.require_admin()?;
    let mut definitions = store::list(&app.pool, kind, after.as_ref(), limit + 1).await?;
    let next_cursor = pagination::cut(&mut definitions, limit, |last| last.name.clone());
    let path = format!("/v1/{}s", kind.name());
    let next = next_cursor
        .clone()
        .map(|cursor| pagination::next_link(&path, &ListQuery { cursor: Some(cursor), limit: Some(limit) }));
    Ok(Page { definitions, next_cursor, next })
}

pub(super) async fn get<T: Serialize>(
    app: &App,
    caller: &Caller,
    path: &ByName,
    kind: Kind,
    show: impl Fn(Definition) -> T,
) -> Result<Response, ApiError> {
    let name = Name::parse("name", &path.name)?;
    caller.require_admin()?;
    let found = store::get(&app.pool, kind, &name).await?.ok_or_else(|| missing(kind, &name))?;
    Ok(reply(StatusCode::OK, found, show))
}

pub(super) async fn put<T: Serialize>(
    app: &App,
    caller: &Caller,
    (kind, path): (Kind, &ByName),
    content: &Content,
    condition: &Preconditions,
    show: impl Fn(Definition) -> T,
) -> Result<Response, ApiError> {
    let name = Name::parse("name", &path.name)?;
    caller.require_admin()?;
    let (definition, made) = store::put(&app.writer, &caller.actor, kind, &name, content, condition).await?;
    let status = if made { StatusCode::CREATED } else { StatusCode::OK };
    Ok(reply(status, definition, show))
}

pub(super) async fn remove(
    app: &App,
    caller: &Caller,
    (kind, path): (Kind, &ByName),
    condition: &Preconditions,
) -> Result<StatusCode, ApiError> {
    let name = Name::parse("name", &path.name)?;
    caller.require_admin()?;
    if !store::remove(&app.writer, &caller.actor, kind, &name, condition).await? {
        return Err(missing(kind, &name));
    }
    Ok(StatusCode::NO_CONTENT)
}

fn missing(kind: Kind, name: &Name) -> ApiError {
    ApiError::NotFound(format!("There is no {} {}.", kind.name(), name.as_str()))
}

fn reply<T: Serialize>(status: StatusCode, definition: Definition, show: impl Fn(Definition) -> T) -> Response {
    let tag = [(header::ETAG, etag(definition.version))];
    (status, tag, Json(show(definition))).into_response()
}
