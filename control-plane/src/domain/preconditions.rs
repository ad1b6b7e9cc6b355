//! Preconditions of a change (RFC 9110, section 13): the versions that the client expects. A version is shown as the entity
//! tag `"7"`.

use crate::error::ApiError;

/// The entity tag of a version.
pub fn entity_tag(version: i64) -> String {
    format!("\"{version}\"")
}

/// What `If-Match` and `If-None-Match` demand of a resource: one of these entity tags, or any for `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preconditions {
    pub if_match: Option<Vec<String>>,
    pub if_none_match: Option<Vec<String>>,
}

/// Parses one value of a header; none if it is not `*` or a list of entity tags.
pub fn parse_tags(value: &str) -> Option<Vec<String>> {
    let is_tag = |tag: &String| {
        let bare = tag.strip_prefix("W/").unwrap_or(tag);
        tag == "*" || bare.len() >= 2 && bare.starts_with('"') && bare.ends_with('"')
    };
    let tags: Vec<_> = value.split(',').map(|tag| tag.trim().to_owned()).collect();
    tags.iter().all(is_tag).then_some(tags)
}

impl Preconditions {
    /// Checks the present version of a resource; none if there is no such resource. 412 if the client expects another version.
    pub fn check(&self, version: Option<i64>) -> Result<(), ApiError> {
        // Strong comparison: a weak tag matches nothing.
        let matched = |tags: &[String]| {
            version.is_some_and(|version| tags.iter().any(|tag| tag == "*" || *tag == entity_tag(version)))
        };
        let refuse = |detail: &str| Err(ApiError::Precondition(detail.into()));
        if self.if_match.as_deref().is_some_and(|tags| !matched(tags)) {
            return refuse(
                "The resource has changed since it was read. Read it again and repeat the change with its new ETag.",
            );
        }
        if self.if_none_match.as_deref().is_some_and(matched) {
            return refuse("The resource exists already, and If-None-Match demands that it does not.");
        }
        Ok(())
    }

    /// Whether the client has this version already, so that it need not be sent. Weak comparison.
    pub fn is_known(&self, version: i64) -> bool {
        let ours = entity_tag(version);
        let mut tags = self.if_none_match.iter().flatten();
        tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == ours)
    }
}
