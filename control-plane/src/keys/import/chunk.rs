//! Writes a chunk of an import in one transaction. Keys that are stored already are reported by their line.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Accepted, Code};
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::definitions::Kind;
use crate::error::ApiError;
use crate::keys::lock::lock_store;
use crate::keys::permissions::{Permissions, PlanRef};
use crate::keys::unknown;
use crate::quota::{Whose, apply_quotas};

/// A line that is not written: its number and why.
type Refused = (u64, Code, String);

/// A line to write, with the numbers of its roles and its plan.
struct Sound<'a> {
    accepted: &'a Accepted,
    roles: Vec<i32>,
    plan: Option<i32>,
}

/// Writes a chunk. Returns the lines that are not written: their keys exist already, or what they name does not exist.
pub(super) async fn write(change: &mut Change, chunk: &[Accepted]) -> Result<Vec<Refused>, ApiError> {
    let owners = lock_owners(change, chunk).await?;
    let defined = Defined::lock(change, chunk).await?;
    // Until the commit, no other transaction creates or rotates a key.
    lock_store(change).await?;
    let (refused, sound) = sort_out(change, chunk, &defined).await?;
    let mut rows = Rows::default();
    for line in &sound {
        let Accepted { line: number, key, .. } = line.accepted;
        let owner = owners.get(key.email.as_str());
        let owner =
            owner.ok_or_else(|| ApiError::Internal(format!("line {number}: its owner was made and is not there")))?;
        rows.push(*owner, line)?;
    }
    if !rows.ids.is_empty() {
        rows.insert(change).await?;
        // They or their plans may have quotas.
        apply_quotas(change, Whose::Keys(&rows.ids)).await?;
        let imported: Vec<_> = sound.iter().map(|line| line.accepted.key.hash).collect();
        unknown::forget(change, &imported).await?;
        let [first, last] = [chunk.first(), chunk.last()].map(|line| line.map_or(0, |line| line.line));
        let detail = json!({"imported": rows.ids.len(), "lines": [first, last]});
        change.record_each("key.import", &rows.ids, &json!({"lines": [first, last]})).await?;
        let event = AuditEvent { action: "import.commit", key_id: None, target: None, detail };
        change.record(event).await?;
    }
    Ok(refused)
}

/// The lines that [`write()`] would not write.
pub(super) async fn check(change: &mut Change, chunk: &[Accepted]) -> Result<Vec<Refused>, ApiError> {
    let defined = Defined::lock(change, chunk).await?;
    Ok(sort_out(change, chunk, &defined).await?.0)
}

/// Tells lines that cannot be written from those that can.
async fn sort_out<'a>(
    connection: &mut PgConnection,
    chunk: &'a [Accepted],
    defined: &Defined,
) -> Result<(Vec<Refused>, Vec<Sound<'a>>), ApiError> {
    // A key that was stored without a pepper, before there was one, is a duplicate too.
    let mut hashes: Vec<Vec<u8>> =
        chunk.iter().flat_map(|line| [line.stored, line.key.hash]).map(|hash| hash.0.to_vec()).collect();
    hashes.dedup();
    let there = sqlx::query_scalar!(
        r#"select k.hash as "hash!" from unnest($1::bytea[]) as new (hash) join api_keys k on k.hash = new.hash
        union all
        select r.hash from unnest($1::bytea[]) as new (hash) join retired_secrets r on r.hash = new.hash"#,
        &hashes
    )
    .fetch_all(connection)
    .await?;
    let there: HashSet<_> = there.into_iter().collect();
    let (mut refused, mut sound) = (Vec::new(), Vec::new());
    for accepted in chunk {
        let Accepted { line, key, stored } = accepted;
        if [stored, &key.hash].into_iter().any(|hash| there.contains(hash.0.as_slice())) {
            refused.push((*line, Code::Duplicate, "this key exists already".into()));
            continue;
        }
        match defined.of(accepted) {
            Ok((roles, plan)) => sound.push(Sound { accepted, roles, plan }),
            Err(reason) => refused.push((*line, Code::Invalid, reason)),
        }
    }
    Ok((refused, sound))
}

/// The numbers of roles and plans by kind and name.
struct Defined(HashMap<(String, String), i32>);

impl Defined {
    /// Finds those that the lines name, and locks them against removal until the transaction ends.
    async fn lock(connection: &mut PgConnection, chunk: &[Accepted]) -> Result<Self, ApiError> {
        let named: BTreeSet<(&str, &str)> = chunk.iter().flat_map(|line| names_of(&line.key.permissions)).collect();
        let (kinds, names): (Vec<String>, Vec<String>) =
            named.into_iter().map(|(kind, name)| (kind.to_owned(), name.to_owned())).unzip();
        if names.is_empty() {
            return Ok(Self(HashMap::new()));
        }
        let found = sqlx::query!(
            "select kind, name, number from definitions
            where (kind, name) in (select * from unnest($1::text[], $2::text[])) and not removed
            order by number for key share",
            &kinds,
            &names
        )
        .fetch_all(connection)
        .await?;
        Ok(Self(found.into_iter().map(|row| ((row.kind, row.name), row.number)).collect()))
    }

    /// The numbers of the roles and the plan of a line. An error names the first that does not exist.
    fn of(&self, line: &Accepted) -> Result<(Vec<i32>, Option<i32>), String> {
        let (mut roles, mut plan) = (Vec::new(), None);
        for (kind, name) in names_of(&line.key.permissions) {
            let number = self.0.get(&(kind.to_owned(), name.to_owned())).copied();
            let number = number.ok_or_else(|| format!("there is no {kind} {name}"))?;
            if kind == Kind::Plan.name() { plan = Some(number) } else { roles.push(number) }
        }
        Ok((roles, plan))
    }
}

