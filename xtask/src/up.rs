//! `cargo xtask up`: runs the whole stack in the foreground until Ctrl-C or SIGTERM. If one of its
//! processes ends, the command fails with the end of its log.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use contract::key::Secret;
use portcullis_harness::control_plane::{self, ControlPlane, fresh_key};
use portcullis_harness::demo::DemoApi;
use portcullis_harness::envoy::{self, Envoy};
use portcullis_harness::envoy_config::Replacements;
use portcullis_harness::log::Log;
use portcullis_harness::output::{progress, say};
use portcullis_harness::postgres::Postgres;
use portcullis_harness::process::Signal;
use portcullis_harness::service::Service;
use portcullis_harness::{compile, paths, shell, stack};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};

use crate::observe::{self, Observers, Targets};

/// Ports and the service to protect.
#[derive(Args)]
pub(crate) struct Options {
    /// URL of a service to protect, such as http://localhost:3000, in place of the demo API. Every path then needs a key.
    #[arg(long, value_name = "URL", value_parser = Service::parse)]
    upstream: Option<Service>,
    /// PEM file with the authorities that the certificate of an https:// service is checked against [default: those that
    /// this machine trusts]
    #[arg(long, value_name = "FILE", requires = "upstream")]
    upstream_ca: Option<PathBuf>,
    /// Port of Envoy's listener, in front of the API.
    #[arg(long, value_name = "PORT", default_value_t = 10_000)]
    envoy_port: u16,
    /// Port of the control plane's REST API.
    #[arg(long, value_name = "PORT", default_value_t = 8_081)]
    control_plane_port: u16,
    /// Port of Envoy's admin interface.
    #[arg(long, value_name = "PORT", default_value_t = 9_901)]
    envoy_admin_port: u16,
    /// Worker threads of Envoy.
    #[arg(long, value_name = "WORKERS", default_value_t = 2)]
    concurrency: usize,
    /// Start without what earlier runs left in target/up: users, keys, usage, the admin key.
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    observe: observe::ObserveOptions,
}

/// How often the processes are checked.
const WATCH: Duration = Duration::from_millis(500);

/// Sends usage events each second, so that a user who tries them does not wait a minute.
const EVENTS: [&str; 2] = ["--usage-event-interval", "1s"];

/// Time limit for a connection to the service.
const REACH: Duration = Duration::from_secs(3);

/// Starts everything and runs until SIGINT or SIGTERM.
pub(crate) async fn up(options: &Options) -> Result<()> {
    let service = options.check()?;
    let programs = options.observe.programs()?;
    // Before the signal handlers: a signal must end a running cargo.
    if std::env::var_os("PORTCULLIS_WASM").is_none() {
        compile::filter()?;
    }
    if std::env::var_os("CONTROL_PLANE_BIN").is_none() {
        compile::control_plane()?;
    }

    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let up = tokio::select! {
        up = Up::start(options, service, programs) => up?,
        // Processes that were started end when dropped.
        _ = interrupted.recv() => return Ok(()),
        _ = terminated.recv() => return Ok(()),
    };
    up.introduce();
    let watched = tokio::select! {
        died = up.watch() => Err(died),
        _ = interrupted.recv() => Ok(()),
        _ = terminated.recv() => Ok(()),
    };
    progress("stopping");
    up.stop().await;
    watched
}

impl Options {
    /// Fails early on ports in use and invalid services. Returns the service to protect.
    fn check(&self) -> Result<Option<Service>> {
        let mut ports = vec![
            ("--envoy-port", self.envoy_port),
            ("--control-plane-port", self.control_plane_port),
            ("--envoy-admin-port", self.envoy_admin_port),
        ];
        ports.extend(self.observe.ports());
        for &(flag, port) in &ports {
            TcpListener::bind(local(port))
                .with_context(|| format!("port {port} is in use; choose another one with {flag}"))?;
        }
        let Some(service) = self.upstream.clone() else { return Ok(None) };
        let here = ["localhost", "127.0.0.1", "::1"].contains(&service.host().as_str());
        if let Some((flag, port)) = ports.into_iter().find(|(_, port)| here && *port == service.port()) {
            bail!("--upstream: port {port} is {flag} of this stack; choose another one with {flag}");
        }
        let service = service.trusting(self.upstream_ca.clone()).map_err(|why| anyhow!("--upstream-ca: {why}"))?;
        Ok(Some(service))
    }
}

