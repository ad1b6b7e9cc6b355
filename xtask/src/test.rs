//! `cargo xtask test`: every check and every ring of tests, in order. A summary at the end has each step with its time and
//! result. A step that this machine cannot do says so there.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use portcullis_harness::cargo::{cargo, need_target, read, run};
use portcullis_harness::output::{progress, say};
use portcullis_harness::postgres::{Database, Postgres};
use portcullis_harness::tools::{ENVOY_VERSIONS, envoy, installed_envoy, on_path};
use portcullis_harness::{compile, paths};
use serde_json::Value;

use crate::{api, dependencies, docs, metrics, openapi, sqlx, tools, wasm};

/// Which steps to run.
#[derive(Args)]
pub(crate) struct Options {
    /// Do only this step. Can be given several times.
    #[arg(long, value_name = "STEP")]
    only: Vec<Step>,
}

/// The steps, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Step {
    /// Formatting.
    Fmt,
    /// Lints of everything.
    Clippy,
    /// Lints of the filter and contract as WebAssembly.
    ClippyWasm,
    /// Documentation builds without warnings.
    Doc,
    /// The book builds; links, anchors, paths and line widths of the documents are right.
    Docs,
    /// Dependencies: sources, licences, bans, known vulnerabilities, and none that is unused.
    Dependencies,
    /// docker-compose.yml and the Dockerfile are well-formed, and the files that they name exist.
    Compose,
    /// The committed descriptions of queries fit the queries and migrations.
    Sqlx,
    /// The filter builds, is small enough, and a build in another directory gives the same bytes.
    Wasm,
    /// Ring 1: unit tests beside the code.
    Unit,
    /// Ring 1, as WebAssembly: the contract in Node.
    ContractWasm,
    /// Ring 2: the control plane's router on real PostgreSQL.
    Database,
    /// Requests generated from the OpenAPI document get responses that it describes, and no status of 500 or above.
    Api,
    /// The OpenAPI document passes a linter; clients generated from it compile and work.
    Openapi,
    /// promtool accepts the alerts, and their tests pass.
    Alerts,
    /// promtool accepts the metrics that Prometheus reads.
    Metrics,
    /// Rings 3 and 4: the built filter in real Envoy, with the whole stack.
    EndToEnd,
    /// The main scenarios and every shipped configuration on each supported version of Envoy.
    EnvoyVersions,
}

/// Test programs with steps of their own: they need a database or the built filter.
const RINGS: [&str; 3] = ["database", "scenarios", "measured"];

/// The scenarios for each version of Envoy: a key from creation to revocation, counted, over TLS; other filters beside
/// Portcullis, and a policy; browsers; and every shipped configuration file.
const MAIN_SCENARIOS: [&str; 4] =
    ["hardened::a_key_works_", "existing::health_checks_", "cors::a_browser_", "shipped::envoy_takes_"];

/// Each scenario is a whole stack of several processes.
const END_TO_END_THREADS: &str = "--test-threads=2";

pub(crate) async fn test(options: &Options) -> Result<()> {
    let steps: Vec<Step> = Step::value_variants()
        .iter()
        .copied()
        .filter(|s| options.only.is_empty() || options.only.contains(s))
        .collect();
    let mut results = Vec::new();
    for step in steps {
        let (name, what) = step.described();
        say(&format!("\n=== {name}: {what}"));
        let start = Instant::now();
        let done = step.run().await;
        if let Err(error) = &done {
            say(&format!("FAILED: {error:#}"));
        }
        results.push((name, done, start.elapsed()));
    }
    say("\n=== summary");
    for (name, done, took) in &results {
        let verdict = match done {
            Ok(Done::Yes) => "ok",
            Ok(Done::Incomplete(why)) => why,
            Err(_) => "FAILED",
        };
        say(&format!("{name:<16} {:>6.1} s  {verdict}", took.as_secs_f64()));
    }
    let total: Duration = results.iter().map(|(_, _, took)| *took).sum();
    say(&format!("{:<16} {:>6.1} s", "in all", total.as_secs_f64()));
    let failed = results.iter().filter(|(_, done, _)| done.is_err()).count();
    ensure!(failed == 0, "{failed} of {} steps failed", results.len());
    Ok(())
}

/// The result of a step that did not fail.
enum Done {
    Yes,
    /// This machine lacks something that the step needs. Says what was not checked.
    Incomplete(&'static str),
}

impl Step {
    fn described(self) -> (String, String) {
        let value = self.to_possible_value();
        let name = value.as_ref().map(|value| value.get_name().to_owned()).unwrap_or_default();
        let what = value.and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default();
        (name, what)
    }