/// Kind and name of the roles and the plan that a line names.
fn names_of(permissions: &Permissions) -> impl Iterator<Item = (&'static str, &str)> {
    let roles = permissions.roles.iter().flatten().map(|name| (Kind::Role.name(), name.as_str()));
    let plan = match permissions.plan.value() {
        Some(PlanRef::Named(name)) => Some((Kind::Plan.name(), name.as_str())),
        _ => None,
    };
    roles.chain(plan)
}

/// Creates the missing owners and locks the rows of all, so that the values that keys copy from their owners do not change
/// before the keys are written.
async fn lock_owners(connection: &mut PgConnection, chunk: &[Accepted]) -> Result<HashMap<String, Uuid>, ApiError> {
    let mut emails: Vec<_> = chunk.iter().map(|line| line.key.email.as_str().to_owned()).collect();
    emails.sort_unstable();
    emails.dedup();
    let ids: Vec<_> = emails.iter().map(|_| Uuid::now_v7()).collect();
    sqlx::query!(
        "insert into user_preferences (id, email)
        select id, email from unnest($1::uuid[], $2::text[]) as new (id, email) order by email on conflict (email) do nothing",
        &ids,
        &emails
    )
    .execute(&mut *connection)
    .await?;
    let owners = sqlx::query!(
        "select id, email from user_preferences where email = any($1) order by id for no key update",
        &emails
    )
    .fetch_all(connection)
    .await?;
    Ok(owners.into_iter().map(|owner| (owner.email, owner.id)).collect())
}

/// The columns of the new rows.
#[derive(Default)]
struct Rows {
    ids: Vec<Uuid>,
    owners: Vec<Uuid>,
    names: Vec<String>,
    hashes: Vec<Vec<u8>>,
    prefixes: Vec<Option<String>>,
    /// Lists as JSON: the database has no lists of lists of different lengths.
    scopes: Vec<serde_json::Value>,
    rate_limits: Vec<serde_json::Value>,
    ends: Vec<Option<time::OffsetDateTime>>,
    disabled: Vec<bool>,
    roles: Vec<serde_json::Value>,
    plans: Vec<Option<i32>>,
    networks: Vec<serde_json::Value>,
    quotas: Vec<Option<serde_json::Value>>,
    costs: Vec<Option<i32>>,
    kinds: Vec<String>,
    attributes: Vec<Option<serde_json::Value>>,
}

impl Rows {
    fn push(&mut self, owner: Uuid, Sound { accepted, roles, plan }: &Sound<'_>) -> Result<(), ApiError> {
        let Accepted { key, stored, .. } = accepted;
        let Permissions { networks, quota, cost, rate_limits, attributes, .. } = &key.permissions;
        let value = |value: Result<_, serde_json::Error>| value.map_err(|error| ApiError::Internal(error.to_string()));
        let networks: Vec<String> = networks.iter().flatten().map(ToString::to_string).collect();
        self.ids.push(Uuid::now_v7());
        self.owners.push(owner);
        self.names.push(key.name.as_str().into());
        self.hashes.push(stored.0.to_vec());
        self.prefixes.push(key.prefix.clone());
        self.scopes.push(json!(key.scopes.as_slice()));
        self.rate_limits.push(value(serde_json::to_value(rate_limits.as_deref().unwrap_or_default()))?);
        self.ends.push(key.expires_at);
        self.disabled.push(key.disabled);
        self.roles.push(json!(roles));
        self.plans.push(*plan);
        self.networks.push(json!(networks));
        self.quotas.push(quota.value().map(|quota| value(serde_json::to_value(quota))).transpose()?);
        self.costs.push(*cost);
        self.kinds.push(key.kind.name().into());
        self.attributes.push(attributes.column());
        Ok(())
    }

    async fn insert(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            "insert into api_keys (
                id, owner_id, name, hash, prefix, scopes, rate_limits, expires_at, disabled, disabled_by_admin,
                role_numbers, plan_number, networks, quota, cost, kind, attributes
            )
            select id, owner_id, name, hash, prefix, array(select jsonb_array_elements_text(scopes)), rate_limits,
                expires_at, disabled, disabled, array(select jsonb_array_elements_text(roles)::integer), plan,
                array(select jsonb_array_elements_text(networks)), quota, coalesce(cost, 1), kind, attributes
            from unnest(
                $1::uuid[], $2::uuid[], $3::text[], $4::bytea[], $5::text[], $6::jsonb[], $7::jsonb[],
                $8::timestamptz[], $9::boolean[], $10::jsonb[], $11::integer[], $12::jsonb[], $13::jsonb[], $14::integer[],
                $15::text[], $16::jsonb[]
            ) as new (
                id, owner_id, name, hash, prefix, scopes, rate_limits, expires_at, disabled, roles, plan, networks, quota,
                cost, kind, attributes
            )",
            &self.ids,
            &self.owners,
            &self.names,
            &self.hashes,
            &self.prefixes as &[Option<String>],
            &self.scopes,
            &self.rate_limits,
            &self.ends as &[Option<time::OffsetDateTime>],
            &self.disabled,
            &self.roles,
            &self.plans as &[Option<i32>],
            &self.networks,
            &self.quotas as &[Option<serde_json::Value>],
            &self.costs as &[Option<i32>],
            &self.kinds,
            &self.attributes as &[Option<serde_json::Value>]
        )
        .execute(connection)
        .await
        .map(|_| ())
    }
}
