//! Conditional requests (RFC 9110, section 13): `If-Match` and `If-None-Match` come in, whether they hold for a version goes
//! out. The entity tag of a thing is its version, which counts what can be set of it; counts of use are no part of it.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::error::ApiError;

/// The entity tag of a version.
#[must_use]
pub fn etag(version: i64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{version}\"")).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

/// What a request insists on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    if_match: Option<String>,
    if_none_match: Option<String>,
}

impl Conditions {
    /// Insists on the version that a change expects, if it names one.
    ///
    /// # Errors
    /// 412 if the version is another.
    pub fn require(&self, version: i64) -> Result<(), ApiError> {
        // Weak tags never match here (section 13.1.1).
        if self.if_match.as_ref().is_none_or(|tags| names(tags, version, false)) {
            return Ok(());
        }
        let detail = "It was changed since. Get it again, and repeat the change with its ETag if it is still wanted.";
        Err(ApiError::Precondition(detail.into()))
    }

    /// Whether the client has this version already.
    #[must_use]
    pub fn known(&self, version: i64) -> bool {
        self.if_none_match.as_ref().is_some_and(|tags| names(tags, version, true))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Conditions {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Ok(Self {
            if_match: joined(&parts.headers, &header::IF_MATCH)?,
            if_none_match: joined(&parts.headers, &header::IF_NONE_MATCH)?,
        })
    }
}

/// A list field as one line (RFC 9110, section 5.3).
fn joined(headers: &HeaderMap, name: &HeaderName) -> Result<Option<String>, ApiError> {
    let lines: Result<Vec<_>, _> = headers.get_all(name).iter().map(HeaderValue::to_str).collect();
    let lines = lines.map_err(|_| ApiError::Invalid { field: None, detail: format!("{name} must be ASCII text") })?;
    Ok((!lines.is_empty()).then(|| lines.join(",")))
}

/// Whether a list of tags names the version. Ours are numbers, so that a comma never stands inside of one.
fn names(tags: &str, version: i64, weak: bool) -> bool {
    let ours = format!("\"{version}\"");
    let same = |tag: &str| tag == "*" || tag == ours || weak && tag.strip_prefix("W/") == Some(&ours);
    tags.split(',').any(|tag| same(tag.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_tags_names_a_version_exactly() {
        for (tags, strongly, weakly) in [
            ("\"7\"", true, true),
            ("*", true, true),
            ("\"6\" , \"7\"", true, true),
            ("W/\"7\"", false, true),
            ("\"77\"", false, false),
            ("7", false, false),
            ("", false, false),
        ] {
            assert_eq!((names(tags, 7, false), names(tags, 7, true)), (strongly, weakly), "{tags}");
        }
    }

    #[test]
    fn without_a_condition_every_change_is_welcome_and_nothing_is_known() {
        assert!(Conditions::default().require(1).is_ok() && !Conditions::default().known(1));
    }
}
