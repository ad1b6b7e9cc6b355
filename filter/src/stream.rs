//! A request in Envoy, during its callbacks.

use std::net::IpAddr;

use filter_core::address;
use filter_core::host::{Reply, Stream};
use proxy_wasm::hostcalls;
use proxy_wasm::types::MapType;

/// The property with the filter's metadata of a route.
const METADATA: [&str; 4] = ["xds", "route_metadata", "filter_metadata", "portcullis"];

/// Metadata without members as Envoy encodes it: the number of its pairs.
const NO_MEMBERS: [u8; 4] = [0; 4];

/// The request of the present callback.
pub(crate) struct EnvoyStream;

impl Stream for EnvoyStream {
    fn header(&self, name: &str) -> Option<Vec<u8>> {
        hostcalls::get_map_value_bytes(MapType::HttpRequestHeaders, name).ok().flatten()
    }

    fn header_lines(&self, name: &str) -> Option<Vec<u8>> {
        match hostcalls::get_property(vec!["request", "headers", name]) {
            Ok(lines) => lines,
            // Envoy may be configured to give no properties.
            Err(_) => self.header(name),
        }
    }

    /// The SDK returns an empty name as no name. Without a name a second call reads all of the metadata. If the route has none,
    /// that call returns no data.
    fn route_policy(&self) -> Option<String> {
        let [xds, route, kind, own] = METADATA;
        match hostcalls::get_property(vec![xds, route, kind, own, "policy"]) {
            Ok(None) => {}
            Ok(Some(name)) => return Some(String::from_utf8_lossy(&name).into_owned()),
            // For example, the value is null.
            Err(_) => return Some(String::new()),
        }
        match hostcalls::get_property(METADATA.to_vec()) {
            Ok(None) => None,
            Ok(Some(metadata)) if metadata == NO_MEMBERS => None,
            _ => Some(String::new()),
        }
    }

    fn client_address(&self) -> Option<IpAddr> {
        let address = hostcalls::get_property(vec!["source", "address"]).ok().flatten()?;
        address::read(&address)
    }

    fn set_header(&mut self, name: &str, value: &[u8]) {
        let _ = hostcalls::set_map_value_bytes(MapType::HttpRequestHeaders, name, Some(value));
    }

    fn remove_header(&mut self, name: &str) {
        let _ = hostcalls::remove_map_value(MapType::HttpRequestHeaders, name);
    }

    fn remove_trailer(&mut self, name: &str) {
        let _ = hostcalls::remove_map_value(MapType::HttpRequestTrailers, name);
    }

    /// As `wasm.<name>`.
    fn set_filter_state(&mut self, name: &str, value: &str) {
        let _ = hostcalls::set_property(vec![name], Some(value.as_bytes()));
    }

    fn send_reply(&mut self, reply: &Reply) {
        let headers = reply.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let _ = hostcalls::send_http_response(u32::from(reply.status), headers, Some(reply.body.as_bytes()));
    }

    fn resume(&mut self) {
        let _ = hostcalls::resume_http_request();
    }
}
