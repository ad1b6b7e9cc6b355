//! Permissions of a key beside its scopes: roles, a plan, networks, a quota, a cost and rate limits; and its attributes. They
//! are parsed from the fields of a request, and resolved to the columns of a key.

use std::collections::HashSet;

use contract::network::Network;
use contract::policy::COST;
use contract::record::RateLimit;
use serde_json::{Value, json};
use sqlx::PgConnection;

use crate::definitions::store::{lock_plan, numbers};
use crate::definitions::{Kind, Name};
use crate::domain::{AttributesPatch, Patch, Quota, QuotaBody, RateLimitBody, parse_key_quota, parse_key_rate_limits};
use crate::error::ApiError;

const ROLES: usize = 16;
const NETWORKS: usize = 32;

/// The fields of a request.
#[derive(Debug, Default)]
pub struct PermissionsPatch {
    pub roles: Option<Vec<String>>,
    pub plan: Patch<String>,
    /// Networks or addresses.
    pub allowed_addresses: Option<Vec<String>>,
    pub quota: Patch<QuotaBody>,
    pub cost: Option<i64>,
    pub rate_limits: Option<Vec<RateLimitBody>>,
    pub attributes: AttributesPatch,
}

/// The plan of a key: named by a client, or that of another key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanRef {
    /// By name.
    Named(Name),
    /// By number.
    Numbered(i32),
}

/// Parsed permissions. `None` keeps the present value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    pub roles: Option<Vec<Name>>,
    pub plan: Patch<PlanRef>,
    /// Networks from which it can be used; empty: all.
    pub networks: Option<Vec<Network>>,
    pub quota: Patch<Quota>,
    pub cost: Option<i32>,
    pub rate_limits: Option<Vec<RateLimit>>,
    pub attributes: AttributesPatch,
}

impl Permissions {
    /// Parses the fields of a client.
    pub fn parse(patch: PermissionsPatch) -> Result<Self, ApiError> {
        let cost = |cost: i64| {
            let in_range = i32::try_from(cost).ok().filter(|_| (0..=i64::from(COST)).contains(&cost));
            in_range.ok_or_else(|| ApiError::invalid("cost", format!("must be a number from 0 to {COST}")))
        };
        Ok(Self {
            roles: patch.roles.map(|names| parse_roles(&names)).transpose()?,
            plan: patch.plan.try_map(|name| Name::parse("plan", &name).map(PlanRef::Named))?,
            networks: patch.allowed_addresses.map(|list| parse_networks(&list)).transpose()?,
            quota: patch.quota.try_map(parse_key_quota)?,
            cost: patch.cost.map(cost).transpose()?,
            rate_limits: patch.rate_limits.map(parse_key_rate_limits).transpose()?,
            attributes: patch.attributes.check()?,
        })
    }

