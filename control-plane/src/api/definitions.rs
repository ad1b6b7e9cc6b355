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

/// The routes of roles or of plans: list, get, put and delete. `$body` has a method `parse`, `$view` a function `of`.
#[rustfmt::skip]
macro_rules! routes {
    (
        $kind:ident $tag:tt, $view:ident, $body:ident, $page:ident { $field:ident },
        list: $list:tt $list_path:tt $list_doc:tt,
        get: $get:tt $path:tt $get_doc:tt,
        put: $put:tt $put_doc:tt,
        delete: $delete:tt $delete_doc:tt $(,)?
    ) => {
        use axum::http::StatusCode;
        use axum::response::Response;
        use $crate::api::call::Call;
        use $crate::api::definitions::{self, ByName};
        use $crate::api::extract::Json;
        use $crate::api::openapi::{Conditions, Conflict};
        use $crate::api::pagination::{self, All, List, PageQuery};
        use $crate::definitions::Kind;
        use $crate::domain::Preconditions;

        #[doc = $list_doc]
        #[utoipa::path(
            operation_id = $list,
            get, path = $list_path, tag = $tag, params(PageQuery),
            responses((status = 200, description = "A page of the list", body = $page))
        )]
        pub async fn list(
            Call { app, caller, .. }: Call,
            List { page, .. }: List<All, String>,
        ) -> Result<Response, ApiError> {
            let (found, next) = definitions::list(&app, &caller, page, Kind::$kind).await?;
            let $field = found.into_iter().map($view::of).collect();
            Ok(pagination::reply($page { $field, next_cursor: next.cursor }, next.link))
        }

        #[doc = $get_doc]
        #[utoipa::path(
            operation_id = $get,
            get, path = $path, tag = $tag, params(ByName),
            responses((status = 200, description = "The role or plan", body = $view))
        )]
        pub async fn get(Call { app, caller, path }: Call<ByName>) -> Result<Response, ApiError> {
            definitions::get(&app, &caller, &path, Kind::$kind, $view::of).await
        }

        #[doc = $put_doc]
        ///
        /// A change reaches every Envoy as fast as a revocation does.
        #[utoipa::path(
            operation_id = $put,
            put, path = $path, tag = $tag, params(ByName, Conditions), request_body = $body,
            responses(
                Conflict,
                (status = 200, description = "Replaced, or the same as before", body = $view),
                (status = 201, description = "Created", body = $view),
            )
        )]
        pub async fn put(
            Call { app, caller, path }: Call<ByName>,
            preconditions: Preconditions,
            Json(body): Json<$body>,
        ) -> Result<Response, ApiError> {
            definitions::put(&app, &caller, (Kind::$kind, &path), &body.parse()?, &preconditions, $view::of).await
        }

        #[doc = $delete_doc]
        #[utoipa::path(
            operation_id = $delete,
            delete, path = $path, tag = $tag, params(ByName, Conditions),
            responses(Conflict, (status = 204, description = "Deleted"))
        )]
        pub async fn delete(
            Call { app, caller, path }: Call<ByName>,
            preconditions: Preconditions,
        ) -> Result<StatusCode, ApiError> {
            definitions::remove(&app, &caller, (Kind::$kind, &path), &preconditions).await
        }
    };
}
pub(super) use routes;

/// Which one.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ByName {
    /// The name: 1 to 64 characters of a-z, 0-9, `_` and `-`.
    #[param(example = "gold", min_length = 1, max_length = 64, pattern = "^[a-z0-9_-]+$")]
    name: String,
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
    let remove = app.writer.change(&caller.actor, async |change| store::remove(change, kind, &name, condition).await);
    if remove.await? { Ok(StatusCode::NO_CONTENT) } else { Err(missing(kind, &name)) }
}

fn missing(kind: Kind, name: &Name) -> ApiError {
    ApiError::NotFound(format!("There is no {} {}.", kind.name(), name.as_str()))
}

fn reply<T: Serialize>(status: StatusCode, definition: Definition, show: impl Fn(Definition) -> T) -> Response {
    let tag = [(header::ETAG, etag(definition.version))];
    (status, tag, Json(show(definition))).into_response()
}
