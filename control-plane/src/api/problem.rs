//! Error responses: problems (RFC 9457) with a stable `code`. Internal errors are logged once, and their text is not sent.

use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::outcome::Outcome;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::extract::json_line;
use crate::error::{ApiError, is_away};

/// `Retry-After` while the database or the mirror is not available, in seconds.
const RETRY_UNAVAILABLE_S: u64 = 1;

/// The body of an error (RFC 9457).
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({
    "type": "urn:portcullis:problem:invalid", "title": "Invalid request", "status": 400, "code": "invalid",
    "detail": "must have 1 to 100 characters, none of them a control character", "field": "name"
}))]
pub struct Problem {
    /// A URN that names the kind of problem.
    pub r#type: String,
    /// The kind of problem, in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong here, and what to do about it.
    pub detail: String,
    /// The kind of problem, for programs: stable.
    pub code: String,
    /// The field of the request that is wrong, if it is one: by its path, as `rate_limits[0].name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match self {
            Self::Invalid { field, detail } => {
                respond(StatusCode::BAD_REQUEST, "invalid", "Invalid request", &detail, field.as_deref())
            }
            Self::Unreadable(status, detail) if status.is_server_error() => {
                tracing::error!(%status, detail, "could not handle a request");
                internal()
            }
            Self::Unreadable(status, detail) => {
                let (code, title) = match status {
                    StatusCode::REQUEST_TIMEOUT => ("timeout", "Request timeout"),
                    StatusCode::PAYLOAD_TOO_LARGE => ("too_large", "Body too large"),
                    StatusCode::UNSUPPORTED_MEDIA_TYPE => ("unsupported_media_type", "Unsupported media type"),
                    StatusCode::METHOD_NOT_ALLOWED => ("method_not_allowed", "Method not allowed"),
                    _ => ("invalid", "Invalid request"),
                };
                respond(status, code, title, &detail, None)
            }
            Self::Refused(outcome) => refuse(outcome),
            Self::Forbidden(detail) => respond(StatusCode::FORBIDDEN, "forbidden", "Forbidden", &detail, None),
            Self::NotFound(detail) => respond(StatusCode::NOT_FOUND, "not_found", "Not found", &detail, None),
            Self::Conflict(detail) => respond(StatusCode::CONFLICT, "conflict", "Conflict", &detail, None),
            Self::InProgress => {
                let detail = "The first request with this Idempotency-Key is still running. Try again shortly.";
                let response =
                    respond(StatusCode::CONFLICT, "idempotency_in_progress", "Request in progress", detail, None);
                with(response, RETRY_AFTER, HeaderValue::from(RETRY_UNAVAILABLE_S))
            }
            Self::Precondition(detail) => {
                respond(StatusCode::PRECONDITION_FAILED, "precondition_failed", "Precondition failed", &detail, None)
            }
            Self::Mismatch(detail) => respond(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_mismatch",
                "Idempotency-Key used before",
                detail,
                None,
            ),
            Self::Gone(detail) => respond(StatusCode::GONE, "gone", "Gone", &detail, None),
            Self::TooMany { retry_after_s } => {
                let detail = "This caller sends too many requests. Wait as long as Retry-After demands.";
                let response =
                    respond(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", "Too many requests", detail, None);
                with(response, RETRY_AFTER, HeaderValue::from(retry_after_s))
            }
            Self::BoundReached { detail, retry_after_s } => {
                let response = respond(StatusCode::TOO_MANY_REQUESTS, "bound_reached", "Bound reached", &detail, None);
                with(response, RETRY_AFTER, HeaderValue::from(retry_after_s))
            }
            Self::Unavailable(why) => unavailable(why),
            Self::Database(error) if is_away(&error) => {
                tracing::warn!(%error, "the database is not available");
                unavailable("The database is not available. Try again shortly.")
            }
            Self::Database(error) => {
                tracing::error!(%error, "database error");
                internal()
            }
            Self::Internal(why) => {
                tracing::error!(why, "internal error");
                internal()
            }
        }
    }
}

fn refuse(outcome: Outcome) -> Response {
    let Some(refusal) = outcome.refusal() else { return internal() };
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::FORBIDDEN);
    let missing = outcome == Outcome::Missing;
    let detail = if missing { "Send your API key in the header x-api-key." } else { refusal.detail };
    let response = respond(status, outcome.name(), refusal.title, detail, None);
    if status == StatusCode::UNAUTHORIZED {
        with(response, WWW_AUTHENTICATE, HeaderValue::from_static("ApiKey realm=\"portcullis\""))
    } else {
        response
    }
}

fn unavailable(why: &str) -> Response {
    let response = respond(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Temporarily unavailable", why, None);
    with(response, RETRY_AFTER, HeaderValue::from(RETRY_UNAVAILABLE_S))
}

fn internal() -> Response {
    let detail = "Internal error. See the server log for the request id of this response.";
    respond(StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error", detail, None)
}

fn respond(status: StatusCode, code: &str, title: &str, detail: &str, field: Option<&str>) -> Response {
    let problem = Problem {
        r#type: format!("urn:portcullis:problem:{code}"),
        title: title.into(),
        status: status.as_u16(),
        detail: detail.into(),
        code: code.into(),
        field: field.map(Into::into),
    };
    let body = json_line(&problem).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/problem+json"), (header::CACHE_CONTROL, "no-store")], body)
        .into_response()
}

fn with(mut response: Response, name: header::HeaderName, value: HeaderValue) -> Response {
    response.headers_mut().insert(name, value);
    response
}
