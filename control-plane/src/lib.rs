//! The control plane. It owns the keys in PostgreSQL, the REST API that manages them, the sync to the filters and the usage that
//! they report.
//!
//! [`api`] has the routes: a call authenticates, parses its body to types of [`domain`], and runs a [`change`], the transaction
//! in which [`keys`], [`users`], [`definitions`], [`credits`] and [`quota`] write and [`audit`] records. A commit wakes
//! [`sync`], which reads the change into a mirror of all keys; filters fetch it by held polls (`api::sync`). [`allowances`]
//! answers filters that ask for tokens of shared limits, and [`metering`] writes the counts that they report. [`jobs`] run in
//! the background, and [`server`] starts it all.

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
