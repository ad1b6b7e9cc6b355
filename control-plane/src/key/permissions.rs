//! What a key may beside its scopes: roles, a plan, networks, a quota, what its requests cost, its own rate limits. What a
//! client says of them comes in, columns of the key's row go out, and back. What is not said stays as it is.

use std::collections::{HashMap, HashSet};

use contract::network::Network;
use contract::policy::COST;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use sqlx::types::Json;
use sqlx::{PgConnection, PgExecutor};
use utoipa::ToSchema;
use uuid::Uuid;

use super::domain::{RateLimitBody, StoredLimit, parse_rate_limits};
use super::quota::{QuotaBody, Whose, check_time_zone, refresh_starters};
use super::store::Held;
use crate::audit::{self, Actor, Deed};
use crate::definition::store::{hold, numbers};
use crate::definition::{Kind, Name};
use crate::error::ApiError;
use crate::quota::Quota;

const ROLES: usize = 16;
const NETWORKS: usize = 32;

/// A field that may be absent, null, or a value.
///
/// # Errors
/// Those of the value.
pub fn said<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// What a client says, field by field as in the body.
#[derive(Debug, Default)]
pub struct Said {
    /// Names of roles.
    pub roles: Option<Vec<String>>,
    /// The name of a plan, or none.
    pub plan: Option<Option<String>>,
    /// Networks or addresses.
    pub allowed_addresses: Option<Vec<String>>,
    /// A quota, or none.
    pub quota: Option<Option<QuotaBody>>,
    /// Credits.
    pub cost: Option<i64>,
    /// Limits.
    pub rate_limits: Option<Vec<RateLimitBody>>,
}

/// The plan of a key: named by a client, or that of another key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// By name.
    Named(Name),
    /// By number.
    Numbered(i32),
}

/// What is to be set; `None` leaves a field as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// Roles.
    pub roles: Option<Vec<Name>>,
    /// The key's own plan.
    pub plan: Option<Option<Plan>>,
    /// Networks that it may be used from; none: any.
    pub networks: Option<Vec<Network>>,
    /// Its own quota.
    pub quota: Option<Option<Quota>>,
    /// Credits that a request costs.
    pub cost: Option<i32>,
    /// Its own rate limits.
    pub rate_limits: Option<Vec<StoredLimit>>,
}

impl Permissions {
    /// Parses what a client says.
    ///
    /// # Errors
    /// The field that is wrong, and the remedy.
    pub fn parse(said: Said) -> Result<Self, ApiError> {
        let plan = match said.plan {
            Some(Some(name)) => Some(Some(Plan::Named(Name::parse("plan", &name)?))),
            Some(None) => Some(None),
            None => None,
        };
        let quota = match said.quota {
            Some(Some(quota)) => Some(Some(quota.parse()?)),
            Some(None) => Some(None),
            None => None,
        };
        let cost = |cost: i64| {
            let in_range = i32::try_from(cost).ok().filter(|_| (0..=i64::from(COST)).contains(&cost));
            in_range.ok_or_else(|| ApiError::invalid("cost", format!("must be a number from 0 to {COST}")))
        };
        Ok(Self {
            roles: said.roles.map(|names| parse_roles(&names)).transpose()?,
            plan,
            networks: said.allowed_addresses.map(|list| parse_networks(&list)).transpose()?,
            quota,
            cost: said.cost.map(cost).transpose()?,
            rate_limits: said.rate_limits.map(parse_rate_limits).transpose()?,
        })
    }

