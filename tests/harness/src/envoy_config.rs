//! Envoy configurations from the files in `envoy/`, with other addresses and a few other settings.
//! The rest stays as shipped, so that tests run what users run. A marker that does not occur
//! exactly once in its file is an error.

use std::net::{Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use serde_json::{Map, Value};

use crate::ports::LOCAL;
use crate::service::Service;

/// Changes of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replacements {
    /// The address of the listener. `::` accepts IPv4 too.
    pub listener: SocketAddr,
    pub admin: SocketAddr,
    pub control_plane: SocketAddr,
    pub upstream: SocketAddr,
    /// Fields to set in the plugin configuration.
    pub plugin: Map<String, Value>,
    /// Routes before the catch-all route: path prefix and policy.
    pub routes: Vec<(String, String)>,
    /// A service in place of `upstream`. For `minimal.yaml` only.
    pub service: Option<Service>,
    /// Other replacements of text. Each text must occur exactly once.
    pub texts: Vec<(String, String)>,
}

impl Replacements {
    /// The template with these addresses, on free ports.
    pub fn between(control_plane: SocketAddr, upstream: SocketAddr) -> Self {
        let (listener, admin) = (LOCAL, LOCAL);
        let (plugin, routes, texts) = (Map::new(), Vec::new(), Vec::new());
        Self { listener, admin, control_plane, upstream, plugin, routes, service: None, texts }
    }

    /// Replaces a text that occurs once in the template.
    pub fn edit(&mut self, old: &str, new: &str) {
        self.texts.push((old.to_owned(), new.to_owned()));
    }
}

/// The plugin configuration of the template.
pub const PLUGIN: &str = r#"{"control_plane": {"cluster": "portcullis_control_plane"}}"#;
/// The port of the listener in every template.
const LISTENER_PORT: u16 = 10_000;
/// The port of the gRPC service in `existing.yaml`.
const GRPC_PORT: u16 = 50_051;
const ROUTE: &str = "- match: { prefix: / }";
/// How `minimal.yaml` sends a request to the upstream.
pub const UPSTREAM_ROUTE: &str = "route: { cluster: upstream }";
const POLICY_FIELD: &str = "metadata: { filter_metadata: { portcullis: { policy:";

pub fn render(template: &str, with: &Replacements) -> Result<String> {
    let mut addresses =
        vec![(LISTENER_PORT, with.listener), (9_901, with.admin), (8_081, with.control_plane), (8_080, with.upstream)];
    let mut text = template.to_owned();
    for (old, new) in &with.texts {
        text = replace_once(&text, old, new)?;
    }
    if let Some(service) = &with.service {
        for (old, new) in service.replacements() {
            text = replace_once(&text, &old, &new)?;
        }
        addresses.pop();
    }
    if text.contains(&format!("port_value: {GRPC_PORT}")) {
        addresses.push((GRPC_PORT, with.upstream));
    }
    // First to placeholders: a new address may equal another old one.
    for &(port, _) in &addresses {
        let marker = format!("{{ address: 127.0.0.1, port_value: {port} }}");
        text = replace_once(&text, &marker, &format!("\u{0}{port}\u{0}"))?;
    }
    for (port, address) in addresses {
        let both_families = if address.ip() == Ipv6Addr::UNSPECIFIED { " ipv4_compat: true," } else { "" };
        let new = format!("{{ address: \"{}\",{both_families} port_value: {} }}", address.ip(), address.port());
        text = replace_once(&text, &format!("\u{0}{port}\u{0}"), &new)?;
    }
    let indent = format!("\n{}", " ".repeat(24));
    let route = |(prefix, policy): &(String, String)| {
        let metadata = format!("{POLICY_FIELD} \"{policy}\" }} }} }}");
        let upstream = with.service.as_ref().map_or_else(|| UPSTREAM_ROUTE.to_owned(), Service::route);
        format!("- match: {{ prefix: \"{prefix}\" }}{indent}  {metadata}{indent}  {upstream}{indent}")
    };
    let routes: String = with.routes.iter().map(route).collect();
    text = replace_once(&text, ROUTE, &format!("{routes}{ROUTE}"))?;
    if with.plugin.is_empty() {
        return Ok(text);
    }
    let mut plugin: Map<String, Value> = serde_json::from_str(PLUGIN).unwrap_or_default();
    plugin.extend(with.plugin.clone());
    replace_once(&text, PLUGIN, &Value::from(plugin).to_string())
}

/// The file in Envoy's directory with the listener, if it is in a file of its own.
pub const LISTENER_FILE: &str = "listener.yaml";

