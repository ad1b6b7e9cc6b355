//! What the workspace depends on: where it comes from, under which licences, whether it is used, and whether it has known
//! faults. It asks cargo alone, so that it runs on every machine; where `cargo deny` and `cargo machete` are installed, they
//! are asked too.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use portcullis_tests::{paths, tools};
use serde_json::Value;

use crate::advisories;
use crate::output::say;
use crate::run::{cargo, read, run};

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Checks everything.
pub(crate) fn check() -> Result<()> {
    let deny = std::fs::read_to_string(paths::workspace().join("deny.toml"))?;
    let allowed = allowed_licences(&deny).context("deny.toml has no list `allow = [` of licences")?;
    let packages = packages()?;
    sources_and_licences(&packages, &allowed)?;
    nothing_banned(&packages, &deny)?;
    nothing_unused()?;
    advisories::check(&deny)?;
    for (tool, arguments) in [("cargo-deny", &["deny", "check"][..]), ("cargo-machete", &["machete"])] {
        if tools::on_path(tool).is_some() {
            run(cargo(arguments))?;
        } else {
            say(&format!("{tool} is not installed; what it looks for was looked for without it"));
        }
    }
    Ok(())
}

fn allowed_licences(deny: &str) -> Option<Vec<String>> {
    let (_, list) = deny.split_once("allow = [")?;
    let (list, _) = list.split_once(']')?;
    Some(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// All that cargo knows of this workspace and what it depends on.
fn packages() -> Result<Vec<Value>> {
    let metadata = read(cargo(&["metadata", "--locked", "--format-version", "1", "--all-features"]))?;
    let mut metadata: Value = serde_json::from_str(&metadata).context("cargo metadata speaks no JSON")?;
    match metadata["packages"].take() {
        Value::Array(packages) => Ok(packages),
        _ => bail!("cargo metadata names no packages"),
    }
}

/// Every package comes from crates.io or this workspace, under a licence that deny.toml allows.
fn sources_and_licences(packages: &[Value], allowed: &[String]) -> Result<()> {
    for package in packages {
        let (name, licence) = (&package["name"], package["license"].as_str().unwrap_or_default());
        ensure!(satisfied(licence, allowed), "{name}: the licence {licence:?} is not allowed by deny.toml");
        let source = package["source"].as_str();
        ensure!(source.is_none_or(|source| source == CRATES_IO), "{name}: comes from {source:?}, not from crates.io");
    }
    say(&format!("{} packages, from crates.io or this workspace, under allowed licences", packages.len()));
    Ok(())
}

/// No package is one that deny.toml bans, and none of ours asks for just any version of another.
fn nothing_banned(packages: &[Value], deny: &str) -> Result<()> {
    let banned = banned(deny).context("deny.toml has no list `deny = [` of crates")?;
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        ensure!(!banned.iter().any(|banned| banned == name), "{name} is banned by deny.toml");
        if !package["source"].is_null() {
            continue;
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let any = dependency["req"] == "*" && dependency["path"].is_null();
            ensure!(!any, "{name}: name the version of {}", dependency["name"]);
        }
    }
    say(&format!("none of the {} crates that deny.toml bans", banned.len()));
    Ok(())
}

fn banned(deny: &str) -> Option<Vec<String>> {
    let (_, bans) = deny.split_once("[bans]")?;
    let (_, list) = bans.split_once("\ndeny = [")?;
    let (list, _) = list.split_once(']')?;
    let names: Vec<String> =
        list.split("crate = \"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.into())).collect();
    (!names.is_empty()).then_some(names)
}

/// Whether an SPDX expression can be met by allowed licences. `OR` binds weaker than `AND`; `/` is an old spelling of
/// `OR`.
fn satisfied(expression: &str, allowed: &[String]) -> bool {
    let mut depth = 0_usize;
    let (mut ors, mut ands, mut term) = (Vec::new(), Vec::new(), String::new());
    let expression = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    for word in expression.split_whitespace() {
        match word {
            "OR" if depth == 0 => {
                ands.push(std::mem::take(&mut term));
                ors.push(std::mem::take(&mut ands));
                continue;
            }
            "AND" if depth == 0 => {
                ands.push(std::mem::take(&mut term));
                continue;
            }
            "(" => depth = depth.saturating_add(1),
            ")" => depth = depth.saturating_sub(1),
            _ => {}
        }
        term.push_str(word);
        term.push(' ');
    }
    ands.push(term);
    ors.push(ands);
    ors.iter().any(|ands| {
        ands.iter().all(|term| {
            let term = term.trim();
            match term.strip_prefix("( ").and_then(|inner| inner.strip_suffix(" )")) {
                Some(inner) => satisfied(inner, allowed),
                None => allowed.iter().any(|licence| licence == term),
            }
        })
    })
}

/// Every dependency that a crate names stands somewhere in its sources.
fn nothing_unused() -> Result<()> {
    for member in ["contract", "filter", "filter-core", "control-plane", "tests", "xtask"] {
        let home = paths::workspace().join(member);
        let manifest = std::fs::read_to_string(home.join("Cargo.toml"))?;
        let mut sources = String::new();
        collect(&home, &mut sources)?;
        for name in dependencies(&manifest) {
            let word = name.replace('-', "_");
            let used = sources.match_indices(&word).any(|(at, _)| {
                let before = sources[..at].chars().next_back();
                let after = sources[at.saturating_add(word.len())..].chars().next();
                let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
                !part(before) && !part(after)
            });
            if !used {
                bail!("{member}/Cargo.toml names {name}, and no source of that crate uses it");
            }
        }
    }
    Ok(())
}

fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut inside = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.trim_end_matches(']').ends_with("dependencies");
        } else if inside && let Some(name) = line.split(['.', ' ', '=']).next().filter(|name| !name.is_empty()) {
            names.push(name.to_owned());
        }
    }
    names
}

