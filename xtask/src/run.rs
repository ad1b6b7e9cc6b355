//! Running programs in the workspace: a command comes in; it has succeeded, or an error names it.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use portcullis_tests::{paths, tools};

/// `cargo` as it runs this.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).current_dir(paths::workspace());
    // These describe xtask, and would make cargo build anew what asks for them: ring, and all that builds on it.
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("CARGO_MANIFEST_") || name.starts_with("CARGO_PKG_") {
            cargo.env_remove(&variable);
        }
    }
    cargo
}

/// Runs a command whose output the user sees.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let shown = shown(&command);
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    ensure!(status.success(), "{shown} failed ({status})");
    Ok(())
}

/// Runs a command quietly and gives what it wrote to standard output.
pub(crate) fn read(mut command: Command) -> Result<String> {
    let shown = shown(&command);
    let output = command.output().with_context(|| format!("cannot run {shown}"))?;
    ensure!(output.status.success(), "{shown} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes sure that code can be compiled for a target. With rustup, rust-toolchain.toml already asks for it, but a
/// toolchain that was there before is not completed by itself.
pub(crate) fn need_target(target: &str) -> Result<()> {
    let mut rustc = Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", target]).current_dir(paths::workspace());
    if std::path::Path::new(read(rustc)?.trim()).is_dir() {
        return Ok(());
    }
    if tools::on_path("rustup").is_none() {
        bail!("Rust cannot compile for {target}: install that target (rustup would have done it)");
    }
    crate::output::progress(&format!("adding the Rust target {target}"));
    let mut rustup = Command::new("rustup");
    rustup.args(["target", "add", target]).current_dir(paths::workspace());
    run(rustup)
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    words.join(" ")
}
