//! Builds the filter without the rest of xtask, for container images: `filter-build FILE`, in the
//! root of the workspace.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let to: PathBuf = std::env::args_os().nth(1).context("usage: filter-build FILE")?.into();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    if let Some(directory) = to.parent().filter(|directory| *directory != Path::new("")) {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    filter_build::compile(Command::new("cargo"), "filter", &[])?;
    filter_build::strip(&filter_build::compiled(&target, "filter"), &to)
}
