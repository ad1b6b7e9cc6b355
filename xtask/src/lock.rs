//! Cargo.lock: its text comes in, the packages that it names go out. cargo writes it always in the same form, so that no
//! parser of TOML is needed.

use anyhow::{Context, Result};
use portcullis_tests::paths;
use semver::Version;

/// A package that is built into something here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Locked {
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: Version,
    /// The SHA-256 of its archive, in hexadecimal; none for our own.
    pub(crate) checksum: Option<String>,
}

/// All packages of the workspace's Cargo.lock.
pub(crate) fn packages() -> Result<Vec<Locked>> {
    parse(&std::fs::read_to_string(paths::workspace().join("Cargo.lock"))?)
}

fn parse(text: &str) -> Result<Vec<Locked>> {
    let field = |entry: &str, name: &str| {
        let line = entry.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""))?;
        Some(line.trim_end_matches('"').to_owned())
    };
    let entries = text.split("[[package]]\n").skip(1);
    entries
        .map(|entry| {
            let name = field(entry, "name").context("Cargo.lock has a package without a name")?;
            let version = field(entry, "version").with_context(|| format!("Cargo.lock: {name} has no version"))?;
            let version = version.parse().with_context(|| format!("Cargo.lock: {name} has the version {version:?}"))?;
            Ok(Locked { name, version, checksum: field(entry, "checksum") })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_have_names_versions_and_checksums_unless_they_are_ours() {
        let text = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.2.3+x\"\nsource = \"registry\"\nchecksum = \"0a\"\n\n[[package]]\nname = \"b\"\nversion = \"0.1.0\"\ndependencies = [\n \"a\",\n]\n";
        let found = parse(text).unwrap();
        let shown: Vec<_> =
            found.iter().map(|p| (p.name.as_str(), p.version.to_string(), p.checksum.as_deref())).collect();
        assert_eq!(shown, [("a", "1.2.3+x".into(), Some("0a")), ("b", "0.1.0".into(), None)]);
        assert!(parse("[[package]]\nname = \"a\"\nversion = \"one\"\n").is_err());
    }
}
