//! Handlers that `/v1/roles` and `/v1/plans` share, and what `/v1/policies` uses of them. All of them are for admins.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::extract::Json;
use crate::api::auth::Caller;
use crate::api::preconditions::etag;
use crate::definitions::{Kind, Name};
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
        use $crate::api::definitions::{ByName, missing, reply};
        use $crate::api::extract::Json;
        use $crate::api::openapi::{Conditions, Conflict};
        use $crate::api::pagination::{self, All, List, PageQuery};
        use $crate::definitions::{Kind, store};
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
            caller.require_admin()?;
            let mut found = store::list(&app.pool, Kind::$kind, page.after.as_deref(), page.read()).await?;
            let next = page.cut(&mut found, |last| last.name.clone());
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
            let name = path.parse(&caller)?;
            let found = store::get(&app.pool, Kind::$kind, &name).await?.ok_or_else(|| missing(Kind::$kind, &name))?;
            Ok(reply(StatusCode::OK, found.version, $view::of(found)))
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
            let name = path.parse(&caller)?;
            let content = body.parse()?;
            let put = store::put(&app.writer, &caller.actor, Kind::$kind, &name, &content, &preconditions);
            let (definition, made) = put.await?;
            let status = if made { StatusCode::CREATED } else { StatusCode::OK };
            Ok(reply(status, definition.version, $view::of(definition)))
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
            let name = path.parse(&caller)?;
            let removed = app.writer.change(&caller.actor, async |change| {
                store::remove(change, Kind::$kind, &name, &preconditions, false).await
            });
            if removed.await? { Ok(StatusCode::NO_CONTENT) } else { Err(missing(Kind::$kind, &name)) }
        }
    };
}
pub(super) use routes;

/// Which one.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub struct ByName {
    /// Its name: 1 to 64 characters of a-z, 0-9, `_` and `-`.
    #[param(example = "gold", min_length = 1, max_length = 64, pattern = "^[a-z0-9_-]+$")]
    name: String,
}

impl ByName {
    /// The name, for admins only.
    pub(super) fn parse(&self, caller: &Caller) -> Result<Name, ApiError> {
        let name = Name::parse("name", &self.name)?;
        caller.require_admin()?;
        Ok(name)
    }
}

pub(super) fn missing(kind: Kind, name: &Name) -> ApiError {
    ApiError::NotFound(format!("There is no {} {}.", kind.name(), name.as_str()))
}

pub(super) fn reply(status: StatusCode, version: i64, view: impl Serialize) -> Response {
    (status, [(header::ETAG, etag(version))], Json(view)).into_response()
}
