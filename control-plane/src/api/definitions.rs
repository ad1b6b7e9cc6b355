//! Handlers that `/v1/roles` and `/v1/plans` share. All of them are for admins.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::extract::Json;
use super::pagination::{Next, Page};
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

/// A page of definitions, each found by its name, and what is said of the next page.
pub(super) async fn list(
    app: &App,
    caller: &Caller,
    page: Page<String>,
    kind: Kind,
) -> Result<(Vec<Definition>, Next), ApiError> {
    caller.require_admin()?;
    let mut definitions = store::list(&app.pool, kind, page.after.as_deref(), page.read()).await?;
    let next = page.cut(&mut definitions, |last| last.name.clone());
    Ok((definitions, next))
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
