//! Usage on its way into the database: reports come in from filters or from log lines, counts are added to the tables,
//! once for each number of each reporter. What they draw from quotas and credits is booked with them, and the answers say what
//! each Envoy is leased. And out of it: as sums that people ask for, and as events for other systems.

mod apply;
mod draw;
pub mod events;
pub mod hourly;
pub mod import;
mod ingest;
pub mod lease;
mod log_keys;
pub mod outcome;
pub mod query;
pub mod retention;

pub use apply::{Applied, NEW_REPORTERS, Submission, apply};
pub use ingest::{Ingest, IngestError};
