//! The stack under torture: its own PostgreSQL, two control planes, a proxy between each Envoy and
//! the control planes, Envoys whose listeners are in files of their own, and an adjustable clock
//! for each process.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use contract::key::Secret;
use portcullis_harness::control_plane::{self, ControlPlane};
use portcullis_harness::demo::DemoApi;
use portcullis_harness::envoy::{self, Envoy};
use portcullis_harness::envoy_config::Replacements;
use portcullis_harness::log::Log;
use portcullis_harness::paths;
use portcullis_harness::ports::LOCAL;
use portcullis_harness::postgres::{Database, Postgres};
use portcullis_harness::rest::Rest;
use portcullis_harness::stack::wait_for_status;
use portcullis_harness::tools::silently;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::proxy::Proxy;

/// Replicas of the control plane.
const CONTROL_PLANES: usize = 2;

#[derive(Debug)]
pub struct Clock(PathBuf);

impl Clock {
    fn create(path: PathBuf) -> Result<Self> {
        let clock = Self(path);
        std::fs::write(&clock.0, 0_i64.to_ne_bytes())?;
        Ok(clock)
    }

    /// Sets its offset from the clock of the machine.
    pub fn shift(&self, seconds: i64) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(&self.0)?;
        // In place, since the process has mapped the file.
        file.write_all_at(&seconds.saturating_mul(1_000_000_000).to_ne_bytes(), 0)?;
        Ok(())
    }

    fn environment(&self) -> Vec<(String, String)> {
        let preloaded = ("LD_PRELOAD".into(), paths::shifted_clock().display().to_string());
        vec![preloaded, ("PORTCULLIS_CLOCK".into(), self.0.display().to_string())]
    }
}

/// The stack. Its parts end when dropped, in the order of the fields.
#[derive(Debug)]
pub struct TortureStack {
    pub envoys: Vec<Envoy>,
    pub envoy_clocks: Vec<Clock>,
    pub demo: DemoApi,
    pub proxies: Vec<Proxy>,
    pub control_planes: Vec<ControlPlane>,
    pub control_plane_clocks: Vec<Clock>,
    pub database: Database,
    pub postgres: Arc<Postgres>,
    directory: TempDir,
}

impl TortureStack {
    /// Starts it and waits until every Envoy has its keys and so refuses an unknown one.
    pub async fn start(number_of_envoys: usize) -> Result<Self> {
        for file in [paths::trap_wasm(), paths::shifted_clock()] {
            ensure!(file.is_file(), "{} is missing; run `cargo xtask wasm --for-faults`", file.display());
        }
        let mut directory = TempDir::with_prefix("portcullis-torture-")?;
        directory.disable_cleanup(std::env::var_os("PORTCULLIS_KEEP").is_some());
        let postgres = Arc::new(Postgres::private().await?);
        let database = postgres.create_database().await?;
        let generous = control_plane::Settings::generous(&database)?;
        let home = |name: String| {
            let home = directory.path().join(name);
            std::fs::create_dir_all(&home).map(|()| home)
        };

        let (mut control_planes, mut control_plane_clocks) = (Vec::new(), Vec::new());
        for number in 0..CONTROL_PLANES {
            let home = home(format!("control-plane-{number}"))?;
            let clock = Clock::create(home.join("clock"))?;
            let settings = control_plane::Settings { environment: clock.environment(), ..generous.clone() };
            let log = Log::create(&home.join("log"))?;
            control_planes.push(ControlPlane::start(settings, &home, log).await?);
            control_plane_clocks.push(clock);
        }

        let demo = DemoApi::start(LOCAL).await?;
        let backends: Vec<_> = control_planes.iter().map(ControlPlane::address).collect();
        let (mut envoys, mut envoy_clocks, mut proxies) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..number_of_envoys {
            let home = home(format!("envoy-{number}"))?;
            let clock = Clock::create(home.join("clock"))?;
            let proxy = Proxy::start(backends.clone(), number).await?;
            envoys.push(start_envoy(&home, &proxy, &demo, &clock, &generous.sync_key).await?);
            envoy_clocks.push(clock);
            proxies.push(proxy);
        }
        Ok(Self {
            envoys,
            envoy_clocks,
            demo,
            proxies,
            control_planes,
            control_plane_clocks,
            database,
            postgres,
            directory,
        })
    }

    /// The REST API of a control plane, modulo their number.
    pub fn rest(&self, number: usize) -> Result<Rest> {
        let control_plane = self.control_planes.get(number % self.control_planes.len().max(1));
        let control_plane = control_plane.context("there is no control plane")?;
        Ok(Rest { address: control_plane.address(), key: control_plane.settings().admin_key })
    }

    pub fn everywhere(&self) -> Vec<usize> {
        (0..self.envoys.len()).collect()
    }

    /// A statistic of an Envoy's filter. None if the Envoy does not respond within a second.
    pub async fn stat(&self, envoy: usize, name: &str) -> Option<u64> {
        let asked = self.envoys.get(envoy)?.stats(name);
        let stats = tokio::time::timeout(Duration::from_secs(1), asked).await.ok()?.ok()?;
        let full = format!("wasmcustom.portcullis.{name}");
        stats.into_iter().find(|(found, _)| *found == full).map(|(_, value)| value)
    }

    /// The directory of its logs. `PORTCULLIS_KEEP` keeps it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// Starts an Envoy whose filter traps on demand, and waits until it has its keys.
async fn start_envoy(home: &Path, proxy: &Proxy, demo: &DemoApi, clock: &Clock, sync_key: &Secret) -> Result<Envoy> {
    let mut replacements = Replacements::between(proxy.address, demo.address());
    replacements.plugin.insert("rate_limit".into(), Value::Null);
    // In place of 0.25 s, for a machine that is busy with the whole stack and its load. Two calls in turn take no longer than
    // a request may wait.
    replacements.plugin.insert("limits".into(), json!({"wait": "0.4s"}));
    let environment = clock.environment();
    let usual = envoy::Settings::new(replacements, sync_key.clone());
    let settings = envoy::Settings { environment, listener_file: true, ..usual };
    let envoy = Envoy::prepare(settings, home, Log::create(&home.join("log"))?, &silently)?;
    std::fs::copy(paths::trap_wasm(), home.join("portcullis.wasm"))?;
    envoy.restart().await?;
    wait_for_status(&envoy, Some("no such key"), 401).await?;
    Ok(envoy)
}
