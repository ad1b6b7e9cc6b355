//! Compiles what the stack runs: the filter as it is shipped, variants of it, and the control plane.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use filter_build::{compiled, strip};

use crate::cargo::{cargo, need_target, run};
use crate::output::{progress, say};
use crate::paths;

pub use filter_build::TARGET as FILTER_TARGET;

/// Upper bound of the filter's size, so that it does not grow unnoticed: every Envoy downloads, stores and compiles it. It
/// was below 300 KiB with one key header and rate limits. Policies, key sources, networks, roles, plans, quotas, credits,
/// trailers, signed usage, allowances, attributes and captured keys took the rest.
const MAX_FILTER_BYTES: u64 = 460 * 1_024;

/// The header that traps a VM. Only filters built for tests of faults contain it.
const TRAP: &str = "x-portcullis-trap";

/// Compiles the filter into target/portcullis.wasm, and checks its size.
pub fn filter() -> Result<()> {
    need_target(FILTER_TARGET)?;
    progress("building the filter");
    compile("filter", &[])?;
    let built = compiled(paths::target(), "filter");
    let shipped = paths::target().join("portcullis.wasm");
    strip(&built, &shipped)?;
    let filter = std::fs::read(&shipped)?;
    let traps = filter.windows(TRAP.len()).any(|part| part == TRAP.as_bytes());
    ensure!(!traps, "{} was built with the feature `trap`, which is for tests only", shipped.display());
    let bytes = filter.len() as u64;
    let (kib, max_kib) = (bytes / 1024, MAX_FILTER_BYTES / 1024);
    say(&format!("{}: {bytes} bytes ({kib} KiB; at most {max_kib})", shipped.display()));
    ensure!(bytes <= MAX_FILTER_BYTES, "the filter is larger than {max_kib} KiB");
    Ok(())
}

/// Compiles what only tests of faults need: a filter that traps on demand, and a clock to preload.
pub fn for_faults() -> Result<()> {
    need_target(FILTER_TARGET)?;
    progress("building the filter that traps on demand");
    // In a directory of its own: both filters have one file name, and cargo would take one for the other.
    let apart = paths::target().join("faults");
    let folder = apart.to_str().context("the path of the target directory is not UTF-8")?;
    compile("filter", &["--features", "trap", "--target-dir", folder])?;
    strip(&compiled(&apart, "filter"), &paths::trap_wasm())?;
    run(cargo(&["build", "--locked", "--package", "shifted-clock"]))
}

/// Compiles a filter that does nothing, with no more exports than ours.
pub fn empty_filter() -> Result<PathBuf> {
    need_target(FILTER_TARGET)?;
    progress("building the filter that does nothing");
    compile("empty-filter", &[])?;
    let stripped = paths::target().join("empty-filter.wasm");
    strip(&compiled(paths::target(), "empty_filter"), &stripped)?;
    Ok(stripped)
}

/// Compiles the control plane with the development profile, with the dependencies that this program and the tests have
/// too.
pub fn control_plane() -> Result<()> {
    progress("building the control plane (some minutes the first time)");
    run(cargo(&["build", "--locked", "--workspace", "--bin", "portcullis"]))
}

/// Compiles the control plane with all optimisations, as it is shipped, and lets [`paths::control_plane`] name it.
pub fn optimised_control_plane() -> Result<()> {
    progress("building the control plane with all optimisations (some minutes the first time)");
    run(cargo(&["build", "--locked", "--release", "--package", "control-plane"]))?;
    paths::use_control_plane(paths::target().join("release/portcullis"));
    Ok(())
}

fn compile(package: &str, more: &[&str]) -> Result<()> {
    filter_build::compile(cargo(&[]), package, more)
}
