//! The control plane: it owns the keys in PostgreSQL, the REST API that manages them, the sync to the filters and the
//! usage that they report.
//!
//! Reading order: [`config`] is what the operator chose, [`secret_setting`]s and the [`database`] included; [`http`] has
//! all routes on one page and a file for each resource; [`auth`] says who calls and [`callers`] how often, [`bounds`] how
//! much one owner may make, [`condition`] what they take for granted, [`audit`] what they did; [`key`] is the domain and its
//! SQL, [`definition`] roles and plans, [`user`] the owners of keys; [`sync`] brings keys to the filters; [`usage`] brings
//! counts back, books what they draw from [`quota`]s and [`credits`], and leases Envoys their part; [`policies`] are those of
//! Envoys' routes, and [`explain`] is why requests are decided as they are; [`error`] is what goes wrong; [`chores`] are done
//! without being asked for, [`statistics`] among them; [`metric`] lists the metrics; [`pepper`] is that of imported
//! keys; [`serve`] starts and stops it all; it [`listen`]s, with [`tls`] or without, for
//! [`connection`]s that lose nothing; [`admission`] bounds connections, [`delivery`] ends responses that are not taken,
//! [`wait_budget`] is how long a client may keep it waiting, and [`transaction`] awaits the end of each transaction.

#![forbid(unsafe_code)]

pub mod admission;
pub mod audit;
pub mod auth;
pub mod bounds;
pub mod callers;
pub mod chores;
pub mod condition;
pub mod config;
pub mod connection;
pub mod credits;
pub mod database;
pub mod definition;
pub mod delivery;
pub mod error;
pub mod explain;
pub mod http;
pub mod key;
pub mod listen;
pub mod metric;
pub mod pepper;
pub mod policies;
pub mod quota;
pub mod secret_setting;
pub mod serve;
pub mod statistics;
pub mod sync;
pub mod telemetry;
pub mod tls;
pub mod transaction;
pub mod usage;
pub mod user;
pub mod wait_budget;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

/// What every handler has.
#[derive(Clone)]
pub struct App {
    /// The database.
    pub pool: sqlx::PgPool,
    /// Keys on their way to the filters.
    pub store: sync::Store,
    /// What imported keys are stored under, beside the plain hash.
    pub pepper: Option<contract::pepper::Pepper>,
    /// What brings them there, for polls that cannot wait for it.
    pub feed: sync::feed::Feed,
    /// The way in for usage.
    pub usage: usage::Ingest,
    /// Which Envoys sync, and how far they are.
    pub filters: sync::registry::Registry,
    /// What Envoys' routes ask for, as far as the operator told, for `explain`.
    pub policies: Arc<policies::Configured>,
    /// What one owner and one sync key may make.
    pub bounds: bounds::Bounds,
    /// How often callers may call.
    pub callers: Arc<callers::Callers>,
    /// Whether the database answers.
    pub database: Arc<http::health::DatabaseCheck>,
    /// How long a poll is held without news.
    pub long_poll: Duration,
    /// Becomes true when the process is told to end: held polls end then.
    pub stopping: watch::Receiver<bool>,
}

/// The schema, part of the binary.
pub static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();
