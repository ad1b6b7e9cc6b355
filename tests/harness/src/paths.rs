//! Paths of the workspace, of what cargo built, and of directories that another user can enter.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};

use crate::cargo::{cargo, read};

/// Files by which the root of the workspace is recognised.
const OF_THE_ROOT: [&str; 3] = ["Cargo.toml", "tests/Cargo.toml", "envoy/minimal.yaml"];

/// The root of the workspace: of `CARGO_MANIFEST_DIR`, which cargo sets, or else of the current directory. The directory in
/// which this program was compiled does not matter, since a checkout may be copied with its target directory.
pub fn find_workspace() -> Result<&'static Path> {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(root) = ROOT.get() {
        return Ok(root);
    }
    let (start, named_by) = match std::env::var_os("CARGO_MANIFEST_DIR") {
        Some(directory) => (PathBuf::from(directory), "CARGO_MANIFEST_DIR"),
        None => (std::env::current_dir().context("the current directory is gone")?, "the current directory"),
    };
    let is_root = |directory: &&Path| OF_THE_ROOT.iter().all(|file| directory.join(file).is_file());
    let root = start.ancestors().find(is_root).with_context(|| {
        let start = start.display();
        format!("{named_by}, {start}, is not in a checkout of Portcullis; run this with cargo, or in a checkout")
    })?;
    Ok(ROOT.get_or_init(|| root.to_owned()))
}

/// The root of the workspace. Panics where [`find_workspace`] fails.
pub fn workspace() -> &'static Path {
    find_workspace().unwrap_or_else(|error| panic!("{error}"))
}

/// Cargo's target directory, wherever the environment or a configuration file puts it.
pub fn target() -> &'static Path {
    static TARGET: OnceLock<PathBuf> = OnceLock::new();
    TARGET.get_or_init(|| {
        let metadata = read(cargo(&["metadata", "--format-version", "1", "--no-deps", "--offline"]));
        let metadata = metadata.unwrap_or_else(|error| panic!("{error:#}"));
        let metadata: serde_json::Value = serde_json::from_str(&metadata).expect("cargo metadata speaks JSON");
        metadata["target_directory"].as_str().expect("cargo metadata names the target directory").into()
    })
}

/// The filter as Envoy loads it. `PORTCULLIS_WASM` names another.
pub fn wasm() -> PathBuf {
    std::env::var_os("PORTCULLIS_WASM").map_or_else(|| target().join("portcullis.wasm"), PathBuf::from)
}

/// The filter that traps on demand, for tests of faults.
pub fn trap_wasm() -> PathBuf {
    target().join("portcullis-trap.wasm")
}

/// The library that replaces the clock of a process that preloads it.
pub fn shifted_clock() -> PathBuf {
    target().join("debug/libshifted_clock.so")
}

static CONTROL_PLANE: OnceLock<PathBuf> = OnceLock::new();

/// The control plane that the development profile built, unless `CONTROL_PLANE_BIN` names another.
pub fn control_plane() -> PathBuf {
    let built = || CONTROL_PLANE.get().cloned().unwrap_or_else(|| target().join("debug/portcullis"));
    std::env::var_os("CONTROL_PLANE_BIN").map_or_else(built, PathBuf::from)
}

/// Sets the result of [`control_plane`]. Only the first call has an effect.
pub fn use_control_plane(binary: PathBuf) {
    let _ = CONTROL_PLANE.set(binary);
}

/// A directory that every user of the machine can reach. PostgreSQL refuses to run as root, and the user that it runs as
/// instead cannot enter `/root`, for example. `wanted` then becomes a link to a directory below `/var/tmp`.
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

/// Copies a directory without target directories and .git.
pub fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let (entry, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        if name == "target" || name == ".git" || entry == target() {
            continue;
        }
        if entry.is_dir() {
            copy_sources(&entry, &to.join(name))?;
        } else {
            std::fs::copy(&entry, to.join(name)).with_context(|| format!("cannot copy {}", entry.display()))?;
        }
    }
    Ok(())
}

/// The Markdown files below a directory, by name.
pub fn markdown_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut pages = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            pages.append(&mut markdown_below(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    pages.sort();
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Asks this very program, as it was built here, where the workspace and the target directory are.
    fn run_in(directory: &Path, manifest_directory: Option<&Path>) -> (String, bool) {
        let mut this = Command::new(std::env::current_exe().unwrap());
        this.args(["--exact", "paths::tests::where_it_is", "--ignored", "--nocapture"]);
        this.current_dir(directory).env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_TARGET_DIR");
        if let Some(manifest_directory) = manifest_directory {
            this.env("CARGO_MANIFEST_DIR", manifest_directory);
        }
        let output = this.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (text.into_owned(), output.status.success())
    }

    #[test]
    #[ignore = "other tests run it as a program of its own"]
    #[allow(clippy::print_stdout, reason = "the test that runs it reads it")]
    fn where_it_is() {
        println!("workspace {} target {};", workspace().display(), target().display());
    }

    #[test]
    fn a_program_that_was_built_elsewhere_works_on_the_checkout_that_cargo_runs_it_for() {
        let home = tempfile::TempDir::with_prefix("portcullis-copy-").unwrap();
        let copy = home.path().canonicalize().unwrap().join("checkout");
        copy_sources(workspace(), &copy).unwrap();
        let expected = format!("workspace {copy} target {copy}/target;", copy = copy.display());
        for (directory, manifest_directory) in
            [(workspace(), Some(copy.join("xtask"))), (&copy, Some(copy.join("tests"))), (&copy.join("docs"), None)]
        {
            let (output, _) = run_in(directory, manifest_directory.as_deref());
            assert!(output.contains(&expected), "{} and {manifest_directory:?}: {output}", directory.display());
        }
    }

    #[test]
    fn a_directory_that_is_no_checkout_is_named_with_the_remedy() {
        let home = tempfile::TempDir::with_prefix("portcullis-none-").unwrap();
        let path = home.path().canonicalize().unwrap();
        for (manifest_directory, named_by) in
            [(Some(path.as_path()), "CARGO_MANIFEST_DIR"), (None, "the current directory")]
        {
            let (output, succeeded) = run_in(&path, manifest_directory);
            let expected =
                format!("{named_by}, {}, is not in a checkout of Portcullis; run this with cargo", path.display());
            assert!(!succeeded && output.contains(&expected), "{output}");
        }
    }
}
