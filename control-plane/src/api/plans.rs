//! `/v1/plans`: named bundles of scopes, limits and a quota that keys and users have.

use contract::json::null_is_default;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::definitions::Content;
use crate::definitions::store::Definition;
use crate::domain::{QuotaBody, RateLimitBody, Timestamp};
use crate::error::ApiError;

/// The content of a plan.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"description": "For production", "scopes": ["orders:read"]}))]
pub struct PlanBody {
    /// For people: at most 500 characters.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_length = 500)]
    description: String,
    /// Scopes that it grants: at most 32; not `admin` and `sync`, which are granted to a key only.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, example = json!(["orders:read"]), max_items = 32)]
    scopes: Vec<String>,
    /// Limits of keys that have none of their own, at most 8.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schema(nullable, max_items = 8)]
    rate_limits: Vec<RateLimitBody>,
    /// The quota of each key that has none of its own.
    quota: Option<QuotaBody>,
}

impl PlanBody {
    fn parse(self) -> Result<Content, ApiError> {
        Content::parse(&self.description, self.scopes, self.rate_limits, self.quota)
    }

    /// The content as it is shown once it is stored.
    pub(super) fn normalize(self) -> Result<Self, ApiError> {
        let Content { description, scopes, rate_limits, quota, .. } = self.parse()?;
        let rate_limits = rate_limits.iter().map(RateLimitBody::of).collect();
        let quota = quota.as_ref().map(QuotaBody::of);
        Ok(Self { description, scopes: scopes.as_slice().to_vec(), rate_limits, quota })
    }
}

/// A plan: a named bundle of scopes, limits and a quota.
#[derive(Debug, Serialize, ToSchema)]
pub struct PlanView {
    /// The name by which keys refer to it.
    #[schema(example = "gold")]
    name: String,
    /// For people.
    description: String,
    /// Scopes that it grants.
    scopes: Vec<String>,
    /// Limits of keys that have none of their own.
    rate_limits: Vec<RateLimitBody>,
    /// The quota of each key that has none of its own.
    #[schema(required)]
    quota: Option<QuotaBody>,
    /// Since when there is one of that name.
    created_at: Timestamp,
}

impl PlanView {
    fn of(definition: Definition) -> Self {
        Self {
            name: definition.name,
            description: definition.description,
            scopes: definition.scopes,
            rate_limits: definition.rate_limits.iter().map(RateLimitBody::of).collect(),
            quota: definition.quota.map(|quota| QuotaBody::of(&quota)),
            created_at: definition.created_at.into(),
        }
    }
}

super::pagination::page!(PlanPage "A page of plans, by name." { plans: PlanView = "The plans." });

super::definitions::routes!(
    Plan "plans", PlanView, PlanBody, PlanPage { plans },
    list: "listPlans" "/v1/plans" "List plans by name.",
    get: "getPlan" "/v1/plans/{name}" "Get a plan.",
    put: "putPlan" "Create a plan, or replace it as a whole.",
    delete: "deletePlan" "Delete a plan that no key and no user has.",
);
