//! Known faults of what is built in: Cargo.lock is held against a copy of the RustSec advisory database, without a network.
//! A copy is looked for where `cargo audit` and `cargo deny` keep theirs, or where `ADVISORY_DB` says; where there is none,
//! that is said.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use semver::{Version, VersionReq};

use crate::lock::{self, Locked};
use crate::output::say;

/// An advisory, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Advisory {
    id: String,
    /// Why it is no vulnerability: `unmaintained`, `notice`; none if it is one. Unsound code counts as one.
    informational: Option<String>,
    withdrawn: bool,
    /// Versions that are not affected: mended, or older than the fault.
    good: Vec<VersionReq>,
}

/// Refuses packages with a known vulnerability that deny.toml does not name in `ignore`; tells of those without a keeper.
pub(crate) fn check(deny: &str) -> Result<()> {
    let Some(database) = database()? else {
        say("no copy of the advisory database here (ADVISORY_DB names one): known vulnerabilities were not looked for");
        return Ok(());
    };
    let (mut found, mut advisories) = (Vec::new(), 0);
    let packages = lock::packages()?;
    for package in packages.iter().filter(|package| package.checksum.is_some()) {
        for advisory in of(&database, &package.name)? {
            advisories += 1;
            if !advisory.concerns(&package.version) {
                continue;
            }
            let Locked { name, version, .. } = package;
            match &advisory.informational {
                Some(kind) if kind != "unsound" => say(&format!("note: {name} {version}: {} ({kind})", advisory.id)),
                _ if deny.contains(&format!("\"{}\"", advisory.id)) => {
                    say(&format!("note: {name} {version}: {} is ignored by deny.toml", advisory.id));
                }
                _ => found.push(format!("{name} {version}: {}", advisory.id)),
            }
        }
    }
    ensure!(found.is_empty(), "known vulnerabilities: {}; update what has them", found.join(", "));
    let database = database.display();
    say(&format!(
        "{} packages of Cargo.lock have no known vulnerability ({advisories} advisories of {database} name one of them)",
        packages.len()
    ));
    Ok(())
}

fn database() -> Result<Option<PathBuf>> {
    let is_one = |path: &PathBuf| path.join("crates").is_dir();
    if let Some(named) = std::env::var_os("ADVISORY_DB").filter(|named| !named.is_empty()).map(PathBuf::from) {
        ensure!(
            is_one(&named),
            "ADVISORY_DB: {} is no copy of the advisory database: it has no folder crates",
            named.display()
        );
        return Ok(Some(named));
    }
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let Some(cargo) = cargo.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"))) else {
        return Ok(None);
    };
    let deny = std::fs::read_dir(cargo.join("advisory-dbs")).into_iter().flatten().flatten().map(|entry| entry.path());
    Ok([cargo.join("advisory-db")].into_iter().chain(deny).find(is_one))
}

fn of(database: &Path, package: &str) -> Result<Vec<Advisory>> {
    let Ok(files) = std::fs::read_dir(database.join("crates").join(package)) else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for file in files {
        let file = file?.path();
        if file.extension().is_some_and(|extension| extension == "md") {
            let text = std::fs::read_to_string(&file)?;
            all.push(parse(&text).with_context(|| format!("{} is no advisory", file.display()))?);
        }
    }
    Ok(all)
}

/// Reads the head of an advisory, which is TOML of a fixed form within a block of code.
fn parse(text: &str) -> Result<Advisory> {
    let (_, rest) = text.split_once("```toml").context("no TOML")?;
    let (head, _) = rest.split_once("```").context("no end of the TOML")?;
    let value = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='))?;
        Some(line.trim().trim_matches('"').to_owned())
    };
    let mut good = Vec::new();
    for name in ["patched", "unaffected"] {
        let Some(list) = head.split_once(&format!("\n{name} = [")).and_then(|(_, rest)| rest.split_once(']')) else {
            continue;
        };
        for requirement in list.0.split('"').skip(1).step_by(2) {
            good.push(requirement.parse().with_context(|| format!("{name}: {requirement:?}"))?);
        }
    }
    Ok(Advisory {
        id: value("id").context("no id")?,
        informational: value("informational"),
        withdrawn: value("withdrawn").is_some(),
        good,
    })
}

impl Advisory {
    fn concerns(&self, version: &Version) -> bool {
        !self.withdrawn && !self.good.iter().any(|requirement| requirement.matches(version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "```toml\n[advisory]\nid = \"RUSTSEC-2026-0001\"\npackage = \"a\"\ncategories = [\"denial-of-service\"]\n\n[versions]\npatched = [\n  \"^0.3.7\",\n  \">= 0.4.2\",\n]\nunaffected = [\"< 0.3.0\"]\n```\n\n# Title\n";

    #[test]
    fn versions_that_are_neither_mended_nor_older_than_the_fault_are_concerned() {
        let advisory = parse(TEXT).unwrap();
        let concerned = |version: &str| advisory.concerns(&version.parse().unwrap());
        assert_eq!(advisory.id, "RUSTSEC-2026-0001");
        assert_eq!(
            ["0.2.9", "0.3.0", "0.3.6", "0.3.7", "0.4.1", "0.4.2", "1.0.0"].map(concerned),
            [false, true, true, false, true, false, false]
        );
    }

    #[test]
    fn a_fault_that_nobody_mended_concerns_every_version_unless_it_was_withdrawn() {
        let open = "```toml\nid = \"R\"\ninformational = \"unsound\"\n[versions]\npatched = []\n```";
        assert!(parse(open).unwrap().concerns(&Version::new(9, 9, 9)));
        assert_eq!(parse(open).unwrap().informational.as_deref(), Some("unsound"));
        let withdrawn = open.replace("id = \"R\"", "id = \"R\"\nwithdrawn = \"2026-01-01\"");
        assert!(!parse(&withdrawn).unwrap().concerns(&Version::new(9, 9, 9)));
        assert!(parse("# no head").is_err());
    }
}
