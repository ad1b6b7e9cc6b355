//! `cargo xtask wasm`: the filter as it is shipped, and the check that its build is reproducible.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::Args;
use filter_build::{compiled, strip};
use portcullis_harness::cargo::cargo;
use portcullis_harness::output::progress;
use portcullis_harness::{compile, paths};
use tempfile::TempDir;

/// What to build.
#[derive(Args)]
pub(crate) struct Options {
    /// Also build what tests of faults need: target/portcullis-trap.wasm, which must not be shipped, and a clock to preload.
    #[arg(long)]
    for_faults: bool,
}

pub(crate) fn wasm(options: &Options) -> Result<()> {
    compile::filter()?;
    if options.for_faults { compile::for_faults() } else { Ok(()) }
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
    ensure!(same, "{} differs from a build of the same sources in another directory", shipped.display());
    Ok(())
}

/// Copies a directory without target directories and .git.
pub(crate) fn copy_sources(from: &Path, to: &Path) -> Result<()> {
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
