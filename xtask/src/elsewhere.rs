//! Commands that are programs of other crates, so that xtask does not compile what only they need.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use anyhow::{Error, anyhow};
use clap::Args;
use portcullis_harness::cargo::cargo;
use portcullis_harness::paths;

/// The program parses its arguments itself, `--help` included.
#[derive(Args)]
pub(crate) struct Arguments {
    /// `--help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Replaces this process by `cargo run` of a program. Returns only if that fails.
pub(crate) fn run(program: &str, Arguments { arguments }: Arguments) -> Error {
    let mut cargo = cargo(&["run", "--locked", "--bin", program, "--manifest-path"]);
    cargo.arg(paths::workspace().join("Cargo.toml")).arg("--").args(arguments);
    // Arguments may name files relative to the directory of the caller.
    if let Ok(directory) = std::env::current_dir() {
        cargo.current_dir(directory);
    }
    anyhow!("cannot run cargo: {}", cargo.exec())
}