    /// Whether it sets nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The first field that only an admin sets.
    #[must_use]
    pub fn privileged(&self) -> Option<&'static str> {
        let fields = [
            ("roles", self.roles.is_some()),
            ("plan", self.plan.is_some()),
            ("quota", self.quota.is_some()),
            ("cost", self.cost.is_some()),
            ("rate_limits", self.rate_limits.is_some()),
        ];
        fields.into_iter().find(|(_, set)| *set).map(|(field, _)| field)
    }

    /// For the audit trail: the fields that are set, as clients write them.
    #[must_use]
    pub fn told(&self) -> Value {
        let mut told = json!({});
        if let Some(roles) = &self.roles {
            told["roles"] = roles.iter().map(Name::as_str).collect();
        }
        if let Some(plan) = &self.plan {
            told["plan"] = match plan {
                Some(Plan::Named(name)) => name.as_str().into(),
                Some(Plan::Numbered(number)) => (*number).into(),
                None => Value::Null,
            };
        }
        if let Some(networks) = &self.networks {
            told["allowed_addresses"] = texts(networks).into();
        }
        if let Some(quota) = &self.quota {
            told["quota"] = json!(quota.as_ref().map(QuotaBody::of));
        }
        if let Some(cost) = self.cost {
            told["cost"] = cost.into();
        }
        if let Some(limits) = &self.rate_limits {
            told["rate_limits"] = json!(limits.iter().map(RateLimitBody::of).collect::<Vec<_>>());
        }
        told
    }

    /// Finds what is named, before anything of a key is changed: see the order of locks in [`crate::definition::store`].
    ///
    /// # Errors
    /// A role, a plan or a time zone that is unknown; those of the database.
    pub async fn resolve(&self, connection: &mut PgConnection) -> Result<Resolved, ApiError> {
        if let Some(Some(quota)) = &self.quota {
            check_time_zone(quota, connection).await?;
        }
        let roles = match &self.roles {
            Some(roles) => Some(numbers(connection, Kind::Role, roles).await?),
            None => None,
        };
        let plan = match &self.plan {
            Some(Some(Plan::Named(name))) => {
                Some(numbers(connection, Kind::Plan, std::slice::from_ref(name)).await?.first().copied())
            }
            Some(Some(Plan::Numbered(number))) => Some(hold(connection, *number).await?),
            Some(None) => Some(None),
            None => None,
        };
        Ok(Resolved {
            roles,
            plan,
            networks: self.networks.as_deref().map(texts),
            quota: self.quota.clone(),
            cost: self.cost,
            rate_limits: self.rate_limits.clone(),
        })
    }
}

fn parse_roles(names: &[String]) -> Result<Vec<Name>, ApiError> {
    if names.len() > ROLES {
        return Err(ApiError::invalid("roles", format!("must have at most {ROLES} entries")));
    }
    let names = names.iter().map(|name| Name::parse("roles", name)).collect::<Result<Vec<_>, _>>()?;
    let mut seen = HashSet::new();
    Ok(names.into_iter().filter(|name| seen.insert(name.clone())).collect())
}

fn parse_networks(list: &[String]) -> Result<Vec<Network>, ApiError> {
    if list.len() > NETWORKS {
        return Err(ApiError::invalid("allowed_addresses", format!("must have at most {NETWORKS} entries")));
    }
    let mut networks = Vec::new();
    for (place, text) in list.iter().enumerate() {
        let network: Network =
            text.parse().map_err(|error| ApiError::invalid("allowed_addresses", format!("entry {place}: {error}")))?;
        if !networks.contains(&network) {
            networks.push(network);
        }
    }
    Ok(networks)
}

fn texts(networks: &[Network]) -> Vec<String> {
    networks.iter().map(Network::to_string).collect()
}

/// Whether each of the networks lies within one of the bounds. No network at all means any address, as bounds too.
#[must_use]
pub fn within(networks: &[Network], bounds: &[Network]) -> bool {
    let held = |network: &Network| bounds.iter().any(|bound| bound.holds(network));
    bounds.is_empty() || (!networks.is_empty() && networks.iter().all(held))
}

/// [`Permissions`] whose roles and plan were found.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    roles: Option<Vec<i32>>,
    plan: Option<Option<i32>>,
    networks: Option<Vec<String>>,
    quota: Option<Option<Quota>>,
    cost: Option<i32>,
    rate_limits: Option<Vec<StoredLimit>>,
}

impl Resolved {
    /// Whether nothing is to be set.
    #[must_use]
    pub const fn is_nothing(&self) -> bool {
        let Self { roles, plan, networks, quota, cost, rate_limits } = self;
        roles.is_none()
            && plan.is_none()
            && networks.is_none()
            && quota.is_none()
            && cost.is_none()
            && rate_limits.is_none()
    }
}

