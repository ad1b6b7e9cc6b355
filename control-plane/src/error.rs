//! Errors at the boundary: whatever goes wrong in a handler becomes a problem (RFC 9457) with a stable `code` here, and
//! nowhere else. What is nobody's business outside is logged once and not sent.

use std::borrow::Cow;

use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::json::InputError;
use contract::outcome::Outcome;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::http::extract::json_line;

/// How long a client should wait before it tries again while the database or the mirror is away, in seconds.
const RETRY_UNAVAILABLE_S: u64 = 1;

/// The rules of the database that keep one admin key alive, and one that can be used from where the caller is.
const LAST_ADMIN: &str = "api_keys_last_admin";
const LAST_ADMIN_HERE: &str = "api_keys_last_admin_here";

/// What a handler may fail with.
#[derive(Debug)]
pub enum ApiError {
    /// 400: the request does not make sense. The field and the remedy.
    Invalid {
        /// Which field of the body, by its path, or of the path or the query; none for the request as a whole.
        field: Option<Cow<'static, str>>,
        /// What is wrong and what to do.
        detail: String,
    },
    /// 400: a request that the framework could not read, with its status and what was wrong with it.
    Unreadable(StatusCode, String),
    /// 401, 403: the caller's key was not admitted.
    Refused(Outcome),
    /// 403: the key is good, but not for this.
    Forbidden(String),
    /// 404: no such thing. What was looked for.
    NotFound(String),
    /// 409: it contradicts what is there.
    Conflict(String),
    /// 409: the same request is still being worked on.
    InProgress,
    /// 412: what is to be changed is not as the client believes.
    Precondition(String),
    /// 422: an Idempotency-Key that another request had.
    Mismatch(&'static str),
    /// 410: it was there and is no longer kept. What, and what to do.
    Gone(String),
    /// 429: too many requests of this caller.
    TooMany {
        /// When to come back, in seconds.
        retry_after_s: u64,
    },
    /// 429: as much as one owner or one sync key may have. Which bound that is, and what to do.
    BoundReached {
        /// Which bound, and what to do.
        detail: String,
        /// When to come back, in seconds.
        retry_after_s: u64,
    },
    /// 503: the database, the mirror or a queue cannot take it now. Why, for the client.
    Unavailable(&'static str),
    /// 500, or 503 if the database is away.
    Database(sqlx::Error),
    /// 500: what should not have happened, for the log.
    Internal(String),
}

impl ApiError {
    /// A bad field.
    pub fn invalid(field: impl Into<Cow<'static, str>>, detail: impl Into<String>) -> Self {
        Self::Invalid { field: Some(field.into()), detail: detail.into() }
    }
}

/// For the command line, where there is nobody to hide internals from.
impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Invalid { field: Some(field), detail } => write!(f, "{field}: {detail}"),
            Self::Invalid { field: None, detail }
            | Self::Unreadable(_, detail)
            | Self::Forbidden(detail)
            | Self::NotFound(detail)
            | Self::Conflict(detail)
            | Self::Precondition(detail)
            | Self::Gone(detail)
            | Self::BoundReached { detail, .. }
            | Self::Internal(detail) => f.write_str(detail),
            Self::InProgress => f.write_str("the same request is still being worked on"),
            Self::Mismatch(detail) => f.write_str(detail),
            Self::Refused(outcome) => write!(f, "the key was refused: {}", outcome.name()),
            Self::TooMany { retry_after_s } => write!(f, "too many requests; come back in {retry_after_s} s"),
            Self::Unavailable(why) => f.write_str(why),
            Self::Database(error) => write!(f, "the database: {error}"),
        }
    }
}

impl std::error::Error for ApiError {}

/// What is wrong with the body as JSON.
impl From<InputError> for ApiError {
    fn from(InputError { path, detail, .. }: InputError) -> Self {
        if path.is_empty() {
            return Self::Invalid { field: None, detail: format!("The body {detail}.") };
        }
        Self::invalid(path, detail)
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> Self {
        if error.as_database_error().and_then(|error| error.constraint()) == Some(LAST_ADMIN) {
            let detail = "This would end the last key with the scope admin that works for longer than a day, and nobody could manage \
                          keys any more. Create another one first.";
            return Self::Conflict(detail.into());
        }
        if error.as_database_error().and_then(|error| error.constraint()) == Some(LAST_ADMIN_HERE) {
            let detail = "After this, no key with the scope admin could be used from your address for longer than a day, and you \
                          could not manage keys any more. Let allowed_addresses hold your address, or create another admin key \
                          that is not bound to networks first.";
            return Self::Conflict(detail.into());
        }
        Self::Database(error)
    }
}

/// Whether the database cannot work at the moment, so that the same call may succeed later.
#[must_use]
pub fn is_away(error: &sqlx::Error) -> bool {
    let passing = |code: &str| {
        // Connection exceptions, resources, shutting down or starting up; a deadlock, a lock or a statement given up.
        ["08", "53", "57P"].iter().any(|class| code.starts_with(class)) || ["40P01", "55P03", "57014"].contains(&code)
    };
    match error {
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Io(_) | sqlx::Error::Tls(_) => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| passing(&code)),
        _ => false,
    }
}

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
                tracing::error!(%status, detail, "the framework failed");
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
                let detail = "The first request with this Idempotency-Key is still being worked on. Try again shortly.";
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
                let detail = "This caller sends too many requests. Wait as long as Retry-After says.";
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
                tracing::warn!(%error, "the database is away");
                unavailable("The database does not answer at the moment. Try again shortly.")
            }
            Self::Database(error) => {
                tracing::error!(%error, "the database refused a statement");
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
    let detail = "Something went wrong here. The log has more, under the request id of this reply.";
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
