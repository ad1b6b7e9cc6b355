//! The build of the filter: compiles it for WASI and removes exports that it does not need. The
//! result is the same to the byte in every directory and for every user.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};

/// Where the filter runs.
pub const TARGET: &str = "wasm32-wasip1";

/// Cargo's profile of the filter.
const PROFILE: &str = "wasm";

/// What Envoy calls. The SDK exports every callback there is, and Envoy goes into the VM for each that is exported: for
/// request bodies, responses and logs too, which this filter has no part in. Leaving those out saves about 4 µs a request.
const EXPORTS: [&str; 14] = [
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
    // For calls on behalf of requests that wait.
    "proxy_on_queue_ready",
];
/// A function whose name is the version of the interface.
const ABI_EXPORT: &str = "proxy_abi_version_";

/// Compiles `package` for WASI by `cargo`, which the caller has set to run in the workspace.
pub fn compile(mut cargo: Command, package: &str, more: &[&str]) -> Result<()> {
    cargo.args(["build", "--locked", "--package", package, "--target", TARGET, "--profile", PROFILE]).args(more);
    // In place of whatever flags the environment or a configuration file sets: those would change the result.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", remap_flags()?.join("\x1f"));
    let status = cargo.status().context("cargo cannot be run")?;
    ensure!(status.success(), "cargo could not build {package} ({status})");
    Ok(())
}

/// Where [`compile`] puts the library of this name, below cargo's target directory.
pub fn compiled(target: &Path, library: &str) -> PathBuf {
    target.join(TARGET).join(PROFILE).join(library).with_extension("wasm")
}

/// Flags for rustc that put fixed names in place of this machine's directories. Panic messages carry paths of source files.
fn remap_flags() -> Result<Vec<String>> {
    let remapped = directories()?.into_iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    Ok(remapped.collect())
}

/// The directories of this machine that hold source files, and the names that they get. The workspace is not among them:
/// cargo names its own files relative to it.
fn directories() -> Result<Vec<(PathBuf, String)>> {
    let mut directories = Vec::new();
    // One directory for each registry. Its name depends on the version of cargo and on mirrors.
    let registries = cargo_home()?.join("registry/src");
    if registries.is_dir() {
        for entry in std::fs::read_dir(&registries).with_context(|| registries.display().to_string())? {
            directories.push((entry?.path(), "/registry".to_owned()));
        }
    }
    // The standard library's sources are there if somebody has installed rust-src; without them, rustc says the same.
    let (sysroot, version) = (rustc(&["--print", "sysroot"])?, rustc(&["--version", "--verbose"])?);
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: "));
    if let Some(commit) = commit {
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
        directories.push((sources, format!("/rustc/{commit}")));
    }
    Ok(directories)
}

fn cargo_home() -> Result<PathBuf> {
    let default = || std::env::home_dir().map(|home| home.join(".cargo"));
    std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(default)
        .context("CARGO_HOME is not set, and HOME neither")
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let output = Command::new("rustc").args(arguments).output().context("rustc cannot be run")?;
    ensure!(output.status.success(), "rustc {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Writes `from` to `to` without the exports that are not in the list, and without whatever only they used.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    let mut module = walrus::Module::from_file(from).map_err(|error| anyhow!("{}: {error}", from.display()))?;
    let needed = |name: &str| EXPORTS.contains(&name) || name.starts_with(ABI_EXPORT);
    let spare: Vec<_> = module.exports.iter().filter(|export| !needed(&export.name)).map(walrus::Export::id).collect();
    for export in spare {
        module.exports.delete(export);
    }
    walrus::passes::gc::run(&mut module);
    let stripped = module.emit_wasm();
    names_no_directory_of_this_machine(&stripped).with_context(|| format!("{} is not reproducible", from.display()))?;
    // Envoys that start meanwhile see the old file or the new one, never a part.
    let part = to.with_extension("wasm.part");
    std::fs::write(&part, stripped).with_context(|| format!("cannot write {}", part.display()))?;
    std::fs::rename(&part, to).with_context(|| format!("cannot write {}", to.display()))
}

fn names_no_directory_of_this_machine(wasm: &[u8]) -> Result<()> {
    let sources = directories()?.into_iter().map(|(from, _)| from);
    let directories = sources.chain([cargo_home()?, std::env::current_dir()?]);
    for directory in directories {
        let name = directory.as_os_str().as_encoded_bytes();
        if wasm.windows(name.len()).any(|part| part == name) {
            bail!("it contains the path {}", directory.display());
        }
    }
    Ok(())
}
