//! Error responses: problems (RFC 9457) with a stable `code`. Internal errors are logged once, and their text is not sent.

use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::outcome::{Outcome, PROBLEMS};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::extract::json_line;
use crate::error::{ApiError, is_away};

/// `Retry-After` while the database or the mirror is not available, in seconds.
const RETRY_UNAVAILABLE_S: u64 = 1;

/// The body of an error (RFC 9457).
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({
    "type": "https://portcullis.invalid/reference/problems.html#invalid", "title": "Invalid request", "status": 400, "code": "invalid",
    "detail": "must have 1 to 100 characters, none of them a control character", "field": "name"
}))]
pub struct Problem {
    /// Names the kind of problem: the address of its description.
    pub r#type: String,
    /// The kind of problem, in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// The cause of the error and its remedy.
    pub detail: String,
    /// The kind of problem, for programs: stable.
    pub code: String,
    /// The field of the request that is wrong, if it is one: by its path, as `rate_limits[0].name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// A kind of problem.
struct Kind {
    status: StatusCode,
    code: &'static str,
    title: &'static str,
}

macro_rules! kinds {
    ($($name:ident: $status:ident $code:literal $title:literal,)+) => {
        $(const $name: Kind = Kind { status: StatusCode::$status, code: $code, title: $title };)+

        #[cfg(test)]
        const KINDS: &[Kind] = &[$($name),+];
    };
}

// The kinds of the REST API itself. Those of the caller's key are outcomes.
kinds! {
    INVALID: BAD_REQUEST "invalid" "Invalid request",
    FORBIDDEN: FORBIDDEN "forbidden" "Forbidden",
    NOT_FOUND: NOT_FOUND "not_found" "Not found",
    METHOD_NOT_ALLOWED: METHOD_NOT_ALLOWED "method_not_allowed" "Method not allowed",
    TIMEOUT: REQUEST_TIMEOUT "timeout" "Request timeout",
    CONFLICT: CONFLICT "conflict" "Conflict",
    IN_PROGRESS: CONFLICT "idempotency_in_progress" "Request in progress",
    GONE: GONE "gone" "Gone",
    PRECONDITION_FAILED: PRECONDITION_FAILED "precondition_failed" "Precondition failed",
    TOO_LARGE: PAYLOAD_TOO_LARGE "too_large" "Body too large",
    UNSUPPORTED_MEDIA_TYPE: UNSUPPORTED_MEDIA_TYPE "unsupported_media_type" "Unsupported media type",
    MISMATCH: UNPROCESSABLE_ENTITY "idempotency_mismatch" "Idempotency-Key used before",
    TOO_MANY_REQUESTS: TOO_MANY_REQUESTS "too_many_requests" "Too many requests",
    BOUND_REACHED: TOO_MANY_REQUESTS "bound_reached" "Bound reached",
    INTERNAL: INTERNAL_SERVER_ERROR "internal" "Internal error",
    UNAVAILABLE: SERVICE_UNAVAILABLE "unavailable" "Temporarily unavailable",
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match self {
            Self::Invalid { field, detail } => respond(&INVALID, &detail, field.as_deref()),
            Self::Unreadable(status, detail) if status.is_server_error() => {
                tracing::error!(%status, detail, "could not handle a request");
                internal()
            }
            Self::Unreadable(status, detail) => {
                let kind = match status {
                    StatusCode::REQUEST_TIMEOUT => TIMEOUT,
                    StatusCode::PAYLOAD_TOO_LARGE => TOO_LARGE,
                    StatusCode::UNSUPPORTED_MEDIA_TYPE => UNSUPPORTED_MEDIA_TYPE,
                    StatusCode::METHOD_NOT_ALLOWED => METHOD_NOT_ALLOWED,
                    _ => Kind { status, ..INVALID },
                };
                respond(&kind, &detail, None)
            }
            Self::Refused(outcome) => refuse(outcome),
            Self::Forbidden(detail) => respond(&FORBIDDEN, &detail, None),
            Self::NotFound(detail) => respond(&NOT_FOUND, &detail, None),
            Self::Conflict(detail) => respond(&CONFLICT, &detail, None),
            Self::InProgress => {
                let detail = "The first request with this Idempotency-Key is still running. Try again shortly.";
                retry_after(respond(&IN_PROGRESS, detail, None), RETRY_UNAVAILABLE_S)
            }
            Self::Precondition(detail) => respond(&PRECONDITION_FAILED, &detail, None),
            Self::Mismatch(detail) => respond(&MISMATCH, detail, None),
            Self::Gone(detail) => respond(&GONE, &detail, None),
            Self::TooMany { retry_after_s } => {
                let detail = "This caller sends too many requests. Wait as long as Retry-After demands.";
                retry_after(respond(&TOO_MANY_REQUESTS, detail, None), retry_after_s)
            }
            Self::BoundReached { detail, retry_after_s } => {
                retry_after(respond(&BOUND_REACHED, &detail, None), retry_after_s)
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
    let response = respond(&Kind { status, code: outcome.name(), title: refusal.title }, detail, None);
    if status == StatusCode::UNAUTHORIZED {
        with(response, WWW_AUTHENTICATE, HeaderValue::from_static("ApiKey realm=\"portcullis\""))
    } else {
        response
    }
}

fn unavailable(why: &str) -> Response {
    retry_after(respond(&UNAVAILABLE, why, None), RETRY_UNAVAILABLE_S)
}

fn internal() -> Response {
    respond(&INTERNAL, "Internal error. See the server log for the request id of this response.", None)
}

fn respond(kind: &Kind, detail: &str, field: Option<&str>) -> Response {
    let problem = Problem {
        r#type: format!("{PROBLEMS}{}", kind.code),
        title: kind.title.into(),
        status: kind.status.as_u16(),
        detail: detail.into(),
        code: kind.code.into(),
        field: field.map(Into::into),
    };
    let body = json_line(&problem).unwrap_or_default();
    let headers = [(header::CONTENT_TYPE, "application/problem+json"), (header::CACHE_CONTROL, "no-store")];
    (kind.status, headers, body).into_response()
}

fn retry_after(response: Response, seconds: u64) -> Response {
    with(response, RETRY_AFTER, HeaderValue::from(seconds))
}

fn with(mut response: Response, name: header::HeaderName, value: HeaderValue) -> Response {
    response.headers_mut().insert(name, value);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_describes_every_type_of_problem_under_its_anchor() {
        let page = include_str!("../../../docs/src/reference/problems.md");
        assert!(PROBLEMS.ends_with("/reference/problems.html#"));
        // The anchor of such a heading is its text.
        let described: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("### ")).collect();
        let refusals = Outcome::ALL.into_iter().filter(|outcome| outcome.refusal().is_some()).map(Outcome::name);
        let mut expected: Vec<_> = KINDS.iter().map(|kind| kind.code).chain(refusals).collect();
        let mut found = described.clone();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
    }
}
