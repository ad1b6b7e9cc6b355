//! Permissions of keys as clients read them: their own and those of their roles and plans.

use std::collections::{HashMap, HashSet};

use serde::Serialize;
use sqlx::PgExecutor;
use sqlx::types::Json;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::{Quota, QuotaBody};
use crate::error::ApiError;

/// What a key may, as clients read it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct EffectivePermissions {
    /// Its roles.
    #[schema(example = json!(["support"]))]
    pub roles: Vec<String>,
    /// Its own plan, if it has one.
    #[schema(required, example = "gold")]
    pub plan: Option<String>,
    /// The plan that applies: its own, or else its owner's.
    #[schema(required, example = "gold")]
    pub effective_plan: Option<String>,
    /// All it is granted, each once: its own scopes, its roles' and its plan's.
    pub effective_scopes: Vec<String>,
    /// Networks that it may be used from; none: any.
    #[schema(example = json!(["192.0.2.0/24"]))]
    pub allowed_addresses: Vec<String>,
    /// Its own quota; without one that of its plan applies.
    #[schema(required)]
    pub quota: Option<QuotaBody>,
    /// Credits that a request costs, unless its route says otherwise and its owner's credits are not metered.
    pub cost: i32,
}

impl EffectivePermissions {
    /// The permissions of a key with scopes of its own and nothing else, whose owner has no plan.
    pub fn plain(scopes: &[String], cost: i32) -> Self {
        Self { effective_scopes: deduplicate(scopes.iter().cloned()), cost, ..Self::default() }
    }
}

fn deduplicate(scopes: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut seen = HashSet::new();
    scopes.into_iter().filter(|scope| seen.insert(scope.clone())).collect()
}

struct Row {
    id: Uuid,
    networks: Vec<String>,
    quota: Option<Json<Quota>>,
    cost: i32,
    plan: Option<String>,
    effective_plan: Option<String>,
    roles: Vec<String>,
    scopes: Vec<String>,
}

/// The query of permissions, from its condition on.
macro_rules! select_permissions {
    ($rest:tt, $ids:expr) => {
        sqlx::query_as!(
            Row,
            r#"select id as "id!", networks as "networks!", quota as "quota: Json<Quota>", cost as "cost!", plan, effective_plan,
                roles as "roles!", scopes as "scopes!"
            from key_permissions where "# + $rest,
            $ids
        )
    };
}

/// Reads the permissions of keys.
pub async fn read_effective(
    executor: impl PgExecutor<'_>,
    ids: &[Uuid],
) -> Result<HashMap<Uuid, EffectivePermissions>, ApiError> {
    // PostgreSQL would plan a statement for any number of keys at each call, which costs more than reading one key.
    let rows = match *ids {
        [id] => select_permissions!("id = $1", id).fetch_all(executor).await?,
        _ => select_permissions!("id = any($1)", ids).fetch_all(executor).await?,
    };
    let all = rows.into_iter().map(|row| {
        let effective = EffectivePermissions {
            roles: row.roles,
            plan: row.plan,
            effective_plan: row.effective_plan,
            effective_scopes: deduplicate(row.scopes),
            allowed_addresses: row.networks,
            quota: row.quota.map(|quota| QuotaBody::of(&quota)),
            cost: row.cost,
        };
        (row.id, effective)
    });
    Ok(all.collect())
}
