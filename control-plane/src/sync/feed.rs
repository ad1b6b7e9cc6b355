//! The change feed: brings the mirror up to date with what was committed in PostgreSQL.
//!
//! Polling finds every change. LISTEN/NOTIFY and the wake-up after a commit of this process only make it immediate. Each
//! refresh reads the rows after the revision of the mirror in one snapshot of the database, or in two statements that give
//! the same result (`read_few_changes`), so the mirror steps from one committed state to a later one. After any fault the session
//! starts over and checks the identity of the database.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use contract::id::Epoch;
use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tracing::{info, warn};
use uuid::Uuid;

use super::mirror::Mirror;
use super::rows::{DatabaseState, FEW, Keys, ReadError, definitions, old_secrets};
use super::{Position, Store};

/// Pause after a fault, before the database is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// Time-out of one refresh. A million keys load in seconds.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(60);

/// During a burst of changes, reads of the database start at least this far apart, so that each finds several changes. Outside
/// of a burst, a change is read at once.
const IN_A_STREAM: Duration = Duration::from_millis(5);

/// Shortest time between two refreshes for keys that the mirror does not know. It bounds the load that guessed keys cause.
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(20);

/// Replaces a part of the identity of a database that may not be read. The other parts still identify it.
const HIDDEN: &str = "hidden";

/// Why a refresh failed.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The connection that announces changes was lost.
    #[error("the connection to the database was lost")]
    Interrupted,
    /// The database took longer than a minute.
    #[error("the database did not answer in time")]
    Late,
}

impl From<sqlx::Error> for FeedError {
    fn from(error: sqlx::Error) -> Self {
        Self::Read(error.into())
    }
}

/// The feed. It has connections of its own, so that it never waits for requests.
#[derive(Clone, Debug)]
pub struct Feed {
    pool: PgPool,
    store: Store,
    /// When the last refresh for an unknown key began.
    caught_up: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

impl Feed {
    /// A feed into a store.
    #[must_use]
    pub fn new(pool: PgPool, store: Store) -> Self {
        Self { pool, store, caught_up: Arc::default() }
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
            let (began, before) = (tokio::time::Instant::now(), self.store.position());
            tokio::time::timeout(REFRESH_TIMEOUT, self.refresh(None)).await.map_err(|_| FeedError::Late)??;
            let streams = several_between(before, self.store.position());
            self.wait_for_change(&mut listener, poll_interval).await?;
            if streams {
                tokio::time::sleep_until(began + IN_A_STREAM).await;
            }
        }
    }

    /// Waits until there may be something to read.
    async fn wait_for_change(&self, listener: &mut PgListener, poll_interval: Duration) -> Result<(), FeedError> {
        let mut due = pin!(tokio::time::sleep(poll_interval));
        loop {
            tokio::select! {
                notification = listener.try_recv() => {
                    // The connection was lost, perhaps to a server that has failed over or was restored: ask who it is.
                    let notification = notification?.ok_or(FeedError::Interrupted)?;
                    // This replica has read its own changes already. A database that went back to earlier revisions is found
                    // by the next poll.
                    let is_read = |revision: u64| self.store.position().is_some_and(|(_, at)| revision <= at);
                    if !notification.payload().parse().is_ok_and(is_read) {
                        return Ok(());
                    }
                }
                () = self.store.waker().woken() => return Ok(()),
                () = &mut due => return Ok(()),
            }
        }
    }

    /// Brings the mirror to the revision that the database has when this is called, for a key that the mirror does not know.
    /// Concurrent callers share one refresh.
    pub async fn catch_up(&self) -> Result<(), FeedError> {
        let called = Instant::now();
        let mut last = self.caught_up.lock().await;
        if let Some(began) = *last {
            if began >= called {
                return Ok(());
            }
            tokio::time::sleep_until((began + CATCH_UP_INTERVAL).into()).await;
        }
        let began = Instant::now();
        self.refresh(None).await?;
        *last = Some(began);
        Ok(())
    }

    /// Brings the mirror to the present revision of the database. Returns at once if the mirror has the `wanted` position, or if
    /// another task has refreshed it since the call: many polls cause one refresh.
    pub async fn refresh(&self, wanted: Option<(Epoch, u64)>) -> Result<(), FeedError> {
        let called = Instant::now();
        // One refresh at a time. The mirror is read before the database, so the database is never older.
        let mut last_read = self.store.refreshing().await;
        let reached =
            |(epoch, revision)| self.store.position().is_some_and(|(ours, at)| ours == epoch && at >= revision);
        if wanted.is_some_and(reached) || last_read.is_some_and(|began| began >= called) {
            return Ok(());
        }
        let began = Instant::now();
        while !read_changes(&self.pool, &self.store).await? {}
        *last_read = Some(began);
        Ok(())
    }
}

