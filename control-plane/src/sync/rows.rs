//! Reads the rows that filters need. The caller ensures that all rows are of one state of the database.

use contract::definition::Definition;
use contract::hash::KeyHash;
use contract::id::Epoch;
use contract::policy::NamedPolicy;
use contract::record::RateLimit;
use futures_util::{Stream, TryStreamExt};
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::mirror::{DefinitionRow, KeyRow};
use crate::domain::Attributes;
use crate::domain::record::record_of;

/// Why rows could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    /// A row that the schema does not allow.
    #[error("key {0} cannot be written as a record")]
    Row(Uuid),
}

/// Streams the keys that match a condition. A macro, since sqlx checks only literal statements.
macro_rules! keys {
    ($connection:expr, $where:literal $(, $of:expr)*) => {
        sqlx::query_as!(
            SecretRow,
            r#"select id, owner_id, hash, generation, kind, attributes as "attributes: Json<Attributes>",
                owner_attributes as "owner_attributes: Json<Attributes>", scopes,
                rate_limits as "rate_limits: Json<Vec<RateLimit>>", cost,
                expires_at, disabled, quota_exceeded, credits_exhausted, revoked_at, withdrawn,
                coalesce(plan_number, owner_plan_number) as plan_number, role_numbers, networks, quota_fill,
                case when applied_quota is not null then applied_quota ->> 'per' is not distinct from 'owner' end as quota_shared,
                quota_resets_at, metered, credits_fill, revision
            from api_keys where "# + $where
            $(, $of)*
        )
        .fetch($connection)
    };
}

/// How far the database is.
pub(super) struct DatabaseState {
    pub(super) epoch: Uuid,
    pub(super) revision: i64,
    /// The revision of the newest change of an old secret, and of a role, plan or policy; 0 if there is none.
    pub(super) newest_old_secret: i64,
    pub(super) newest_definition: i64,
}

impl DatabaseState {
    pub(super) async fn read(connection: &mut PgConnection) -> Result<Self, sqlx::Error> {
        sqlx::query_as!(
            Self,
            r#"select epoch, revision, coalesce((select max(revision) from retired_secrets), 0) as "newest_old_secret!",
                coalesce((select max(revision) from definitions), 0) as "newest_definition!"
            from store_state"#
        )
        .fetch_one(connection)
        .await
    }

    pub(super) fn position(&self) -> (Epoch, u64) {
        (Epoch::from(self.epoch), self.revision.cast_unsigned())
    }
}

/// One secret as filters know it: the columns of its key, with the hash, the generation and the end of the secret.
struct SecretRow {
    id: Uuid,
    owner_id: Uuid,
    hash: Vec<u8>,
    generation: i32,
    kind: String,
    attributes: Option<Json<Attributes>>,
    owner_attributes: Option<Json<Attributes>>,
    scopes: Vec<String>,
    rate_limits: Json<Vec<RateLimit>>,
    cost: i32,
    expires_at: Option<OffsetDateTime>,
    disabled: bool,
    quota_exceeded: bool,
    credits_exhausted: bool,
    revoked_at: Option<OffsetDateTime>,
    withdrawn: bool,
    plan_number: Option<i32>,
    role_numbers: Vec<i32>,
    networks: Vec<String>,
    quota_fill: i32,
    /// Whether all keys of the owner with the plan share the quota; `None` without a quota.
    quota_shared: Option<bool>,
    quota_resets_at: Option<OffsetDateTime>,
    metered: bool,
    credits_fill: i32,
    revision: i64,
}

impl SecretRow {
    fn row(self) -> Result<KeyRow, ReadError> {
        let (id, revision) = (self.id, self.revision.cast_unsigned());
        let hash = KeyHash(self.hash.as_slice().try_into().map_err(|_| ReadError::Row(id))?);
        if self.withdrawn {
            return Ok(KeyRow { hash, revision, record: None });
        }
        let record = record_of!(self).to_bytes().map_err(|_| ReadError::Row(id))?;
        Ok(KeyRow { hash, revision, record: Some(record.into_boxed_slice()) })
    }
}

/// Most changes that the cheap statement reads. PostgreSQL plans a statement with a fixed limit once, and one without a limit at
/// each call, which takes longer than reading a few rows. The number is also in the statement, since PostgreSQL cannot plan by a
/// parameter.
pub(super) const FEW: usize = 64;

