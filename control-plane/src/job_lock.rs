//! Advisory locks, so that one replica at a time runs a job.

use sqlx::PgConnection;

/// The lock of a job. Its number names it in PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
pub enum JobLock {
    UsageEvents = 0x706f_7274_0000_0001,
    UsageRetention = 0x706f_7274_0000_0002,
    LedgerRollUp = 0x706f_7274_0000_0003,
}

impl JobLock {
    /// Takes the lock until the transaction ends. Returns whether it was free.
    pub async fn try_take(self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        let alone = sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock($1) as "alone!""#, self as i64);
        alone.fetch_one(connection).await
    }
}
