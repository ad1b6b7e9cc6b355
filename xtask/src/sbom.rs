//! `cargo xtask sbom`: a CycloneDX document for the control plane and one for the filter, by
//! cargo-cyclonedx. They list every package that is built in or used by a build script, with
//! version, licence and checksum. The same commit gives the same bytes in every directory.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use portcullis_harness::cargo::{read, run};
use portcullis_harness::output::say;
use portcullis_harness::{compile, paths};
use serde_json::Value;
use tempfile::TempDir;

use crate::tools;

/// What is shipped, with the target that it is compiled for if that is not this machine.
const PRODUCTS: [(&str, Option<&str>); 2] = [("control-plane", None), ("filter", Some(compile::FILTER_TARGET))];

#[derive(Args)]
pub(crate) struct Options {
    /// The directory to write control-plane.cdx.json and filter.cdx.json to [default: target]
    #[arg(long, value_name = "DIRECTORY")]
    output: Option<PathBuf>,
}

pub(crate) fn write(options: &Options) -> Result<()> {
    let cyclonedx = tools::cargo_cyclonedx()?;
    let directory = options.output.clone().unwrap_or_else(|| paths::target().to_owned());
    // cargo-cyclonedx writes a document beside every manifest of the workspace, and names its directory in them.
    let copy = TempDir::with_prefix("portcullis-sbom-")?;
    paths::copy_sources(paths::workspace(), copy.path())?;
    for (product, target) in PRODUCTS {
        let mut command = Command::new(&cyclonedx);
        command.args(["cyclonedx", "-q", "--all", "--format", "json", "--spec-version", "1.5"]);
        command.args(target.map(|target| ["--target", target]).into_iter().flatten());
        command.current_dir(copy.path()).env("SOURCE_DATE_EPOCH", commit_time());
        run(command)?;
        let written = copy.path().join(product).join(product).with_extension("cdx.json");
        let text = std::fs::read_to_string(&written).with_context(|| written.display().to_string())?;
        let text = text.replace(&copy.path().display().to_string(), "/portcullis");
        let file = directory.join(product).with_extension("cdx.json");
        std::fs::write(&file, &text).with_context(|| format!("cannot write {}", file.display()))?;
        let document: Value = serde_json::from_str(&text)?;
        say(&format!("{}: {} components", file.display(), document["components"].as_array().map_or(0, Vec::len)));
    }
    Ok(())
}

/// Seconds since 1970, of the commit if there is one. `SOURCE_DATE_EPOCH` overrides it.
fn commit_time() -> String {
    std::env::var("SOURCE_DATE_EPOCH").unwrap_or_else(|_| {
        let mut git = Command::new("git");
        git.args(["log", "-1", "--format=%ct"]).current_dir(paths::workspace());
        read(git).map_or_else(|_| "0".to_owned(), |time| time.trim().to_owned())
    })
}