/// Sets them and the starter that goes with them. A statement that changes nothing would wake every filter, and is not
/// made. Also right, with nothing to set, for a key that was just made: its owner's plan may have a quota. Says whether
/// anything changed; none if there is no such key that is not revoked.
///
/// # Errors
/// Those of the database.
pub async fn permit(connection: &mut PgConnection, id: Uuid, wanted: &Resolved) -> Result<Option<bool>, ApiError> {
    let quota = wanted.quota.as_ref().and_then(Option::as_ref).map(Json);
    let rate_limits = wanted.rate_limits.as_ref().map(Json);
    let differs = sqlx::query_scalar!(
        r#"select (role_numbers, plan_number, networks, quota, cost, rate_limits) is distinct from (
                coalesce($2, role_numbers), case when $3 then $4 else plan_number end, coalesce($5, networks),
                case when $6 then $7 else quota end, coalesce($8, cost), coalesce($9, rate_limits)
            ) as "differs!"
        from api_keys where id = $1 and revoked_at is null"#,
        id,
        wanted.roles.as_deref(),
        wanted.plan.is_some(),
        wanted.plan.flatten(),
        wanted.networks.as_deref(),
        wanted.quota.is_some(),
        quota as _,
        wanted.cost,
        rate_limits as _
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(differs) = differs else { return Ok(None) };
    if differs {
        sqlx::query!(
            "update api_keys set
                role_numbers = coalesce($2, role_numbers), plan_number = case when $3 then $4 else plan_number end,
                networks = coalesce($5, networks), quota = case when $6 then $7 else quota end, cost = coalesce($8, cost),
                rate_limits = coalesce($9, rate_limits)
            where id = $1 and revoked_at is null",
            id,
            wanted.roles.as_deref(),
            wanted.plan.is_some(),
            wanted.plan.flatten(),
            wanted.networks.as_deref(),
            wanted.quota.is_some(),
            wanted.quota.as_ref().and_then(Option::as_ref).map(Json) as _,
            wanted.cost,
            wanted.rate_limits.as_ref().map(Json) as _
        )
        .execute(&mut *connection)
        .await?;
    }
    refresh_starters(connection, Whose::Keys(&[id])).await?;
    Ok(Some(differs))
}

/// Changes what a key that is held may.
///
/// # Errors
/// 409 for a key that was revoked; those of the database.
pub async fn change(
    connection: &mut PgConnection,
    actor: &Actor,
    key: &Held,
    permissions: &Permissions,
    wanted: &Resolved,
) -> Result<(), ApiError> {
    match permit(connection, key.id, wanted).await? {
        None => Err(ApiError::Conflict("This key is revoked for good and cannot be changed.".into())),
        Some(false) => Ok(()),
        Some(true) => {
            audit::note(connection, actor, Deed::to_key("key.permit", key.id, permissions.told())).await?;
            Ok(())
        }
    }
}

/// Networks that a key may be used from at present.
///
/// # Errors
/// Those of the database.
pub async fn networks(connection: &mut PgConnection, id: Uuid) -> Result<Vec<Network>, ApiError> {
    let texts =
        sqlx::query_scalar!("select networks from api_keys where id = $1", id).fetch_optional(connection).await?;
    // As records have it, so that one that does not parse widens nothing.
    Ok(super::further(None, &texts.unwrap_or_default(), (None, 1, None), (None, 1), 0).networks)
}

/// What a key may, as clients read it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Permitted {
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

impl Permitted {
    /// What a key may that has scopes of its own and nothing else, nor an owner with a plan.
    #[must_use]
    pub fn plain(scopes: &[String], cost: i32) -> Self {
        Self { effective_scopes: once_each(scopes.iter().cloned()), cost, ..Self::default() }
    }
}

/// Each of them once, where it comes first.
fn once_each(scopes: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut seen = HashSet::new();
    scopes.into_iter().filter(|scope| seen.insert(scope.clone())).collect()
}

