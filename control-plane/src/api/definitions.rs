//! Handlers that `/v1/roles` and `/v1/plans` share, and what `/v1/policies` uses of them. All of them are for admins.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::extract::Json;
use crate::api::auth::Caller;
use crate::api::idempotency::IdempotentResponse;
use crate::api::preconditions::etag;
use crate::definitions::Name;
use crate::definitions::store::Definition;
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
        use $crate::api::definitions::{ByName, put_reply, reply};
        use $crate::api::idempotency::{IdempotentRequest, IdempotentResponse};
        use $crate::api::openapi::{Conditions, Conflict, IdempotencyKey};
        use $crate::api::pagination::{self, All, List, PageQuery};
        use $crate::change::Change;
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
            let found = store::get(&app.pool, Kind::$kind, &name).await?.ok_or_else(|| store::missing(Kind::$kind, &name))?;
            Ok(reply(StatusCode::OK, found.version, $view::of(found)))
        }

        #[doc = $put_doc]
        ///
        /// A change reaches every Envoy as fast as a revocation does.
        #[utoipa::path(
            operation_id = $put,
            put, path = $path, tag = $tag, params(ByName, Conditions, IdempotencyKey), request_body = $body,
            responses(
                Conflict,
                (status = 200, description = "Replaced, or the same as before", body = $view),
                (status = 201, description = "Created", body = $view),
            )
        )]
        pub async fn put(
            Call { app, caller, path }: Call<ByName>,
            preconditions: Preconditions,
            mut request: IdempotentRequest,
        ) -> Result<Response, ApiError> {
            let name = path.parse(&caller)?;
            let content = request.body::<$body>().await?.parse()?;
            let put = async |change: &mut Change| {
                let put = store::put(change, Kind::$kind, &name, &content, &preconditions).await?;
                put_reply(put, $view::of)
            };
            request.respond(&app.writer, &caller, put).await
        }

        #[doc = $delete_doc]
        #[utoipa::path(
            operation_id = $delete,
            delete, path = $path, tag = $tag, params(ByName, Conditions, IdempotencyKey),
            responses(Conflict, (status = 204, description = "Deleted"))
        )]
        pub async fn delete(
            Call { app, caller, path }: Call<ByName>,
            preconditions: Preconditions,
            request: IdempotentRequest,
        ) -> Result<Response, ApiError> {
            let name = path.parse(&caller)?;
            let remove = async |change: &mut Change| {
                store::remove(change, Kind::$kind, &name, &preconditions, false).await?;
                Ok(IdempotentResponse::no_content())
            };
            request.respond(&app.writer, &caller, remove).await
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

/// The response to a definition that was put: 201 if it is new.
pub(super) fn put_reply<V: Serialize>(
    (definition, made): (Definition, bool),
    view: impl FnOnce(Definition) -> V,
) -> Result<IdempotentResponse, ApiError> {
    let (status, version) = (if made { StatusCode::CREATED } else { StatusCode::OK }, definition.version);
    Ok(IdempotentResponse::new(status, &view(definition))?.with_version(version))
}

pub(super) fn reply(status: StatusCode, version: i64, view: impl Serialize) -> Response {
    (status, [(header::ETAG, etag(version))], Json(view)).into_response()
}
