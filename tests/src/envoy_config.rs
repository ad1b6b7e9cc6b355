//! `envoy/minimal.yaml` with other addresses: the template and addresses come in, the configuration goes out. Everything
//! else in it stays as people read it, so that what is tested is what they use. A template in which something that is to
//! be replaced does not stand exactly once is refused.

use std::net::SocketAddr;

use serde_json::{Map, Value};

/// What is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replacements {
    /// Where Envoy takes requests.
    pub listener: SocketAddr,
    /// Its admin interface.
    pub admin: SocketAddr,
    /// Where it finds the control plane.
    pub control_plane: SocketAddr,
    /// Where it finds the API that is protected.
    pub upstream: SocketAddr,
    /// Fields of the plugin configuration beside those that the template has, or instead of them.
    pub plugin: Map<String, Value>,
}

/// The template is not what this code knows how to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateError {
    marker: String,
    found: usize,
}

impl std::fmt::Display for TemplateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "envoy/minimal.yaml has {} times, not once: {}", self.found, self.marker)
    }
}

impl std::error::Error for TemplateError {}

/// The plugin configuration of the template.
pub const PLUGIN: &str = r#"{"control_plane": {"cluster": "portcullis_control_plane"}}"#;

/// Replaces the addresses, and adds to the plugin configuration if there is something to add.
///
/// # Errors
/// If one of them does not stand there exactly once.
pub fn render(template: &str, with: &Replacements) -> Result<String, TemplateError> {
    let addresses = [(10_000, with.listener), (9_901, with.admin), (8_081, with.control_plane), (8_080, with.upstream)];
    // First to placeholders, lest a new address be taken for another old one.
    let mut text = template.to_owned();
    for (port, _) in addresses {
        let marker = format!("{{ address: 127.0.0.1, port_value: {port} }}");
        text = replace_once(&text, &marker, &format!("\u{0}{port}\u{0}"))?;
    }
    for (port, address) in addresses {
        let new = format!("{{ address: \"{}\", port_value: {} }}", address.ip(), address.port());
        text = replace_once(&text, &format!("\u{0}{port}\u{0}"), &new)?;
    }
    if with.plugin.is_empty() {
        return Ok(text);
    }
    let mut plugin: Map<String, Value> = serde_json::from_str(PLUGIN).unwrap_or_default();
    plugin.extend(with.plugin.clone());
    replace_once(&text, PLUGIN, &Value::from(plugin).to_string())
}

fn replace_once(text: &str, marker: &str, new: &str) -> Result<String, TemplateError> {
    match text.matches(marker).count() {
        1 => Ok(text.replacen(marker, new, 1)),
        found => Err(TemplateError { marker: marker.to_owned(), found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = include_str!("../../envoy/minimal.yaml");

    fn replacements(plugin: &Value) -> Replacements {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let plugin = plugin.as_object().unwrap().clone();
        Replacements { listener: at(8_080), admin: at(0), control_plane: at(10_000), upstream: at(8_081), plugin }
    }

    fn lines_that_differ(one: &str, other: &str) -> Vec<String> {
        assert_eq!(one.lines().count(), other.lines().count());
        let pairs = one.lines().zip(other.lines());
        pairs.filter(|(one, other)| one != other).map(|(_, other)| other.trim().to_owned()).collect()
    }

    #[test]
    fn only_the_addresses_change_even_when_they_are_swapped() {
        let text = render(TEMPLATE, &replacements(&serde_json::json!({}))).unwrap();
        let expected = [
            "socket_address: { address: \"127.0.0.1\", port_value: 0 }",
            "socket_address: { address: \"127.0.0.1\", port_value: 8080 }",
            "socket_address: { address: \"127.0.0.1\", port_value: 8081 }",
            "socket_address: { address: \"127.0.0.1\", port_value: 10000 }",
        ];
        assert_eq!(lines_that_differ(TEMPLATE, &text), expected);
    }

    #[test]
    fn what_a_test_configures_is_added_to_the_plugin_configuration() {
        let plain = render(TEMPLATE, &replacements(&serde_json::json!({}))).unwrap();
        let text = render(TEMPLATE, &replacements(&serde_json::json!({"rate_limit": null}))).unwrap();
        let expected = r#"{"control_plane":{"cluster":"portcullis_control_plane"},"rate_limit":null}"#;
        assert_eq!(lines_that_differ(&plain, &text), [expected]);
    }

    #[test]
    fn a_template_without_a_marker_or_with_two_is_refused() {
        let with = replacements(&serde_json::json!({"strip_key": false}));
        let error = |template: &str| render(template, &with).unwrap_err().to_string();
        assert!(error(&TEMPLATE.replace("port_value: 8081", "port_value: 8082")).contains("0 times"));
        assert!(error(&TEMPLATE.repeat(2)).contains("2 times"));
        assert!(error(&TEMPLATE.replace(PLUGIN, "{}")).contains("portcullis_control_plane"));
    }
}
