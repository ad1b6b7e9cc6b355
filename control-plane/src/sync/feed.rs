//! The change feed: what was committed in PostgreSQL comes in, the mirror is brought up to date.
//!
//! Polling is the truth, LISTEN/NOTIFY and the nudge after own writes are hints that make it immediate. Each refresh is
//! one read of the rows after the mirror's revision, in one snapshot of the database, so the mirror steps from one
//! committed state to a later one. After any fault the session starts over, and with it the check of who the database is.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use contract::definition::Definition;
use contract::hash::KeyHash;
use contract::id::Epoch;
use futures_util::TryStreamExt;
use sqlx::postgres::PgListener;
use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};
use tracing::{info, warn};
use uuid::Uuid;

use super::Store;
use super::mirror::{Defined, Mirror, Row};
use crate::key::domain::StoredLimit;
use crate::key::record_of;

/// How long to wait before the database is tried again after a fault.
const PAUSE: Duration = Duration::from_millis(500);

/// How long one refresh may take: a million keys load in seconds, so a server that takes longer has stopped answering.
const PATIENCE: Duration = Duration::from_secs(60);

/// What stands in the identity of a database for a part that it does not let us see. The other parts still tell.
const HIDDEN: &str = "hidden";

/// Why a refresh did not come about.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The database did not answer as it should.
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    /// The connection that announces changes was lost.
    #[error("the connection to the database was lost")]
    Interrupted,
    /// The database took longer than a minute.
    #[error("the database did not answer in time")]
    Late,
    /// A row that the schema does not allow.
    #[error("key {0} cannot be written as a record")]
    Row(Uuid),
}

/// The feed: it has connections of its own, so that no request waits for others to learn what was committed.
#[derive(Clone, Debug)]
pub struct Feed {
    pool: PgPool,
    store: Store,
}

impl Feed {
    /// A feed into a store.
    #[must_use]
    pub const fn new(pool: PgPool, store: Store) -> Self {
        Self { pool, store }
    }

