//! Bodies, paths and queries: bytes of a request come in, typed values go out. What cannot be read is refused with a
//! problem that names the field, where the reader tells it. What the values mean is judged in [`crate::key::domain`].

use axum::extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::ApiError;

/// Fields that a problem can name. What else a client sends is spoken of in the detail only.
const FIELDS: &[&str] = &[
    "email",
    "key_name",
    "name",
    "kind",
    "scopes",
    "rate_limits",
    "expires_at",
    "expires_in_seconds",
    "disabled",
    "roles",
    "plan",
    "allowed_addresses",
    "quota",
    "cost",
    "description",
    "id",
    "cursor",
    "limit",
    "from",
    "to",
    "grace_seconds",
    "generation",
    "prefix",
    "state",
    "last_used_before",
    "key_id",
    "actor_key_id",
    "key",
    "method",
    "path",
    "policy",
    "address",
    "time",
    "group_by",
    "interval",
    "outcome",
    "format",
    "after",
    "wait",
    "amount",
    "note",
    "metered",
    "refill",
];

/// A JSON body. As a reply it forbids caches to keep it, since all there is here is somebody's own.
#[derive(Debug)]
pub struct Json<T>(pub T);

/// Parameters of the path.
#[derive(Debug)]
pub struct Path<T>(pub T);

/// Parameters of the query.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match axum::Json::from_request(request, state).await {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(JsonRejection::JsonDataError(error)) => Err(unreadable(&error.body_text())),
            Err(JsonRejection::JsonSyntaxError(error)) => Err(unreadable(&error.body_text())),
            Err(JsonRejection::MissingJsonContentType(error)) => {
                let detail = "Send the body as JSON, with Content-Type: application/json.";
                Err(ApiError::Unreadable(error.status(), detail.into()))
            }
            Err(JsonRejection::BytesRejection(error)) => Err(unread(&error)),
            Err(error) => Err(ApiError::Unreadable(StatusCode::BAD_REQUEST, error.body_text())),
        }
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match json_line(&self.0) {
            Ok(body) => {
                let kind = HeaderValue::from_static("application/json");
                let no_store = HeaderValue::from_static("no-store");
                ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, no_store)], body).into_response()
            }
            Err(error) => ApiError::Internal(format!("a reply could not be written: {error}")).into_response(),
        }
    }
}

/// JSON that ends with a newline, so that a terminal shows what follows on a line of its own.
///
/// # Errors
/// If a value cannot be written as JSON.
pub fn json_line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(PathRejection::FailedToDeserializePathParams(error)) => Err(unreadable(&error.body_text())),
            Err(error) => Err(ApiError::Internal(error.body_text())),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(QueryRejection::FailedToDeserializeQueryString(error)) => Err(unreadable(&error.body_text())),
            Err(error) => Err(ApiError::Unreadable(StatusCode::BAD_REQUEST, error.body_text())),
        }
    }
}

pub(super) fn unread(error: &BytesRejection) -> ApiError {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::Unreadable(StatusCode::PAYLOAD_TOO_LARGE, "The body is larger than this call allows.".into())
        }
        _ => ApiError::Unreadable(StatusCode::BAD_REQUEST, "The body broke off.".into()),
    }
}

/// Turns the reader's words into a problem, without those that say nothing to a client.
fn unreadable(text: &str) -> ApiError {
    let told = ["Failed to parse the request body as JSON: ", "Invalid URL: "]
        .into_iter()
        .fold(text, |text, prefix| text.strip_prefix(prefix).unwrap_or(text));
    let told = match told.strip_prefix("Failed to deserialize ").and_then(|rest| rest.split_once(": ")) {
        Some((_what, told)) => told,
        None => told,
    };
    ApiError::Invalid { field: field_of(told), detail: told.into() }
}

/// Finds the field in what serde says: `email: invalid type…`, `rate_limits[0].name: …`, `` missing field `email` ``.
fn field_of(told: &str) -> Option<&'static str> {
    let known = |name: &str| FIELDS.iter().copied().find(|field| *field == name);
    let path = told.split([':', '.', '[', ' ']).next().unwrap_or_default();
    let quoted = || {
        let named =
            told.starts_with("missing field") || told.starts_with("Cannot parse") || told.starts_with("Invalid");
        told.split('`').nth(1).filter(|_| named)
    };
    known(path).or_else(|| quoted().and_then(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> (Option<&'static str>, String) {
        match unreadable(text) {
            ApiError::Invalid { field, detail } => (field, detail),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_field_is_found_wherever_the_reader_names_it() {
        let body = "Failed to deserialize the JSON body into the target type: ";
        for (text, field, detail) in [
            ("missing field `email` at line 1 column 2", Some("email"), "missing field `email` at line 1 column 2"),
            ("scopes[0]: invalid type: integer `1`", Some("scopes"), "scopes[0]: invalid type: integer `1`"),
            ("unknown field `x`, expected `email`", None, "unknown field `x`, expected `email`"),
        ] {
            assert_eq!(told(&format!("{body}{text}")), (field, detail.into()));
        }
        let query = "Failed to deserialize query string: limit: invalid digit found in string";
        assert_eq!(told(query), (Some("limit"), "limit: invalid digit found in string".into()));
    }
}
