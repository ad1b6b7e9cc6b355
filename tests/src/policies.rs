//! `envoy/demo-policies.json`, which the control plane reads as it is (`--policies`): here it becomes the part of Envoy's
//! configuration that says the same, so that both sides judge by one file.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::paths;

/// The file.
#[must_use]
pub fn file() -> PathBuf {
    paths::workspace().join("envoy/demo-policies.json")
}

/// Its policies as fields of the plugin configuration, and its routes: prefix and policy.
///
/// # Errors
/// If the file is not there or not what it should be.
pub fn for_envoy() -> Result<(Map<String, Value>, Vec<(String, String)>)> {
    let text = std::fs::read_to_string(file())?;
    let mut all: Map<String, Value> = serde_json::from_str(&text)?;
    let routes = all.remove("routes").context("demo-policies.json has no routes")?;
    let route = |route: &Value| Some((route["prefix"].as_str()?.to_owned(), route["policy"].as_str()?.to_owned()));
    let routes = routes.as_array().into_iter().flatten().map(route).collect::<Option<_>>();
    Ok((all, routes.context("a route of demo-policies.json has no prefix or no policy")?))
}
