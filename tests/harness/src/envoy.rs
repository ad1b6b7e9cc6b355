//! An Envoy with the filter as a process, which keeps its ports across restarts.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use contract::key::Secret;

use crate::envoy_config::{LISTENER_FILE, Replacements, apart, render};
use crate::http::{self, Connection};
use crate::log::Log;
use crate::paths;
use crate::ports::Port;
use crate::process::{Process, Signal, resident_kib};
use crate::tools::{self, Say};
use crate::wait::{DEADLINE, eventually};

/// The name of the listener in front of the API, in every configuration.
pub const INGRESS: &str = "ingress";

#[derive(Clone, Debug)]
pub struct Settings {
    /// Changes of the template. Port 0 of the listener and of the admin interface stands for a free port, which is reserved
    /// for this Envoy.
    pub replacements: Replacements,
    pub workers: usize,
    /// Envoy's log level; `wasm` and others may follow as `warning,wasm:debug`.
    pub log_level: String,
    pub sync_key: Secret,
    pub environment: Vec<(String, String)>,
    /// Whether the listener is in a file of its own, which can be changed while Envoy runs.
    pub listener_file: bool,
}

impl Settings {
    /// Two workers, and the usual log.
    pub fn new(replacements: Replacements, sync_key: Secret) -> Self {
        let log_level = "warning,wasm:info".into();
        Self { replacements, workers: 2, log_level, sync_key, environment: Vec::new(), listener_file: false }
    }
}

#[derive(Debug)]
pub struct Envoy {
    binary: PathBuf,
    settings: Mutex<Settings>,
    template: &'static str,
    directory: PathBuf,
    log: Log,
    process: Mutex<Option<Process>>,
    _ports: Vec<Port>,
}

impl Envoy {
    /// Starts it in a directory of its own and waits until it accepts requests, possibly without keys.
    pub async fn start(settings: Settings, directory: &Path, log: Log, say: Say<'_>) -> Result<Self> {
        let this = Self::prepare(settings, directory, log, say)?;
        this.restart().await?;
        Ok(this)
    }

    /// Prepares an Envoy that [`restart`](Self::restart) starts.
    pub fn prepare(mut settings: Settings, directory: &Path, log: Log, say: Say<'_>) -> Result<Self> {
        let binary = tools::envoy(say)?;
        std::fs::create_dir_all(directory)?;
        let wasm = paths::wasm();
        // A copy: a filter that is built anew must not change under a running Envoy.
        std::fs::copy(&wasm, directory.join("portcullis.wasm"))
            .with_context(|| format!("{} is missing; run `cargo xtask wasm`", wasm.display()))?;
        let mut ports = Vec::new();
        for address in [&mut settings.replacements.listener, &mut settings.replacements.admin] {
            if address.port() == 0 {
                let port = Port::reserve(address.ip())?;
                *address = port.address();
                ports.push(port);
            }
        }
        let (settings, process) = (Mutex::new(settings), Mutex::new(None));
        let template = "minimal.yaml";
        Ok(Self { binary, settings, template, directory: directory.to_owned(), log, process, _ports: ports })
    }

    /// Uses another file of the directory `envoy` than `minimal.yaml`. Files that it names must be in the directory of this
    /// Envoy.
    pub const fn with_template(mut self, template: &'static str) -> Self {
        self.template = template;
        self
    }

    /// Starts it, on the same ports as before, and waits until it accepts requests.
    pub async fn restart(&self) -> Result<()> {
        let settings = self.settings();
        self.write_configuration(&settings)?;
        let admin_file = self.directory.join("admin.address");
        // The file of an earlier run has an old address.
        let _ = std::fs::remove_file(&admin_file);

        let mut envoy = Command::new(&self.binary);
        envoy.args(["-c", "envoy.yaml", "--use-dynamic-base-id", "--admin-address-path", "admin.address"]);
        envoy.arg("--concurrency").arg(settings.workers.to_string());
        let (level, components) = settings.log_level.split_once(',').unwrap_or((&settings.log_level, ""));
        envoy.args(["-l", level]);
        if !components.is_empty() {
            envoy.args(["--component-log-level", components]);
        }
        // The default waits ten minutes for clients to leave.
        envoy.args(["--drain-time-s", "1", "--parent-shutdown-time-s", "2"]);
        envoy.current_dir(&self.directory).env("PORTCULLIS_SYNC_KEY", settings.sync_key.reveal());
        envoy.envs(settings.environment);
        let process = Process::spawn("Envoy", envoy, &self.log, Signal::SIGKILL)?;

        let (admin, listener) = live(&process, &admin_file, DEADLINE).await?;
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        settings.replacements.admin = admin;
        settings.replacements.listener = listener;
        drop(settings);
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        Ok(())
    }

