//! Starts the control plane and stops it: settings come in; it returns once everything has ended.

use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use contract::key::Secret;
use contract::pepper::Pepper;
use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::admission::{Admission, Limits, within_descriptors};
use crate::bounds::Bounds;
use crate::callers::Callers;
use crate::config::{ADMIN_KEY, Database, OPERATOR, SYNC_KEY, Serve, given_key, given_pepper};
use crate::error::{ApiError, is_away};
use crate::key::domain::{ADMIN, Email, KeyName, SYNC, Scopes};
use crate::key::forget;
use crate::key::revoke::withdraw;
use crate::key::store as keys;
use crate::listen::{self, Manners};
use crate::pepper;
use crate::policies::Configured;
use crate::sync::feed::Feed;
use crate::sync::registry::Registry;
use crate::sync::{Store, filters};
use crate::tls::{Files, Tls};
use crate::usage::Ingest;
use crate::usage::retention::Retention;
use crate::{App, MIGRATIONS, chores, database, http, telemetry, usage};

type Failure = Box<dyn std::error::Error>;

/// How long requests that are under way may take to end.
const GRACE: Duration = Duration::from_secs(10);

/// For how long a connection to the database is taken to live since it last was used.
const TRUSTED: Duration = Duration::from_secs(1);

/// How long a request waits for a connection to the database.
const ACQUIRE: Duration = Duration::from_secs(3);

/// How long a change waits for another transaction, and how long one statement may take, before the request is told to
/// come back. As PostgreSQL reads them.
const LOCK: &str = "3s";
const STATEMENT: &str = "60s";

/// Connections of the feed: one listens, one reads, one asks who the database is.
const FEED_CONNECTIONS: u32 = 3;

/// How long to wait before the database is tried again.
const PAUSE: Duration = Duration::from_millis(500);

const HOUR: Duration = Duration::from_hours(1);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting, in one line.
pub async fn serve(settings: Serve) -> Result<(), Failure> {
    telemetry::start_log(settings.log_format, &settings.log)?;
    let metrics = telemetry::start_metrics()?;
    let admin_key = given_key(ADMIN_KEY)?;
    let sync_key = given_key(SYNC_KEY)?;
    let pepper = given_pepper()?;
    let policies = settings.policies.as_deref().map(Configured::read).transpose()?.unwrap_or_default();
    let options = database::options(&settings.database)?;
    let pool = open(&options, settings.database_connections);

    let tls = tls(&settings)?;
    let admission = Admission::new(limits(&settings));
    let patience = Duration::from_secs(settings.read_timeout_seconds);
    let listener =
        TcpListener::bind(settings.listen).await.map_err(|error| format!("--listen {}: {error}", settings.listen))?;
    let address = listener.local_addr()?;
    let (stop, stopping) = watch::channel(false);
    let (usage, committing) = Ingest::start(pool.clone());
    // The feed has connections of its own: a revocation reaches the filters however many requests wait for one.
    let (feed_pool, store) = (open(&options, FEED_CONNECTIONS), Store::new());
    let feed = Feed::new(feed_pool.clone(), store.clone());
    let app = App {
        pool: pool.clone(),
        store,
        pepper,
        feed: feed.clone(),
        usage,
        filters: Registry::bounded(settings.envoys_per_sync_key),
        policies: Arc::new(policies),
        bounds: Bounds {
            owner_keys_per_day: settings.owner_keys_per_day,
            envoys_per_sync_key: settings.envoys_per_sync_key,
        },
        callers: Arc::new(Callers::new(settings.api_rate_limit, settings.api_burst)),
        database: Arc::default(),
        long_poll: Duration::from_secs(settings.long_poll_seconds),
        stopping,
    };
    let pepper = app.pepper.clone();
    let mut feeding = tokio::spawn(async move {
        prepare(&options, &feed_pool, pepper.as_ref(), [(admin_key, ADMIN), (sync_key, SYNC)]).await?;
        feed.run(Duration::from_millis(settings.poll_interval_ms)).await;
        Ok::<_, String>(())
    });
    let retention = Retention {
        hourly_days: settings.usage_hourly_days,
        daily_days: settings.usage_daily_days,
        event_days: settings.usage_event_days,
    };
    let (filters, store, callers) = (app.filters.clone(), app.store.clone(), Arc::clone(&app.callers));
    let every = Duration::from_secs(settings.usage_event_seconds);
    // None of it ends by itself: that one has panicked must not go unnoticed for ever.
    let mut background = JoinSet::new();
    background.spawn(filters.clone().run(pool.clone(), store.clone()));
    background.spawn(usage::events::run(pool.clone(), store.clone(), every));
    let forgotten = Forgotten {
        revoked_days: settings.revoked_retention_days,
        ended_key_days: settings.ended_key_days,
        audit_days: settings.audit_days,
    };
    background.spawn(tidy(pool.clone(), store.clone(), callers, forgotten, retention));
    background.spawn(chores::run(pool.clone(), store, settings.ledger_detail_days));

    if let Some(tls) = tls.clone() {
        background.spawn(tls.follow());
    }
    let router = http::patient_router(app, Some(metrics), patience);
    if let Some(file) = &settings.address_file {
        write_address(file, address).map_err(|error| format!("--address-file {}: {error}", file.display()))?;
    }
    info!(%address, tls = tls.is_some(), client_certificates = settings.tls_client_ca.is_some(), "listening");
    let ended = told_to_end()?;
    let mut told = stop.subscribe();
    let ended = async move {
        ended.await;
        info!("ending: no new requests, held polls end now");
        let _ = stop.send(true);
    };
    tokio::select! {
        () = listen::serve(listener, router, Manners { tls, patience, admission }, ended) => {}
        unprepared = &mut feeding => unprepared??,
        Some(broken) = background.join_next() => {
            let why = broken.err().map_or_else(|| "it returned".into(), |error| error.to_string());
            return Err(format!("a task in the background ended: {why}").into());
        }
        () = async {
            let _ = told.wait_for(|told| *told).await;
            tokio::time::sleep(GRACE).await;
        } => warn!("some requests did not end in time"),
    }
    feeding.abort();
    // The server and with it the ways in for usage are gone: what waits is committed.
    if tokio::time::timeout(GRACE, committing).await.is_err() {
        warn!("usage that waited could not be committed; the filters will send it again");
    }
    background.shutdown().await;
    match tokio::time::timeout(GRACE, filters.write(&pool)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) | Err(_) => warn!("what Envoys said last could not be written; they will say it again"),
    }
    info!("ended");
    Ok(())
}

