//! Connections to the database, and its schema, which is brought up to date before anything else reads it.

use std::time::Duration;

use contract::key::Secret;
use contract::pepper::Pepper;
use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};
use tracing::{info, warn};

use super::Failure;
use crate::MIGRATIONS;
use crate::change::{FeedWaker, Writer};
use crate::config::{Database, OPERATOR, database};
use crate::domain::{Email, KeyName, Scopes};
use crate::error::{ApiError, is_away};
use crate::keys::create::insert_given;
use crate::keys::pepper::{self, PepperError};

/// How long a connection to the database is taken to live since it last was used.
const TRUSTED: Duration = Duration::from_secs(1);

/// How long a request waits for a connection to the database.
const ACQUIRE: Duration = Duration::from_secs(3);

/// How long a change waits for another transaction, and how long one statement may take, before the request is told to
/// come back. As PostgreSQL reads them.
const LOCK: &str = "3s";
const STATEMENT: &str = "60s";

/// PostgreSQL ends a transaction in which nothing was asked for this long. Otherwise a replica that hangs would keep its locks,
/// and limits would be unavailable on all replicas.
const IDLE: &str = "2s";

/// How long to wait before the database is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// Connects to the database and brings its schema up to date.
pub async fn connect(database: &Database) -> Result<PgPool, Failure> {
    let options = database::options(database)?;
    schema(&options).await.map_err(|fault| fault.to_string())?;
    Ok(open(&options, 2))
}

/// Connections are opened when they are needed, so that the process starts without the database.
pub(super) fn open(options: &PgConnectOptions, connections: u32) -> PgPool {
    // Statements are short: to compile one takes longer than to run it.
    let options = options.clone().options([
        ("lock_timeout", LOCK),
        ("statement_timeout", STATEMENT),
        ("idle_in_transaction_session_timeout", IDLE),
        ("jit", "off"),
    ]);
    let pool = PgPoolOptions::new().max_connections(connections).acquire_timeout(ACQUIRE);
    // To ask each time costs a call to the database as long as many a statement.
    let pool = pool.test_before_acquire(false).before_acquire(|connection, meta| {
        Box::pin(async move {
            if meta.idle_for > TRUSTED {
                connection.ping().await?;
            }
            Ok(true)
        })
    });
    pool.connect_lazy_with(options)
}

/// What keeps the database from being prepared.
#[derive(Debug, thiserror::Error)]
enum Unprepared {
    #[error("DATABASE_URL: cannot connect to the database: {0}")]
    Connection(sqlx::Error),
    #[error("database schema: {0}")]
    Schema(#[from] MigrateError),
    #[error("{0}")]
    Key(ApiError),
    #[error(transparent)]
    Pepper(#[from] PepperError),
}

impl Unprepared {
    /// Whether waiting helps.
    fn passes(&self) -> bool {
        match self {
            Self::Connection(error)
            | Self::Pepper(PepperError::Database(error))
            | Self::Schema(MigrateError::Execute(error))
            | Self::Key(ApiError::Database(error)) => is_away(error),
            Self::Schema(_) | Self::Key(_) | Self::Pepper(_) => false,
        }
    }
}

async fn schema(options: &PgConnectOptions) -> Result<(), Unprepared> {
    // A pool would only say that it timed out.
    let connection = PgConnection::connect_with(options).await.map_err(Unprepared::Connection)?;
    connection.close().await.map_err(Unprepared::Connection)?;
    // Migrations may take as long as they need.
    let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options.clone());
    MIGRATIONS.run(&pool).await?;
    pool.close().await;
    Ok(())
}

/// Brings the schema up to date and enters the keys that were given, as soon as the database answers.
pub(super) async fn prepare(
    options: &PgConnectOptions,
    pool: &PgPool,
    feed: FeedWaker,
    pepper: Option<&Pepper>,
    given: [(Option<Secret>, &'static str); 2],
) -> Result<(), String> {
    let writer = Writer::new(pool.clone(), feed);
    loop {
        let prepared = async {
            schema(options).await?;
            pepper::check(pool, pepper).await?;
            for (key, scope) in &given {
                enter(&writer, key.as_ref(), scope).await.map_err(Unprepared::Key)?;
            }
            Ok::<_, Unprepared>(())
        };
        match prepared.await {
            Ok(()) => return Ok(()),
            Err(fault) if fault.passes() => warn!(%fault, "waiting for the database"),
            Err(fault) => return Err(fault.to_string()),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn enter(writer: &Writer, key: Option<&Secret>, scope: &str) -> Result<(), ApiError> {
    let Some(key) = key else { return Ok(()) };
    let name = KeyName::parse("name", &format!("bootstrap {scope}"))?;
    let scopes = Scopes::parse(vec![scope.to_owned()])?;
    if insert_given(writer, key, &name, &scopes, &Email::parse(OPERATOR)?).await? {
        info!(scope, "stored the key from the environment");
    }
    Ok(())
}
