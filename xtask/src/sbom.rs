//! `cargo xtask sbom`: what is built into the control plane and the filter, as CycloneDX 1.5 in JSON: every package with
//! its version, licence and checksum, and what needs it. What only tests and tools need is left out. The same Cargo.lock
//! gives the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use portcullis_tests::paths;
use serde_json::{Value, json};

use crate::lock::{self, Locked};
use crate::output::say;
use crate::run::{cargo, read};

/// What is shipped.
const PRODUCTS: [&str; 2] = ["control-plane", "filter"];

/// Where the list goes.
#[derive(Args)]
pub(crate) struct Options {
    /// The file to write; target/portcullis.cdx.json if left out.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes the list.
pub(crate) fn write(options: &Options) -> Result<()> {
    let metadata = read(cargo(&["metadata", "--locked", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata speaks no JSON")?;
    let bom = bom(&metadata, &lock::packages()?)?;
    let file = options.output.clone().unwrap_or_else(|| paths::target().join("portcullis.cdx.json"));
    std::fs::write(&file, serde_json::to_string_pretty(&bom)? + "\n")
        .with_context(|| format!("cannot write {}", file.display()))?;
    let components = bom["components"].as_array().map_or(0, Vec::len);
    say(&format!("{}: {components} components", file.display()));
    Ok(())
}

fn bom(metadata: &Value, locked: &[Locked]) -> Result<Value> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages: BTreeMap<String, Value> =
        list(&metadata["packages"]).into_iter().map(|package| (text(&package["id"]), package)).collect();
    let nodes: BTreeMap<String, Vec<String>> = list(&metadata["resolve"]["nodes"])
        .iter()
        .map(|node| {
            (
                text(&node["id"]),
                list(&node["deps"]).iter().filter(|dep| built_in(dep)).map(|dep| text(&dep["pkg"])).collect(),
            )
        })
        .collect();
    let purl = |id: &String| {
        let package = packages.get(id);
        package.map_or_else(String::new, |package| {
            format!("pkg:cargo/{}@{}", text(&package["name"]), text(&package["version"]))
        })
    };
    let mut waiting: Vec<String> = packages
        .iter()
        .filter(|(_, package)| package["source"].is_null() && PRODUCTS.contains(&text(&package["name"]).as_str()))
        .map(|(id, _)| id.clone())
        .collect();
    let products: Vec<String> = waiting.iter().map(purl).collect();
    let mut reached = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if reached.insert(id.clone()) {
            waiting.extend(nodes.get(&id).cloned().unwrap_or_default());
        }
    }
    let (mut components, mut dependencies) = (BTreeMap::new(), BTreeMap::new());
    for id in &reached {
        let package = packages.get(id).with_context(|| format!("cargo metadata does not describe {id}"))?;
        let (name, version) = (text(&package["name"]), text(&package["version"]));
        let mut component = json!({
            "type": if PRODUCTS.contains(&name.as_str()) { "application" } else { "library" },
            "bom-ref": purl(id), "name": name, "version": version, "purl": purl(id),
            "licenses": [{"expression": text(&package["license"]).replace('/', " OR ")}],
        });
        let entry = locked.iter().find(|entry| entry.name == name && entry.version.to_string() == version);
        if let Some(checksum) = entry.and_then(|entry| entry.checksum.as_ref()) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        }
        if let Some(repository) = package["repository"].as_str() {
            component["externalReferences"] = json!([{"type": "vcs", "url": repository}]);
        }
        let needs: BTreeSet<String> = nodes.get(id).into_iter().flatten().map(purl).collect();
        dependencies.insert(purl(id), json!({"ref": purl(id), "dependsOn": needs}));
        components.insert(purl(id), component);
    }
    dependencies.insert("portcullis".into(), json!({"ref": "portcullis", "dependsOn": products}));
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {
            "type": "application", "bom-ref": "portcullis", "name": "portcullis", "version": env!("CARGO_PKG_VERSION"),
            "licenses": [{"expression": env!("CARGO_PKG_LICENSE")}],
        }},
        "components": components.into_values().collect::<Vec<_>>(),
        "dependencies": dependencies.into_values().collect::<Vec<_>>(),
    }))
}

/// Whether a dependency goes into what is built, or into building it: not if only tests need it.
fn built_in(dependency: &Value) -> bool {
    let kinds = dependency["dep_kinds"].as_array();
    kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null() || kind["kind"] == "build"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(id: &str, name: &str, source: Option<&str>) -> Value {
        json!({"id": id, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0", "source": source, "repository": null})
    }

    #[test]
    fn what_is_shipped_is_listed_with_what_it_needs_and_nothing_else() {
        let dep = |pkg: &str, kind: Option<&str>| json!({"pkg": pkg, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [
                package("1", "control-plane", None), package("2", "used", Some("r")), package("3", "tested", Some("r")),
                package("4", "filter", None), package("5", "below", Some("r")), package("6", "xtask", None),
            ],
            "resolve": {"nodes": [
                {"id": "1", "deps": [dep("2", None), dep("3", Some("dev"))]}, {"id": "2", "deps": [dep("5", Some("build"))]},
                {"id": "3", "deps": []}, {"id": "4", "deps": []}, {"id": "5", "deps": []}, {"id": "6", "deps": [dep("3", None)]},
            ]},
        });
        let locked =
            [Locked { name: "used".into(), version: semver::Version::new(1, 0, 0), checksum: Some("ab".into()) }];
        let bom = bom(&metadata, &locked).unwrap();
        let names: Vec<_> = bom["components"].as_array().unwrap().iter().map(|part| &part["name"]).collect();
        assert_eq!(names, ["below", "control-plane", "filter", "used"]);
        let used = json!({
            "type": "library", "bom-ref": "pkg:cargo/used@1.0.0", "name": "used", "version": "1.0.0",
            "purl": "pkg:cargo/used@1.0.0", "licenses": [{"expression": "MIT OR Apache-2.0"}],
            "hashes": [{"alg": "SHA-256", "content": "ab"}],
        });
        assert_eq!(bom["components"][3], used);
        let needs = json!({"ref": "pkg:cargo/used@1.0.0", "dependsOn": ["pkg:cargo/below@1.0.0"]});
        assert_eq!(bom["dependencies"][3], needs);
        let whole =
            json!({"ref": "portcullis", "dependsOn": ["pkg:cargo/control-plane@1.0.0", "pkg:cargo/filter@1.0.0"]});
        assert_eq!(bom["dependencies"][4], whole);
    }
}
