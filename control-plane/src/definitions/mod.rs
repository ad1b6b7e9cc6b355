//! Roles, plans and policies: parsed here, stored in [`store`]. Roles and plans cannot grant the scopes `admin` and `sync`,
//! which only a key itself has.

pub mod policy;
pub mod store;
pub mod uses;

use crate::domain::{ADMIN, Quota, QuotaBody, RateLimitBody, SYNC, Scopes, parse_rate_limits};
use crate::error::ApiError;
use contract::policy::NamedPolicy;
use contract::record::RateLimit;

const NAME_CHARS: usize = 64;
const DESCRIPTION_CHARS: usize = 500;

/// Most roles, most plans, and most policies. Filters have all of them in memory. Removed ones do not count.
pub const MOST: i64 = 1_000;

/// What a definition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A named set of scopes; a key may have several.
    Role,
    /// A bundle of scopes, limits and a quota; a key has one at most.
    Plan,
    /// What is required of requests.
    Policy,
}

impl Kind {
    /// Its name, in the database and in words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Role => "role",
            Self::Plan => "plan",
            Self::Policy => "policy",
        }
    }

    /// Its name for several.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Role => "roles",
            Self::Plan => "plans",
            Self::Policy => "policies",
        }
    }

    /// The field of a key that names definitions of the kind.
    pub const fn field(self) -> &'static str {
        match self {
            Self::Role => "roles",
            Self::Plan => "plan",
            Self::Policy => "policy",
        }
    }
}

/// What a role, plan or policy is called: 1 to 64 characters of a-z, 0-9, `_` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name(String);

impl Name {
    /// Parses a name that stands in `field`.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, ApiError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
        if !(1..=NAME_CHARS).contains(&text.len()) || !text.bytes().all(allowed) {
            let detail = format!("each name must have 1 to {NAME_CHARS} characters of a-z, 0-9, _ and -");
            return Err(ApiError::invalid(field, detail));
        }
        Ok(Self(text.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The content of a definition. Roles have scopes only, policies a description and the policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    pub description: String,
    pub scopes: Scopes,
    /// Limits of keys that have none of their own.
    pub rate_limits: Vec<RateLimit>,
    /// The quota of each key that has none of its own.
    pub quota: Option<Quota>,
    /// The policy.
    pub policy: Option<NamedPolicy>,
}

impl Content {
    /// Parses the fields of a role or plan.
    pub fn parse(
        description: &str,
        scopes: Vec<String>,
        rate_limits: Vec<RateLimitBody>,
        quota: Option<QuotaBody>,
    ) -> Result<Self, ApiError> {
        let scopes = Scopes::parse(scopes)?;
        if let Some(scope) = scopes.as_slice().iter().find(|scope| [ADMIN, SYNC].contains(&scope.as_str())) {
            let detail = format!("must not contain {scope}, which can be granted to a key only");
            return Err(ApiError::invalid("scopes", detail));
        }
        Ok(Self {
            description: parse_description(description)?,
            scopes,
            rate_limits: parse_rate_limits(rate_limits)?,
            quota: quota.map(QuotaBody::parse).transpose()?,
            policy: None,
        })
    }
}

/// Parses the description of a definition.
fn parse_description(text: &str) -> Result<String, ApiError> {
    let text = text.trim();
    if text.chars().count() > DESCRIPTION_CHARS || text.chars().any(char::is_control) {
        let detail = format!("must have at most {DESCRIPTION_CHARS} characters and no control characters");
        return Err(ApiError::invalid("description", detail));
    }
    Ok(text.into())
}
