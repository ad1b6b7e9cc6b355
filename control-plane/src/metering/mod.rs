//! Usage. `ingest` takes reports from filters and [`mod@import`] takes them from logs; `apply` writes
//! the counts of each report into the tables of usage, once, and `booking` books quotas and credits with it. [`query`] and [`hourly`] read sums of
//! [`spans`] of time, [`events`] passes usage to other systems, and [`retention`] rolls up and deletes old usage.

mod apply;
mod booking;
pub mod events;
pub mod hourly;
pub mod import;
mod ingest;
mod log_keys;
pub mod outcome;
pub mod query;
pub mod retention;
pub mod spans;

pub use apply::{Applied, NEW_REPORTERS, Submission, apply};
pub use ingest::{Ingest, IngestError};