/// How many connections there may be, as far as file descriptors reach.
fn limits(settings: &Serve) -> Limits {
    let wanted = usize::try_from(settings.max_connections).unwrap_or(usize::MAX);
    let fits = within_descriptors(wanted, settings.database_connections.saturating_add(FEED_CONNECTIONS));
    if fits < wanted {
        warn!(wanted, fits, "--max-connections is more than the limit of open files allows (ulimit -n)");
    }
    let count = |setting: u32| usize::try_from(setting).unwrap_or(usize::MAX);
    let reserved = settings.connections_reserved_for_sync.map(count);
    let limits = Limits::new(fits, count(settings.max_connections_per_address), reserved);
    info!(total = limits.total, by_address = limits.by_address, reserved = limits.reserved, "bounds of connections");
    limits
}

fn tls(settings: &Serve) -> Result<Option<Arc<Tls>>, String> {
    let (Some(certificate), Some(key)) = (settings.tls_cert.clone(), settings.tls_key.clone()) else { return Ok(None) };
    let files = Files { certificate, key, client_ca: settings.tls_client_ca.clone() };
    Ok(Some(Arc::new(Tls::load(files)?)))
}

/// Connects to the database and brings its schema up to date.
///
/// # Errors
/// One line that names the setting.
pub async fn connect(database: &Database) -> Result<PgPool, Failure> {
    let options = database::options(database)?;
    schema(&options).await.map_err(|fault| fault.to_string())?;
    Ok(open(&options, 2))
}

