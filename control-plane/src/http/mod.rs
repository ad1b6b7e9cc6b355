//! All routes, on one page. Each resource has its file; what they share is here: limits, request ids, and that whatever
//! is not served is answered with a problem too.

pub mod audit;
pub mod credits;
pub mod csv;
pub mod definitions;
mod document;
pub mod events;
pub mod explain;
pub mod extract;
pub mod filters;
pub mod health;
pub mod keys;
pub mod once;
pub mod paging;
pub mod patience;
pub mod plans;
pub mod refusals;
pub mod roles;
pub mod sync;
pub mod usage;
pub mod user;
pub mod users;

use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use metrics_exporter_prometheus::PrometheusHandle;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::auth::Keyless;
use crate::error::ApiError;
use crate::{App, telemetry};

/// What `/` answers: where to go.
const INDEX: &[u8] = concat!(
    r#"{"service": "Portcullis control plane", "openapi": "/openapi.json", "alive": "/healthz", "ready": "/readyz", "#,
    r#""metrics": "/metrics", "documentation": "README.md of the release"}"#,
    "\n"
)
.as_bytes();

/// Longest body of a management request, in bytes.
const BODY_BYTES: usize = 16 * 1_024;

/// How long a client may take to send what it has begun, unless the operator says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Longest body of a message with usage reports, in bytes.
const USAGE_BYTES: usize = 4 << 20;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Portcullis",
        description = "API keys for Envoy: the REST API of the control plane.\n\nBodies are JSON objects. A field that may be \
                       left out may also be null, which means the same, unless the description of the field says what null \
                       does. A problem names the field that is wrong by its path, as `rate_limits[0].name`. Email addresses \
                       are kept in one canonical form: the domain in ASCII (UTS 46), the local part in normalisation form C \
                       with ASCII letters in lower case.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/", description = "The control plane that serves this document")),
    modifiers(&KeyHeader),
    tags(
        (name = "user", description = "The primary key of a user"),
        (name = "keys", description = "Keys of all users: create, find, change, rotate, import and revoke them"),
        (name = "users", description = "The owners of keys"),
        (name = "credits", description = "Credits of users and the ledger of their changes"),
        (name = "roles", description = "Named sets of scopes"),
        (name = "plans", description = "Named bundles of scopes, limits and a quota"),
        (name = "audit", description = "The audit trail"),
        (name = "insight", description = "Decisions explained, usage, and the state of every Envoy"),
        (name = "platform", description = "For the platform that the control plane runs on")
    )
)]
struct Document;

struct KeyHeader;

impl Modify for KeyHeader {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let description = "A key with the scope `admin` manages everything. A user's own key manages its owner's keys.";
        let scheme = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description("X-API-Key", description)));
        openapi.components.get_or_insert_default().add_security_scheme("api_key", scheme);
    }
}

fn management() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(user::status, user::revoke))
        .routes(routes!(user::generate))
        .routes(routes!(user::usage))
        .routes(routes!(keys::create, keys::list))
        .routes(routes!(keys::get, keys::patch, keys::revoke))
        .routes(routes!(keys::rotate))
        .routes(routes!(keys::cut_off))
        .routes(routes!(keys::import))
        .routes(routes!(keys::usage))
        .routes(routes!(keys::quota))
        .routes(routes!(users::list))
        .routes(routes!(users::get, users::patch))
        .routes(routes!(users::revoke_keys))
        .routes(routes!(credits::account, credits::credit, credits::change))
        .routes(routes!(credits::ledger))
        .routes(routes!(roles::list))
        .routes(routes!(roles::get, roles::put, roles::delete))
        .routes(routes!(plans::list))
        .routes(routes!(plans::get, plans::put, plans::delete))
        .routes(routes!(audit::trail))
        .routes(routes!(explain::explain))
        .routes(routes!(usage::usage))
        .routes(routes!(events::events))
        .routes(routes!(filters::filters))
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
}

/// The OpenAPI document, made from the handlers.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    document::complete(management().to_openapi())
}

/// The whole service. `metrics` are shown under `/metrics` if they are collected.
pub fn router(app: App, metrics: Option<PrometheusHandle>) -> Router {
    patient_router(app, metrics, PATIENCE)
}

/// The whole service, with bodies that have to be there before `patience` is over.
pub fn patient_router(app: App, metrics: Option<PrometheusHandle>, patience: Duration) -> Router {
    let (management, openapi) = management().layer(DefaultBodyLimit::max(BODY_BYTES)).split_for_parts();
    // Written once: responses share it, however many wait to be taken.
    let openapi = extract::json_line(&document::complete(openapi)).map(Bytes::from).unwrap_or_default();
    let shown = app.clone();
    let filters = Router::new()
        .route("/sync/v1/keys", get(sync::poll))
        .route("/sync/v1/usage", post(sync::report).layer(DefaultBodyLimit::max(USAGE_BYTES)));
    management
        .merge(filters)
        .route("/metrics", get(move |_: Keyless| health::metrics(shown, metrics)))
        .route("/openapi.json", get(async move |_: Keyless| document(openapi)))
        .route("/", get(async |_: Keyless| document(Bytes::from_static(INDEX))))
        .fallback(async |_: Keyless| ApiError::NotFound("There is no such route; /openapi.json lists them.".into()))
        .method_not_allowed_fallback(async |_: Keyless| {
            let detail = "This route does not take that method; /openapi.json lists those it takes.";
            ApiError::Unreadable(StatusCode::METHOD_NOT_ALLOWED, detail.into())
        })
        .layer(middleware::from_fn(explain_plain_errors))
        .layer(middleware::from_fn_with_state(patience, patience::limit))
        .layer(middleware::from_fn(telemetry::observe))
        .with_state(app)
}

/// A JSON document that is the same for all callers.
fn document(body: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Errors that the framework answers in plain text become problems.
async fn explain_plain_errors(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let plain = response.headers().get("content-type").is_none_or(|kind| kind.as_bytes().starts_with(b"text/plain"));
    if !plain || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let detail = status.canonical_reason().unwrap_or("the request could not be read");
    ApiError::Unreadable(status, detail.to_owned()).into_response()
}
