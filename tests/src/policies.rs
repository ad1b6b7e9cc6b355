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

/// What Envoy's configuration needs of it: fields of the plugin configuration, and routes as prefix and policy.
pub type ForEnvoy = (Map<String, Value>, Vec<(String, String)>);

/// Reads it for Envoy.
///
/// # Errors
/// If the file is not there or not what it should be.
pub fn for_envoy() -> Result<ForEnvoy> {
    let text = std::fs::read_to_string(file())?;
    let mut all: Map<String, Value> = serde_json::from_str(&text)?;
    let routes = all.remove("routes").context("demo-policies.json has no routes")?;
    let route = |route: &Value| Some((route["prefix"].as_str()?.to_owned(), route["policy"].as_str()?.to_owned()));
    let routes = routes.as_array().into_iter().flatten().map(route).collect::<Option<_>>();
    Ok((all, routes.context("a route of demo-policies.json has no prefix or no policy")?))
}