/// Keys that were read.
#[derive(Default)]
pub(super) struct Keys {
    pub(super) rows: Vec<KeyRow>,
    /// Those that may have old secrets.
    pub(super) rotated: Vec<Uuid>,
}

impl Keys {
    /// All keys that are not withdrawn.
    pub(super) async fn all(connection: &mut PgConnection) -> Result<Self, ReadError> {
        Self::read(keys!(connection, "not withdrawn")).await
    }

    /// Those that have changed after a revision.
    pub(super) async fn changed(connection: &mut PgConnection, since: i64) -> Result<Self, ReadError> {
        Self::read(keys!(connection, "revision > $1", since)).await
    }

    /// The first of these, at most [`FEW`].
    pub(super) async fn few_changed(connection: &mut PgConnection, since: i64) -> Result<Self, ReadError> {
        Self::read(keys!(connection, "revision > $1 order by revision limit 64", since)).await
    }

    async fn read(mut keys: impl Stream<Item = Result<SecretRow, sqlx::Error>> + Unpin) -> Result<Self, ReadError> {
        let mut read = Self::default();
        while let Some(key) = keys.try_next().await? {
            // A key has old secrets only from its second generation on.
            if key.generation > 1 {
                read.rotated.push(key.id);
            }
            read.rows.push(key.row()?);
        }
        Ok(read)
    }
}

/// Old secrets that have changed after a revision, and the old secrets of some keys.
pub(super) async fn old_secrets(
    connection: &mut PgConnection,
    since: i64,
    of_keys: &[Uuid],
    withdrawn: bool,
) -> Result<Vec<KeyRow>, ReadError> {
    // A secret that has ended by the clock of the database ends for every Envoy, whatever its clock shows.
    let mut secrets = sqlx::query_as!(
        SecretRow,
        r#"select k.id, k.owner_id, r.hash, r.generation, k.kind, k.attributes as "attributes: Json<Attributes>",
            k.owner_attributes as "owner_attributes: Json<Attributes>", k.scopes,
            k.rate_limits as "rate_limits: Json<Vec<RateLimit>>", k.cost,
            least(k.expires_at, case when r.ends_at <= now() then to_timestamp(0) else r.ends_at end) as expires_at,
            k.disabled, k.quota_exceeded, k.credits_exhausted, k.revoked_at, k.withdrawn or r.withdrawn as "withdrawn!",
            coalesce(k.plan_number, k.owner_plan_number) as plan_number, k.role_numbers, k.networks, k.quota_fill,
            case when k.applied_quota is not null then k.applied_quota ->> 'per' is not distinct from 'owner' end as quota_shared,
            k.quota_resets_at, k.metered, k.credits_fill,
            greatest(k.revision, r.revision) as "revision!"
        from (
            select hash from retired_secrets where revision > $1
            union
            select hash from retired_secrets where key_id = any($3)
        ) changed
        join retired_secrets r on r.hash = changed.hash join api_keys k on k.id = r.key_id
        where not (k.withdrawn or r.withdrawn) or $2"#,
        since,
        withdrawn,
        of_keys
    )
    .fetch(connection);
    let mut rows = Vec::new();
    while let Some(secret) = secrets.try_next().await? {
        rows.push(secret.row()?);
    }
    Ok(rows)
}

/// Roles, plans and policies that have changed after a revision, removed ones included.
pub(super) async fn definitions(connection: &mut PgConnection, since: i64) -> Result<Vec<DefinitionRow>, ReadError> {
    let rows = sqlx::query!(
        r#"select number, scopes, rate_limits as "rate_limits: Json<Vec<RateLimit>>", policy as "policy: Json<NamedPolicy>",
            removed, revision
        from definitions where revision > $1"#,
        since
    )
    .fetch_all(connection)
    .await?;
    let defined = rows.into_iter().map(|row| {
        let policy = row.policy.map(|policy| policy.0.into());
        let definition = Definition { scopes: row.scopes, rate_limits: row.rate_limits.0, policy };
        DefinitionRow {
            number: row.number.cast_unsigned(),
            revision: row.revision.cast_unsigned(),
            definition: (!row.removed).then_some(definition),
        }
    });
    Ok(defined.collect())
}
