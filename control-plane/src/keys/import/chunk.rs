//! Writes a chunk of an import in one transaction. Keys that are stored already are reported by their line.

use std::collections::{HashMap, HashSet};

use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Accepted, Code};
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::error::ApiError;
use crate::keys::lock::lock_store;
use crate::quota::{Whose, apply_quotas};

/// Writes a chunk. Returns the numbers of the lines whose keys exist already, and why they were not written.
pub(super) async fn write(change: &mut Change, chunk: &[Accepted]) -> Result<Vec<(u64, Code, String)>, ApiError> {
    let owners = lock_owners(change, chunk).await?;
    // Until the commit, no other transaction creates or rotates a key.
    lock_store(change).await?;
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
    .fetch_all(&mut **change)
    .await?;
    let there: HashSet<_> = there.into_iter().collect();
    let (mut refused, mut rows, mut last) = (Vec::new(), Rows::default(), 0);
    for accepted in chunk {
        let Accepted { line: number, key, stored } = accepted;
        match owners.get(key.email.as_str()) {
            _ if [stored, &key.hash].into_iter().any(|hash| there.contains(hash.0.as_slice())) => {
                refused.push((*number, Code::Duplicate, "this key exists already".into()));
            }
            Some(owner) => rows.push(*owner, accepted)?,
            None => return Err(ApiError::Internal(format!("line {number}: its owner was made and is not there"))),
        }
        last = *number;
    }
    if !rows.ids.is_empty() {
        rows.insert(change).await?;
        // The plans of their owners may have quotas.
        apply_quotas(change, Whose::Keys(&rows.ids)).await?;
        let first = chunk.first().map_or(0, |first| first.line);
        let detail = json!({"imported": rows.ids.len(), "lines": [first, last]});
        change.record_each("key.import", &rows.ids, &json!({"lines": [first, last]})).await?;
        let event = AuditEvent { action: "import.commit", key_id: None, target: None, detail };
        change.record(event).await?;
    }
    Ok(refused)
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
}

impl Rows {
    fn push(&mut self, owner: Uuid, Accepted { key, stored, .. }: &Accepted) -> Result<(), ApiError> {
        let rate_limits = serde_json::to_value(&key.rate_limits);
        self.ids.push(Uuid::now_v7());
        self.owners.push(owner);
        self.names.push(key.name.as_str().into());
        self.hashes.push(stored.0.to_vec());
        self.prefixes.push(key.prefix.clone());
        self.scopes.push(json!(key.scopes.as_slice()));
        self.rate_limits.push(rate_limits.map_err(|error| ApiError::Internal(error.to_string()))?);
        self.ends.push(key.expires_at);
        self.disabled.push(key.disabled);
        Ok(())
    }

    async fn insert(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            "insert into api_keys (
                id, owner_id, name, hash, prefix, scopes, rate_limits, expires_at, disabled, disabled_by_admin
            )
            select id, owner_id, name, hash, prefix, array(select jsonb_array_elements_text(scopes)), rate_limits,
                expires_at, disabled, disabled
            from unnest(
                $1::uuid[], $2::uuid[], $3::text[], $4::bytea[], $5::text[], $6::jsonb[], $7::jsonb[],
                $8::timestamptz[], $9::boolean[]
            ) as new (id, owner_id, name, hash, prefix, scopes, rate_limits, expires_at, disabled)",
            &self.ids,
            &self.owners,
            &self.names,
            &self.hashes,
            &self.prefixes as &[Option<String>],
            &self.scopes,
            &self.rate_limits,
            &self.ends as &[Option<time::OffsetDateTime>],
            &self.disabled
        )
        .execute(connection)
        .await
        .map(|_| ())
    }
}