    pub async fn stop(&self, signal: Signal) -> Result<ExitStatus> {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner).take();
        process.ok_or_else(|| anyhow!("Envoy does not run"))?.stop(signal).await
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.as_ref().ok_or_else(|| anyhow!("Envoy does not run"))?.signal(signal)
    }

    pub fn must_run(&self) -> Result<()> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(Ok(()), Process::must_run)
    }

    pub fn resident_kib(&self) -> Result<u64> {
        self.pid().and_then(resident_kib).context("Envoy does not run, or this is not Linux")
    }

    pub fn address(&self) -> SocketAddr {
        self.settings().replacements.listener
    }

    pub fn admin(&self) -> SocketAddr {
        self.settings().replacements.admin
    }

    pub fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the settings for the next start.
    pub fn change_settings(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Process::pid)
    }

    /// Writes the configuration with the listener as [`change_settings`](Self::change_settings) changed it. An Envoy whose
    /// listener is in a file of its own applies it at once.
    pub fn update_listener(&self) -> Result<()> {
        self.write_configuration(&self.settings())
    }

    fn write_configuration(&self, settings: &Settings) -> Result<()> {
        let template = std::fs::read_to_string(paths::workspace().join("envoy").join(self.template))?;
        let mut bootstrap = render(&template, &settings.replacements)?;
        if settings.listener_file {
            let listener;
            (bootstrap, listener) = apart(&bootstrap)?;
            // Envoy watches for renames.
            let new = self.directory.join("listener.yaml.new");
            std::fs::write(&new, listener)?;
            std::fs::rename(new, self.directory.join(LISTENER_FILE))?;
        }
        Ok(std::fs::write(self.directory.join("envoy.yaml"), bootstrap)?)
    }

    /// Its output: its own log and the access log.
    pub const fn log(&self) -> &Log {
        &self.log
    }

    /// A statistic by its exact name, 0 if it does not exist yet.
    pub async fn stat(&self, name: &str) -> Result<u64> {
        stat(self.admin(), name).await
    }

    /// Waits until a statistic has a value that is wanted.
    pub async fn wait_for_stat(&self, name: &str, is_wanted: impl Fn(u64) -> bool) -> Result<()> {
        let reached = async || self.stat(name).await.is_ok_and(&is_wanted).then_some(());
        eventually(&format!("another value of {name}"), reached).await
    }

    /// The statistics whose names contain this.
    pub async fn stats(&self, part: &str) -> Result<Vec<(String, u64)>> {
        stats(self.admin(), part).await
    }

    /// One open connection to each of its workers, in their order.
    pub async fn connection_per_worker(&self) -> Result<Vec<Connection>> {
        let workers = self.settings().workers;
        let mut connections: Vec<Option<Connection>> = (0..workers).map(|_| None).collect();
        let mut others = Vec::new();
        let mut accepted = self.accepted_per_worker().await?;
        for _ in 0..workers.saturating_mul(50) {
            let connection = Connection::open(self.address()).await?;
            let worker = eventually("a worker to accept a connection", async || {
                let now = self.accepted_per_worker().await.ok()?;
                let worker = now.iter().zip(&accepted).position(|(now, before)| now > before)?;
                accepted = now;
                Some(worker)
            })
            .await?;
            match connections.get_mut(worker) {
                Some(place @ None) => *place = Some(connection),
                // Kept open, so that the kernel gives the next connection to another worker.
                _ => others.push(connection),
            }
            if connections.iter().all(Option::is_some) {
                return Ok(connections.into_iter().flatten().collect());
            }
        }
        bail!("some worker never accepted a connection")
    }

    async fn accepted_per_worker(&self) -> Result<Vec<u64>> {
        let name = |worker| format!(".worker_{worker}.downstream_cx_total");
        let mut accepted = Vec::new();
        for worker in 0..self.settings().workers {
            let of_worker = self.stats(&name(worker)).await?;
            // The admin interface has workers' statistics of its own.
            accepted.extend(of_worker.iter().filter(|(stat, _)| !stat.contains("admin")).map(|(_, value)| *value));
        }
        Ok(accepted)
    }
}

pub async fn stat(admin: SocketAddr, name: &str) -> Result<u64> {
    let found = stats(admin, name).await?;
    Ok(found.into_iter().find(|(found, _)| found == name).map_or(0, |(_, value)| value))
}

async fn stats(admin: SocketAddr, part: &str) -> Result<Vec<(String, u64)>> {
    let stats = http::get(admin, &format!("/stats?format=json&filter={part}")).await?.json()?;
    let named = |stat: &serde_json::Value| Some((stat["name"].as_str()?.to_owned(), stat["value"].as_u64()?));
    Ok(stats["stats"].as_array().into_iter().flatten().filter_map(named).collect())
}

/// Waits until an Envoy accepts requests. Returns the addresses of its admin interface and of the
/// listener [`INGRESS`], or else of its first listener.
pub async fn live(process: &Process, admin_file: &Path, deadline: Duration) -> Result<(SocketAddr, SocketAddr)> {
    let live = async || {
        let admin = std::fs::read_to_string(admin_file).ok()?.trim().parse().ok()?;
        http::get(admin, "/ready").await.ok().filter(|ready| ready.status == 200).map(|_| admin)
    };
    let admin = process.eventually_within("Envoy to be live", deadline, live).await?;
    Ok((admin, listener(admin).await?))
}

/// The time until every worker, on a connection of its own, responds with this status to a key.
pub async fn until_all(workers: &mut [Connection], path: &str, key: &str, status: u16) -> Result<Duration> {
    let start = Instant::now();
    for worker in workers {
        while worker.get(path, Some(key)).await?.status != status {
            ensure!(start.elapsed() < DEADLINE, "a worker does not respond with {status}, {DEADLINE:?} after a change");
        }
    }
    Ok(start.elapsed())
}

async fn listener(admin: SocketAddr) -> Result<SocketAddr> {
    let listeners = http::get(admin, "/listeners?format=json").await?.json()?;
    let all = listeners["listener_statuses"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ingress = all.iter().find(|listener| listener["name"] == INGRESS).or(all.first());
    let socket = &ingress.unwrap_or(&serde_json::Value::Null)["local_address"]["socket_address"];
    let port = socket["port_value"].as_u64().and_then(|port| u16::try_from(port).ok());
    let ip = socket["address"].as_str().and_then(|ip| ip.parse::<IpAddr>().ok());
    ip.zip(port).map(SocketAddr::from).with_context(|| format!("Envoy names no listener: {listeners}"))
}
