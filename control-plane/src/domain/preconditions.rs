//! Preconditions of a change (RFC 9110, section 13): the versions that the client expects. A version is shown as the entity
//! tag `"7"`.

use crate::error::ApiError;

/// The entity tag of a version.
pub fn entity_tag(version: i64) -> String {
    format!("\"{version}\"")
}

/// What `If-Match` and `If-None-Match` demand of a resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preconditions {
    pub if_match: Option<EntityTags>,
    pub if_none_match: Option<EntityTags>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntityTags {
    Any,
    Listed(Vec<String>),
}

impl EntityTags {
    /// Parses one value of a header; none if it is not `*` or a list of entity tags.
    pub fn parse(value: &str) -> Option<Self> {
        let mut listed = Vec::new();
        for tag in value.split(',').map(str::trim) {
            let bare = tag.strip_prefix("W/").unwrap_or(tag);
            let quoted = bare.len() >= 2 && bare.starts_with('"') && bare.ends_with('"');
            match tag {
                "*" => return Some(Self::Any),
                _ if quoted => listed.push(tag.to_owned()),
                _ => return None,
            }
        }
        Some(Self::Listed(listed))
    }

    /// The tags of two values of the same header.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Listed(mut tags), Self::Listed(others)) => {
                tags.extend(others);
                Self::Listed(tags)
            }
            _ => Self::Any,
        }
    }

    /// Strong comparison: a weak tag matches nothing.
    fn match_version(&self, version: Option<i64>) -> bool {
        match (self, version) {
            (_, None) => false,
            (Self::Any, Some(_)) => true,
            (Self::Listed(tags), Some(version)) => tags.contains(&entity_tag(version)),
        }
    }
}

impl Preconditions {
    /// Checks the present version of a resource; none if there is no such resource. 412 if the client expects another version.
    pub fn check(&self, version: Option<i64>) -> Result<(), ApiError> {
        let refuse = |detail: &str| Err(ApiError::Precondition(detail.into()));
        if self.if_match.as_ref().is_some_and(|tags| !tags.match_version(version)) {
            return refuse(
                "The resource has changed since it was read. Read it again and repeat the change with its new ETag.",
            );
        }
        if self.if_none_match.as_ref().is_some_and(|tags| tags.match_version(version)) {
            return refuse("The resource exists already, and If-None-Match demands that it does not.");
        }
        Ok(())
    }

    /// Whether the client has this version already, so that it need not be sent. Weak comparison.
    pub fn is_known(&self, version: i64) -> bool {
        let ours = entity_tag(version);
        self.if_none_match.as_ref().is_some_and(|tags| match tags {
            EntityTags::Any => true,
            EntityTags::Listed(tags) => tags.iter().any(|tag| tag.strip_prefix("W/").unwrap_or(tag) == ours),
        })
    }
}
