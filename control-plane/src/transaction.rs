//! Database transactions whose end is awaited.
//!
//! A dropped sqlx transaction is rolled back later, by a task in the background. Until then it holds its locks, so that a
//! client that repeats its request at once finds them taken. Every transaction that writes therefore runs here: `clippy.toml`
//! forbids `Pool::begin` elsewhere.

use sqlx::{PgConnection, PgPool};

/// Runs `work` in a transaction and commits it. If `work` fails, the transaction is rolled back before the error is returned.
///
/// # Errors
/// The error of `work`, or of the database.
pub async fn transact<T, E: From<sqlx::Error>>(
    pool: &PgPool,
    work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
) -> Result<T, E> {
    #[expect(clippy::disallowed_methods, reason = "the end of this transaction is awaited below")]
    let mut transaction = pool.begin().await?;
    match work(&mut transaction).await {
        Ok(done) => {
            transaction.commit().await?;
            Ok(done)
        }
        Err(error) => {
            // If the connection is lost, PostgreSQL ends the transaction by itself. The first error tells more.
            if let Err(lost) = transaction.rollback().await {
                tracing::debug!(error = %lost, "a transaction could not be rolled back");
            }
            Err(error)
        }
    }
}
