//! The filter as it is shipped: built for WASI, then rid of the exports that it does not need, then measured.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use filter_build::{compiled, strip};
use portcullis_tests::paths;
use tempfile::TempDir;

use crate::output::{progress, say};
use crate::run::{cargo, need_target, run};

pub(crate) use filter_build::TARGET;

/// The filter is downloaded, kept and compiled by every Envoy: it must not grow unnoticed.
const MOST_BYTES: u64 = 400 * 1024;

/// The header that traps a VM stands in filters that were built for tests of faults, and in no other.
const TRAP: &str = "x-portcullis-trap";

/// What to build.
#[derive(Args)]
pub(crate) struct Options {
    /// Also what tests of faults need: target/portcullis-trap.wasm, which must not be shipped, and a clock to preload.
    #[arg(long)]
    for_faults: bool,
}

/// Builds it.
pub(crate) fn wasm(options: &Options) -> Result<()> {
    build()?;
    if options.for_faults { build_for_faults() } else { Ok(()) }
}

/// Builds the filter that does nothing; gives it as the SDK makes it, with all exports, and as this one is shipped.
pub(crate) fn build_empty() -> Result<[PathBuf; 2]> {
    need_target(TARGET)?;
    progress("building the filter that does nothing");
    compile("empty-filter", &[])?;
    let stripped = paths::target().join("empty-filter.wasm");
    let built = compiled(paths::target(), "empty_filter");
    strip(&built, &stripped)?;
    Ok([built, stripped])
}

/// Builds target/portcullis.wasm.
pub(crate) fn build() -> Result<()> {
    need_target(TARGET)?;
    progress("building the filter");
    compile("filter", &[])?;
    let built = compiled(paths::target(), "filter");
    let shipped = paths::target().join("portcullis.wasm");
    strip(&built, &shipped)?;
    let filter = std::fs::read(&shipped)?;
    let traps = filter.windows(TRAP.len()).any(|part| part == TRAP.as_bytes());
    ensure!(!traps, "{} traps on demand: it was built with the feature for tests of faults", shipped.display());
    let bytes = filter.len() as u64;
    say(&format!("{}: {bytes} bytes ({} KiB; at most {})", shipped.display(), bytes / 1024, MOST_BYTES / 1024));
    ensure!(bytes <= MOST_BYTES, "the filter has grown beyond {} KiB", MOST_BYTES / 1024);
    Ok(())
}

/// Builds what only tests of faults need.
pub(crate) fn build_for_faults() -> Result<()> {
    need_target(TARGET)?;
    progress("building the filter that traps on demand");
    // In a place of its own: cargo gives both filters one name, and takes whichever is there for the one it is asked for.
    let apart = paths::target().join("faults");
    let folder = apart.to_str().context("the path of the target directory is not text")?;
    compile("filter", &["--features", "trap", "--target-dir", folder])?;
    strip(&compiled(&apart, "filter"), &paths::trap_wasm())?;
    run(cargo(&["build", "--locked", "--package", "shifted-clock"]))
}

/// Builds the filter once more, from a copy of the sources in another directory, and compares the bytes.
pub(crate) fn check_reproducible() -> Result<()> {
    progress("building the filter in another directory");
    let elsewhere = TempDir::with_prefix("portcullis-elsewhere-")?;
    copy_sources(paths::workspace(), elsewhere.path())?;
    let mut build = cargo(&[]);
    build.current_dir(elsewhere.path()).env("CARGO_TARGET_DIR", elsewhere.path().join("target"));
    filter_build::compile(build, "filter", &[])?;
    let again = elsewhere.path().join("portcullis.wasm");
    strip(&compiled(&elsewhere.path().join("target"), "filter"), &again)?;
    let shipped = paths::target().join("portcullis.wasm");
    let same = std::fs::read(&again)? == std::fs::read(&shipped)?;
    ensure!(same, "{} is not what the same sources become in another directory", shipped.display());
    Ok(())
}

/// Copies a directory without what cargo and git keep there.
fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let (entry, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        if name == "target" || name == ".git" {
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

fn compile(package: &str, more: &[&str]) -> Result<()> {
    filter_build::compile(cargo(&[]), package, more)
}
