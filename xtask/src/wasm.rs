//! The filter as it is shipped: built for WASI, then rid of the exports that it does not need, then measured.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use portcullis_tests::paths;

use crate::output::{progress, say};
use crate::run::{cargo, need_target, run};

/// Where the filter runs.
pub(crate) const TARGET: &str = "wasm32-wasip1";

/// The filter is downloaded, kept and compiled by every Envoy: it must not grow unnoticed. It was below 300 KiB when all
/// that it knew of a key was one header and its limits; policies, key sources, networks, roles, plans, shares, quotas and
/// credits took the rest; trailers, every line of a header and the id of a refusal some of it.
const MOST_BYTES: u64 = 432 * 1024;

/// What Envoy calls. The SDK exports every callback there is, and Envoy goes into the VM for each that is exported: for
/// request bodies, responses and logs too, which this filter has no part in. Leaving those out saves about 4 µs a request.
const EXPORTS: [&str; 13] = [
    // The VM itself.
    "memory",
    "_initialize",
    "_start",
    // Where Envoy puts what hostcalls return.
    "malloc",
    "proxy_on_memory_allocate",
    // The life of a context.
    "proxy_on_context_create",
    "proxy_on_vm_start",
    "proxy_on_configure",
    "proxy_on_delete",
    // What the filter does.
    "proxy_on_tick",
    "proxy_on_request_headers",
    // Only for requests that have some.
    "proxy_on_request_trailers",
    "proxy_on_http_call_response",
];
/// A function whose name is the version of the interface.
const ABI_EXPORT: &str = "proxy_abi_version_";

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
    let built = paths::target().join(TARGET).join("wasm/empty_filter.wasm");
    strip(&built, &stripped)?;
    Ok([built, stripped])
}

/// Builds target/portcullis.wasm.
pub(crate) fn build() -> Result<()> {
    need_target(TARGET)?;
    progress("building the filter");
    compile("filter", &[])?;
    let built = paths::target().join(TARGET).join("wasm/filter.wasm");
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
    strip(&apart.join(TARGET).join("wasm/filter.wasm"), &paths::trap_wasm())?;
    run(cargo(&["build", "--locked", "--package", "shifted-clock"]))
}

fn compile(package: &str, more: &[&str]) -> Result<()> {
    let mut build = cargo(&["build", "--locked", "--package", package, "--target", TARGET, "--profile", "wasm"]);
    build.args(more);
    run(build)
}

/// Removes the exports that are not in the list, and whatever only they used.
fn strip(from: &Path, to: &Path) -> Result<()> {
    let mut module = walrus::Module::from_file(from).map_err(|error| anyhow!("{}: {error}", from.display()))?;
    let needed = |name: &str| EXPORTS.contains(&name) || name.starts_with(ABI_EXPORT);
    let spare: Vec<_> = module.exports.iter().filter(|export| !needed(&export.name)).map(walrus::Export::id).collect();
    for export in spare {
        module.exports.delete(export);
    }
    walrus::passes::gc::run(&mut module);
    // Envoys that start meanwhile see the old file or the new one, never a part.
    let part = to.with_extension("wasm.part");
    std::fs::write(&part, module.emit_wasm()).with_context(|| format!("cannot write {}", part.display()))?;
    std::fs::rename(&part, to).with_context(|| format!("cannot write {}", to.display()))
}
