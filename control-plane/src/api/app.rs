//! The state that every handler shares.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderValue;
use contract::pepper::Pepper;
use sqlx::PgPool;
use tokio::sync::watch;

use super::health::DatabaseCheck;
use super::rate_limit::CallerRateLimiter;
use crate::allowances::Allowances;
use crate::change::Writer;
use crate::metering::Ingest;
use crate::sync::Store;
use crate::sync::feed::Feed;
use crate::sync::registry::Registry;

#[derive(Clone)]
pub struct App {
    /// The database, for what only reads.
    pub pool: PgPool,
    /// The way to write.
    pub writer: Writer,
    /// The mirror of the keys, which filters are served from.
    pub store: Store,
    /// The feed of the mirror, for polls that cannot wait for it.
    pub feed: Feed,
    /// The pepper of imported keys.
    pub pepper: Option<Pepper>,
    /// Takes usage reports.
    pub usage: Ingest,
    /// Grants allowances to Envoys.
    pub allowances: Allowances,
    /// Envoys that sync, and how far each is.
    pub filters: Registry,
    /// Origins whose pages may call the REST API.
    pub cors_origins: Arc<[HeaderValue]>,
    /// Keys that the keys of one owner may make, and rotations, in 24 hours.
    pub owner_keys_per_day: u32,
    pub rate_limiter: Arc<CallerRateLimiter>,
    pub database: Arc<DatabaseCheck>,
    /// How long a poll is held without news.
    pub long_poll: Duration,
    /// Becomes true when the process shuts down. Held polls end then.
    pub stopping: watch::Receiver<bool>,
}
