//! The kinds of resources that files declare, and the form in which they are compared.

use serde_json::{Map, Value};

/// The members of a resource.
pub type Content = Map<String, Value>;

/// A kind of resource. The order is that of writes: a kind comes after those that it refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// A named set of scopes.
    Role,
    /// A bundle of scopes, limits and a quota.
    Plan,
    /// What requests need, with the rules in `match`.
    Policy,
    /// The plan and the refill of a user.
    User,
}

/// A resource with all defaults, in the form in which the control plane shows it. Two resources are the same if these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normalized {
    /// The name; the address of a user.
    pub name: String,
    /// The members. A member of a user that is not given is absent.
    pub content: Content,
}

/// Why the control plane would refuse a resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The path of the field, such as `rate_limits[0].name`; empty for the resource as a whole.
    pub field: String,
    /// What is wrong.
    pub detail: String,
}

/// Parses a resource of this name as the control plane does. The control plane provides it, so that there is one set of rules.
pub type Normalize = fn(Resource, &str, &Value) -> Result<Normalized, Invalid>;

impl Resource {
    /// All kinds, in the order of writes.
    pub const ALL: [Self; 4] = [Self::Role, Self::Plan, Self::Policy, Self::User];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Role => "role",
            Self::Plan => "plan",
            Self::Policy => "policy",
            Self::User => "user",
        }
    }

    /// Its name for several.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Role => "roles",
            Self::Plan => "plans",
            Self::Policy => "policies",
            Self::User => "users",
        }
    }

    /// The file that declares its resources.
    #[must_use]
    pub const fn file(self) -> &'static str {
        match self {
            Self::Role => "roles.yaml",
            Self::Plan => "plans.yaml",
            Self::Policy => "policies.yaml",
            Self::User => "users.yaml",
        }
    }

    /// The member of a response that has the name.
    pub(super) const fn key(self) -> &'static str {
        match self {
            Self::User => "email",
            Self::Role | Self::Plan | Self::Policy => "name",
        }
    }

    /// The operation that lists resources.
    pub(super) const fn list(self) -> &'static str {
        match self {
            Self::Role => "listRoles",
            Self::Plan => "listPlans",
            Self::Policy => "listPolicies",
            Self::User => "listUsers",
        }
    }

    /// The operation that gets a resource with its ETag.
    pub(super) const fn get(self) -> &'static str {
        match self {
            Self::Role => "getRole",
            Self::Plan => "getPlan",
            Self::Policy => "getPolicy",
            Self::User => "getUser",
        }
    }

    /// The operation that changes a resource.
    pub(super) const fn write(self) -> &'static str {
        match self {
            Self::Role => "putRole",
            Self::Plan => "putPlan",
            Self::Policy => "putPolicy",
            Self::User => "updateUser",
        }
    }

    /// The operation that deletes a resource. Users are never deleted: that would erase them and revoke their keys.
    pub(super) const fn delete(self) -> Option<&'static str> {
        match self {
            Self::Role => Some("deleteRole"),
            Self::Plan => Some("deletePlan"),
            Self::Policy => Some("deletePolicy"),
            Self::User => None,
        }
    }
}
