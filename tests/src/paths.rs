//! Where things are: the workspace, what cargo built, and directories that another user can reach.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};

/// The root of the workspace.
#[must_use]
pub fn workspace() -> &'static Path {
    // The crate lies one folder below it.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("."))
}

/// Cargo's target directory, wherever the environment or a configuration file puts it.
///
/// # Panics
/// If `cargo metadata` does not answer.
#[must_use]
pub fn target() -> &'static Path {
    static TARGET: OnceLock<PathBuf> = OnceLock::new();
    TARGET.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = std::process::Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
            .current_dir(workspace())
            .output()
            .expect("cargo metadata cannot be run");
        let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata speaks JSON");
        metadata["target_directory"].as_str().expect("cargo metadata names the target directory").into()
    })
}

/// The filter as Envoy loads it. `PORTCULLIS_WASM` names another.
#[must_use]
pub fn wasm() -> PathBuf {
    std::env::var_os("PORTCULLIS_WASM").map_or_else(|| target().join("portcullis.wasm"), PathBuf::from)
}

/// The filter with a switch that traps its VM, for tests of faults.
#[must_use]
pub fn trap_wasm() -> PathBuf {
    target().join("portcullis-trap.wasm")
}

/// The library that shifts the clock of a process that it is preloaded into.
#[must_use]
pub fn shifted_clock() -> PathBuf {
    target().join("debug/libshifted_clock.so")
}

static CONTROL_PLANE: OnceLock<PathBuf> = OnceLock::new();

/// The control plane. `CONTROL_PLANE_BIN` names another than the one that the development profile built.
#[must_use]
pub fn control_plane() -> PathBuf {
    let built = || CONTROL_PLANE.get().cloned().unwrap_or_else(|| target().join("debug/control-plane"));
    std::env::var_os("CONTROL_PLANE_BIN").map_or_else(built, PathBuf::from)
}

/// From now on, [`control_plane`] is this one. The first that is named stays.
pub fn use_control_plane(binary: PathBuf) {
    let _ = CONTROL_PLANE.set(binary);
}

/// A directory of the given name that every user of the machine can reach. PostgreSQL refuses to run as root, and the
/// user that it runs as instead cannot enter, for example, `/root`: then `wanted` becomes a link to a directory below
/// `/var/tmp` that can be reached.
///
/// # Errors
/// If neither can be made.
pub fn reachable(wanted: &Path) -> Result<PathBuf> {
    if let Some(parent) = wanted.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    if !nix::unistd::geteuid().is_root() || ancestors_can_be_entered(wanted) {
        std::fs::create_dir_all(wanted).with_context(|| format!("cannot make {}", wanted.display()))?;
        return Ok(wanted.to_owned());
    }
    let mut hasher = DefaultHasher::new();
    wanted.hash(&mut hasher);
    let real = PathBuf::from(format!("/var/tmp/portcullis-{:016x}", hasher.finish()));
    std::fs::create_dir_all(&real).with_context(|| format!("cannot make {}", real.display()))?;
    if std::fs::symlink_metadata(wanted).is_err() {
        symlink(&real, wanted).with_context(|| format!("cannot link {}", wanted.display()))?;
    }
    Ok(real)
}

fn ancestors_can_be_entered(path: &Path) -> bool {
    path.ancestors()
        .skip(1)
        .all(|directory| std::fs::metadata(directory).is_ok_and(|metadata| metadata.mode() & 0o001 != 0))
}
