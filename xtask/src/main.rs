//! `cargo xtask`: the commands of developers and CI. Errors are printed in one line.

#![forbid(unsafe_code)]

mod observe;
mod up;

mod wasm;

mod dependencies;
mod sbom;
mod sqlx;

mod api;
mod docs;
mod metrics;
mod openapi;
mod test;
mod tools;

mod elsewhere;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use portcullis_harness::output::exit_code;

/// Builds, runs and tests Portcullis. Needs Rust with rustup, and python3 with pip to install what the machine lacks:
/// Envoy, PostgreSQL, Node and others, into target/tools.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start everything on this machine: PostgreSQL, the control plane, a demo API, and Envoy with the filter.
    Up(up::Options),
    /// Check and test everything, as CI does.
    Test(test::Options),
    /// Inject faults into the stack at random, under load, and check that no count is lost and no dead key admitted.
    #[command(disable_help_flag = true)]
    Torture(elsewhere::Arguments),
    /// Measure what a check costs, against the other ways to do it.
    #[command(disable_help_flag = true)]
    Bench(elsewhere::Arguments),
    /// Build the filter into target/portcullis.wasm.
    Wasm(wasm::Options),
    /// Build the book into target/book.
    Docs,
    /// Write control-plane/.sqlx anew, after a query or a migration changed.
    Sqlx,
    /// List the packages that are built into the product, with versions, licences and checksums (CycloneDX 1.5).
    Sbom(sbom::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    exit_code(async {
        match cli.command {
            Command::Up(options) => up::up(&options).await,
            Command::Test(options) => test::test(&options).await,
            Command::Torture(arguments) => Err(elsewhere::run("portcullis-torture", arguments)),
            Command::Bench(arguments) => Err(elsewhere::run("portcullis-bench", arguments)),
            Command::Wasm(options) => wasm::wasm(&options),
            Command::Docs => docs::build(),
            Command::Sqlx => sqlx::write().await,
            Command::Sbom(options) => sbom::write(&options),
        }
    })
}
