//! Roles, plans and policies in PostgreSQL. A deleted definition keeps its row and its number, so that filters learn that it
//! is gone.
//!
//! A key or a user that gets a definition locks its row `for key share` ([`numbers`]), which only a deletion waits
//! for. A deletion locks it `for update` and then sees every use. A replacement locks it `for no key update`: it
//! waits for other replacements and deletions only. The order of locks stands in [`crate::keys::lock`].

use contract::policy::{DEFAULT_NAME, NamedPolicy};
use contract::record::RateLimit;
use contract::rules::{RULES, Rules, conflict};
use serde_json::json;
use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;

use super::policy::PolicyBody;
use super::{Content, Kind, MOST, Name};
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::definitions::uses;
use crate::domain::{Preconditions, Quota, QuotaBody};
use crate::error::ApiError;
use crate::quota::{Whose, apply_quotas};

/// The number of the lock that [`put`] takes.
const DEFINITIONS_LOCK: i64 = i64::from_be_bytes(*b"pcdefins");

/// Most bytes of all policies together, as filters get them: they come in one update.
const POLICY_BYTES: usize = 1 << 18;

/// A role, a plan or a policy.
#[derive(Clone, Debug)]
pub struct Definition {
    /// By which keys and records reference it.
    pub number: i32,
    pub name: String,
    pub description: String,
    pub scopes: Vec<String>,
    /// Limits of keys that have none of their own.
    pub rate_limits: Json<Vec<RateLimit>>,
    /// The quota of each key that has none of its own.
    pub quota: Option<Json<Quota>>,
    /// Policies only.
    pub policy: Option<Json<NamedPolicy>>,
    /// Incremented by each change.
    pub version: i64,
    /// The revision of the last change.
    pub revision: i64,
    pub created_at: OffsetDateTime,
}

impl Definition {
    fn says(&self, content: &Content) -> bool {
        self.description == content.description
            && self.scopes == content.scopes.as_slice()
            && self.rate_limits.0 == content.rate_limits
            && self.quota.as_ref().map(|quota| &quota.0) == content.quota.as_ref()
            && self.policy.as_ref().map(|policy| &policy.0) == content.policy.as_ref()
    }
}

/// A query of definitions: what comes before its columns, and after them.
macro_rules! query_definitions {
    ($before:tt, $after:tt, $($argument:expr),+ $(,)?) => {
        sqlx::query_as!(
            Definition,
            $before + r#" number, name, description, scopes, rate_limits as "rate_limits: Json<Vec<RateLimit>>",
                quota as "quota: Json<Quota>", policy as "policy: Json<NamedPolicy>", version, revision, created_at "#
                + $after,
            $($argument),+
        )
    };
}

/// Reads one.
pub async fn get(pool: &PgPool, kind: Kind, name: &Name) -> Result<Option<Definition>, ApiError> {
    let found = query_definitions!(
        "select",
        "from definitions where kind = $1 and name = $2 and not removed",
        kind.name(),
        name.as_str()
    );
    Ok(found.fetch_optional(pool).await?)
}

/// Reads those whose names come after `after`, by name, at most `limit`.
pub async fn list(pool: &PgPool, kind: Kind, after: Option<&str>, limit: i64) -> Result<Vec<Definition>, ApiError> {
    let found = query_definitions!(
        "select",
        "from definitions where kind = $1 and name > $2 and not removed order by name limit $3",
        kind.name(),
        after.unwrap_or_default(),
        limit
    );
    Ok(found.fetch_all(pool).await?)
}

/// Creates or replaces a definition. Returns whether it is new. A definition with the same content stays as it is: a statement
/// that changes nothing would wake every filter. 412 by the preconditions, 409 if there are too many.
pub async fn put(
    change: &mut Change,
    kind: Kind,
    name: &Name,
    content: &Content,
    preconditions: &Preconditions,
) -> Result<(Definition, bool), ApiError> {
    lock_definitions(change).await?;
    let present = query_definitions!(
        "select",
        "from definitions where kind = $1 and name = $2 and not removed for no key update",
        kind.name(),
        name.as_str()
    );
    let present = present.fetch_optional(&mut **change).await?;
    preconditions.check(present.as_ref().map(|present| present.version))?;
    let made = present.is_none();
    let put = match present {
        Some(present) if present.says(content) => return Ok((present, false)),
        Some(present) => replace(change, kind, present.number, content).await?,
        None => make(change, kind, name, content).await?,
    };
    let action = match (kind, made) {
        (Kind::Role, true) => "role.create",
        (Kind::Role, false) => "role.update",
        (Kind::Plan, true) => "plan.create",
        (Kind::Plan, false) => "plan.update",
        (Kind::Policy, true) => "policy.create",
        (Kind::Policy, false) => "policy.update",
    };
    let detail = match kind {
        Kind::Role => json!({"scopes": put.scopes}),
        Kind::Plan => json!({
            "scopes": put.scopes,
            "rate_limits": put.rate_limits,
            "quota": put.quota.as_ref().map(|quota| QuotaBody::of(quota)),
        }),
        Kind::Policy => {
            check_policies(change, name, made).await?;
            json!(put.policy.as_ref().map(|policy| PolicyBody::of(&put.description, policy)))
        }
    };
    change.record(AuditEvent::on(action, name.as_str(), detail)).await?;
    Ok((put, made))
}