    /// Keeps the store's mirror up to date until the future is dropped.
    pub async fn run(self, poll_interval: Duration) {
        loop {
            let Err(error) = self.session(poll_interval).await;
            warn!(%error, "the change feed was interrupted");
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn session(&self, poll_interval: Duration) -> Result<Infallible, FeedError> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen("portcullis_changes").await?;
        identify(&self.pool).await?;
        loop {
            tokio::time::timeout(PATIENCE, self.refresh(None)).await.map_err(|_| FeedError::Late)??;
            tokio::select! {
                notification = listener.try_recv() => {
                    // The connection was lost, perhaps to a server that has failed over or was restored: ask who it is.
                    notification?.ok_or(FeedError::Interrupted)?;
                }
                () = self.store.nudged() => {}
                () = tokio::time::sleep(poll_interval) => {}
            }
        }
    }

    /// Brings the mirror to the present revision of the database. Returns at once if the mirror has what is `wanted`, or
    /// somebody else has looked since this was called: however many polls ask, the database is asked once.
    ///
    /// # Errors
    /// [`FeedError`]; the mirror is as it was.
    pub async fn refresh(&self, wanted: Option<(Epoch, u64)>) -> Result<(), FeedError> {
        let called = Instant::now();
        // One at a time, and the mirror is looked at before the database: what the database says then is never older.
        let mut last_look = self.store.refreshing().await;
        let reached =
            |(epoch, revision)| self.store.position().is_some_and(|(ours, at)| ours == epoch && at >= revision);
        if wanted.is_some_and(reached) || last_look.is_some_and(|began| began >= called) {
            return Ok(());
        }
        let began = Instant::now();
        while !look(&self.pool, &self.store).await? {}
        *last_look = Some(began);
        Ok(())
    }
}

/// Draws a new epoch if this is not the database that the present one was drawn for: another server, another timeline
/// after a promotion or a point-in-time recovery, or another database after a restore of a dump.
///
/// # Errors
/// Those of the database.
pub async fn identify(pool: &PgPool) -> Result<(), sqlx::Error> {
    let system = sqlx::query_scalar!(r#"select system_identifier::text as "text!" from pg_control_system()"#);
    // Of the present WAL file: the control file tells a new timeline only after the next checkpoint.
    let timeline = sqlx::query_scalar!(r#"select substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) as "timeline!""#);
    let database =
        sqlx::query_scalar!(r#"select oid::text as "text!" from pg_database where datname = current_database()"#);
    let identity = [
        or_hidden(system.fetch_one(pool).await)?,
        or_hidden(timeline.fetch_one(pool).await)?,
        database.fetch_one(pool).await?,
    ]
    .join("/");
    let drawn = sqlx::query!(
        "update store_state set epoch = gen_random_uuid(), identity = $1 where identity <> $1 returning epoch",
        identity
    )
    .fetch_optional(pool)
    .await?;
    if let Some(drawn) = drawn {
        info!(epoch = %drawn.epoch, identity, "a new epoch begins: this is a new or restored database");
    }
    Ok(())
}

/// A part of the identity; managed services do not let every user see all of them.
fn or_hidden(part: Result<String, sqlx::Error>) -> Result<String, sqlx::Error> {
    part.or_else(|error| match error.as_database_error().and_then(|error| error.code()) {
        Some(code) if code == "42501" => Ok(HIDDEN.to_owned()),
        _ => Err(error),
    })
}

/// Draws a new epoch: every filter will load the whole store anew.
///
/// # Errors
/// Those of the database.
pub async fn new_epoch(pool: &PgPool) -> Result<Uuid, sqlx::Error> {
    sqlx::query_scalar!("update store_state set epoch = gen_random_uuid() returning epoch").fetch_one(pool).await
}

/// One look at the database. Says whether the mirror is now what the database holds; if not, a new epoch has begun and is
/// there to be loaded.
async fn look(pool: &PgPool, store: &Store) -> Result<bool, FeedError> {
    let known = store.position();
    let mut transaction = pool.begin_with("begin isolation level repeatable read read only").await?;
    let state = sqlx::query!("select epoch, revision from store_state").fetch_one(&mut *transaction).await?;
    let (epoch, revision) = (Epoch::from(state.epoch), state.revision);
    if known == Some((epoch, revision.cast_unsigned())) {
        store.seen();
        return Ok(true);
    }
    match known {
        Some((ours, since)) if ours == epoch && revision.cast_unsigned() > since => {
            let rows = rows(&mut transaction, since.cast_signed(), true).await?;
            let defined = definitions(&mut transaction, since.cast_signed(), true).await?;
            store.update(|mirror| {
                if let Some(mirror) = mirror {
                    mirror.define(defined);
                    mirror.apply(rows, revision.cast_unsigned());
                }
            });
        }
        Some((ours, since)) if ours == epoch => {
            warn!(since, revision, "the database has gone back to an earlier revision: a new epoch begins");
            drop(transaction);
            // Only if no other replica has done so meanwhile.
            sqlx::query!("update store_state set epoch = gen_random_uuid() where epoch = $1", state.epoch)
                .execute(pool)
                .await?;
            return Ok(false);
        }
        Some(_) | None => {
            let horizon = sqlx::query_scalar!(
                r#"select greatest(
                        (select max(revision) from api_keys where withdrawn),
                        (select max(revision) from retired_secrets where withdrawn), 0
                    ) as "horizon!""#
            )
            .fetch_one(&mut *transaction)
            .await?;
            let rows = rows(&mut transaction, -1, false).await?;
            let mut mirror = Mirror::new(epoch, horizon.cast_unsigned());
            // Those that were removed too: readers who know them are told.
            mirror.define(definitions(&mut transaction, -1, true).await?);
            mirror.apply(rows, revision.cast_unsigned());
            info!(%epoch, revision, keys = mirror.keys(), "the store is loaded");
            store.update(|present| *present = Some(mirror));
        }
    }
    Ok(true)
}

/// Rows of keys, and of their old secrets. One that has ended by the database's clock has ended by any Envoy's.
async fn rows(connection: &mut PgConnection, since: i64, withdrawn: bool) -> Result<Vec<Row>, FeedError> {
    let mut stream = sqlx::query!(
        r#"select id as "id!", owner_id as "owner_id!", hash as "hash!", generation as "generation!", scopes as "scopes!",
            rate_limits as "rate_limits!: Json<Vec<StoredLimit>>", cost as "cost!", expires_at, disabled as "disabled!",
            quota_exceeded as "quota_exceeded!", credits_exhausted as "credits_exhausted!", revoked_at,
            withdrawn as "withdrawn!", coalesce(plan_number, owner_plan_number) as plan_number,
            role_numbers as "role_numbers!", networks as "networks!", quota_starter, quota_turn as "quota_turn!",
            quota_resets_at, credits_starter, credits_turn as "credits_turn!", revision as "revision!"
        from api_keys where revision > $1 and (not withdrawn or $2)
        union all
        select k.id, k.owner_id, r.hash, r.generation, k.scopes, k.rate_limits, k.cost, least(k.expires_at, case when r.ends_at <= now() then to_timestamp(0) else r.ends_at end),
            k.disabled, k.quota_exceeded, k.credits_exhausted, k.revoked_at, k.withdrawn or r.withdrawn,
            coalesce(k.plan_number, k.owner_plan_number), k.role_numbers, k.networks, k.quota_starter, k.quota_turn,
            k.quota_resets_at, k.credits_starter, k.credits_turn, greatest(k.revision, r.revision)
        from (
            select hash from retired_secrets where revision > $1
            union
            select o.hash from api_keys c join retired_secrets o on o.key_id = c.id where c.revision > $1
        ) changed
        join retired_secrets r on r.hash = changed.hash join api_keys k on k.id = r.key_id
        where not (k.withdrawn or r.withdrawn) or $2"#,
        since,
        withdrawn
    )
    .fetch(connection);
    let mut rows = Vec::new();
    while let Some(row) = stream.try_next().await? {
        let bad = || FeedError::Row(row.id);
        let revision = row.revision.cast_unsigned();
        let hash = KeyHash(row.hash.as_slice().try_into().map_err(|_| bad())?);
        if row.withdrawn {
            rows.push(Row { hash, revision, record: None });
            continue;
        }
        let id = row.id;
        let record = record_of!(row).to_bytes().map_err(|_| FeedError::Row(id))?;
        rows.push(Row { hash, revision, record: Some(record.into_boxed_slice()) });
    }
    Ok(rows)
}

async fn definitions(connection: &mut PgConnection, since: i64, removed: bool) -> Result<Vec<Defined>, FeedError> {
    let rows = sqlx::query!(
        r#"select number, scopes, rate_limits as "rate_limits: Json<Vec<StoredLimit>>", removed, revision
        from definitions where revision > $1 and (not removed or $2)"#,
        since,
        removed
    )
    .fetch_all(connection)
    .await?;
    let defined = rows.into_iter().map(|row| {
        let (rate_limits, alone) = StoredLimit::apart(row.rate_limits.0);
        let definition = Definition { scopes: row.scopes, rate_limits, alone };
        Defined {
            number: row.number.cast_unsigned(),
            revision: row.revision.cast_unsigned(),
            definition: (!row.removed).then_some(definition),
        }
    });
    Ok(defined.collect())
}
