//! Envoy configurations of the ways to check a key. All have the same listener and respond
//! themselves; `/up` is forwarded to an upstream. A header mutation copies the key from the query
//! into `x-api-key`, so that the load generator can send a different key with each request.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;
use portcullis_harness::envoy::INGRESS;
use serde_json::{Value, json};

use crate::feed::key;

const CONTROL_PLANE: &str = "control_plane";
const AUTHORIZER: &str = "authorizer";
const HTTP2: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// An Envoy configuration in the making.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    filters: Vec<Value>,
    listeners: Vec<Value>,
    clusters: Vec<Value>,
    route_metadata: Option<Value>,
    /// Headers of clients that Envoy removes before any filter runs.
    removed: &'static [&'static str],
    /// Whether Envoy writes what is left of the limits into each response.
    shows_limits: bool,
}

impl Peer {
    /// No filter at all.
    pub(crate) fn nothing() -> Self {
        Self::default()
    }

    /// A filter of the Rust SDK that does nothing.
    pub(crate) fn empty(wasm: &Path) -> Self {
        Self {
            filters: vec![filter(
                "empty",
                "wasm.v3.Wasm",
                json!({"config": {
                    "name": "empty", "root_id": "empty", "vm_config": vm("empty", wasm),
                }}),
            )],
            ..Self::default()
        }
    }

    /// Portcullis, with its keys from `feed`.
    pub(crate) fn portcullis(wasm: &Path, feed: SocketAddr, mut plugin: Value) -> Self {
        plugin["control_plane"] = json!({"cluster": CONTROL_PLANE});
        let removed = if plugin["envoy_removes_identity_headers"] == true { &REMOVED_BY_ENVOY[..] } else { &[] };
        let mut vm = vm("portcullis", wasm);
        vm["environment_variables"] = json!({"host_env_keys": ["PORTCULLIS_SYNC_KEY"]});
        let config = json!({"config": {
            "name": "portcullis", "root_id": "portcullis", "failure_policy": "FAIL_RELOAD", "vm_config": vm,
            "configuration": {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": plugin.to_string()},
        }});
        Self {
            filters: vec![filter("portcullis", "wasm.v3.Wasm", config)],
            clusters: vec![cluster(CONTROL_PLANE, feed, true)],
            removed,
            shows_limits: plugin["rate_limit_state"] == true,
            ..Self::default()
        }
    }

    /// The same routes, under a policy of Portcullis.
    pub(crate) fn with_policy(mut self, name: &str) -> Self {
        self.route_metadata = Some(json!({"filter_metadata": {"portcullis": {"policy": name}}}));
        self
    }

    /// Envoy's own filter, configured to do the same as far as it can: it sends the identity upstream and removes the key.
    pub(crate) fn api_key_auth(keys: u64) -> Self {
        let credential = |number| json!({"key": key(number), "client": format!("client-{number}")});
        Self {
            filters: vec![filter(
                "api_key_auth",
                "api_key_auth.v3.ApiKeyAuth",
                json!({
                    "credentials": (0..keys).map(credential).collect::<Vec<_>>(),
                    "key_sources": [{"header": "x-api-key"}],
                    "forwarding": {"header": "x-consumer-id", "hide_credentials": true},
                }),
            )],
            ..Self::default()
        }
    }

    /// A Lua script with a table, which does the same. The script is written to `file`.
    pub(crate) fn lua(keys: u64, file: &Path) -> Result<Self> {
        let mut pairs = String::new();
        for number in 0..keys {
            let _ = writeln!(pairs, "{} client-{number}", key(number));
        }
        // As text, since Lua limits the constants of a function.
        std::fs::write(file, LUA.replace("PAIRS", &pairs))?;
        let config = json!({"default_source_code": {"filename": file}});
        Ok(Self { filters: vec![filter("lua", "lua.v3.Lua", config)], ..Self::default() })
    }

    /// An authorizer over HTTP that answers at once: another listener of the same Envoy, at this port.
    pub(crate) fn ext_authz_http(port: u16) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let config = json!({"http_service": {
            "server_uri": {"uri": "http://authorizer", "cluster": AUTHORIZER, "timeout": "5s"},
            "authorization_request": {},
        }, "allowed_headers": {"patterns": [{"exact": "x-api-key"}]}});
        Self {
            filters: vec![filter("ext_authz", "ext_authz.v3.ExtAuthz", config)],
            listeners: vec![listener(AUTHORIZER, port, &[], None, false)],
            clusters: vec![cluster(AUTHORIZER, address, false)],
            ..Self::default()
        }
    }

