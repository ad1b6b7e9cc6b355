//! The server: starts the control plane and shuts it down.

pub mod listener;
pub mod metric;
pub mod schema;
pub mod telemetry;
pub mod tls;

use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use contract::pepper::Pepper;
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{info, warn};

use self::listener::ServerOptions;
use self::schema::{open, prepare};
use self::tls::{Files, Tls};
use crate::allowances::Allowances;
use crate::api;
use crate::api::App;
use crate::api::rate_limit::CallerRateLimiter;
use crate::change::Writer;
use crate::config::{ADMIN_KEY, SYNC_KEY, Serve, database, given_key, given_pepper};
use crate::domain::{ADMIN, SYNC};
use crate::jobs;
use crate::metering::Ingest;
use crate::net::admission::{Admission, Limits, within_descriptors};
use crate::sync::Store;
use crate::sync::feed::Feed;
use crate::sync::registry::Registry;

pub type Failure = Box<dyn std::error::Error>;

/// How long running requests may take to end when the process shuts down.
const GRACE: Duration = Duration::from_secs(10);

/// Connections for allowances: one answers, one is spare.
const ALLOWANCE_CONNECTIONS: u32 = 2;

/// Connections of the feed: one listens, one reads, one asks who the database is.
const FEED_CONNECTIONS: u32 = 3;

/// Serves until SIGTERM or SIGINT.
pub async fn serve(settings: Serve) -> Result<(), Failure> {
    telemetry::start_log(settings.log_format, &settings.log_level)?;
    let metrics = telemetry::start_metrics()?;
    let admin_key = given_key(ADMIN_KEY)?;
    let sync_key = given_key(SYNC_KEY)?;
    let pepper = given_pepper()?;
    let options = database::options(&settings.database)?;
    let pool = open(&options, settings.database_connections);

    let tls = tls(&settings)?;
    let admission = Admission::new(limits(&settings));
    let listener =
        TcpListener::bind(settings.listen).await.map_err(|error| format!("--listen {}: {error}", settings.listen))?;
    let address = listener.local_addr()?;
    let (stop, stopping) = watch::channel(false);
    let (usage, committing) = Ingest::start(pool.clone());
    // Requests wait for allowances, so these never wait for a connection.
    let allowances = Allowances::start(open(&options, ALLOWANCE_CONNECTIONS));
    // The feed has connections of its own: a revocation reaches the filters however many requests wait for one.
    let (feed_pool, store) = (open(&options, FEED_CONNECTIONS), Store::new());
    let feed = Feed::new(feed_pool.clone(), store.clone());
    let app = app(&settings, &pool, (store, feed.clone()), (usage, allowances), pepper, stopping);
    let (pepper, waker) = (app.pepper.clone(), app.store.waker().clone());
    let mut feeding = tokio::spawn(async move {
        prepare(&options, &feed_pool, waker, pepper.as_ref(), [(admin_key, ADMIN), (sync_key, SYNC)]).await?;
        feed.run(settings.database_poll_interval).await;
        Ok::<_, String>(())
    });
    let filters = app.filters.clone();
    let mut background = start_background(&settings, &app, tls.clone());
    let router = api::router_with_read_timeout(app, Some(metrics), settings.read_timeout);
    if let Some(file) = &settings.address_file {
        write_address(file, address).map_err(|error| format!("--address-file {}: {error}", file.display()))?;
    }
    info!(%address, tls = tls.is_some(), client_certificates = settings.tls_client_ca_file.is_some(), "listening");
    let ended = shutdown_signal()?;
    let mut stopped = stop.subscribe();
    let ended = async move {
        ended.await;
        info!("shutting down: draining connections");
        let _ = stop.send(true);
    };
    tokio::select! {
        () = listener::serve(listener, router, ServerOptions { tls, read_timeout: settings.read_timeout, admission }, ended) => {}
        unprepared = &mut feeding => unprepared??,
        Some(broken) = background.join_next() => {
            let why = broken.err().map_or_else(|| "it returned".into(), |error| error.to_string());
            return Err(format!("a background task ended: {why}").into());
        }
        () = async {
            let _ = stopped.wait_for(|stopped| *stopped).await;
            tokio::time::sleep(GRACE).await;
        } => warn!(?GRACE, "some requests did not end in time"),
    }
    feeding.abort();
    finish(committing, background, &filters, &pool).await;
    info!("shut down");
    Ok(())
}

fn app(
    settings: &Serve,
    pool: &PgPool,
    (store, feed): (Store, Feed),
    (usage, allowances): (Ingest, Allowances),
    pepper: Option<Pepper>,
    stopping: watch::Receiver<bool>,
) -> App {
    App {
        pool: pool.clone(),
        writer: Writer::new(pool.clone(), store.waker().clone()),
        store,
        pepper,
        feed,
        usage,
        allowances,
        filters: Registry::bounded(settings.envoys_per_sync_key),
        cors_origins: settings.cors_origins.as_slice().into(),
        owner_keys_per_day: settings.owner_keys_per_day,
        rate_limiter: Arc::new(CallerRateLimiter::new(settings.api_rate_limit, settings.api_burst)),
        database: Arc::default(),
        long_poll: settings.long_poll_timeout,
        stopping,
    }
}

/// Starts the tasks that do not end by themselves: the end of one is a fault.
fn start_background(settings: &Serve, app: &App, tls: Option<Arc<Tls>>) -> JoinSet<()> {
    let mut background = JoinSet::new();
    background.spawn(app.filters.clone().run(app.pool.clone(), app.store.positions()));
    let jobs = jobs::Context::new(settings, app.pool.clone(), Arc::clone(&app.rate_limiter));
    background.spawn(jobs::run(jobs, app.store.clone()));
    if let Some(tls) = tls {
        background.spawn(tls.follow());
    }
    background
}

/// Commits queued usage and persists the status of filters, which are in memory only.
async fn finish(committing: JoinHandle<()>, mut background: JoinSet<()>, filters: &Registry, pool: &PgPool) {
    // The router and with it all senders of usage are gone: what is queued is committed.
    if tokio::time::timeout(GRACE, committing).await.is_err() {
        warn!("could not commit queued usage reports; filters will send them again");
    }
    background.shutdown().await;
    match tokio::time::timeout(GRACE, filters.write(pool)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) | Err(_) => warn!("could not persist the status of filters; filters will report it again"),
    }
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
    let (Some(certificate), Some(key)) = (settings.tls_cert_file.clone(), settings.tls_key_file.clone()) else {
        return Ok(None);
    };
    let files = Files { certificate, key, client_ca: settings.tls_client_ca_file.clone() };
    Ok(Some(Arc::new(Tls::load(files)?)))
}

/// Writes the file under another name and renames it, so that no reader sees half of it.
fn write_address(file: &Path, address: SocketAddr) -> std::io::Result<()> {
    let mut whole = file.as_os_str().to_owned();
    whole.push(".new");
    std::fs::File::create(&whole)?.write_all(address.to_string().as_bytes())?;
    std::fs::rename(&whole, file)
}

fn shutdown_signal() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
