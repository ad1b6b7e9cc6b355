//! `cargo xtask test`: every check and every ring of tests, in order, each under a heading and with its time; what failed
//! is said at the end. Nothing is skipped in silence.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use portcullis_tests::postgres::{Database, Postgres};
use portcullis_tests::{containers, paths, tools};
use serde_json::Value;

use crate::output::{progress, say};
use crate::run::{cargo, need_target, read, run};
use crate::{api, dependencies, docs, metrics, openapi, sqlx, wasm};

/// Which of the steps.
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
    /// Dependencies: sources, licences, none banned, unused or known to be faulty.
    Dependencies,
    /// docker-compose.yml and the Dockerfile are well-formed, and what they name is there.
    Compose,
    /// The descriptions of the queries fit the queries and migrations.
    Sqlx,
    /// The filter builds, is small enough, and is the same to the byte when it is built elsewhere.
    Wasm,
    /// Ring 1: unit tests beside the code.
    Unit,
    /// Ring 1, as WebAssembly: the contract in Node.
    ContractWasm,
    /// Ring 2: the control plane's router on real PostgreSQL.
    Database,
    /// Requests made out of the OpenAPI document: no answer of 500 and more, none that it does not describe.
    Api,
    /// The OpenAPI document passes a linter; clients that are generated from it compile and work.
    Openapi,
    /// promtool finds no fault with the metrics that Prometheus reads.
    Metrics,
    /// Rings 3 and 4: the built filter in real Envoy, with the whole stack.
    EndToEnd,
    /// The main scenarios and every shipped configuration on each supported version of Envoy.
    EnvoyVersions,
}

/// The programs of tests that need something started, and have steps of their own.
const RINGS: [&str; 3] = ["database", "scenarios", "measured"];

/// What is run on each version of Envoy: a key from its making to its end, counted, over TLS; what an Envoy does beside
/// Portcullis, and a policy; browsers; and that Envoy takes each file as it is shipped.
const MAIN_SCENARIOS: [&str; 4] =
    ["hardened::a_key_works_", "existing::health_checks_", "cors::a_browser_", "shipped::envoy_takes_"];

/// At the same time; each is a whole stack, and each stack has several processes.
const END_TO_END_THREADS: &str = "--test-threads=2";

/// Runs them all.
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
            Ok(Done::NotHere(why)) => why,
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
    /// This machine lacks what the step needs; says what.
    NotHere(&'static str),
}

impl Step {
    fn described(self) -> (String, String) {
        let value = self.to_possible_value();
        let name = value.as_ref().map(|value| value.get_name().to_owned()).unwrap_or_default();
        let what = value.and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default();
        (name, what)
    }

