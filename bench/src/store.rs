//! A release build of the control plane with many keys in a database of its own.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use portcullis_harness::compile;
use portcullis_harness::http::get;
use portcullis_harness::output::progress;
use portcullis_harness::process::Signal;
use portcullis_harness::stack::{Builder, Stack};
use portcullis_harness::wait::eventually;

use crate::machine;

/// Builds the control plane with all optimisations, once, and uses it from then on.
pub(crate) fn build() -> Result<()> {
    static BUILT: OnceLock<()> = OnceLock::new();
    if std::env::var_os("CONTROL_PLANE_BIN").is_some() || BUILT.get().is_some() {
        return Ok(());
    }
    compile::optimised_control_plane()?;
    let _ = BUILT.set(());
    Ok(())
}

/// Starts a control plane with a database of its own and Envoys.
pub(crate) async fn start(envoys: usize) -> Result<Stack> {
    builder(envoys)?.start().await
}

/// The same, before it starts.
pub(crate) fn builder(envoys: usize) -> Result<Builder> {
    build()?;
    let plugin = serde_json::json!({"rate_limit": null});
    Ok(Stack::builder().own_postgres().envoys(envoys).plugin(&plugin))
}

/// Inserts keys into an empty database, and restarts the control plane, so that it loads them as a whole.
pub(crate) async fn fill(stack: &Stack, keys: u64) -> Result<()> {
    progress(&format!("entering {keys} keys"));
    stack.insert_keys(keys).await?;
    stack.database.execute("analyze").await?;
    stack.control_plane.stop(Signal::SIGTERM).await?;
    stack.control_plane.restart().await
}

pub(crate) fn control_plane_pid(stack: &Stack) -> Result<u32> {
    stack.control_plane.pid().context("the control plane does not run")
}

/// Waits until a metric of the control plane reaches a value.
pub(crate) async fn reaches(stack: &Stack, metric: &str, least: f64) -> Result<()> {
    let is_reached = async || (read_metric(stack, metric).await? >= least).then_some(());
    eventually(&format!("{metric} to reach {least}"), is_reached).await
}

/// A metric of the control plane, if it has a value.
pub(crate) async fn read_metric(stack: &Stack, metric: &str) -> Option<f64> {
    let reply = get(stack.control_plane.address(), "/metrics").await.ok()?;
    let text = String::from_utf8_lossy(&reply.body).into_owned();
    text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '))?.trim().parse().ok()
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

/// CPU time so far, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    control_plane: u64,
    database: u64,
}

impl Used {
    pub(crate) fn read(stack: &Stack, postmaster: u32) -> Result<Self> {
        let control_plane = machine::cpu_ns(control_plane_pid(stack)?)?;
        Ok(Self { control_plane, database: machine::family_cpu_ns(postmaster)? })
    }

    /// CPU seconds since then: of the control plane, and of PostgreSQL.
    pub(crate) fn since(&self, before: &Self) -> (f64, f64) {
        let seconds_of = |now: u64, before: u64| Duration::from_nanos(now.saturating_sub(before)).as_secs_f64();
        (seconds_of(self.control_plane, before.control_plane), seconds_of(self.database, before.database))
    }
}

/// The parent process of PostgreSQL.
pub(crate) async fn postmaster(stack: &Stack) -> Result<u32> {
    let file = stack.database.text("select pg_read_file('postmaster.pid')").await?;
    let first = file.lines().next().and_then(|line| line.trim().parse().ok());
    first.context("postmaster.pid names no process")
}
