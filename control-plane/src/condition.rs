//! Conditional changes (RFC 9110, section 13): `If-Match` and `If-None-Match` come in, whether a thing of some version may be
//! changed goes out. A version is shown as the entity tag `"7"`. Refused are tags that are not of that form.

use axum::extract::FromRequestParts;
use axum::http::header::{HeaderName, IF_MATCH, IF_NONE_MATCH};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};

use crate::error::ApiError;

/// The entity tag of a version.
#[must_use]
pub fn etag(version: i64) -> HeaderValue {
    HeaderValue::try_from(tag(version)).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

fn tag(version: i64) -> String {
    format!("\"{version}\"")
}

/// What a thing must be before it is changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    is: Option<Tags>,
    is_not: Option<Tags>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Tags {
    Any,
    Listed(Vec<String>),
}

impl Tags {
    fn of(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Self>, ApiError> {
        let bad = || ApiError::Invalid {
            field: None,
            detail: format!("{name} must be * or a list of entity tags such as \"7\""),
        };
        let mut listed = Vec::new();
        for value in headers.get_all(name) {
            for tag in value.to_str().map_err(|_| bad())?.split(',').map(str::trim) {
                let bare = tag.strip_prefix("W/").unwrap_or(tag);
                let quoted = bare.len() >= 2 && bare.starts_with('"') && bare.ends_with('"');
                match tag {
                    "*" => return Ok(Some(Self::Any)),
                    _ if quoted => listed.push(tag.to_owned()),
                    _ => return Err(bad()),
                }
            }
        }
        Ok((!listed.is_empty()).then_some(Self::Listed(listed)))
    }

    /// Strong comparison: a weak tag matches nothing.
    fn match_version(&self, version: Option<i64>) -> bool {
        match (self, version) {
            (_, None) => false,
            (Self::Any, Some(_)) => true,
            (Self::Listed(tags), Some(version)) => tags.contains(&tag(version)),
        }
    }
}

impl Condition {
    /// Reads it from the headers of a request; without any, every change is welcome.
    ///
    /// # Errors
    /// 400 for what is no list of entity tags.
    pub fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        Ok(Self { is: Tags::of(headers, &IF_MATCH)?, is_not: Tags::of(headers, &IF_NONE_MATCH)? })
    }

    /// Judges a thing of this version; none if there is no such thing.
    ///
    /// # Errors
    /// 412 if it is not what the client takes it for.
    pub fn check(&self, version: Option<i64>) -> Result<(), ApiError> {
        let refuse = |detail: &str| Err(ApiError::Precondition(detail.into()));
        if self.is.as_ref().is_some_and(|tags| !tags.match_version(version)) {
            return refuse(
                "It was changed since it was read. Read it again, then repeat the change with its new ETag.",
            );
        }
        if self.is_not.as_ref().is_some_and(|tags| tags.match_version(version)) {
            return refuse("It is there already, and If-None-Match asks that it is not.");
        }
        Ok(())
    }

    /// Whether the client has this version already, so that it need not be sent again. Weak comparison.
    #[must_use]
    pub fn knows(&self, version: i64) -> bool {
        let ours = tag(version);
        self.is_not.as_ref().is_some_and(|tags| match tags {
            Tags::Any => true,
            Tags::Listed(tags) => tags.iter().any(|tag| tag.strip_prefix("W/").unwrap_or(tag) == ours),
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Condition {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Self::of(&parts.headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(name: HeaderName, value: &str, version: Option<i64>) -> Option<bool> {
        let headers = HeaderMap::from_iter([(name, value.parse().unwrap())]);
        Condition::of(&headers).ok().map(|condition| condition.check(version).is_ok())
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
        let condition = Condition::of(&headers).unwrap();
        assert!(condition.knows(7) && condition.knows(6) && !condition.knows(5));
        assert!(Condition::default().check(None).is_ok() && Condition::default().check(Some(1)).is_ok());
    }
}
