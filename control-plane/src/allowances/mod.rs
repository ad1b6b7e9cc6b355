//! Allowances: what Envoys are granted of shared rate limits, quotas and credits. The rules are those of the crate [`limits`];
//! this module keeps its pools in PostgreSQL and answers the calls of Envoys.
//!
//! `queue` collects calls, and `batch` answers those that have come meanwhile in one transaction. [`limits::ledger::Pool::answer`] says what
//! is granted. `callers` notes which
//! Envoys are live, `terms` reads what the pools allow, and `rows` reads and writes their state. `metering` books usage in
//! the same rows. A transaction that has locked a pool waits for nothing but other pools.

mod batch;
mod callers;
mod queue;
mod rows;
mod terms;
mod tidy;

pub use queue::{Allowances, CallError};
pub(crate) use rows::{book, lock};
pub use tidy::tidy;

use limits::pool::PoolId;
use uuid::Uuid;

/// The columns that identify a pool, as arrays of a statement.
#[derive(Default)]
struct PoolColumns {
    kinds: Vec<i16>,
    subjects: Vec<Uuid>,
    tags: Vec<i64>,
}

impl PoolColumns {
    fn of(pools: impl IntoIterator<Item = PoolId>) -> Self {
        let mut columns = Self::default();
        for PoolId { kind, subject, tag } in pools {
            columns.kinds.push(kind.code().into());
            columns.subjects.push(Uuid::from_bytes(subject.0));
            columns.tags.push(tag.cast_signed());
        }
        columns
    }
}

/// A count as PostgreSQL stores it. It saturates: a forged count must not stop the calls that are answered with it.
fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
