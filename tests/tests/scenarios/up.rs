//! `cargo xtask up --upstream URL` as a process of its own: it starts, protects the service, and ends on SIGTERM.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use contract::key::Secret;
use contract::outcome::Outcome;
use portcullis_harness::cargo::{cargo, run};
use portcullis_tests::demo::DemoApi;
use portcullis_tests::expect::{assert_refused, assert_upstream};
use portcullis_tests::http::{get_request, send};
use portcullis_tests::log::Log;
use portcullis_tests::paths;
use portcullis_tests::ports::{LOCAL, Port};
use portcullis_tests::process::{Process, Signal};
use portcullis_tests::rest::Rest;
use portcullis_tests::wait::eventually;
use serde_json::json;
use tempfile::TempDir;

/// The value of a variable in the file that `up` writes.
fn variable(environment: &str, name: &str) -> Result<String> {
    let value = environment.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix("='")?.strip_suffix('\''));
    Ok(value.with_context(|| format!("no {name} in {environment}"))?.to_owned())
}

#[tokio::test]
async fn up_protects_the_service_that_upstream_names_until_it_is_told_to_end() -> Result<()> {
    run(cargo(&["build", "--locked", "--workspace", "--bin", "xtask"]))?;
    // A target directory of its own, so that a developer's `cargo xtask up` is not disturbed. PostgreSQL may run as another
    // user, who must be able to enter it.
    let target = TempDir::with_prefix("portcullis-")?;
    std::fs::set_permissions(target.path(), PermissionsExt::from_mode(0o755))?;
    symlink(paths::target().join("tools"), target.path().join("tools"))?;
    let service = DemoApi::start(LOCAL).await?;
    let ports = [Port::reserve(LOCAL.ip())?, Port::reserve(LOCAL.ip())?, Port::reserve(LOCAL.ip())?];
    let mut up = Command::new(paths::target().join("debug/xtask"));
    up.args(["up", "--upstream", &format!("http://{}", service.address())]);
    for (flag, port) in ["--envoy-port", "--control-plane-port", "--envoy-admin-port"].into_iter().zip(&ports) {
        up.args([flag, &port.address().port().to_string()]);
    }
    up.current_dir(paths::workspace()).env("CARGO_TARGET_DIR", target.path());
    up.env("CONTROL_PLANE_BIN", paths::control_plane()).env("PORTCULLIS_WASM", paths::wasm());
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

    let status = up.stop(Signal::SIGTERM).await?;
    ensure!(status.success(), "{status}: {}", log.tail(20));
    assert!(send(gate, get_request("/", Some(&key))?).await.is_err());
    Ok(())
}