const fn local(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// The running stack. Fields are dropped in their order.
struct Up {
    /// Only with `--observe`.
    observers: Option<Observers>,
    envoy: Envoy,
    /// None in front of the user's own service.
    demo: Option<DemoApi>,
    service: Option<Service>,
    control_plane: ControlPlane,
    postgres: Postgres,
    home: PathBuf,
    _alone: File,
}

impl Up {
    async fn start(options: &Options, service: Option<Service>, programs: Option<observe::Programs>) -> Result<Self> {
        let home = paths::target().join("up");
        std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let alone = File::create(paths::target().join("up.lock"))?;
        if alone.try_lock().is_err() {
            bail!("another `cargo xtask up` uses {}", home.display());
        }
        if options.fresh {
            wipe(&home)?;
        }
        let log = |name: &str| Log::create(&home.join(name));

        progress("starting PostgreSQL");
        let data = paths::reachable(&home.join("postgres"))?.join("data");
        let postgres = Postgres::kept(&data, log("postgres.log")?, &progress).await?;
        let database = postgres.database("portcullis").await?;

        progress("starting the control plane");
        let sync_key = kept_key(&home.join("sync.key"))?;
        let settings = control_plane::Settings {
            listen: local(options.control_plane_port),
            admin_key: kept_key(&home.join("admin.key"))?,
            sync_key: sync_key.clone(),
            arguments: EVENTS.map(ToOwned::to_owned).to_vec(),
            ..control_plane::Settings::generous(&database)?
        };
        let control_plane = ControlPlane::start(settings, &home, log("control-plane.log")?).await?;

        progress("starting Envoy");
        let demo = upstream(service.as_ref()).await?;
        let replacements = Replacements {
            listener: local(options.envoy_port),
            admin: local(options.envoy_admin_port),
            service: service.clone(),
            ..Replacements::between(control_plane.address(), demo.as_ref().map_or(local(0), DemoApi::address))
        };
        let settings = envoy::Settings { workers: options.concurrency, ..envoy::Settings::new(replacements, sync_key) };
        let envoy = Envoy::start(settings, &home.join("envoy"), log("envoy.log")?, &progress).await?;

        progress("waiting for the filter to have the keys");
        stack::wait_for_status(&envoy, Some("no such key"), 401).await?;
        let admin = control_plane.settings().admin_key;
        shell::write_environment(&home.join("env"), control_plane.address(), envoy.address(), &admin)?;
        let targets = Targets { envoy: envoy.admin(), control_plane: control_plane.address() };
        let observers = match programs {
            None => None,
            Some(programs) => Some(Observers::start(&options.observe, programs, &home, targets).await?),
        };
        Ok(Self { observers, envoy, demo, service, control_plane, postgres, home, _alone: alone })
    }

    /// The line `ready`, and commands that can be copied as they are, into bash and zsh.
    fn introduce(&self) {
        let (home, envoy, rest) = (self.home.display(), self.envoy.address(), self.control_plane.address());
        let upstream = self.service.as_ref().map_or("the demo API", Service::url);
        let path = if self.service.is_some() { "/" } else { "/orders" };
        say("ready");
        say(&format!(
            r#"
  Envoy             http://{envoy}          in front of {upstream}
  REST API          http://{rest}           Envoy's admin interface  http://{admin}
  logs and data     {home}{observers}

These commands can be copied into bash and zsh. The file that the first one reads sets API, GATE and ADMIN.

  . '{home}/env'

Without a key: 401.

  curl -si "$GATE{path}"

Generate a key.

  KEY=$(curl -s "$API/api/user/key" -H "X-API-Key: $ADMIN" -H 'Content-Type: application/json' -d '{{"email": "ada@example.com", "key_name": "Production Key"}}' | sed 's/.*"key": *"\([^"]*\)".*/\1/'); echo "$KEY"

With the key, {told}

  curl -si "$GATE{path}" -H "X-API-Key: $KEY"

The usage of the key. Counts arrive within a second.

  curl -s "$API/api/user/key/ada@example.com" -H "X-API-Key: $ADMIN"

A policy: from its answer on, requests below /reports need a scope, and the key gets 403 there.

  curl -s -X PUT "$API/v1/policies/reports" -H "X-API-Key: $ADMIN" -H 'Content-Type: application/json' -H 'Prefer: wait=2' -d '{{"scopes": {{"all": ["reports:read"]}}, "match": [{{"path": {{"prefix": "/reports"}}}}]}}'
  curl -si "$GATE/reports" -H "X-API-Key: $KEY"

Revoke it; the same request then gets 401.

  curl -s -X DELETE "$API/api/user/key/ada@example.com" -H "X-API-Key: $ADMIN"
  curl -si "$GATE{path}" -H "X-API-Key: $KEY"

{further}
Ctrl-C stops everything."#,
            admin = self.envoy.admin(),
            observers = self.observers.as_ref().map(Observers::introduction).unwrap_or_default(),
            told = if self.service.is_some() {
                "your service answers. It gets x-consumer-id and x-credential-identifier, and not the key."
            } else {
                "200. The demo API shows the request that it received: it has the ids of the owner and of the key, and not the key."
            },
            further = if self.service.is_some() {
                "docs/src/tutorials/own-service.md describes what your service receives, and the next steps."
            } else {
                "The tutorials begin with docs/src/tutorials/start.md: scopes, rotation, limits, credits, import, shadow\nmode, customers who manage their own keys, usage."
            },
        ));
    }

    /// Returns when one of the processes has ended.
    async fn watch(&self) -> anyhow::Error {
        loop {
            let observers = self.observers.as_ref().map_or(Ok(()), Observers::must_run);
            let parts = [self.envoy.must_run(), self.control_plane.must_run(), self.postgres.must_run(), observers];
            if let Some(died) = parts.into_iter().find_map(Result::err) {
                return died;
            }
            tokio::time::sleep(WATCH).await;
        }
    }

    /// What observes the others first. Envoy before the control plane and PostgreSQL, so that it can send its last usage
    /// report. A process that does not end is killed when dropped.
    async fn stop(self) {
        if let Some(observers) = self.observers {
            observers.stop().await;
        }
        let _ = self.envoy.stop(Signal::SIGTERM).await;
        drop(self.demo);
        let _ = self.control_plane.stop(Signal::SIGTERM).await;
        let _ = self.postgres.stop(Signal::SIGINT).await;
    }
}

/// The demo API, unless there is a service to protect.
async fn upstream(service: Option<&Service>) -> Result<Option<DemoApi>> {
    let Some(service) = service else { return Ok(Some(DemoApi::start(local(0)).await?)) };
    if let Some(why) = not_reached(service).await {
        let url = service.url();
        progress(&format!("{url} is not there yet ({why}); until it is, good keys get 503 from Envoy"));
    }
    Ok(None)
}

/// The reason why the service accepts no connection, if any.
async fn not_reached(service: &Service) -> Option<String> {
    let connecting = TcpStream::connect((service.host(), service.port()));
    match tokio::time::timeout(REACH, connecting).await {
        Ok(connected) => connected.err().map(|error| error.to_string()),
        Err(_) => Some(format!("no answer within {} s", REACH.as_secs())),
    }
}

/// Removes the data of earlier runs. The directory of the database may be a link.
fn wipe(home: &Path) -> Result<()> {
    progress(&format!("removing what is in {}", home.display()));
    let data = paths::reachable(&home.join("postgres"))?;
    std::fs::remove_dir_all(&data).with_context(|| format!("cannot remove {}", data.display()))?;
    std::fs::remove_dir_all(home).with_context(|| format!("cannot remove {}", home.display()))?;
    Ok(std::fs::create_dir_all(home)?)
}

/// The key in this file, or a new one that is written to it, readable by its owner alone.
fn kept_key(path: &Path) -> Result<Secret> {
    if let Ok(text) = std::fs::read_to_string(path)
        && contract::key::check(text.trim()).is_ok()
    {
        return Ok(Secret::from_presented(text.trim().to_owned()));
    }
    let key = fresh_key()?;
    shell::write_secret(path, &format!("{}\n", key.reveal()))?;
    Ok(key)
}
