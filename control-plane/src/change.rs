//! The one way to write. A [`Change`] is a transaction that records in the audit trail what it changed, and that wakes the
//! feed once it is committed.
//!
//! Each transaction has ended before its function returns, on errors too. A dropped sqlx transaction is rolled back later, by
//! a task in the background. Until then it holds its locks, so a client that repeats its request at once finds them taken.
//! `clippy.toml` therefore forbids `Pool::begin` elsewhere.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use serde_json::Value;
use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::audit::{self, Actor, AuditEvent};

/// Wakes the feed of this process after a commit, so that it need not wait for the notification of PostgreSQL.
#[derive(Clone, Debug, Default)]
pub struct FeedWaker(Arc<Notify>);

impl FeedWaker {
    /// Asks the feed to read from the database now.
    pub fn wake(&self) {
        self.0.notify_one();
    }

    /// Waits for the next [`FeedWaker::wake`], or returns at once if there was one since the last wait.
    pub async fn woken(&self) {
        self.0.notified().await;
    }
}

/// Begins and commits changes.
#[derive(Clone, Debug)]
pub struct Writer {
    pool: PgPool,
    feed: FeedWaker,
}

impl Writer {
    pub const fn new(pool: PgPool, feed: FeedWaker) -> Self {
        Self { pool, feed }
    }

    /// Runs `work` in a transaction and commits it. If `work` fails, the transaction is rolled back before the error is
    /// returned. A change that recorded nothing in the audit trail has changed nothing, and does not wake the feed.
    pub async fn change<T, E: From<sqlx::Error>>(
        &self,
        actor: &Actor,
        work: impl AsyncFnOnce(&mut Change) -> Result<T, E>,
    ) -> Result<T, E> {
        #[expect(clippy::disallowed_methods, reason = "the end of this transaction is awaited below")]
        let transaction = self.pool.begin().await?;
        let mut change = Change { transaction, actor: actor.clone(), is_recorded: false };
        let done = work(&mut change).await;
        let Change { transaction, is_recorded, .. } = change;
        let done = end(transaction, done).await?;
        if is_recorded {
            self.feed.wake();
        }
        Ok(done)
    }
}

/// A transaction of one actor.
#[derive(Debug)]
pub struct Change {
    transaction: Transaction<'static, Postgres>,
    actor: Actor,
    is_recorded: bool,
}

impl Change {
    pub const fn actor(&self) -> &Actor {
        &self.actor
    }

    /// Records an event in the audit trail.
    pub async fn record(&mut self, event: AuditEvent<'_>) -> Result<(), sqlx::Error> {
        self.is_recorded = true;
        audit::record(&mut self.transaction, &self.actor, event).await
    }

    /// Records the same event for each of several keys.
    pub async fn record_each(
        &mut self,
        action: &'static str,
        keys: &[Uuid],
        detail: &Value,
    ) -> Result<(), sqlx::Error> {
        self.is_recorded = true;
        audit::record_each(&mut self.transaction, &self.actor, action, keys, detail).await
    }
}

impl Deref for Change {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.transaction
    }
}

impl DerefMut for Change {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.transaction
    }
}

/// Runs `work` in a transaction that is not part of the audit trail, and commits it. If `work` fails, the transaction is
/// rolled back before the error is returned.
pub async fn transact<T, E: From<sqlx::Error>>(
    pool: &PgPool,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
) -> Result<T, E> {
    #[expect(clippy::disallowed_methods, reason = "the end of this transaction is awaited below")]
    let mut transaction = pool.begin().await?;
    let done = work(&mut transaction).await;
    end(transaction, done).await
}

async fn end<T, E: From<sqlx::Error>>(transaction: Transaction<'static, Postgres>, done: Result<T, E>) -> Result<T, E> {
    match done {
        Ok(done) => {
            transaction.commit().await?;
            Ok(done)
        }
        Err(error) => {
            // If the connection is lost, PostgreSQL ends the transaction. The first error says more.
            if let Err(lost) = transaction.rollback().await {
                tracing::debug!(error = %lost, "could not roll a transaction back");
            }
            Err(error)
        }
    }
}
