//! The container files, checked without a container engine: what [`compose`] and [`dockerfile`]
//! name must exist and fit together.

pub mod compose;
pub mod dockerfile;

use std::path::Path;

use anyhow::{Context, Result, ensure};

use self::compose::Compose;
use self::dockerfile::Dockerfile;

/// Checks that the files that docker-compose.yml and the Dockerfile below `root` name exist. The error has one fault a line.
pub fn check(root: &Path) -> Result<()> {
    let read = |name: &str| std::fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"));
    let (compose, dockerfile) =
        (Compose::parse(&read("docker-compose.yml")?)?, Dockerfile::parse(&read("Dockerfile")?)?);
    let ignored = dockerfile::Ignored::parse(&read(".dockerignore")?);
    let mut faults = dockerfile.faults(root, &ignored);
    faults.extend(compose.faults(&dockerfile));
    faults.extend(
        members(&read("Cargo.toml")?)
            .filter(|member| ignored.matches(member))
            .map(|member| format!(".dockerignore leaves out {member}, which is part of the workspace")),
    );
    faults.extend(toolchain(&dockerfile, &read("rust-toolchain.toml")?));
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

/// The members of the workspace.
fn members(manifest: &str) -> impl Iterator<Item = &str> {
    let list =
        manifest.split_once("members = [").and_then(|(_, rest)| rest.split_once(']')).map_or("", |(list, _)| list);
    list.split(',').map(|member| member.trim().trim_matches('"')).filter(|member| !member.is_empty())
}

/// Checks that the image of the toolchain has the version of rust-toolchain.toml. With another, rustup would download a second
/// toolchain in every build.
fn toolchain(dockerfile: &Dockerfile, toolchain: &str) -> Option<String> {
    let channel = toolchain.lines().find_map(|line| line.strip_prefix("channel = "))?.trim_matches('"');
    let wanted = format!("rust:{channel}-bookworm");
    let missing = !dockerfile.stages.iter().any(|stage| stage.base == wanted);
    missing.then(|| format!("Dockerfile: no stage starts from {wanted}, as rust-toolchain.toml asks for"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths;

    #[test]
    fn the_files_that_are_shipped_fit_together() {
        check(paths::workspace()).unwrap();
    }

    #[test]
    fn members_of_the_workspace_are_found() {
        let members: Vec<_> =
            members("[workspace]\nmembers = [\n    \"a\",\n    \"b/c\",\n]\nexclude = [\"d\"]\n").collect();
        assert_eq!(members, ["a", "b/c"]);
    }

    #[test]
    fn a_toolchain_of_another_version_than_the_workspace_asks_for_is_a_fault() {
        let dockerfile = Dockerfile::parse("FROM rust:1.95.0-bookworm AS a\n").unwrap();
        assert_eq!(toolchain(&dockerfile, "[toolchain]\nchannel = \"1.95.0\"\n"), None);
        assert!(
            toolchain(&dockerfile, "[toolchain]\nchannel = \"1.96.0\"\n").unwrap().contains("rust:1.96.0-bookworm")
        );
    }
}
