//! Calls of the REST API by pages of other origins (CORS), off unless the operator names origins.
//!
//! The key stands in a header that a page must set, and no cookie is read, so no page can use a key that it does not have.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::CorsLayer;

/// For how long a browser remembers what a preflight request allowed.
const MAX_AGE: Duration = Duration::from_mins(10);

/// Request headers that the REST API reads.
const READ: [HeaderName; 7] = [
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("idempotency-key"),
    HeaderName::from_static("prefer"),
    HeaderName::from_static("x-request-id"),
    header::CONTENT_TYPE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
];

/// Response headers that a page needs.
const EXPOSED: [HeaderName; 6] = [
    HeaderName::from_static("preference-applied"),
    HeaderName::from_static("x-request-id"),
    header::ETAG,
    header::LINK,
    header::LOCATION,
    header::RETRY_AFTER,
];

/// Lets pages of these origins call.
pub fn allow(origins: &[HeaderValue]) -> CorsLayer {
    let methods = [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    CorsLayer::new()
        .allow_origin(origins.to_vec())
        .allow_methods(methods)
        .allow_headers(READ)
        .expose_headers(EXPOSED)
        .max_age(MAX_AGE)
}
