//! Reads the headers `If-Match` and `If-None-Match`, and writes `ETag`.

use axum::extract::FromRequestParts;
use axum::http::header::{HeaderName, IF_MATCH, IF_NONE_MATCH};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};

use crate::domain::Preconditions;
use crate::domain::preconditions::{entity_tag, parse_tags};
use crate::error::ApiError;

/// The value of `ETag` for a version.
pub fn etag(version: i64) -> HeaderValue {
    HeaderValue::try_from(entity_tag(version)).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

fn read(headers: &HeaderMap) -> Result<Preconditions, ApiError> {
    Ok(Preconditions { if_match: tags(headers, &IF_MATCH)?, if_none_match: tags(headers, &IF_NONE_MATCH)? })
}

fn tags(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Vec<String>>, ApiError> {
    let mut all = None::<Vec<String>>;
    for value in headers.get_all(name) {
        let tags = value.to_str().ok().and_then(parse_tags).ok_or_else(|| ApiError::Invalid {
            field: None,
            detail: format!("{name} must be * or a list of entity tags such as \"7\""),
        })?;
        all.get_or_insert_default().extend(tags);
    }
    Ok(all)
}

impl<S: Send + Sync> FromRequestParts<S> for Preconditions {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        read(&parts.headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(name: HeaderName, value: &str, version: Option<i64>) -> Option<bool> {
        let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
        read(&headers).ok().map(|preconditions| preconditions.check(version).is_ok())
    }

    #[test]
    fn a_change_goes_ahead_if_the_tag_is_that_of_the_version() {
        for (name, value, version, expected) in [
            (IF_MATCH, "\"7\"", Some(7), Some(true)),
            (IF_MATCH, "\"6\", \"7\"", Some(7), Some(true)),
            (IF_MATCH, "*", Some(7), Some(true)),
            (IF_MATCH, "\"6\"", Some(7), Some(false)),
            (IF_MATCH, "W/\"7\"", Some(7), Some(false)),
            (IF_MATCH, "*", None, Some(false)),
            (IF_MATCH, "7", Some(7), None),
            (IF_NONE_MATCH, "*", None, Some(true)),
            (IF_NONE_MATCH, "*", Some(1), Some(false)),
            (IF_NONE_MATCH, "\"1\"", Some(2), Some(true)),
        ] {
            assert_eq!(judged(name.clone(), value, version), expected, "{name}: {value} {version:?}");
        }
        let headers = HeaderMap::from_iter([(IF_NONE_MATCH, "\"6\", W/\"7\"".parse().unwrap())]);
        let preconditions = read(&headers).unwrap();
        assert!(preconditions.is_known(7) && preconditions.is_known(6) && !preconditions.is_known(5));
        assert!(Preconditions::default().check(None).is_ok() && Preconditions::default().check(Some(1)).is_ok());
    }
}