/// Lets no other transaction create or replace definitions until this one ends. Two that create the same one would otherwise
/// not see each other.
async fn lock_definitions(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("select pg_advisory_xact_lock($1)", DEFINITIONS_LOCK).execute(connection).await.map(|_| ())
}

async fn make(
    connection: &mut PgConnection,
    kind: Kind,
    name: &Name,
    content: &Content,
) -> Result<Definition, ApiError> {
    let made = query_definitions!(
        "insert into definitions (kind, name, description, scopes, rate_limits, quota, policy)
        values ($1, $2, $3, $4, $5, $6, $7) returning",
        "",
        kind.name(),
        name.as_str(),
        content.description,
        content.scopes.as_slice(),
        Json(&content.rate_limits) as _,
        content.quota.as_ref().map(Json) as _,
        content.policy.as_ref().map(Json) as _
    );
    let made = made.fetch_one(&mut *connection).await?;
    // Since the insert, other transactions wait for `store_state`, so the count is complete.
    let there = sqlx::query_scalar!(
        r#"select count(*) as "there!" from definitions where kind = $1 and not removed"#,
        kind.name()
    )
    .fetch_one(connection)
    .await?;
    if there > MOST {
        let (one, many) = (kind.name(), kind.plural());
        let detail = format!("There are {MOST} {many} already. Delete a {one} that is not needed.");
        return Err(ApiError::Conflict(detail));
    }
    Ok(made)
}

async fn replace(
    connection: &mut PgConnection,
    kind: Kind,
    number: i32,
    content: &Content,
) -> Result<Definition, ApiError> {
    let replaced = query_definitions!(
        "update definitions set description = $2, scopes = $3, rate_limits = $4, quota = $5, policy = $6
        where number = $1 returning",
        "",
        number,
        content.description,
        content.scopes.as_slice(),
        Json(&content.rate_limits) as _,
        content.quota.as_ref().map(Json) as _,
        content.policy.as_ref().map(Json) as _
    );
    let replaced = replaced.fetch_one(&mut *connection).await?;
    if kind == Kind::Plan {
        apply_quotas(connection, Whose::Plan(number)).await?;
    }
    Ok(replaced)
}

/// The error for a definition that does not exist.
pub fn missing(kind: Kind, name: &Name) -> ApiError {
    ApiError::NotFound(format!("There is no {} {}.", kind.name(), name.as_str()))
}

/// Deletes a definition that is not in use. 404 if there is none, 412 by the preconditions, 409 that says how many use it.
/// `is_forced` deletes a policy although routes named it within two hours.
pub async fn remove(
    change: &mut Change,
    kind: Kind,
    name: &Name,
    preconditions: &Preconditions,
    is_forced: bool,
) -> Result<(), ApiError> {
    let present = sqlx::query!(
        r#"select number, version, policy as "policy: Json<NamedPolicy>"
        from definitions where kind = $1 and name = $2 and not removed for update"#,
        kind.name(),
        name.as_str()
    )
    .fetch_optional(&mut **change)
    .await?;
    preconditions.check(present.as_ref().map(|present| present.version))?;
    let Some(present) = present else { return Err(missing(kind, name)) };
    if kind == Kind::Policy {
        refuse_removal_in_use(name, present.policy.as_ref().map(|policy| &policy.0))?;
        if !is_forced {
            refuse_removal_while_named(change, name, present.number).await?;
        }
    }
    let uses = sqlx::query!(
        r#"select
            (select count(*) from api_keys where role_numbers @> array[$1::integer] and role_numbers <> '{}'
                and revoked_at is null)
            + (select count(*) from api_keys where coalesce(plan_number, owner_plan_number) = $1 and revoked_at is null)
                as "keys!",
            (select count(*) from user_preferences where plan_number = $1) as "users!""#,
        present.number
    )
    .fetch_one(&mut **change)
    .await?;
    if uses.keys > 0 || uses.users > 0 {
        let users = if uses.users > 0 { format!(" and {}", counted(uses.users, "user")) } else { String::new() };
        let (kind, name, keys) = (kind.name(), name.as_str(), counted(uses.keys, "key"));
        return Err(ApiError::Conflict(format!(
            "The {kind} {name} is used by {keys}{users}. Remove it from them first."
        )));
    }
    sqlx::query!("update definitions set removed = true where number = $1", present.number)
        .execute(&mut **change)
        .await?;
    let action = match kind {
        Kind::Role => "role.delete",
        Kind::Plan => "plan.delete",
        Kind::Policy => "policy.delete",
    };
    change.record(AuditEvent::on(action, name.as_str(), json!({}))).await?;
    Ok(())
}

