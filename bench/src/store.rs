//! A release build of the control plane with many keys in a database of its own.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use portcullis_harness::compile;
use portcullis_harness::http::get;
use portcullis_harness::output::progress;
use portcullis_harness::process::Signal;
use portcullis_harness::stack::Stack;
use portcullis_harness::wait::eventually;

use crate::machine;

/// Builds the control plane with all optimisations and uses it from now on.
pub(crate) fn build() -> Result<()> {
    static BUILT: OnceLock<()> = OnceLock::new();
    if std::env::var_os("CONTROL_PLANE_BIN").is_some() || BUILT.get().is_some() {
        return Ok(());
    }
    compile::optimised_control_plane()?;
    let _ = BUILT.set(());
    Ok(())
}

/// A control plane with a database of its own and so many Envoys. Callers may ask as much as they like.
pub(crate) async fn start(envoys: usize) -> Result<Stack> {
    build()?;
    let generous = ["--api-rate-limit", "1000000", "--api-burst", "1000000"];
    let plugin = serde_json::json!({"rate_limit": null});
    Stack::builder().own_postgres().envoys(envoys).plugin(&plugin).control_plane_arguments(&generous).start().await
}

/// Key number n is the text `key-n`, as if imported from elsewhere.
const INSERT: &str = "
    insert into user_preferences (id, email)
    select gen_random_uuid(), 'many-' || n || '@example.com' from generate_series(1, {keys} / 10) n;
    insert into api_keys (id, owner_id, name, hash, revision)
    select gen_random_uuid(), owner.id, 'Many', sha256(convert_to('key-' || n, 'UTF8')), 0
    from generate_series(1, {keys}) n
    join user_preferences owner on owner.email = 'many-' || (n % ({keys} / 10) + 1) || '@example.com';
    analyze";

/// Enters so many keys into a database that has none, and starts the control plane anew, so that it holds them as one
/// that has been running for long.
pub(crate) async fn fill(stack: &Stack, keys: u64) -> Result<()> {
    progress(&format!("entering {keys} keys"));
    stack.database.execute(&INSERT.replace("{keys}", &keys.to_string())).await?;
    stack.control_plane.stop(Signal::SIGTERM).await?;
    stack.control_plane.restart().await
}

/// The number of the control plane's process.
pub(crate) fn control_plane_pid(stack: &Stack) -> Result<u32> {
    stack.control_plane.pid().context("the control plane does not run")
}

/// Waits until a metric of the control plane is as large as this.
pub(crate) async fn reaches(stack: &Stack, metric: &str, least: f64) -> Result<()> {
    eventually(&format!("{metric} to reach {least}"), async || {
        let reply = get(stack.control_plane.address(), "/metrics").await.ok()?;
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        let value = text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '))?;
        (value.trim().parse::<f64>().ok()? >= least).then_some(())
    })
    .await
}

pub(crate) fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

/// What has been used of the processors so far, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    control_plane: u64,
    database: u64,
}

impl Used {
    /// Reads it.
    pub(crate) fn read(stack: &Stack, postmaster: u32) -> Result<Self> {
        let control_plane = machine::cpu_ns(control_plane_pid(stack)?)?;
        Ok(Self { control_plane, database: machine::family_cpu_ns(postmaster)? })
    }

    /// Seconds of the control plane, and of PostgreSQL.
    pub(crate) fn since(&self, before: &Self) -> (f64, f64) {
        let seconds_of = |now: u64, before: u64| seconds(Duration::from_nanos(now.saturating_sub(before)));
        (seconds_of(self.control_plane, before.control_plane), seconds_of(self.database, before.database))
    }
}

/// The process that all of PostgreSQL's are children of.
pub(crate) async fn postmaster(stack: &Stack) -> Result<u32> {
    let file = stack.database.text("select pg_read_file('postmaster.pid')").await?;
    let first = file.lines().next().and_then(|line| line.trim().parse().ok());
    first.context("postmaster.pid names no process")
}