fn collect(directory: &Path, sources: &mut String) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&std::fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_expression_is_met_by_the_allowed_ones() {
        let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        for good in ["MIT", "MIT OR GPL-3.0", "GPL-3.0/MIT", "(MIT OR GPL-3.0) AND Apache-2.0", "MIT AND Apache-2.0"] {
            assert!(satisfied(good, &allowed), "{good}");
        }
        assert!(satisfied("Apache-2.0 WITH LLVM-exception OR GPL-3.0", &allowed));
        for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND GPL-3.0", "Apache-2.0 WITH other"] {
            assert!(!satisfied(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn a_banned_crate_and_a_version_that_is_not_named_are_refused() {
        let deny = "[bans]\nwildcards = \"deny\"\ndeny = [{ crate = \"a-sys\" }, { crate = \"b\" }]\n[sources]\n";
        assert_eq!(banned(deny).unwrap(), ["a-sys", "b"]);
        assert_eq!(banned("[bans]\ndeny = []\n"), None);
        let ours = |requirement: &str, path: Value| {
            serde_json::json!({"name": "ours", "source": null,
                "dependencies": [{"name": "c", "req": requirement, "path": path}]})
        };
        assert!(nothing_banned(&[ours("^1", Value::Null), ours("*", "/c".into())], deny).is_ok());
        assert!(nothing_banned(&[ours("*", Value::Null)], deny).is_err());
        assert!(nothing_banned(&[serde_json::json!({"name": "a-sys", "source": CRATES_IO})], deny).is_err());
    }

    #[test]
    fn dependencies_of_all_kinds_are_found_in_a_manifest() {
        let manifest = "[package]\nname = \"x\"\n[dependencies]\na-b.workspace = true\n[dev-dependencies]\nc = \"1\"\n\n[target.'cfg(unix)'.dependencies]\nd = { version = \"1\" }\n[lints]\nworkspace = true\n";
        assert_eq!(dependencies(manifest), ["a-b", "c", "d"]);
    }
}