/// Checks the rules of all policies, after one has changed. With the first policy it creates the default one: an Envoy looks for
/// the policies that routes name as soon as there is one, and goes on doing so although others are deleted.
async fn check_policies(change: &mut Change, name: &Name, made: bool) -> Result<(), ApiError> {
    let connection = &mut **change;
    let all = sqlx::query_scalar!(
        r#"select policy as "policy!: Json<NamedPolicy>" from definitions where kind = 'policy' and not removed"#
    )
    .fetch_all(&mut *connection)
    .await?;
    let bytes: usize = all.iter().map(|policy| encoded_bytes(&policy.0)).sum();
    if bytes > POLICY_BYTES {
        let detail = format!("All policies together may take {POLICY_BYTES} bytes; there would be {bytes}.");
        return Err(ApiError::Conflict(detail));
    }
    let rules: usize = all.iter().map(|policy| policy.matches.len()).sum();
    if rules > RULES {
        let detail = format!("All policies together may have {RULES} entries of match; there would be {rules}.");
        return Err(ApiError::Conflict(detail));
    }
    if let Some((one, other)) = conflict(&Rules::new(all.iter().map(|policy| &policy.0))) {
        let (own, other) = if one.policy == name.as_str() { (one, other) } else { (other, one) };
        return Err(ApiError::Conflict(format!(
            "The match \"{}\" and the match \"{}\" of the policy {} fit the same requests, and neither is more specific. Change \
             one of them.",
            own.matches, other.matches, other.policy
        )));
    }
    if made && !all.iter().any(|policy| policy.name == DEFAULT_NAME) {
        let default = NamedPolicy { name: DEFAULT_NAME.into(), from_annotation: true, ..NamedPolicy::default() };
        sqlx::query!(
            "insert into definitions (kind, name, policy) values ('policy', $1, $2)",
            DEFAULT_NAME,
            Json(&default) as _
        )
        .execute(connection)
        .await?;
        let detail = json!(PolicyBody::of("", &default));
        change.record(AuditEvent::on("policy.create", DEFAULT_NAME, detail)).await?;
    }
    Ok(())
}

/// The size of a policy as filters get it.
fn encoded_bytes(policy: &NamedPolicy) -> usize {
    contract::definition::Definition::from(policy.clone()).to_bytes().map_or(usize::MAX, |bytes| bytes.len())
}

/// 409 for a policy that requests get although no route names it.
fn refuse_removal_in_use(name: &Name, policy: Option<&NamedPolicy>) -> Result<(), ApiError> {
    if name.as_str() == DEFAULT_NAME {
        let detail = "The policy default cannot be deleted. Replace it with {}, which requires a key and nothing else.";
        return Err(ApiError::Conflict(detail.into()));
    }
    match policy.map_or(0, |policy| policy.matches.len()) {
        0 => Ok(()),
        uses => Err(ApiError::Conflict(format!(
            "The policy {} is in use: it has {} of match. Remove them first.",
            name.as_str(),
            if uses == 1 { "one entry".to_owned() } else { format!("{uses} entries") }
        ))),
    }
}

/// 409 for a policy that routes named lately: their requests would be refused.
async fn refuse_removal_while_named(change: &mut Change, name: &Name, number: i32) -> Result<(), ApiError> {
    match uses::last_named(change, number).await? {
        Some((at, true)) => Err(ApiError::Conflict(format!(
            "Routes of Envoys named the policy {} within the last two hours (last report {at}). Remove the name from Envoy's \
             configuration, and delete the policy two hours later, or now with ?force=true. Requests of routes that still name \
             it get 503 policy_unknown.",
            name.as_str()
        ))),
        _ => Ok(()),
    }
}

fn counted(number: i64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// Finds definitions by name, for a key or a user that gets them, and locks them against removal until the transaction ends.
/// The numbers are in the order of the names. Call it before the first change of a key: see the order of locks above. An error
/// names the first name that is unknown.
pub async fn numbers(connection: &mut PgConnection, kind: Kind, names: &[Name]) -> Result<Vec<i32>, ApiError> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let wanted: Vec<_> = names.iter().map(|name| name.as_str().to_owned()).collect();
    let found = sqlx::query!(
        "select number, name from definitions where kind = $1 and name = any($2) and not removed
        order by number for key share",
        kind.name(),
        &wanted
    )
    .fetch_all(connection)
    .await?;
    let number = |name: &String| {
        let row = found.iter().find(|row| row.name == *name);
        row.map(|row| row.number).ok_or_else(|| {
            ApiError::invalid(
                kind.field(),
                format!("there is no {} {name}; create it with PUT /v1/{}/{name}", kind.name(), kind.plural()),
            )
        })
    };
    wanted.iter().map(number).collect()
}

/// Finds a plan by number, for a key that gets the plan of another, and locks it against removal until the transaction ends.
/// `None` if it was removed.
pub async fn lock_plan(connection: &mut PgConnection, number: i32) -> Result<Option<i32>, ApiError> {
    let held =
        sqlx::query_scalar!("select number from definitions where number = $1 and not removed for key share", number)
            .fetch_optional(connection)
            .await?;
    Ok(held)
}
