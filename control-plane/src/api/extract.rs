//! Extractors for bodies, paths and queries. A problem names the field that cannot be parsed, by its path.
//! [`crate::domain`] parses the values further.

use std::ops::RangeInclusive;

use axum::body::Bytes;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::json::{self, InputError, detail_of, in_words};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::ApiError;

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
        if !is_json(request.headers()) {
            let detail = "Send the body as JSON, with Content-Type: application/json.";
            return Err(ApiError::Unreadable(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail.into()));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|error| unread(&error))?;
        Ok(Self(json::read(&bytes)?))
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
            Err(error) => ApiError::Internal(format!("a reply cannot be encoded: {error}")).into_response(),
        }
    }
}

/// JSON that ends with a newline, so that a terminal shows what follows on a line of its own.
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
            Err(PathRejection::FailedToDeserializePathParams(error)) => Err(misread(error.into_kind())),
            Err(error) => Err(ApiError::Internal(error.body_text())),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let _ = state;
        read_query(parts.uri.query().unwrap_or_default()).map(Self)
    }
}

/// Parses the parameters of a query. An error names the parameter.
pub(super) fn read_query<T: DeserializeOwned>(query: &str) -> Result<T, ApiError> {
    let query = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
    serde_path_to_error::deserialize(query).map_err(|error| {
        let InputError { path, detail, .. } = InputError::new(error.path(), &error.inner().to_string());
        let field = (!path.is_empty()).then(|| path.into());
        ApiError::Invalid { field, detail }
    })
}

pub(super) fn unread(error: &BytesRejection) -> ApiError {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::Unreadable(StatusCode::PAYLOAD_TOO_LARGE, "The body is larger than this call allows.".into())
        }
        _ => ApiError::Unreadable(StatusCode::BAD_REQUEST, "The body ended early.".into()),
    }
}

/// A text to search for. PostgreSQL refuses NUL.
pub fn search_text<'a>(
    field: &'static str,
    text: Option<&'a str>,
    chars: RangeInclusive<usize>,
) -> Result<Option<&'a str>, ApiError> {
    match text {
        Some(text) if !chars.contains(&text.chars().count()) || text.chars().any(char::is_control) => {
            let (least, most) = chars.into_inner();
            let detail = format!("must have {least} to {most} characters, none of them a control character");
            Err(ApiError::invalid(field, detail))
        }
        text => Ok(text),
    }
}

/// Whether the media type is JSON (RFC 8259), or one that is written as JSON (RFC 6839).
fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let subtype = essence.strip_prefix("application/");
    subtype.is_some_and(|subtype| subtype == "json" || subtype.ends_with("+json"))
}

fn misread(kind: ErrorKind) -> ApiError {
    match kind {
        ErrorKind::ParseErrorAtKey { key, expected_type, .. } => {
            ApiError::invalid(key, format!("must be {}", in_words(expected_type)))
        }
        ErrorKind::DeserializeError { key, message, .. } => ApiError::invalid(key, detail_of(&message)),
        ErrorKind::InvalidUtf8InPathParam { key } => ApiError::invalid(key, "must be UTF-8, with percent-encoding"),
        other => ApiError::Internal(format!("a path that does not fit its route: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_known_by_its_media_type() {
        let said = |value: &'static str| {
            is_json(&HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(value))]))
        };
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"] {
            assert!(said(good), "{good}");
        }
        for bad in ["", "text/json", "application/x-www-form-urlencoded", "application/jsonp", "json"] {
            assert!(!said(bad), "{bad}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }
}