    // Longer than a screen: one arm for each step.
    async fn run(self) -> Result<Done> {
        match self {
            Self::Fmt => run(cargo(&["fmt", "--all", "--check"]))?,
            Self::Clippy => {
                run(cargo(&["clippy", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"]))?;
            }
            Self::ClippyWasm => clippy_wasm()?,
            Self::Doc => {
                let mut doc = cargo(&["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
                doc.env("RUSTDOCFLAGS", "--deny warnings");
                run(doc)?;
            }
            Self::Docs => {
                docs::check()?;
                docs::build()?;
            }
            Self::Dependencies => {
                if !dependencies::check()? {
                    return Ok(Done::Incomplete("ok, but known vulnerabilities were not looked for"));
                }
            }
            Self::Compose => compose()?,
            Self::Sqlx => sqlx::check().await?,
            Self::Wasm => {
                compile::filter()?;
                wasm::check_reproducible()?;
            }
            Self::Unit => {
                let mut unit = tests(&["--lib", "--bins"]);
                for program in programs()?.iter().filter(|program| !RINGS.contains(&program.as_str())) {
                    unit.args(["--test", program]);
                }
                run(unit)?;
            }
            Self::ContractWasm => contract_wasm()?,
            Self::Database => on_database(tests(&["--test", "database"])).await?,
            Self::Api => {
                build_control_plane()?;
                api::check().await?;
            }
            Self::Openapi => {
                build_control_plane()?;
                openapi::check().await?;
            }
            Self::Alerts => {
                if !metrics::check_alerts()? {
                    return without_promtool();
                }
            }
            Self::Metrics => {
                build_control_plane()?;
                need_filter()?;
                envoy(&progress)?;
                if !metrics::check().await? {
                    return without_promtool();
                }
            }
            Self::EnvoyVersions => {
                build_control_plane()?;
                need_filter()?;
                on_each_envoy().await?;
            }
            Self::EndToEnd => {
                build_control_plane()?;
                need_filter()?;
                compile::for_faults()?;
                envoy(&progress)?;
                end_to_end().await?;
            }
        }
        Ok(Done::Yes)
    }
}

/// A developer may go on without promtool. CI may not.
fn without_promtool() -> Result<Done> {
    const WHY: &str =
        "not checked: there is no promtool, and apt-get cannot fetch it; install Debian's package prometheus";
    ensure!(std::env::var_os("CI").is_none(), WHY);
    Ok(Done::Incomplete(WHY))
}

fn clippy_wasm() -> Result<()> {
    need_target(compile::FILTER_TARGET)?;
    let crates = ["--package", "filter", "--package", "filter-core", "--package", "limits", "--package", "contract"];
    let mut clippy = cargo(&["clippy", "--locked", "--target", compile::FILTER_TARGET]);
    clippy.args(crates).args(["--", "--deny", "warnings"]);
    run(clippy)
}

/// Runs the scenarios, and then `measured` with nothing beside it. --show-output prints what they measure.
async fn end_to_end() -> Result<()> {
    let program = |name, threads| on_database(tests(&["--test", name, "--", "--show-output", threads]));
    let scenarios = program("scenarios", END_TO_END_THREADS).await;
    program("measured", "--test-threads=1").await?;
    scenarios
}

/// Runs the main scenarios on each version of Envoy. The error names the versions that failed.
async fn on_each_envoy() -> Result<()> {
    let mut failed = Vec::new();
    for version in ENVOY_VERSIONS {
        let binary = installed_envoy(version, &progress)?;
        say(&format!("--- Envoy {version}"));
        let mut scenarios = tests(&["--test", "scenarios", "--", END_TO_END_THREADS]);
        scenarios.args(MAIN_SCENARIOS).env("ENVOY_BIN", binary);
        if let Err(error) = on_database(scenarios).await {
            failed.push(format!("Envoy {version}: {error:#}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// `cargo test` on the whole workspace, whichever tests are selected: cargo unites features over the selected packages, and
/// would compile most shared dependencies once more for every other selection of packages.
fn tests(chosen: &[&str]) -> Command {
    let mut tests = cargo(&["test", "--locked", "--workspace"]);
    tests.args(chosen);
    tests
}

/// Builds target/debug/portcullis with the dependencies of the tests: cargo builds a package's program for its tests.
fn build_control_plane() -> Result<()> {
    run(tests(&["--no-run", "--test", "database"]))
}

fn need_filter() -> Result<()> {
    ensure!(paths::wasm().is_file(), "the filter is not built; run `cargo xtask wasm`");
    Ok(())
}

/// All test programs of the workspace, so that a new one is not left out.
fn programs() -> Result<Vec<String>> {
    let metadata = read(cargo(&["metadata", "--locked", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata prints no JSON")?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages.filter_map(|package| package["targets"].as_array()).flatten();
    let programs = targets.filter(|target| target["kind"][0] == "test").filter_map(|target| target["name"].as_str());
    Ok(programs.map(ToOwned::to_owned).collect())
}

/// Runs tests with a PostgreSQL server of their own at `DATABASE_URL`.
async fn on_database(mut tests: Command) -> Result<()> {
    let server = Postgres::private().await?;
    let Database { url } = server.create_database().await?;
    tests.env("DATABASE_URL", url);
    run(tests)
}

fn contract_wasm() -> Result<()> {
    const TARGET: &str = "wasm32-unknown-unknown";
    need_target(TARGET)?;
    let node = tools::node()?;
    let runner = tools::wasm_bindgen_test_runner()?;
    let mut path = vec![node.parent().context("Node lies nowhere")?.to_owned()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut tests = cargo(&["test", "--locked", "--package", "contract", "--test", "*", "--target", TARGET]);
    tests.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUNNER", runner).env("PATH", std::env::join_paths(path)?);
    run(tests)
}

/// Checks the files without a container engine. The scenario `containers` runs the scripts in them.
fn compose() -> Result<()> {
    run(tests(&["--lib", "containers::"]))?;
    let docker = |arguments: &[&str]| {
        let mut docker = Command::new("docker");
        docker.args(arguments).current_dir(paths::workspace());
        docker
    };
    if on_path("docker").is_none() || read(docker(&["compose", "version"])).is_err() {
        progress("there is no docker compose here that could read docker-compose.yml too");
        return Ok(());
    }
    run(docker(&["compose", "config", "--quiet"]))
}
