//! The control plane. It owns the keys in PostgreSQL, the REST API that manages them, the sync to the filters and the usage that
//! they report.

#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "no other crate is built on this one")]

pub mod config;

pub mod api;
pub mod net;
pub mod server;

pub mod domain;
pub mod error;

pub mod audit;
pub mod change;
pub mod job_lock;

pub mod allowances;
pub mod credits;
pub mod definitions;
pub mod keys;
pub mod quota;
pub mod users;

pub mod explain;
pub mod metering;
pub mod sync;

pub mod jobs;

pub use api::App;

/// The schema, part of the binary.
pub static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();
