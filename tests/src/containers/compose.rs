//! docker-compose.yml, read as Compose reads it: anchors and merges are resolved.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use yaml_rust2::{Yaml, YamlLoader};

use super::dockerfile::Dockerfile;

#[derive(Clone, Debug, PartialEq)]
pub struct Compose(Value);

impl Compose {
    pub fn parse(text: &str) -> Result<Self> {
        let documents = YamlLoader::load_from_str(text).context("docker-compose.yml is not YAML")?;
        let document = documents.first().context("docker-compose.yml is empty")?;
        let value = json(document)?;
        ensure!(value["services"].is_object(), "docker-compose.yml has no services");
        Ok(Self(value))
    }

    pub fn services(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.0["services"].as_object().into_iter().flatten()
    }

    /// The command of a service's health check, as it runs in the container.
    pub fn health_check(&self, service: &str) -> Result<Vec<String>> {
        let test = &self.0["services"][service]["healthcheck"]["test"];
        let mut words: Vec<String> =
            serde_json::from_value(test.clone()).with_context(|| format!("{service}: {test}"))?;
        ensure!(words.len() > 1, "{service}: {test}");
        match words.remove(0).as_str() {
            "CMD" => Ok(words),
            "CMD-SHELL" => Ok(["/bin/sh".into(), "-c".into()].into_iter().chain(words).collect()),
            other => bail!("{service}: a health check that starts with {other}"),
        }
    }

    /// The command of a service, as its program gets it.
    ///
    /// # Errors
    /// If there is none.
    pub fn command(&self, service: &str) -> Result<Vec<String>> {
        let command = &self.0["services"][service]["command"];
        let words: Vec<String> =
            serde_json::from_value(command.clone()).with_context(|| format!("{service}: {command}"))?;
        Ok(words.iter().map(|word| interpolated(word)).collect())
    }

    /// The environment of a service, with nothing set on the machine that it is started from.
    pub fn environment(&self, service: &str) -> Vec<(String, String)> {
        let variables = self.0["services"][service]["environment"].as_object();
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), interpolated);
        variables.into_iter().flatten().map(|(name, value)| (name.clone(), text(value))).collect()
    }

    /// What Compose or the build would stumble over.
    pub fn faults(&self, dockerfile: &Dockerfile) -> Vec<String> {
        let mut faults = Vec::new();
        for (name, service) in self.services() {
            let mut fault = |what: String| faults.push(format!("docker-compose.yml: service {name}: {what}"));
            match service["build"]["target"].as_str() {
                Some(target) => match dockerfile.stage(target) {
                    None => fault(format!("the Dockerfile has no stage {target}")),
                    Some(stage) if dockerfile.image(stage).starts_with("rust:") => {
                        fault(format!("its image would have a compiler: the stage {target} starts from one"));
                    }
                    Some(_) => {}
                },
                None if !service["image"].is_string() => fault("has neither an image nor a build".into()),
                None => {}
            }
            for (other, condition) in service["depends_on"].as_object().into_iter().flatten() {
                let wanted = condition["condition"].as_str();
                let other = &self.0["services"][other];
                let missing = match wanted {
                    Some("service_healthy") => other["healthcheck"].is_null(),
                    _ => other.is_null(),
                };
                if missing {
                    fault(format!("depends on something that is not there: {condition}"));
                }
            }
            let mounts = service["volumes"].as_array().into_iter().flatten().filter_map(Value::as_str);
            for volume in mounts.filter_map(|mount| mount.split(':').next()) {
                if self.0["volumes"].get(volume).is_none() {
                    fault(format!("the volume {volume} is not declared"));
                }
            }
            // `up --wait` waits for those that stay.
            if service["restart"] != "no" && self.health_check(name).is_err() {
                fault("has no health check".into());
            }
            // Several of one service cannot have the same port of the machine.
            if name == "control-plane" && service.get("ports").is_some() {
                fault("publishes a port, so it cannot be scaled".into());
            }
        }
        faults
    }
}

/// A value with variables that are not set: `${NAME:-default}`, `${NAME:+set}`.
fn interpolated(text: &str) -> String {
    let Some((before, rest)) = text.split_once("${") else { return text.to_owned() };
    let (variable, after) = rest.split_once('}').unwrap_or((rest, ""));
    let default = variable.split_once(":-").map_or("", |(_, default)| default);
    format!("{before}{default}{}", interpolated(after))
}

fn json(yaml: &Yaml) -> Result<Value> {
    Ok(match yaml {
        Yaml::Null => Value::Null,
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Integer(value) => (*value).into(),
        Yaml::Real(text) | Yaml::String(text) => text.clone().into(),
        Yaml::Array(items) => items.iter().map(json).collect::<Result<Vec<_>>>()?.into(),
        Yaml::Hash(entries) => {
            let (mut own, mut merged) = (Map::new(), Map::new());
            for (key, value) in entries {
                let key = key.as_str().context("a key that is not text")?;
                match json(value)? {
                    Value::Object(other) if key == "<<" => merged.extend(other),
                    value => {
                        own.insert(key.to_owned(), value);
                    }
                }
            }
            merged.extend(own);
            merged.into()
        }
        Yaml::Alias(_) | Yaml::BadValue => bail!("an alias without an anchor"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(services: &str) -> Vec<String> {
        let dockerfile = Dockerfile::parse("FROM rust:1 AS build\nFROM debian AS api\n").unwrap();
        let text = format!("x-a: &a\n  restart: always\nservices:\n{services}\nvolumes:\n  data: {{}}\n");
        Compose::parse(&text).unwrap().faults(&dockerfile)
    }

    #[test]
    fn what_a_service_names_must_be_there() {
        let check = "healthcheck: { test: [CMD, \"true\"] }";
        assert_eq!(
            faults(&format!("  a: {{ <<: *a, build: {{ target: api }}, {check}, volumes: [\"data:/x\"] }}")),
            [""; 0]
        );
        for (service, fault) in [
            (format!("build: {{ target: none }}, {check}"), "the Dockerfile has no stage none"),
            (format!("build: {{ target: build }}, {check}"), "its image would have a compiler: the stage build starts"),
            (check.to_owned(), "has neither an image nor a build"),
            ("image: x".into(), "has no health check"),
            (format!("image: x, {check}, volumes: [\"other:/x\"]"), "the volume other is not declared"),
            (format!("image: x, {check}, depends_on: {{ b: {{ condition: service_healthy }} }}"), "depends on"),
        ] {
            let found = faults(&format!("  a: {{ {service} }}"));
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].starts_with(&format!("docker-compose.yml: service a: {fault}")), "{found:?}");
        }
        assert_eq!(faults(&format!("  control-plane: {{ image: x, {check}, ports: [\"1:1\"] }}")).len(), 1);
        assert!(Compose::parse("a: [").is_err() && Compose::parse("a: 1").is_err());
    }

    #[test]
    fn commands_and_environments_are_those_of_the_container() {
        let text = "services:\n  a:\n    environment: { ONE: 'x/${NONE:+no-}y', TWO: '${NONE:-z}', THREE: 3 }\n    \
                    healthcheck: { test: [CMD-SHELL, a && b] }\n";
        let compose = Compose::parse(text).unwrap();
        assert_eq!(compose.health_check("a").unwrap(), ["/bin/sh", "-c", "a && b"]);
        let mut environment = compose.environment("a");
        environment.sort();
        assert_eq!(environment, [("ONE", "x/y"), ("THREE", "3"), ("TWO", "z")].map(|(n, v)| (n.into(), v.into())));
    }
}
