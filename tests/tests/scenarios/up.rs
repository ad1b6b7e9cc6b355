//! `cargo xtask up` as a process of its own. With `--upstream URL` it starts, protects the service, and ends on SIGTERM;
//! with `--observe` it starts Prometheus, too.

use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use contract::key::Secret;
use contract::outcome::Outcome;
use portcullis_harness::cargo::{cargo, run};
use portcullis_tests::demo::DemoApi;
use portcullis_tests::expect::{assert_refused, assert_upstream};
use portcullis_tests::http::{self, get_request, send};
use portcullis_tests::log::Log;
use portcullis_tests::paths;
use portcullis_tests::ports::{LOCAL, Port};
use portcullis_tests::process::{Process, Signal};
use portcullis_tests::rest::Rest;
use portcullis_tests::tools::{silently, unpack_debian};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::metrics::dashboards;

/// The value of a variable in the file that `up` writes.
fn variable(environment: &str, name: &str) -> Result<String> {
    let value = environment.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("='")?.strip_suffix('\''));
    Ok(value.with_context(|| format!("no {name} in {environment}"))?.to_owned())
}

/// The commands that `up` prints, and the key that the second one generates.
struct PrintedCommands {
    commands: Vec<String>,
    key: String,
}

impl PrintedCommands {
    fn of(log: &str) -> Self {
        let printed = log.lines().filter_map(|line| line.strip_prefix("  "));
        let is_command = |line: &&str| [". '", "curl ", "KEY="].iter().any(|start| line.starts_with(start));
        Self { commands: printed.filter(is_command).map(str::to_owned).collect(), key: String::new() }
    }

    /// Runs the command that has this text, in a shell that has read the environment.
    async fn run(&self, text: &str) -> Result<String> {
        let with_text = self.commands.iter().find(|command| command.contains(text));
        let command = with_text.with_context(|| format!("no {text} in {:?}", self.commands))?;
        let environment = self.commands.first().context("no command")?;
        let script = format!("set -eu\n{environment}\nKEY='{}'\n{command}\n", self.key);
        let output = tokio::process::Command::new("bash").args(["-c", &script]).output().await?;
        ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The status that the last command with this text prints.
    async fn status(&self, text: &str) -> Result<String> {
        let reply = self.run(text).await?;
        Ok(reply.split(' ').nth(1).context("no status")?.to_owned())
    }
}

/// A target directory for one `up`, so that a developer's `cargo xtask up` is not disturbed.
fn own_target() -> Result<TempDir> {
    run(cargo(&["build", "--locked", "--workspace", "--bin", "xtask"]))?;
    let target = TempDir::with_prefix("portcullis-")?;
    // PostgreSQL may run as another user, who must be able to enter it.
    std::fs::set_permissions(target.path(), PermissionsExt::from_mode(0o755))?;
    symlink(paths::target().join("tools"), target.path().join("tools"))?;
    Ok(target)
}

/// The command, with the programs that are built already.
fn up(target: &Path, ports: &[Port]) -> Command {
    let mut up = Command::new(paths::target().join("debug/xtask"));
    up.arg("up");
    let flags = ["--envoy-port", "--control-plane-port", "--envoy-admin-port", "--prometheus-port", "--grafana-port"];
    for (flag, port) in flags.into_iter().zip(ports) {
        up.args([flag, &port.address().port().to_string()]);
    }
    up.current_dir(paths::workspace()).env("CARGO_TARGET_DIR", target);
    up.env("CONTROL_PLANE_BIN", paths::control_plane()).env("PORTCULLIS_WASM", paths::wasm());
    up
}

#[tokio::test]
async fn up_protects_the_service_that_upstream_names_until_it_is_told_to_end() -> Result<()> {
    let target = own_target()?;
    let service = DemoApi::start(LOCAL).await?;
    let ports = [Port::reserve(LOCAL.ip())?, Port::reserve(LOCAL.ip())?, Port::reserve(LOCAL.ip())?];
    let mut up = up(target.path(), &ports);
    up.args(["--upstream", &format!("http://{}", service.address())]);
    let log = Log::create(&target.path().join("up.log"))?;
    let up = Process::spawn("cargo xtask up", up, &log, Signal::SIGTERM)?;
    let ready = async || log.text().lines().any(|line| line == "ready").then_some(());
    up.eventually("cargo xtask up to be ready", ready).await?;
    log.wait_for("curl -si \"$GATE/\"").await?;

    let environment = std::fs::read_to_string(target.path().join("up/env"))?;
    let [gate, api, _] = ports.each_ref().map(Port::address);
    for (name, address) in [("GATE", gate), ("API", api)] {
        assert_eq!(variable(&environment, name)?, format!("http://{address}"));
    }
    let rest = Rest { address: api, key: Secret::from_presented(variable(&environment, "ADMIN")?) };
    assert_refused(&send(gate, get_request("/", None)?).await?, Outcome::Missing, &[]);
    assert_eq!(service.requests(), 0);
    let key = rest.generate("ada@example.com").await?;
    let admitted = async || {
        let reply = send(gate, get_request("/", Some(&key)).ok()?).await.ok()?;
        (reply.status == 200).then_some(reply)
    };
    let reply = eventually("the key to work", admitted).await?;
    let headers = assert_upstream(&reply, &["x-consumer-id", "x-credential-identifier", "x-forwarded-host"]);
    assert_eq!(headers["host"], json!([service.address().to_string()]));

    let mut tour = PrintedCommands::of(&log.text());
    assert_eq!(tour.status("curl -si \"$GATE/\"").await?, "401");
    tour.key = tour.run("KEY=").await?.trim().to_owned();
    let with_key = "curl -si \"$GATE/\" -H \"X-API-Key: $KEY\"";
    let becomes = async |status: &str| (tour.status(with_key).await.ok()? == status).then_some(());
    eventually("200 with the key", async || becomes("200").await).await?;
    let counted =
        async || tour.run("curl -s \"$API/api/user/key/").await.ok().filter(|usage| usage.contains("Production Key"));
    eventually("the usage of the key", counted).await?;
    // The answer to the change of the policy comes once the Envoy has it.
    assert!(tour.run("curl -s -X PUT").await?.contains("reports:read"));
    assert_eq!(tour.status("curl -si \"$GATE/reports\"").await?, "403");
    tour.run("curl -s -X DELETE").await?;
    eventually("401 with the revoked key", async || becomes("401").await).await?;
    assert_eq!(tour.commands.len(), 9, "{:?}", tour.commands);

    let status = up.stop(Signal::SIGTERM).await?;
    ensure!(status.success(), "{status}: {}", log.tail(20));
    assert!(send(gate, get_request("/", Some(&key))?).await.is_err());
    Ok(())
}

/// Waits until Prometheus answers with data that fit.
async fn prometheus(address: SocketAddr, path: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
    let seen = async || {
        let data = http::get(address, path).await.ok()?.json().ok()?["data"].take();
        fits(&data).then_some(data)
    };
    eventually(&format!("Prometheus at {path}"), seen).await
}

/// A query that Prometheus can run. A percent sign stands before each byte that a URL may not have.
async fn answer(address: SocketAddr, query: &str) -> Result<Value> {
    let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
    http::get(address, &format!("/api/v1/query?query={encoded}")).await?.json()
}

#[tokio::test]
async fn up_with_observe_runs_prometheus_which_reads_the_stack_and_runs_each_query_of_the_dashboards() -> Result<()> {
    let target = own_target()?;
    let port = || Port::reserve(LOCAL.ip());
    let ports = [port()?, port()?, port()?, port()?, port()?];
    let mut without = up(target.path(), &ports);
    let output = without.arg("--observe").env("PATH", target.path()).output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.lines().count() == 1, "{error}");
    assert!(error.contains("`apt-get install prometheus`"), "{error}");

