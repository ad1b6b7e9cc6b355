//! `/v1/roles`: named sets of scopes that keys have.

use contract::json::null_is_default;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::definitions::Content;
use crate::definitions::store::Definition;
use crate::domain::Timestamp;
use crate::error::ApiError;

/// What a role is to be.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"description": "For the support team", "scopes": ["orders:read"]}))]
pub struct RoleBody {
    /// For people: at most 500 characters.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_length = 500)]
    description: String,
    /// Scopes that it grants: at most 32; not `admin` and `sync`, which are granted to a key only.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = json!(["orders:read"]), max_items = 32)]
    scopes: Vec<String>,
}

impl RoleBody {
    fn parse(self) -> Result<Content, ApiError> {
        Content::parse(&self.description, self.scopes, Vec::new(), None)
    }

    /// The content as it is shown once it is stored.
    pub(super) fn normalize(self) -> Result<Self, ApiError> {
        let Content { description, scopes, .. } = self.parse()?;
        Ok(Self { description, scopes: scopes.as_slice().to_vec() })
    }
}

/// A role: a named set of scopes.
#[derive(Debug, Serialize, ToSchema)]
pub struct RoleView {
    /// The name by which keys refer to it.
    #[schema(example = "support")]
    name: String,
    /// For people.
    description: String,
    /// Scopes that it grants.
    scopes: Vec<String>,
    /// Since when there is one of that name.
    created_at: Timestamp,
}

impl RoleView {
    fn of(definition: Definition) -> Self {
        Self {
            name: definition.name,
            description: definition.description,
            scopes: definition.scopes,
            created_at: definition.created_at.into(),
        }
    }
}

super::pagination::page!(RolePage "A page of roles, by name." { roles: RoleView = "The roles." });

super::definitions::routes!(
    Role "roles", RoleView, RoleBody, RolePage { roles },
    list: "listRoles" "/v1/roles" "List roles by name.",
    get: "getRole" "/v1/roles/{name}" "Get a role.",
    put: "putRole" "Create a role, or replace it as a whole.",
    delete: "deleteRole" "Delete a role that no key has.",
);
