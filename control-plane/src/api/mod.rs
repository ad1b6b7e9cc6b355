//! The REST API: all routes on one page, a file for each resource, and what they share.

mod app;

pub mod auth;
pub mod body_timeout;
pub mod call;
pub mod cors;
pub mod csv;
pub mod extract;
pub mod idempotency;
pub mod observe;
mod openapi;
pub mod pagination;
pub mod preconditions;
pub mod prefer;
pub mod problem;
pub mod rate_limit;

pub mod audit;
pub mod declared;
pub mod definitions;
pub mod envoys;
pub mod explain;
pub mod health;
pub mod keys;
pub mod ledger;
pub mod legacy;
pub mod plans;
pub mod policies;
pub mod roles;
pub mod sync;
pub mod usage;
pub mod usage_events;
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

use self::auth::Keyless;
pub use app::App;

use crate::error::ApiError;

/// The answer of `/`: links to the documentation and the API.
const INDEX: &[u8] = concat!(
    r#"{"service": "Portcullis control plane", "openapi": "/openapi.json", "alive": "/healthz", "ready": "/readyz", "#,
    r#""metrics": "/metrics", "documentation": "README.md of the release"}"#,
    "\n"
)
.as_bytes();

/// Longest body of a management request, in bytes.
const BODY_BYTES: usize = 16 * 1_024;

/// The default read time-out.
pub const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest body of a message with usage reports, in bytes.
const USAGE_BYTES: usize = 4 << 20;

/// Longest body of a call for allowances, in bytes: as many pools as a call may ask for, at about 110 bytes each.
const ALLOWANCES_BYTES: usize = 64 << 10;

/// Longest body of a message with sightings, in bytes: as many unknown keys and policies as it may have.
const SIGHTINGS_BYTES: usize = 64 << 10;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Portcullis",
        description = "API keys for Envoy: the REST API of the control plane.\n\nBodies are JSON objects. A field that may be \
                       left out may also be null, which means the same, unless the description of the field says what null \
                       does. A problem names the field that is wrong by its path, as `rate_limits[0].name`. Email addresses \
                       are kept in one canonical form: the domain in ASCII (UTS 46), the local part in normalisation form C \
                       with ASCII letters in lower case.\n\nA change takes effect at Envoys some \
                       milliseconds after its answer. With the header `Prefer: wait=N` (RFC 7240), N from 1 to 10, the answer \
                       comes once every live Envoy has the change and then has the header `Preference-Applied`, or after N \
                       seconds without it.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/", description = "The control plane that serves this document")),
    modifiers(&KeyHeader),
    tags(
        (name = "user", description = "The primary key of a user. Deprecated: use `/v1/keys`"),
        (name = "keys", description = "Keys of all users: create, find, change, rotate, import and revoke them"),
        (name = "users", description = "The owners of keys"),
        (name = "credits", description = "Credits of users and the ledger of their changes"),
        (name = "roles", description = "Named sets of scopes"),
        (name = "plans", description = "Named bundles of scopes, limits and a quota"),
        (name = "policies", description = "What is required of requests, and which requests each is for"),
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
        .routes(routes!(legacy::status, legacy::revoke))
        .routes(routes!(legacy::generate))
        .routes(routes!(legacy::usage))
        .routes(routes!(keys::create::create, keys::list::list))
        .routes(routes!(keys::get::get, keys::update::update, keys::revoke::revoke))
        .routes(routes!(keys::rotate::rotate))
        .routes(routes!(keys::revoke::revoke_secret))
        .routes(routes!(keys::import::import))
        .routes(routes!(keys::lookup::lookup))
        .routes(routes!(keys::unknown::list_all, keys::unknown::forget))
        .routes(routes!(keys::usage::usage))
        .routes(routes!(keys::quota::quota))
        .routes(routes!(keys::quota::reset))
        .routes(routes!(users::list, users::create))
        .routes(routes!(users::get, users::update, users::erase))
        .routes(routes!(users::revoke_keys))
        .routes(routes!(ledger::balance))
        .routes(routes!(ledger::ledger, ledger::book))
        .routes(routes!(roles::list))
        .routes(routes!(roles::get, roles::put, roles::delete))
        .routes(routes!(plans::list))
        .routes(routes!(plans::get, plans::put, plans::delete))
        .routes(routes!(policies::list))
        .routes(routes!(policies::get, policies::put, policies::delete))
        .routes(routes!(audit::trail))
        .routes(routes!(explain::explain))
        .routes(routes!(usage::usage))
        .routes(routes!(usage_events::events))
        .routes(routes!(envoys::list))
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
}

/// The OpenAPI document, made from the handlers.
pub fn openapi_document() -> utoipa::openapi::OpenApi {
    openapi::complete(management().to_openapi())
}

/// The whole service. `metrics` are shown under `/metrics` if they are collected.
pub fn router(app: App, metrics: Option<PrometheusHandle>) -> Router {
    router_with_read_timeout(app, metrics, READ_TIMEOUT)
}

/// The whole service, with a read time-out for request bodies.
pub fn router_with_read_timeout(app: App, metrics: Option<PrometheusHandle>, read_timeout: Duration) -> Router {
    let (management, openapi) = management()
        .layer(middleware::from_fn_with_state(app.clone(), prefer::wait_for_envoys))
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .split_for_parts();
    // Written once: responses share it, however many wait to be taken.
    let openapi = extract::json_line(&openapi::complete(openapi)).map(Bytes::from).unwrap_or_default();
    let shown = app.clone();
    let filters = Router::new()
        .route("/sync/v1/keys", get(sync::poll))
        .route("/sync/v1/usage", post(sync::report).layer(DefaultBodyLimit::max(USAGE_BYTES)))
        .route("/sync/v1/sightings", post(sync::store_sightings).layer(DefaultBodyLimit::max(SIGHTINGS_BYTES)))
        .route("/sync/v1/allowances", post(sync::allowances).layer(DefaultBodyLimit::max(ALLOWANCES_BYTES)));
    let router = management
        .merge(filters)
        .route("/metrics", get(move |_: Keyless| health::metrics(shown, metrics)))
        .route("/openapi.json", get(async move |_: Keyless| document(openapi)))
        .route("/", get(async |_: Keyless| document(Bytes::from_static(INDEX))))
        .fallback(async |_: Keyless| {
            ApiError::NotFound("There is no such route. See /openapi.json for all routes.".into())
        })
        .method_not_allowed_fallback(async |_: Keyless| {
            let detail = "This route does not support the method. See /openapi.json for the methods of each route.";
            ApiError::Unreadable(StatusCode::METHOD_NOT_ALLOWED, detail.into())
        })
        .layer(middleware::from_fn(explain_plain_errors))
        .layer(middleware::from_fn_with_state(read_timeout, body_timeout::limit))
        .layer(middleware::from_fn(observe::observe));
    // Without origins, a page of another origin gets no answer that it may read.
    let router = if app.cors_origins.is_empty() { router } else { router.layer(cors::allow(&app.cors_origins)) };
    router.with_state(app)
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