    /// Whether it sets nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The first field that only an admin sets.
    pub fn privileged(&self) -> Option<&'static str> {
        let fields = [
            ("roles", self.roles.is_some()),
            ("plan", !self.plan.is_keep()),
            ("quota", !self.quota.is_keep()),
            ("cost", self.cost.is_some()),
            ("rate_limits", self.rate_limits.is_some()),
            ("external_id", !self.attributes.external_id.is_keep()),
            ("metadata", self.attributes.metadata.is_some()),
        ];
        fields.into_iter().find(|(_, set)| *set).map(|(field, _)| field)
    }

    /// For the audit trail: the fields that are set, as clients write them.
    pub fn audit_detail(&self) -> Value {
        let mut detail = json!({});
        if let Some(roles) = &self.roles {
            detail["roles"] = roles.iter().map(Name::as_str).collect();
        }
        match &self.plan {
            Patch::Keep => {}
            Patch::Clear => detail["plan"] = Value::Null,
            Patch::Set(PlanRef::Named(name)) => detail["plan"] = name.as_str().into(),
            Patch::Set(PlanRef::Numbered(number)) => detail["plan"] = (*number).into(),
        }
        if let Some(networks) = &self.networks {
            detail["allowed_addresses"] = texts(networks).into();
        }
        if !self.quota.is_keep() {
            detail["quota"] = json!(self.quota.value().map(QuotaBody::of));
        }
        if let Some(cost) = self.cost {
            detail["cost"] = cost.into();
        }
        if let Some(limits) = &self.rate_limits {
            detail["rate_limits"] = json!(limits.iter().map(RateLimitBody::of).collect::<Vec<_>>());
        }
        if let Some(Value::Object(attributes)) = self.attributes.merge() {
            attributes.into_iter().for_each(|(field, value)| detail[field] = value);
        }
        detail
    }

    /// Finds roles and plans by name. Call it before the first change of a key: see the order of locks in
    /// [`crate::definitions::store`].
    pub async fn resolve(&self, connection: &mut PgConnection) -> Result<ResolvedPermissions, ApiError> {
        let roles = match &self.roles {
            Some(roles) => Some(numbers(connection, Kind::Role, roles).await?),
            None => None,
        };
        let plan = match &self.plan {
            Patch::Set(PlanRef::Named(name)) => {
                numbers(connection, Kind::Plan, std::slice::from_ref(name)).await?.first().copied().into()
            }
            Patch::Set(PlanRef::Numbered(number)) => lock_plan(connection, *number).await?.into(),
            Patch::Clear => Patch::Clear,
            Patch::Keep => Patch::Keep,
        };
        Ok(ResolvedPermissions {
            roles,
            plan,
            networks: self.networks.as_deref().map(texts),
            quota: self.quota.clone(),
            cost: self.cost,
            rate_limits: self.rate_limits.clone(),
            attributes: self.attributes.clone(),
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

/// Whether each of the networks lies within one of the bounds. An empty list stands for all addresses, in both.
pub fn within(networks: &[Network], bounds: &[Network]) -> bool {
    let held = |network: &Network| bounds.iter().any(|bound| bound.holds(network));
    bounds.is_empty() || (!networks.is_empty() && networks.iter().all(held))
}

/// [`Permissions`] with the numbers of their roles and plan, as columns of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvedPermissions {
    pub(super) roles: Option<Vec<i32>>,
    pub(super) plan: Patch<i32>,
    pub(super) networks: Option<Vec<String>>,
    pub(super) quota: Patch<Quota>,
    pub(super) cost: Option<i32>,
    pub(super) rate_limits: Option<Vec<RateLimit>>,
    pub(super) attributes: AttributesPatch,
}

impl ResolvedPermissions {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_is_bounded_and_what_repeats_counts_once() {
        let (text, none) = (|text: &str| vec![text.to_owned()], PermissionsPatch::default);
        let parsed = Permissions::parse(PermissionsPatch {
            roles: Some(vec!["b".into(), "a".into(), "b".into()]),
            plan: Patch::Clear,
            allowed_addresses: Some(vec!["192.0.2.7".into(), "2001:DB8::/32".into(), "192.0.2.7/32".into()]),
            cost: Some(1_000_000),
            ..none()
        });
        let detail = parsed.unwrap().audit_detail();
        let expected = json!({
            "roles": ["b", "a"], "plan": null, "allowed_addresses": ["192.0.2.7/32", "2001:db8::/32"], "cost": 1_000_000,
        });
        assert_eq!(detail, expected);
        assert!(Permissions::parse(none()).unwrap().is_empty());
        for (patch, expected) in [
            (PermissionsPatch { roles: Some(vec!["a".into(); 17]), ..none() }, "roles"),
            (PermissionsPatch { roles: Some(text("A")), ..none() }, "roles"),
            (PermissionsPatch { plan: Patch::Set(String::new()), ..none() }, "plan"),
            (PermissionsPatch { allowed_addresses: Some(vec!["::1".into(); 33]), ..none() }, "allowed_addresses"),
            (PermissionsPatch { allowed_addresses: Some(text("192.0.2.1/24")), ..none() }, "allowed_addresses"),
            (PermissionsPatch { cost: Some(-1), ..none() }, "cost"),
            (PermissionsPatch { cost: Some(1_000_001), ..none() }, "cost"),
        ] {
            assert_eq!(Permissions::parse(patch).unwrap_err().field(), Some(expected));
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
