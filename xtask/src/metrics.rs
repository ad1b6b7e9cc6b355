//! Steps `alerts` and `metrics`: promtool, Prometheus's own checker, examines the files of `deploy/prometheus`, and the
//! metrics of the control plane and of the filter.

use std::io::{Seek, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portcullis_harness::cargo::run;
use portcullis_harness::output::say;
use portcullis_harness::stack::Stack;
use portcullis_harness::{http, paths};

use crate::tools;

/// promtool's complaint about every metric of Envoy, those of the filter included: Envoy prints no help texts.
const OF_ENVOY: &str = "no help text";

/// Examines the configuration and the alerts, and runs the tests of the alerts. Returns false if there is no promtool.
pub(crate) fn check_alerts() -> Result<bool> {
    let Some(promtool) = tools::promtool()? else { return Ok(false) };
    let arguments = [["check", "config", "prometheus.yaml"], ["check", "rules", "alerts.yaml"]];
    let tests = ["test", "rules", "alerts.test.yaml"];
    for arguments in arguments.into_iter().chain([tests]) {
        let mut command = Command::new(&promtool);
        command.args(arguments).current_dir(paths::workspace().join("deploy/prometheus"));
        run(command)?;
    }
    Ok(true)
}

/// Examines the metrics on a running stack. Returns false if there is no promtool.
pub(crate) async fn check() -> Result<bool> {
    let Some(promtool) = tools::promtool()? else { return Ok(false) };
    let stack = Stack::start().await?;
    stack.working_key("metrics@portcullis.example").await?;
    stack.get(None).await?;

    let text = text(stack.control_plane.address(), "/metrics").await?;
    let complaints = complaints(&promtool, &text)?;
    ensure!(complaints.is_empty(), "promtool complains about metrics of the control plane:\n{}", complaints.join("\n"));
    say(&format!("promtool: {} metrics of the control plane, no complaints", families(&text)));

    let text = self::text(stack.envoy().admin(), "/stats/prometheus?filter=^wasmcustom").await?;
    ensure!(
        text.contains("portcullis_decisions_total{outcome=\"allowed\"}"),
        "Envoy shows no decisions by outcome:\n{text}"
    );
    let complaints = self::complaints(&promtool, &text)?;
    let ours: Vec<_> = complaints.into_iter().filter(|said| !said.ends_with(OF_ENVOY)).collect();
    ensure!(ours.is_empty(), "promtool complains about statistics of the filter:\n{}", ours.join("\n"));
    say(&format!(
        "promtool: {} statistics of the filter, no complaints except {:?}, which every statistic of Envoy gets",
        families(&text),
        OF_ENVOY
    ));
    Ok(true)
}

async fn text(address: std::net::SocketAddr, path: &str) -> Result<String> {
    let reply = http::get(address, path).await?;
    ensure!(reply.status == 200, "{path} answers {}", reply.status);
    Ok(String::from_utf8_lossy(&reply.body).into_owned())
}

fn families(text: &str) -> usize {
    text.lines().filter(|line| line.starts_with("# TYPE ")).count()
}

/// The complaints of promtool, one a line.
fn complaints(promtool: &Path, metrics: &str) -> Result<Vec<String>> {
    let mut input = tempfile::tempfile()?;
    input.write_all(metrics.as_bytes())?;
    input.rewind()?;
    let output = Command::new(promtool).args(["check", "metrics"]).stdin(input).output();
    let output = output.with_context(|| format!("cannot run {}", promtool.display()))?;
    let all = [output.stdout, output.stderr].concat();
    let lines: Vec<String> = String::from_utf8_lossy(&all).lines().map(ToOwned::to_owned).collect();
    // 3: promtool has complaints.
    ensure!(output.status.success() || output.status.code() == Some(3), "promtool failed: {}", lines.join("\n"));
    Ok(lines)
}
