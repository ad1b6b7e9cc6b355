//! `envoy/demo-policies.json`. The control plane reads the file itself (`--policies-file`); this module
//! translates it into Envoy's configuration, so that both decide by the same policies.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::paths;

pub fn file() -> PathBuf {
    paths::workspace().join("envoy/demo-policies.json")
}

/// Fields of the plugin configuration, and routes as prefix and policy.
pub type ForEnvoy = (Map<String, Value>, Vec<(String, String)>);

pub fn for_envoy() -> Result<ForEnvoy> {
    let text = std::fs::read_to_string(file())?;
    let mut all: Map<String, Value> = serde_json::from_str(&text)?;
    let routes = all.remove("routes").context("demo-policies.json has no routes")?;
    let route = |route: &Value| Some((route["prefix"].as_str()?.to_owned(), route["policy"].as_str()?.to_owned()));
    let routes = routes.as_array().into_iter().flatten().map(route).collect::<Option<_>>();
    Ok((all, routes.context("a route of demo-policies.json has no prefix or no policy")?))
}