    async fn run(self) -> Result<Done> {
        match self {
            Self::Fmt => run(cargo(&["fmt", "--all", "--check"]))?,
            Self::Clippy => {
                run(cargo(&["clippy", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"]))?;
            }
            Self::ClippyWasm => {
                need_target(wasm::TARGET)?;
                let crates = ["--package", "filter", "--package", "contract"];
                let mut clippy = cargo(&["clippy", "--locked", "--target", wasm::TARGET]);
                clippy.args(crates).args(["--", "--deny", "warnings"]);
                run(clippy)?;
            }
            Self::Doc => {
                let mut doc = cargo(&["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
                doc.env("RUSTDOCFLAGS", "--deny warnings");
                run(doc)?;
            }
            Self::Docs => {
                docs::check()?;
                docs::build()?;
            }
            Self::Dependencies => dependencies::check()?,
            Self::Compose => compose()?,
            Self::Sqlx => sqlx::check().await?,
            Self::Wasm => {
                wasm::build()?;
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
            Self::Metrics => {
                build_control_plane()?;
                need_filter()?;
                tools::envoy(&progress)?;
                if !metrics::check().await? {
                    return Ok(Done::NotHere("not checked: there is no promtool, and apt-get cannot fetch it"));
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
                wasm::build_for_faults()?;
                tools::envoy(&progress)?;
                // What scenarios measure is worth printing, and is measured with nothing beside it.
                let program = |name, threads| on_database(tests(&["--test", name, "--", "--show-output", threads]));
                let together = program("scenarios", END_TO_END_THREADS).await;
                program("measured", "--test-threads=1").await?;
                together?;
            }
        }
        Ok(Done::Yes)
    }
}

/// Runs the main scenarios on each version of Envoy, and says at the end on which they failed.
async fn on_each_envoy() -> Result<()> {
    let mut failed = Vec::new();
    for version in tools::ENVOY_VERSIONS {
        let binary = tools::installed_envoy(version, &progress)?;
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

/// Tests of the whole workspace, whichever are chosen: cargo unites the features that the named packages ask for, and
/// for every other choice of packages it would compile most of what they share once more.
fn tests(chosen: &[&str]) -> Command {
    let mut tests = cargo(&["test", "--locked", "--workspace"]);
    tests.args(chosen);
    tests
}

/// Builds target/debug/control-plane out of what the tests are built of: cargo builds a package's program for its tests.
fn build_control_plane() -> Result<()> {
    run(tests(&["--no-run", "--test", "database"]))
}

fn need_filter() -> Result<()> {
    ensure!(paths::wasm().is_file(), "the filter is not built; run `cargo xtask wasm`");
    Ok(())
}

/// All programs of tests in the workspace, so that a new one is not left out.
fn programs() -> Result<Vec<String>> {
    let metadata = read(cargo(&["metadata", "--locked", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata speaks no JSON")?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages.filter_map(|package| package["targets"].as_array()).flatten();
    let programs = targets.filter(|target| target["kind"][0] == "test").filter_map(|target| target["name"].as_str());
    Ok(programs.map(ToOwned::to_owned).collect())
}

/// Runs tests that find a PostgreSQL server of their own at `DATABASE_URL`.
async fn on_database(mut tests: Command) -> Result<()> {
    let server = Postgres::private().await?;
    let Database { url } = server.create_database().await?;
    tests.env("DATABASE_URL", url);
    run(tests)
}

fn contract_wasm() -> Result<()> {
    const TARGET: &str = "wasm32-unknown-unknown";
    need_target(TARGET)?;
    let node = tools::node(&progress)?;
    let version = locked_version("wasm-bindgen")?;
    let home = tools::tools().join(format!("wasm-bindgen-{version}"));
    let runner = home.join("bin/wasm-bindgen-test-runner");
    if !runner.is_file() {
        progress(&format!("installing wasm-bindgen-cli {version} into {} (some minutes)", home.display()));
        let install = |locked: &[&str]| {
            let mut install = cargo(&["install", "--debug", "wasm-bindgen-cli", "--version", &version, "--root"]);
            install.arg(&home).args(["--bin", "wasm-bindgen-test-runner"]).args(locked);
            // Nobody debugs it. Its dependencies are compiled once for all tries.
            install.env("CARGO_PROFILE_DEV_DEBUG", "false");
            install.env("CARGO_TARGET_DIR", paths::target().join("tools/build"));
            run(install)
        };
        // A registry mirror may lag behind the versions that the tool was released with.
        if install(&["--locked"]).is_err() {
            progress("its own Cargo.lock cannot be had from this registry; taking the newest versions that fit");
            install(&[])?;
        }
    }
    let mut path = vec![node.parent().context("Node lies nowhere")?.to_owned()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut tests = cargo(&["test", "--locked", "--package", "contract", "--test", "*", "--target", TARGET]);
    tests.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUNNER", runner).env("PATH", std::env::join_paths(path)?);
    run(tests)
}

/// The version of a crate that Cargo.lock names.
fn locked_version(name: &str) -> Result<String> {
    let lock = std::fs::read_to_string(paths::workspace().join("Cargo.lock"))?;
    let entry = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = lock.split_once(&entry).with_context(|| format!("Cargo.lock names no {name}"))?;
    let (version, _) = rest.split_once('"').context("Cargo.lock is malformed")?;
    Ok(version.to_owned())
}

/// What can be said without a container engine; the scenario `containers` runs what the files have in them.
fn compose() -> Result<()> {
    containers::check(paths::workspace())?;
    let docker = |arguments: &[&str]| {
        let mut docker = Command::new("docker");
        docker.args(arguments).current_dir(paths::workspace());
        docker
    };
    if tools::on_path("docker").is_none() || read(docker(&["compose", "version"])).is_err() {
        progress("this machine has no docker compose to read docker-compose.yml too");
        return Ok(());
    }
    run(docker(&["compose", "config", "--quiet"]))
}
