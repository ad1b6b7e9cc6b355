//! Cargo and other programs, run in the workspace. Errors name the command.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::output::progress;
use crate::{paths, tools};

/// The cargo that runs this program, or else the one on the path, with these arguments.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).current_dir(paths::workspace());
    // These describe this program. Build scripts that read them, ring's among others, would run again.
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("CARGO_MANIFEST_") || name.starts_with("CARGO_PKG_") {
            cargo.env_remove(&variable);
        }
    }
    cargo
}

/// Runs a command whose output the user sees.
pub fn run(mut command: Command) -> Result<()> {
    let line = command_line(&command);
    let status = command.status().with_context(|| format!("cannot run {line}"))?;
    ensure!(status.success(), "{line} failed ({status})");
    Ok(())
}

/// Runs a command quietly and returns its standard output.
pub fn read(mut command: Command) -> Result<String> {
    let line = command_line(&command);
    let output = command.output().with_context(|| format!("cannot run {line}"))?;
    ensure!(output.status.success(), "{line} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes sure that rustc can compile for a target. rustup adds the targets of rust-toolchain.toml only when it installs
/// the toolchain, not when the toolchain is there already.
pub fn need_target(target: &str) -> Result<()> {
    let mut rustc = Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", target]).current_dir(paths::workspace());
    if std::path::Path::new(read(rustc)?.trim()).is_dir() {
        return Ok(());
    }
    if tools::on_path("rustup").is_none() {
        bail!("rustc cannot compile for {target}, and there is no rustup to add that target; install it");
    }
    progress(&format!("adding the Rust target {target}"));
    let mut rustup = Command::new("rustup");
    rustup.args(["target", "add", target]).current_dir(paths::workspace());
    run(rustup)
}

fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    words.join(" ")
}