/// Whether a refresh has found more than one revision.
fn several_between(before: Position, after: Position) -> bool {
    before.zip(after).is_some_and(|((old, from), (epoch, to))| old == epoch && to > from + 1)
}

/// Generates a new epoch if the present one was generated for another database: another server, another timeline after a
/// promotion or a point-in-time recovery, or another database after a restore of a dump.
pub async fn identify(pool: &PgPool) -> Result<(), sqlx::Error> {
    let system = sqlx::query_scalar!(r#"select system_identifier::text as "text!" from pg_control_system()"#);
    // Of the current WAL file: the control file has a new timeline only after the next checkpoint.
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
        info!(epoch = %drawn.epoch, identity, "new or restored database: a new epoch begins");
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

/// Generates a new epoch. Every filter then loads a snapshot.
pub async fn new_epoch(pool: &PgPool) -> Result<Uuid, sqlx::Error> {
    sqlx::query_scalar!("update store_state set epoch = gen_random_uuid() returning epoch").fetch_one(pool).await
}

/// A cheap refresh for the common case: nothing has changed, or a few keys and nothing else. Returns whether it was enough.
///
/// Its two statements see different states. The second finds all keys that changed up to the revision of the first, unless it
/// finds [`FEW`] keys, so that there may be more, or a key with a later revision. Then a full refresh is needed.
async fn read_few_changes(pool: &PgPool, store: &Store) -> Result<bool, FeedError> {
    let Some(known) = store.position() else { return Ok(false) };
    let mut connection = pool.acquire().await?;
    let state = DatabaseState::read(&mut connection).await?;
    let (now, since) = (state.position(), known.1.cast_signed());
    if now == known {
        store.seen();
        return Ok(true);
    }
    if now.0 != known.0 || state.revision < since || state.newest_old_secret.max(state.newest_definition) > since {
        return Ok(false);
    }
    let Keys { rows, rotated } = Keys::few_changed(&mut connection, since).await?;
    let newer = rows.iter().any(|row| row.revision > now.1);
    if rows.len() >= FEW || !rotated.is_empty() || newer {
        return Ok(false);
    }
    store.update(|mirror| {
        if let Some(mirror) = mirror {
            mirror.apply(rows, now.1);
        }
    });
    Ok(true)
}

/// A full refresh in one snapshot of the database. Returns whether the mirror is up to date; if not, there is a new epoch to load.
async fn read_changes(pool: &PgPool, store: &Store) -> Result<bool, FeedError> {
    if read_few_changes(pool, store).await? {
        return Ok(true);
    }
    let known = store.position();
    let mut transaction = pool.begin_with("begin isolation level repeatable read read only").await?;
    let state = DatabaseState::read(&mut transaction).await?;
    let (epoch, revision) = state.position();
    match known {
        Some((ours, since)) if ours == epoch && revision >= since => {
            let since = since.cast_signed();
            let Keys { mut rows, rotated } = Keys::changed(&mut transaction, since).await?;
            if state.newest_old_secret > since || !rotated.is_empty() {
                rows.extend(old_secrets(&mut transaction, since, &rotated, true).await?);
            }
            let defined = definitions(&mut transaction, since).await?;
            store.update(|mirror| {
                if let Some(mirror) = mirror {
                    mirror.define(defined);
                    mirror.apply(rows, revision);
                }
            });
        }
        Some((ours, since)) if ours == epoch => {
            warn!(since, revision, "the database went back to an earlier revision: a new epoch begins");
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
            let mut rows = Keys::all(&mut transaction).await?.rows;
            rows.extend(old_secrets(&mut transaction, -1, &[], false).await?);
            let mut mirror = Mirror::new(epoch, horizon.cast_unsigned());
            // Deleted ones too, so that filters which have them learn of it.
            mirror.define(definitions(&mut transaction, -1).await?);
            mirror.apply(rows, revision);
            info!(%epoch, revision, keys = mirror.keys(), "loaded the key store");
            store.update(|present| *present = Some(mirror));
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_revision_is_no_stream() {
        let (epoch, other) = (Epoch([1; 16]), Epoch([2; 16]));
        let at = |revision| Some((epoch, revision));
        assert!(!several_between(at(7), at(7)) && !several_between(at(7), at(8)));
        assert!(several_between(at(7), at(9)));
        // The whole store was read, now or for the first time.
        assert!(!several_between(None, at(9)) && !several_between(Some((other, 1)), at(9)));
    }
}
