//! Step `openapi`: a linter examines the OpenAPI document, two generators make clients from it, and the clients are
//! compiled and used. An error or a warning of any of these programs fails the step.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis_harness::control_plane::{ControlPlane, Settings};
use portcullis_harness::log::Log;
use portcullis_harness::output::say;
use portcullis_harness::paths;
use portcullis_harness::postgres::Postgres;
use serde_json::Value;

use crate::tools;

/// Time limit of each program. Each takes seconds.
const LONGEST: Duration = Duration::from_secs(60);

const RULES: &str = include_str!("../openapi/redocly.yaml");
const TYPESCRIPT_PROGRAM: &str = include_str!("../openapi/client.ts");
const PYTHON_PROGRAM: &str = include_str!("../openapi/client.py");

/// Examines the document of the control plane that is built.
pub(crate) async fn check() -> Result<()> {
    let home = tempfile::TempDir::with_prefix("portcullis-openapi-")?;
    let home = home.path();
    let mut openapi = Command::new(paths::control_plane());
    openapi.arg("openapi");
    let document = succeeded("portcullis openapi", &done(openapi).await?)?;
    let parsed: Value = serde_json::from_str(&document).context("portcullis openapi prints no JSON")?;
    for (name, text) in
        [("openapi.json", document.as_str()), ("redocly.yaml", RULES), ("client.ts", TYPESCRIPT_PROGRAM)]
    {
        std::fs::write(home.join(name), text)?;
    }
    let programs = tools::node_programs()?;
    lint(&programs, home, &parsed).await?;
    typescript(&programs, home).await?;
    python(home).await
}

async fn lint(programs: &tools::NodePrograms, home: &Path, document: &Value) -> Result<()> {
    let mut redocly = programs.redocly();
    redocly.current_dir(home).args(["lint", "openapi.json", "--config", "redocly.yaml", "--format", "json"]);
    let output = done(redocly).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found: Value =
        serde_json::from_str(&text).with_context(|| format!("redocly did not lint: {}", all_of(&output)))?;
    let problems: Vec<String> = found["problems"].as_array().into_iter().flatten().map(problem).collect();
    let clean = output.status.success() && found["totals"]["errors"] == 0 && found["totals"]["warnings"] == 0;
    ensure!(clean && problems.is_empty(), "redocly rejects the OpenAPI document:\n{}", problems.join("\n"));
    let paths = document["paths"].as_object().into_iter().flatten();
    let operations: usize = paths.map(|(_, path)| path.as_object().map_or(0, serde_json::Map::len)).sum();
    say(&format!("redocly: {operations} operations, no error, no warning"));
    Ok(())
}

fn problem(problem: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let place = text(&problem["location"][0]["pointer"]);
    format!("{}: {} ({place})", text(&problem["ruleId"]), text(&problem["message"]))
}

async fn typescript(programs: &tools::NodePrograms, home: &Path) -> Result<()> {
    let mut generate = programs.program("openapi-typescript/bin/cli.js");
    generate.current_dir(home).args(["openapi.json", "--redocly", "redocly.yaml", "--output", "types.ts"]);
    let told = succeeded("openapi-typescript", &done(generate).await?)?;
    // It marks warnings with a sign, and goes on.
    ensure!(!told.contains('⚠') && !told.to_lowercase().contains("warn"), "openapi-typescript warns: {told}");
    let mut compile = programs.program("typescript/bin/tsc");
    compile.current_dir(home).args(["--noEmit", "--strict", "--noUncheckedIndexedAccess", "types.ts", "client.ts"]);
    succeeded("tsc", &done(compile).await?)?;
    let lines = std::fs::read_to_string(home.join("types.ts"))?.lines().count();
    say(&format!("openapi-typescript: {lines} lines of types, which compile with a program that uses them"));
    Ok(())
}

async fn python(home: &Path) -> Result<()> {
    let (mut generate, modules) = tools::openapi_python_client()?;
    let config = paths::workspace().join("docs/openapi-python-client.yaml");
    generate.current_dir(home).args(["generate", "--path", "openapi.json", "--output-path", "python"]);
    generate.args(["--fail-on-warning", "--config"]).arg(config);
    let told = succeeded("openapi-python-client", &done(generate).await?)?;
    ensure!(!told.to_lowercase().contains("warn"), "openapi-python-client warns: {told}");

    let server = Postgres::private().await?;
    let database = server.create_database().await?;
    let log = Log::create(&home.join("control-plane.log"))?;
    let control_plane = ControlPlane::start(Settings::generous(&database)?, home, log).await?;
    let admin_key = control_plane.settings().admin_key;
    std::fs::write(home.join("client.py"), PYTHON_PROGRAM)?;
    let mut program = Command::new("python3");
    let path = std::env::join_paths([home.join("python"), modules])?;
    let address = format!("http://{}", control_plane.address());
    program.current_dir(home).env("PYTHONPATH", path).args(["client.py", &address, admin_key.reveal()]);
    let told = succeeded("the program that uses the Python client", &done(program).await?)?;
    say(&format!("openapi-python-client: {}", told.trim()));
    Ok(())
}

/// Runs a program to its end, for [`LONGEST`] at most.
async fn done(command: Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut command = tokio::process::Command::from(command);
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(LONGEST, output).await;
    output.with_context(|| format!("{name} took more than {} s", LONGEST.as_secs()))?.context(name)
}

/// What a program printed, if it succeeded.
fn succeeded(name: &str, output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{name} failed ({}): {}", output.status, all_of(output));
    Ok(all_of(output))
}

fn all_of(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
