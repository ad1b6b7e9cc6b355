//! Entry of `cargo xtask`: replaces itself by `cargo run --bin xtask` on the whole workspace.
//!
//! Cargo unites the features of shared dependencies over the selected packages. `cargo run --package xtask` would
//! therefore compile most dependencies for xtask, and once more, with other features, for the control plane and the
//! tests. Only the whole workspace avoids that, but an alias cannot select it from a subdirectory. This program can, and has
//! no dependencies of its own.

#![forbid(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), String> {
    let missing = "CARGO_MANIFEST_DIR is not set; start this program with `cargo xtask`";
    let own = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").ok_or(missing)?);
    let root = own.ancestors().nth(2).ok_or(missing)?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["run", "--locked", "--bin", "xtask", "--manifest-path"]).arg(root.join("Cargo.toml"));
    cargo.arg("--").args(std::env::args_os().skip(1));
    // These describe the launcher. Build scripts that read them would run again.
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("CARGO_MANIFEST_") || name.starts_with("CARGO_PKG_") {
            cargo.env_remove(&variable);
        }
    }
    Err(format!("cannot run cargo: {}", cargo.exec()))
}
