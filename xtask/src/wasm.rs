//! `cargo xtask wasm`: the filter as it is shipped, and the check that its build is reproducible.

use anyhow::{Result, ensure};
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
    paths::copy_sources(paths::workspace(), elsewhere.path())?;
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