    /// An authorizer over gRPC.
    pub(crate) fn ext_authz_grpc(authorizer: SocketAddr) -> Self {
        let config = json!({
            "grpc_service": {"envoy_grpc": {"cluster_name": AUTHORIZER}, "timeout": "5s"}, "transport_api_version": "V3",
        });
        Self {
            filters: vec![filter("ext_authz", "ext_authz.v3.ExtAuthz", config)],
            clusters: vec![cluster(AUTHORIZER, authorizer, true)],
            ..Self::default()
        }
    }

    /// Where `/up` goes.
    pub(crate) fn with_upstream(mut self, upstream: SocketAddr) -> Self {
        self.clusters.push(cluster(UPSTREAM, upstream, true));
        self
    }

    pub(crate) fn config(&self) -> Value {
        let key_from_query = filter(
            "key",
            "header_mutation.v3.HeaderMutation",
            json!({"mutations": {"request_mutations": [
                {"append": {"header": {"key": "x-api-key", "value": "%QUERY_PARAM(key)%"},
                            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}},
            ]}}),
        );
        let mut filters = vec![key_from_query];
        filters.extend(self.filters.clone());
        let has_upstream = self.clusters.iter().any(|cluster| cluster["name"] == UPSTREAM);
        let mut main = listener(INGRESS, 0, &filters, self.route_metadata.as_ref(), has_upstream);
        let manager = &mut main["filter_chains"][0]["filters"][0]["typed_config"];
        if !self.removed.is_empty() {
            let mutations: Vec<Value> = self.removed.iter().map(|name| json!({"remove": name})).collect();
            const KIND: &str = "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation";
            let kind = format!("type.googleapis.com/{KIND}");
            manager["early_header_mutation_extensions"] = json!([{
                "name": "identity", "typed_config": {"@type": kind, "mutations": mutations},
            }]);
        }
        if self.shows_limits {
            let shown = |name: &str, state: &str| {
                json!({
                    "header": {"key": name, "value": format!("%FILTER_STATE(wasm.portcullis.{state}:PLAIN)%")},
                    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                })
            };
            manager["route_config"]["response_headers_to_add"] =
                json!([shown("ratelimit", "ratelimit"), shown("ratelimit-policy", "ratelimit_policy")]);
        }
        let mut listeners = vec![main];
        listeners.extend(self.listeners.clone());
        json!({
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
            "static_resources": {"listeners": listeners, "clusters": self.clusters},
        })
    }
}

const UPSTREAM: &str = "upstream";

/// The names of identity headers, with that of the packed one.
const REMOVED_BY_ENVOY: [&str; 5] =
    ["x-consumer-id", "x-credential-identifier", "x-credential-scopes", "x-portcullis-shadow", "x-identity"];

const LUA: &str = r#"
local clients = {}
for key, client in string.gmatch([[
PAIRS]], "(%S+) (%S+)") do
  clients[key] = client
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local client = clients[headers:get("x-api-key")]
  if client == nil then
    handle:respond({[":status"] = "401"}, "no such key")
    return
  end
  headers:remove("x-api-key")
  headers:replace("x-consumer-id", client)
end
"#;

fn filter(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/envoy.extensions.filters.http.{kind}").into();
    json!({"name": name, "typed_config": config})
}

fn vm(id: &str, wasm: &Path) -> Value {
    json!({"vm_id": id, "runtime": "envoy.wasm.runtime.v8", "code": {"local": {"filename": wasm}}})
}

fn listener(name: &str, port: u16, filters: &[Value], metadata: Option<&Value>, has_upstream: bool) -> Value {
    let mut filters = filters.to_vec();
    filters.push(filter("router", "router.v3.Router", json!({"suppress_envoy_headers": true})));
    let up = json!({"match": {"prefix": "/up"}, "route": {"cluster": UPSTREAM}});
    let yes = json!({"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "yes"}}});
    let mut routes = if has_upstream { vec![up, yes] } else { vec![yes] };
    if let Some(metadata) = metadata {
        routes.iter_mut().for_each(|route| route["metadata"] = metadata.clone());
    }
    json!({
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "use_remote_address": true,
            "http_filters": filters,
            "route_config": {"name": name, "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        }}]}],
    })
}

fn cluster(name: &str, address: SocketAddr, http2: bool) -> Value {
    let protocol = if http2 { json!({"http2_protocol_options": {}}) } else { json!({"http_protocol_options": {}}) };
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {HTTP2: {
            "@type": format!("type.googleapis.com/{HTTP2}"), "explicit_http_config": protocol,
        }},
        "circuit_breakers": {"thresholds": [{"max_pending_requests": 100_000, "max_requests": 100_000, "max_connections": 10_000}]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {
            "socket_address": {"address": address.ip().to_string(), "port_value": address.port()},
        }}}]}]},
    })
}
