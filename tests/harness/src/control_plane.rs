//! A control plane as a process, which keeps its address across restarts.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use contract::key::{KeyKind, Secret};

use crate::http;
use crate::log::Log;
use crate::paths;
use crate::ports::{LOCAL, Port};
use crate::postgres::Database;
use crate::process::{Process, Signal, resident_kib};
use crate::wait::eventually;

#[derive(Clone, Debug)]
pub struct Settings {
    /// Port 0 stands for a free port, which is reserved for this control plane.
    pub listen: SocketAddr,
    pub database_url: String,
    pub admin_key: Secret,
    pub sync_key: Secret,
    /// Further arguments of `serve`.
    pub arguments: Vec<String>,
    /// The value of `PORTCULLIS_LOG_LEVEL`.
    pub log_level: String,
    pub environment: Vec<(String, String)>,
}

impl Settings {
    /// New keys, a free port, and no arguments but a REST API that may be called more often than people do.
    pub fn generous(database: &Database) -> Result<Self> {
        Ok(Self {
            listen: LOCAL,
            database_url: database.url.clone(),
            admin_key: fresh_key()?,
            sync_key: fresh_key()?,
            arguments: GENEROUS.map(Into::into).into(),
            log_level: "info".into(),
            environment: Vec::new(),
        })
    }
}

/// Arguments with which no test meets the limit of the REST API.
pub const GENEROUS: [&str; 4] = ["--api-rate-limit", "1000000", "--api-burst", "1000000"];

#[derive(Debug)]
pub struct ControlPlane {
    settings: Mutex<Settings>,
    directory: PathBuf,
    log: Log,
    process: Mutex<Option<Process>>,
    port: Mutex<Option<Port>>,
}

/// A key from the operating system's randomness.
pub fn fresh_key() -> Result<Secret> {
    Secret::generate(KeyKind::Live, &mut getrandom::SysRng).map_err(|error| anyhow!("no randomness: {error}"))
}

impl ControlPlane {
    /// Starts it and waits until it is ready. Its address file lies in `directory`.
    pub async fn start(settings: Settings, directory: &Path, log: Log) -> Result<Self> {
        let this = Self::prepare(settings, directory, log);
        this.restart().await?;
        Ok(this)
    }

    /// Prepares a control plane that [`launch`](Self::launch) starts, for tests over TLS, which check themselves that it is ready.
    pub fn prepare(settings: Settings, directory: &Path, log: Log) -> Self {
        let (settings, process, port) = (Mutex::new(settings), Mutex::new(None), Mutex::new(None));
        Self { settings, directory: directory.to_owned(), log, process, port }
    }

    /// Reserves a port, unless there is one already.
    fn reserve_port(&self) -> Result<()> {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        if settings.listen.port() == 0 {
            let port = Port::reserve(settings.listen.ip())?;
            settings.listen = port.address();
            *self.port.lock().unwrap_or_else(PoisonError::into_inner) = Some(port);
        }
        Ok(())
    }

    /// Starts it again, on the same port, and waits until it is ready.
    pub async fn restart(&self) -> Result<()> {
        self.launch().await?;
        self.ready().await
    }

    /// Starts it again, on the same port, and waits only until it listens.
    pub async fn launch(&self) -> Result<()> {
        self.reserve_port()?;
        let settings = self.settings();
        let program = paths::control_plane();
        if !program.is_file() {
            bail!("{} is missing; run `cargo build -p control-plane`", program.display());
        }
        let address_file = self.directory.join("control-plane.address");
        // The file of an earlier run has an old address.
        let _ = std::fs::remove_file(&address_file);
        let mut serve = Command::new(program);
        serve.args(["serve", "--log-format", "json", "--listen"]).arg(settings.listen.to_string());
        serve.arg("--database-url").arg(&settings.database_url).arg("--address-file").arg(&address_file);
        serve.args(&settings.arguments).current_dir(&self.directory);
        serve.env("PORTCULLIS_ADMIN_KEY", settings.admin_key.reveal());
        serve.env("PORTCULLIS_SYNC_KEY", settings.sync_key.reveal());
        serve.env("PORTCULLIS_LOG_LEVEL", &settings.log_level).envs(settings.environment);
        let process = Process::spawn("the control plane", serve, &self.log, Signal::SIGKILL)?;
        let address = process.address_in(&address_file).await?;
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).listen = address;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        Ok(())
    }

    /// Waits until it is ready: database and mirror.
    pub async fn ready(&self) -> Result<()> {
        let asked = async || match self.must_run() {
            Err(error) => Some(Err(error)),
            Ok(()) => {
                http::get(self.address(), "/readyz").await.ok().filter(|reply| reply.status == 200).map(|_| Ok(()))
            }
        };
        let ready = eventually("the control plane to be ready", asked).await;
        ready.with_context(|| format!("the end of its log:\n{}", self.log.tail(20)))?
    }

    pub async fn stop(&self, signal: Signal) -> Result<std::process::ExitStatus> {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner).take();
        process.ok_or_else(|| anyhow!("the control plane does not run"))?.stop(signal).await
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        process.as_ref().ok_or_else(|| anyhow!("the control plane does not run"))?.signal(signal)
    }

    pub fn must_run(&self) -> Result<()> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(Ok(()), Process::must_run)
    }

    /// Imports usage from a log line of an Envoy that could not report it.
    pub fn import_usage(&self, line: &str) -> Result<()> {
        let output = self.try_import_usage(line)?;
        ensure!(output.status.success(), "usage import: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// The same for logs with invalid lines. Returns the output of the command.
    pub fn try_import_usage(&self, line: &str) -> Result<Output> {
        let file = self.directory.join("last-words.log");
        std::fs::write(&file, line)?;
        let mut import = Command::new(paths::control_plane());
        import.args(["usage", "import", "--database-url"]).arg(self.settings().database_url).arg(file);
        Ok(import.output()?)
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Process::pid)
    }

    pub fn resident_kib(&self) -> Result<u64> {
        self.pid().and_then(resident_kib).context("the control plane does not run, or this is not Linux")
    }

    pub fn address(&self) -> SocketAddr {
        self.settings().listen
    }

    pub fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub const fn log(&self) -> &Log {
        &self.log
    }
}
