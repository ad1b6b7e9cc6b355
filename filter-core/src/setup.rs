//! What the operator gives one filter: its configuration, and the secrets in its environment.

use contract::pepper::Pepper;

use crate::config::{Config, PolicySource};
use crate::host::{Environment, Log};

/// The environment variable of the pepper, unless the configuration names another.
const PEPPER_ENV: &str = "PORTCULLIS_PEPPER";

/// A configuration that was checked, with its secrets.
pub struct Setup {
    /// The configuration.
    pub config: Config,
    /// The key with the scope `sync`.
    pub sync_key: String,
}

impl Setup {
    /// Reads and checks the configuration and the environment.
    ///
    /// # Errors
    /// The first mistake, with the field or variable and the remedy.
    pub fn read(environment: &impl Environment, log: &impl Log) -> Result<Self, String> {
        let mut config = Config::parse(&environment.configuration()).map_err(|error| error.to_string())?;
        config.pepper = pepper(environment, config.pepper_env.as_deref())?;
        let sync_key = sync_key(environment, &config.sync_key_env)?;
        if !environment.may_read_properties() {
            let remedy = "add proxy_get_property to capability_restriction_config.allowed_capabilities";
            // Without properties, routes would silently get the default policy.
            if config.policy_sources.iter().any(PolicySource::is_property) {
                return Err(format!(
                    "policy_sources: the filter may not ask which policy a route names: {remedy}, or set policy_sources to \
                     [\"rules\"]"
                ));
            }
            log.warn(&format!("keys that are bound to networks will be refused from everywhere: {remedy}"));
        }
        Ok(Self { config, sync_key })
    }
}

fn sync_key(environment: &impl Environment, variable: &str) -> Result<String, String> {
    let key = environment.variable(variable).filter(|key| !key.is_empty()).ok_or_else(|| {
        format!(
            "the environment variable {variable} is not set: start Envoy with a key of scope sync in it and name it \
             in vm_config.environment_variables.host_env_keys"
        )
    })?;
    if key.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(key)
    } else {
        Err(format!("the environment variable {variable} holds characters that no key has"))
    }
}

/// The pepper of imported keys. It is optional unless the configuration names its variable.
fn pepper(environment: &impl Environment, named: Option<&str>) -> Result<Option<Pepper>, String> {
    let variable = named.unwrap_or(PEPPER_ENV);
    match environment.variable(variable).filter(|text| !text.is_empty()) {
        Some(text) => {
            Pepper::parse(&text).map(Some).map_err(|error| format!("the environment variable {variable}: {error}"))
        }
        None if named.is_some() => Err(format!(
            "pepper_env: the environment variable {variable} is not set: start Envoy with the control plane's pepper in it \
             and name it in vm_config.environment_variables.host_env_keys"
        )),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{MockEnvironment, MockHost};

    fn environment(fields: &str, variables: &[(&str, &str)]) -> MockEnvironment {
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        MockEnvironment {
            configuration: format!(r#"{{"control_plane": {{"cluster": "cp"}}{fields}}}"#),
            variables: variables.collect(),
            hides_properties: false,
        }
    }

    fn error(environment: &MockEnvironment) -> String {
        Setup::read(environment, &MockHost::default()).err().unwrap()
    }

    const KEY: (&str, &str) = ("PORTCULLIS_SYNC_KEY", "sk_live_key");
    const PEPPER: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    #[test]
    fn the_sync_key_is_required_and_must_look_like_a_key() {
        let setup = Setup::read(&environment("", &[KEY]), &MockHost::default()).ok().unwrap();
        assert_eq!((setup.sync_key.as_str(), setup.config.pepper.is_none()), ("sk_live_key", true));
        for variables in [&[][..], &[("PORTCULLIS_SYNC_KEY", "")]] {
            assert!(error(&environment("", variables)).starts_with(
                "the environment variable PORTCULLIS_SYNC_KEY is not set: start Envoy with a key of scope sync in it"
            ));
        }
        let expected = "the environment variable PORTCULLIS_SYNC_KEY holds characters that no key has";
        assert_eq!(error(&environment("", &[("PORTCULLIS_SYNC_KEY", "a b")])), expected);
    }

    #[test]
    fn a_pepper_is_read_if_there_is_one_and_required_if_its_variable_is_named() {
        let read = |fields: &str, name: &str, value: &str| {
            Setup::read(&environment(fields, &[KEY, (name, value)]), &MockHost::default())
        };
        assert!(read("", "PORTCULLIS_PEPPER", PEPPER).ok().unwrap().config.pepper.is_some());
        let named = r#", "pepper_env": "PEPPER""#;
        assert!(read(named, "PEPPER", PEPPER).ok().unwrap().config.pepper.is_some());
        let missing = read(named, "PORTCULLIS_PEPPER", PEPPER).err().unwrap();
        assert!(missing.starts_with("pepper_env: the environment variable PEPPER is not set"), "{missing}");
        let bad = read("", "PORTCULLIS_PEPPER", "short").err().unwrap();
        assert!(bad.starts_with("the environment variable PORTCULLIS_PEPPER: a pepper has 64"), "{bad}");
    }

    #[test]
    fn a_configuration_that_is_wrong_is_refused() {
        assert_eq!(
            error(&environment(r#", "stores": 1"#, &[KEY])).split(';').next(),
            Some("stores: is not a known field")
        );
    }

    #[test]
    fn without_properties_routes_cannot_name_policies_and_there_is_a_warning() {
        let hidden = |fields: &str| MockEnvironment { hides_properties: true, ..environment(fields, &[KEY]) };
        let why = error(&hidden(""));
        assert!(
            why.starts_with(
                "policy_sources: the filter may not ask which policy a route names: add proxy_get_property"
            )
        );
        let host = MockHost::default();
        assert!(Setup::read(&hidden(r#", "policy_sources": ["rules"]"#), &host).is_ok());
        let [(level, line)] = &host.take_log()[..] else { panic!("one line") };
        assert!(
            *level == "warn" && line.starts_with("keys that are bound to networks will be refused from everywhere")
        );
    }
}
