//! Starts the control plane and stops it: settings come in; it returns once everything has ended.

use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::ConnectInfo;
use contract::key::Secret;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::auth::Callers;
use crate::config::{ADMIN_KEY, OPERATOR, SYNC_KEY, Serve, given_key};
use crate::key::domain::{Email, KeyName, Scopes};
use crate::key::store as keys;
use crate::sync::{Store, feed};
use crate::usage::Ingest;
use crate::{App, MIGRATIONS, http, telemetry};

type Failure = Box<dyn std::error::Error>;

/// How long requests that are under way may take to end.
const GRACE: Duration = Duration::from_secs(10);

/// How long a request waits for a connection to the database.
const ACQUIRE: Duration = Duration::from_secs(3);

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
    let pool = connect(&settings.database.database_url, settings.database_connections).await?;
    MIGRATIONS.run(&pool).await.map_err(|error| format!("the schema of the database: {error}"))?;
    store_given(&pool, admin_key.as_ref(), "bootstrap admin", "admin", ADMIN_KEY).await?;
    store_given(&pool, sync_key.as_ref(), "bootstrap sync", "sync", SYNC_KEY).await?;

    let listener =
        TcpListener::bind(settings.listen).await.map_err(|error| format!("--listen {}: {error}", settings.listen))?;
    let address = listener.local_addr()?;
    let (stop, stopping) = watch::channel(false);
    let (usage, committing) = Ingest::start(pool.clone());
    let app = App {
        pool: pool.clone(),
        store: Store::new(),
        usage,
        callers: Arc::new(Callers::new(settings.api_rate_limit, settings.api_burst)),
        long_poll: Duration::from_secs(settings.long_poll_seconds),
        stopping,
    };
    let feeding =
        tokio::spawn(feed::run(pool.clone(), app.store.clone(), Duration::from_millis(settings.poll_interval_ms)));
    let tidying = tokio::spawn(tidy(pool, Arc::clone(&app.callers), settings.revoked_retention_days));

    let service = http::router(app, Some(metrics)).into_make_service_with_connect_info::<SocketAddr>();
    if let Some(file) = &settings.address_file {
        write_address(file, address).map_err(|error| format!("--address-file {}: {error}", file.display()))?;
    }
    info!(%address, "listening");
    let ended = told_to_end()?;
    let mut told = stop.subscribe();
    let server = axum::serve(listener, service).with_graceful_shutdown(async move {
        ended.await;
        info!("ending: no new requests, held polls end now");
        let _ = stop.send(true);
    });
    tokio::select! {
        served = server.into_future() => served?,
        () = async {
            let _ = told.wait_for(|told| *told).await;
            tokio::time::sleep(GRACE).await;
        } => warn!("some requests did not end in time"),
    }
    feeding.abort();
    tidying.abort();
    // The server and with it the ways in for usage are gone: what waits is committed.
    if tokio::time::timeout(GRACE, committing).await.is_err() {
        warn!("usage that waited could not be committed; the filters will send it again");
    }
    info!("ended");
    Ok(())
}

/// Connects to the database.
///
/// # Errors
/// One line that names the setting.
pub async fn connect(url: &str, connections: u32) -> Result<PgPool, Failure> {
    let options: PgConnectOptions = url.parse().map_err(|error| format!("DATABASE_URL: {error}"))?;
    let options = options.application_name("portcullis");
    let pool = PgPoolOptions::new().max_connections(connections).acquire_timeout(ACQUIRE).connect_with(options).await;
    Ok(pool.map_err(|error| format!("DATABASE_URL: cannot connect to the database: {error}"))?)
}

async fn store_given(
    pool: &PgPool,
    key: Option<&Secret>,
    name: &str,
    scope: &str,
    variable: &str,
) -> Result<(), Failure> {
    let Some(key) = key else { return Ok(()) };
    let (name, scopes) = (KeyName::parse("name", name)?, Scopes::parse(vec![scope.to_owned()])?);
    if keys::insert_given(pool, key, &name, &scopes, &Email::parse(OPERATOR)?).await? {
        info!(variable, scope, "the key given in the environment is stored");
    }
    Ok(())
}

/// Work that is done now and then: forgetting callers that have gone, and letting filters forget keys that were revoked
/// long ago.
async fn tidy(pool: PgPool, callers: Arc<Callers>, retention_days: i32) {
    let mut often = tokio::time::interval(Duration::from_secs(60));
    let mut seldom = tokio::time::interval(HOUR);
    loop {
        tokio::select! {
            _ = often.tick() => callers.tidy(),
            _ = seldom.tick() => match keys::withdraw(&pool, retention_days).await {
                Ok(0) => {}
                Ok(keys) => info!(keys, "filters forget keys that were revoked long ago"),
                Err(error) => warn!(%error, "revoked keys could not be withdrawn; the next hour will do"),
            },
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

/// The peer of a request, where the server knows it.
pub type Peer = ConnectInfo<SocketAddr>;
