//! Step `dependencies`: cargo-deny enforces deny.toml, and cargo-shear finds dependencies that no source uses.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use portcullis_harness::cargo::{read, run};
use portcullis_harness::output::say;
use portcullis_harness::paths;

use crate::tools;

/// Checks everything. Returns false if the RustSec database cannot be fetched, and so known vulnerabilities were not
/// looked for.
pub(crate) fn check() -> Result<bool> {
    let mut shear = Command::new(tools::of_astral(tools::CARGO_SHEAR)?);
    shear.args(["--locked", "--deny-warnings"]).current_dir(paths::workspace());
    run(shear)?;
    let deny = tools::of_astral(tools::CARGO_DENY)?;
    run(cargo_deny(&deny, &["check", "bans", "licenses", "sources"]))?;
    if let Err(error) = read(cargo_deny(&deny, &["fetch", "db"])) {
        let error = format!("{error:#}");
        let why = error.lines().last().unwrap_or_default();
        say(&format!("known vulnerabilities were not looked for, since the RustSec database cannot be fetched: {why}"));
        return Ok(false);
    }
    run(cargo_deny(&deny, &["--offline", "check", "advisories"]))?;
    Ok(true)
}

fn cargo_deny(deny: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(deny);
    command.arg("--locked").args(arguments).current_dir(paths::workspace());
    command
}
