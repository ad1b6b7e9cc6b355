//! One child process. Its handle signals it and waits for it, and ends it when dropped.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
pub use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::child_reaper;
use crate::log::Log;
use crate::wait::{DEADLINE, eventually_within};

/// How long a process may take to end after a signal. The control plane waits ten seconds for its connections.
const GRACE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Process {
    name: String,
    child: Mutex<Child>,
    last_signal: Signal,
    log: Log,
}

impl Process {
    /// Starts it. It receives `last_signal` when the handle is dropped or this process ends.
    pub fn spawn(name: &str, mut command: Command, log: &Log, last_signal: Signal) -> Result<Self> {
        let (stdout, stderr) = log.outputs()?;
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let child = Mutex::new(child_reaper::spawn(command, last_signal)?);
        Ok(Self { name: name.to_owned(), child, last_signal, log: log.clone() })
    }

    pub fn pid(&self) -> u32 {
        self.child.lock().map(|child| child.id()).unwrap_or_default()
    }

    pub fn ended(&self) -> Option<ExitStatus> {
        self.child.lock().ok()?.try_wait().ok()?
    }

    /// Fails if it has ended, with the last lines of its log.
    pub fn must_run(&self) -> Result<()> {
        match self.ended() {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}). The end of its log:\n{}", self.name, self.log.tail(20)),
        }
    }

    /// Waits until the condition gives a value. Fails if the process ends before that.
    pub async fn eventually_within<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut condition: impl AsyncFnMut() -> Option<T>,
    ) -> Result<T> {
        let running = async || match self.must_run() {
            Err(error) => Some(Err(error)),
            Ok(()) => condition().await.map(Ok),
        };
        eventually_within(what, deadline, running).await?
    }

    /// The same with the usual deadline.
    pub async fn eventually<T>(&self, what: &str, condition: impl AsyncFnMut() -> Option<T>) -> Result<T> {
        self.eventually_within(what, DEADLINE, condition).await
    }

    /// Waits for the address that it writes to a file.
    pub async fn address_in(&self, file: &Path) -> Result<SocketAddr> {
        let what = format!("{} to listen", self.name);
        let address = self.eventually(&what, async || std::fs::read_to_string(file).ok()).await?;
        address.trim().parse().with_context(|| format!("{address:?} is no address"))
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.must_run()?;
        let pid = Pid::from_raw(self.pid().try_into()?);
        nix::sys::signal::kill(pid, signal).map_err(|error| anyhow!("{} cannot be signalled: {error}", self.name))
    }

    /// Sends a signal and waits until the process has ended.
    pub async fn stop(&self, signal: Signal) -> Result<ExitStatus> {
        self.signal(signal)?;
        let what = format!("the end of {} after {signal}", self.name);
        eventually_within(&what, GRACE, async || self.ended()).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Also while a test panics. Waits, so that no process is left.
        if self.signal(self.last_signal).is_err() {
            return;
        }
        let asked = Instant::now();
        while self.ended().is_none() {
            if asked.elapsed() > GRACE {
                let _ = self.signal(Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub fn resident_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