/// Splits a configuration into the part that names [`LISTENER_FILE`] and the content of that file.
pub fn apart(configuration: &str) -> Result<(String, String)> {
    const LISTENERS: &str = "static_resources:\n  listeners:\n    - name: ";
    const CLUSTERS: &str = "\n  clusters:\n";
    for marker in [LISTENERS, CLUSTERS] {
        replace_once(configuration, marker, "")?;
    }
    let (before, rest) = configuration.split_once(LISTENERS).unwrap_or_default();
    let (listener, clusters) = rest.split_once(CLUSTERS).unwrap_or_default();
    let kind = "type.googleapis.com/envoy.config.listener.v3.Listener";
    let listener = format!("resources:\n    - \"@type\": {kind}\n      name: {listener}\n");
    let source = format!("{{ resource_api_version: V3, path_config_source: {{ path: ./{LISTENER_FILE} }} }}");
    let dynamic = format!("node: {{ id: test, cluster: test }}\n\ndynamic_resources:\n  lds_config: {source}\n");
    Ok((format!("{before}{dynamic}\nstatic_resources:{CLUSTERS}{clusters}"), listener))
}

fn replace_once(text: &str, marker: &str, new: &str) -> Result<String> {
    let found = text.matches(marker).count();
    ensure!(found == 1, "the template has {found} times, not once: {marker}");
    Ok(text.replacen(marker, new, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = include_str!("../../../envoy/minimal.yaml");

    fn replacements(plugin: &Value) -> Replacements {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let plugin = plugin.as_object().unwrap().clone();
        let between = Replacements::between(at(10_000), at(8_081));
        Replacements { listener: at(8_080), admin: at(0), plugin, ..between }
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
    fn routes_with_policies_stand_before_the_one_for_everything() {
        let plain = replacements(&serde_json::json!({}));
        let routes = vec![("/a".into(), "one".into()), ("/b".into(), "two".into())];
        let text = render(TEMPLATE, &Replacements { routes, ..plain.clone() }).unwrap();
        let before = render(TEMPLATE, &plain).unwrap();
        let new: Vec<&str> = text.lines().filter(|line| !before.contains(line)).map(str::trim).collect();
        let expected = [
            "- match: { prefix: \"/a\" }",
            "metadata: { filter_metadata: { portcullis: { policy: \"one\" } } }",
            "- match: { prefix: \"/b\" }",
            "metadata: { filter_metadata: { portcullis: { policy: \"two\" } } }",
        ];
        assert_eq!(new, expected);
    }

    #[test]
    fn the_hardened_template_has_the_same_markers_and_the_same_filter() {
        const HARDENED: &str = include_str!("../../../envoy/hardened.yaml");
        let text = render(HARDENED, &replacements(&serde_json::json!({"rate_limit": null}))).unwrap();
        assert_eq!(lines_that_differ(HARDENED, &text).len(), 5);
        assert_same(HARDENED, "access_log:", "route_config:");
        assert_same(HARDENED, "use_remote_address: true", "# Idle clients");
    }

    /// Asserts that what stands between two texts is that of [`TEMPLATE`].
    #[track_caller]
    fn assert_same(template: &str, start: &str, end: &str) {
        let [part, expected] =
            [template, TEMPLATE].map(|text| text.split_once(start).unwrap().1.split_once(end).unwrap().0);
        assert_eq!(part, expected, "from {start:?} to {end:?}");
    }

    #[test]
    fn the_template_of_an_existing_envoy_has_the_same_markers_and_the_same_filter() {
        const EXISTING: &str = include_str!("../../../envoy/existing.yaml");
        let texts = vec![("tokens_per_fill: 5000".to_owned(), "tokens_per_fill: 1".to_owned())];
        let text = render(EXISTING, &Replacements { texts, ..replacements(&serde_json::json!({})) }).unwrap();
        // The four addresses, that of the gRPC service and the text.
        assert_eq!(lines_that_differ(EXISTING, &text).len(), 6);
        for (start, end) in [
            ("access_log:", "http_filters:"),
            ("# Envoy answers the health checks", "                  - name: "),
            ("- name: portcullis\n", "value: |"),
            ("vm_config:", "proc_exit: {}"),
            ("- name: portcullis_control_plane", "cluster_name: portcullis_control_plane"),
        ] {
            assert_same(EXISTING, start, end);
        }
    }

    #[test]
    fn the_listener_moves_to_a_file_of_its_own_and_everything_else_stays() {
        let (bootstrap, listener) = apart(TEMPLATE).unwrap();
        assert!(
            bootstrap
                .contains("lds_config: { resource_api_version: V3, path_config_source: { path: ./listener.yaml } }")
        );
        assert!(bootstrap.contains("static_resources:\n  clusters:\n") && !bootstrap.contains("listeners:"));
        assert!(
            listener
                .starts_with("resources:\n    - \"@type\": type.googleapis.com/envoy.config.listener.v3.Listener\n")
        );
        for line in TEMPLATE.lines().filter(|line| line.len() > 20 && !line.contains("- name: ingress")) {
            assert!(bootstrap.contains(line) || listener.contains(line), "{line}");
        }
        assert!(apart(&TEMPLATE.replace("listeners:", "listener:")).is_err());
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
