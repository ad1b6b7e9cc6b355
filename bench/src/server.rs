//! An Envoy that is measured. It ends when dropped.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use contract::key::Secret;
use portcullis_harness::control_plane::fresh_key;
use portcullis_harness::envoy::{live, stat};
use portcullis_harness::log::Log;
use portcullis_harness::output::progress;
use portcullis_harness::process::{Process, Signal};
use portcullis_harness::stack::STORE_KEYS;
use portcullis_harness::tools;
use serde_json::Value;
use tempfile::TempDir;

use crate::machine;

/// Reading a million credentials takes a while.
const READY_WITHIN: Duration = Duration::from_secs(180);

#[derive(Debug)]
pub(crate) struct Server {
    process: Process,
    pub(crate) admin: SocketAddr,
    pub(crate) address: SocketAddr,
    _home: TempDir,
}

impl Server {
    /// Starts it, on one core if one is given, and waits until it accepts requests.
    pub(crate) async fn start(config: &Value, workers: usize, core: Option<usize>) -> Result<Self> {
        Self::start_with_key(config, workers, core, &fresh_key()?).await
    }

    /// The same with a given sync key.
    pub(crate) async fn start_with_key(
        config: &Value,
        workers: usize,
        core: Option<usize>,
        key: &Secret,
    ) -> Result<Self> {
        let binary = tools::envoy(&progress)?;
        let home = TempDir::with_prefix("portcullis-bench-")?;
        std::fs::write(home.path().join("envoy.json"), config.to_string())?;
        let mut envoy = Command::new(binary);
        envoy.args(["-c", "envoy.json", "--use-dynamic-base-id", "--admin-address-path", "admin.address"]);
        // At level warning, api_key_auth writes a line for each key.
        envoy.args(["-l", "error", "--drain-time-s", "1", "--parent-shutdown-time-s", "2", "--concurrency"]);
        envoy.arg(workers.to_string()).current_dir(home.path());
        envoy.env("PORTCULLIS_SYNC_KEY", key.reveal());
        if let Some(core) = core {
            machine::pin(&mut envoy, core)?;
        }
        let log = Log::create(&home.path().join("log"))?;
        let process = Process::spawn("Envoy", envoy, &log, Signal::SIGKILL)?;
        let admin_file = home.path().join("admin.address");
        let (admin, address) = live(&process, &admin_file, READY_WITHIN).await?;
        Ok(Self { process, admin, address, _home: home })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until its filter has this number of keys.
    pub(crate) async fn wait_for_keys(&self, keys: u64) -> Result<()> {
        let loaded = async || (stat(self.admin, STORE_KEYS).await.ok()? >= keys).then_some(());
        self.process.eventually_within(&format!("{keys} keys in Envoy"), READY_WITHIN, loaded).await
    }
}

/// A port that is free at this moment, for addresses that must be known before Envoy starts.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
