//! Usage on its way into the database: reports come in from filters or from log lines, counts are added to the tables,
//! once for each number of each reporter.

mod apply;
pub mod import;
mod ingest;

pub use apply::{Applied, Submission, apply};
pub use ingest::{Ingest, IngestError};