/// What the database holds of what a key may.
struct Read {
    id: Uuid,
    networks: Vec<String>,
    quota: Option<Json<Quota>>,
    cost: i32,
    plan: Option<String>,
    effective_plan: Option<String>,
    roles: Vec<String>,
    scopes: Vec<String>,
}

/// Reads what keys may.
///
/// # Errors
/// Those of the database.
pub async fn of_keys(executor: impl PgExecutor<'_>, ids: &[Uuid]) -> Result<HashMap<Uuid, Permitted>, ApiError> {
    // Of one among keys that may be many PostgreSQL would make a plan each time, which costs more than to read it.
    let rows = match *ids {
        [id] => {
            sqlx::query_as!(
                Read,
                r#"select id as "id!", networks as "networks!", quota as "quota: Json<Quota>", cost as "cost!", plan, effective_plan,
                    roles as "roles!", scopes as "scopes!"
                from key_permissions where id = $1"#,
                id
            )
            .fetch_all(executor)
            .await?
        }
        _ => {
            sqlx::query_as!(
                Read,
                r#"select id as "id!", networks as "networks!", quota as "quota: Json<Quota>", cost as "cost!", plan, effective_plan,
                    roles as "roles!", scopes as "scopes!"
                from key_permissions where id = any($1)"#,
                ids
            )
            .fetch_all(executor)
            .await?
        }
    };
    let permitted = rows.into_iter().map(|row| {
        let permitted = Permitted {
            roles: row.roles,
            plan: row.plan,
            effective_plan: row.effective_plan,
            effective_scopes: once_each(row.scopes),
            allowed_addresses: row.networks,
            quota: row.quota.map(|quota| QuotaBody::of(&quota)),
            cost: row.cost,
        };
        (row.id, permitted)
    });
    Ok(permitted.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(said: Said) -> Option<String> {
        match Permissions::parse(said) {
            Err(ApiError::Invalid { field, .. }) => field.map(Into::into),
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn each_field_is_bounded_and_what_repeats_counts_once() {
        let text = |text: &str| vec![text.to_owned()];
        let parsed = Permissions::parse(Said {
            roles: Some(vec!["b".into(), "a".into(), "b".into()]),
            plan: Some(None),
            allowed_addresses: Some(vec!["192.0.2.7".into(), "2001:DB8::/32".into(), "192.0.2.7/32".into()]),
            cost: Some(1_000_000),
            ..Said::default()
        });
        let told = parsed.unwrap().told();
        let expected = json!({
            "roles": ["b", "a"], "plan": null, "allowed_addresses": ["192.0.2.7/32", "2001:db8::/32"], "cost": 1_000_000,
        });
        assert_eq!(told, expected);
        assert!(Permissions::parse(Said::default()).unwrap().is_empty());
        for (said, expected) in [
            (Said { roles: Some(vec!["a".into(); 17]), ..Said::default() }, "roles"),
            (Said { roles: Some(text("A")), ..Said::default() }, "roles"),
            (Said { plan: Some(Some(String::new())), ..Said::default() }, "plan"),
            (Said { allowed_addresses: Some(vec!["::1".into(); 33]), ..Said::default() }, "allowed_addresses"),
            (Said { allowed_addresses: Some(text("192.0.2.1/24")), ..Said::default() }, "allowed_addresses"),
            (Said { cost: Some(-1), ..Said::default() }, "cost"),
            (Said { cost: Some(1_000_001), ..Said::default() }, "cost"),
        ] {
            assert_eq!(field(said).as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_list_lies_within_another_unless_it_lets_more_in() {
        let list = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<Network>>();
        for (networks, bounds, expected) in [
            (&[][..], &[][..], true),
            (&["192.0.2.0/24"], &[], true),
            (&[], &["192.0.2.0/24"], false),
            (&["192.0.2.7", "192.0.2.64/26"], &["192.0.2.0/24"], true),
            (&["192.0.2.7", "::1"], &["192.0.2.0/24"], false),
        ] {
            assert_eq!(within(&list(networks), &list(bounds)), expected, "{networks:?} {bounds:?}");
        }
    }
}