    let home = paths::target().join("tools/prometheus");
    if !unpack_debian(&["prometheus"], &home, &silently)? {
        println!("skipped: apt-get cannot fetch Debian's package prometheus");
        return Ok(());
    }
    let mut path = vec![home.join("usr/bin")];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut with = up(target.path(), &ports);
    with.arg("--observe").env("PATH", std::env::join_paths(path)?);
    let log = Log::create(&target.path().join("up.log"))?;
    let up = Process::spawn("cargo xtask up", with, &log, Signal::SIGTERM)?;
    let ready = async || log.text().lines().any(|line| line == "ready").then_some(());
    up.eventually("cargo xtask up to be ready", ready).await?;
    let address = ports[3].address();
    log.wait_for(&format!("http://{address}/alerts")).await?;

    let is_up = |target: &Value| target["health"] == "up";
    let all_up = |data: &Value| {
        data["activeTargets"].as_array().is_some_and(|targets| targets.len() == 2 && targets.iter().all(is_up))
    };
    prometheus(address, "/api/v1/targets", all_up).await?;
    let rules = prometheus(address, "/api/v1/rules", |data| data["groups"][1]["rules"][0]["health"] == "ok").await?;
    let names = rules["groups"].as_array().context("no groups")?.iter().map(|group| &group["name"]);
    assert_eq!(names.collect::<Vec<_>>(), ["portcullis-control-plane", "portcullis-envoy"]);
    for query in dashboards::queries()? {
        let reply = answer(address, &query).await?;
        assert_eq!(reply["status"], "success", "{query}: {reply}");
    }
    let in_step = "sum(portcullis_store_revision >= bool scalar(max(portcullis_mirror_revision)))";
    let reply = answer(address, in_step).await?;
    assert_eq!(reply["data"]["result"][0]["value"][1], "1", "{reply}");

    let status = up.stop(Signal::SIGTERM).await?;
    ensure!(status.success(), "{status}: {}", log.tail(20));
    assert!(http::get(address, "/-/ready").await.is_err());
    Ok(())
}