/// Connections are made when they are needed, so that the process runs, and says so, while the database is away.
fn open(options: &PgConnectOptions, connections: u32) -> PgPool {
    // Statements are short: to compile one takes longer than to run it.
    let options = options.clone().options([("lock_timeout", LOCK), ("statement_timeout", STATEMENT), ("jit", "off")]);
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
    #[error("the schema of the database: {0}")]
    Schema(#[from] MigrateError),
    #[error("{0}")]
    Key(ApiError),
    #[error("{0}")]
    Pepper(String),
    #[error("the database: {0}")]
    Database(sqlx::Error),
}

impl Unprepared {
    /// Whether waiting helps.
    fn passes(&self) -> bool {
        match self {
            Self::Connection(error)
            | Self::Database(error)
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
async fn prepare(
    options: &PgConnectOptions,
    pool: &PgPool,
    pepper: Option<&Pepper>,
    given: [(Option<Secret>, &'static str); 2],
) -> Result<(), String> {
    loop {
        let prepared = async {
            schema(options).await?;
            let checked = pepper::check(pool, pepper).await;
            checked.map_err(Unprepared::Database)?.map_err(Unprepared::Pepper)?;
            for (key, scope) in &given {
                enter(pool, key.as_ref(), scope).await.map_err(Unprepared::Key)?;
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

async fn enter(pool: &PgPool, key: Option<&Secret>, scope: &str) -> Result<(), ApiError> {
    let Some(key) = key else { return Ok(()) };
    let name = KeyName::parse("name", &format!("bootstrap {scope}"))?;
    let scopes = Scopes::parse(vec![scope.to_owned()])?;
    if keys::insert_given(pool, key, &name, &scopes, &Email::parse(OPERATOR)?).await? {
        info!(scope, "the key given in the environment is stored");
    }
    Ok(())
}

/// Work that is done now and then: forgetting callers that have gone and answers that are a day old, letting filters forget
/// keys and secrets that ended long ago, rolling up usage, and forgetting Envoys that have gone.
async fn tidy(pool: PgPool, store: Store, callers: Arc<Callers>, forgotten: Forgotten, retention: Retention) {
    let mut often = tokio::time::interval(Duration::from_secs(60));
    let mut seldom = tokio::time::interval(HOUR);
    loop {
        tokio::select! {
            _ = often.tick() => callers.tidy(),
            // Not before the schema is there.
            _ = seldom.tick(), if store.position().is_some() => {
                if let Err(error) = http::once::tidy(&pool).await {
                    warn!(%error, "old answers could not be forgotten; the next hour will do");
                }
                forget_keys(&pool, forgotten.revoked_days).await;
                purge(&pool, forgotten).await;
                usage::retention::tidy(&pool, retention).await;
                if let Err(error) = filters::forget(&pool).await {
                    warn!(%error, "Envoys that have gone could not be forgotten; the next hour will do");
                }
            }
        }
    }
}

/// When keys and entries of the audit trail go, in days.
#[derive(Clone, Copy, Debug)]
struct Forgotten {
    /// Filters forget a revoked key.
    revoked_days: i32,
    /// The row of a key that filters have forgotten is deleted; 0: never.
    ended_key_days: i32,
    /// An entry of the audit trail is deleted; 0: never.
    audit_days: i32,
}

async fn purge(pool: &PgPool, forgotten: Forgotten) {
    let purged = async {
        let Forgotten { ended_key_days, audit_days, .. } = forgotten;
        let keys = if ended_key_days > 0 { forget::purge(pool, ended_key_days).await? } else { 0 };
        let entries = if audit_days > 0 { forget::purge_audit(pool, audit_days).await? } else { 0 };
        Ok::<_, sqlx::Error>((keys, entries))
    };
    match purged.await {
        Ok((0, 0)) => {}
        Ok((keys, entries)) => {
            info!(keys, entries, "keys that ended long ago and old entries of the audit trail were deleted");
        }
        Err(error) => {
            warn!(%error, "old keys and entries of the audit trail could not be deleted; the next hour will do");
        }
    }
}

async fn forget_keys(pool: &PgPool, retention_days: i32) {
    loop {
        match withdraw(pool, retention_days).await {
            Ok(0) => return,
            Ok(keys) => info!(keys, "filters forget keys and secrets that ended long ago"),
            Err(error) => {
                warn!(%error, "revoked keys could not be withdrawn; the next hour will do");
                return;
            }
        }
    }
}

/// Writes the address in one piece, so that whoever waits for the file never reads half of it.
fn write_address(file: &Path, address: SocketAddr) -> std::io::Result<()> {
    let mut whole = file.as_os_str().to_owned();
    whole.push(".new");
    std::fs::File::create(&whole)?.write_all(address.to_string().as_bytes())?;
    std::fs::rename(&whole, file)
}

fn told_to_end() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
