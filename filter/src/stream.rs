//! A request in Envoy, during its callbacks.

use std::net::IpAddr;

use filter_core::address;
use filter_core::host::{PolicyPlace, Reply, Stream};
use filter_core::metadata::{Member, member};
use proxy_wasm::hostcalls;
use proxy_wasm::types::{MapType, Status};

/// The annotations that Envoy Gateway copies from a resource to its routes.
const ANNOTATIONS: [&str; 6] = ["xds", "route_metadata", "filter_metadata", "envoy-gateway", "resources", "0"];

/// The request of the present callback.
pub(crate) struct EnvoyStream;

/// The policy that metadata of this kind names; an empty name if the metadata has other members only. One call reads all of the
/// metadata. Envoy cannot encode members that are lists: then a second call reads the name.
fn policy_of(kind: &str) -> Option<String> {
    let own = ["xds", kind, "filter_metadata", "portcullis"];
    match hostcalls::get_property(own.to_vec()) {
        Ok(None) => None,
        Ok(Some(metadata)) => match member(&metadata, "policy") {
            Member::NoMetadata => None,
            Member::Missing => Some(String::new()),
            Member::Value(name) => Some(String::from_utf8_lossy(name).into_owned()),
        },
        Err(_) => {
            let policy = own.into_iter().chain(["policy"]).collect();
            Some(text(hostcalls::get_property(policy)).unwrap_or_default())
        }
    }
}

/// A property that is text; empty if the value is none, such as null.
fn text(property: Result<Option<Vec<u8>>, Status>) -> Option<String> {
    match property {
        Ok(text) => Some(String::from_utf8_lossy(&text?).into_owned()),
        Err(_) => Some(String::new()),
    }
}

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

    fn named_policy(&self, place: PolicyPlace<'_>) -> Option<String> {
        match place {
            PolicyPlace::Route => policy_of("route_metadata"),
            PolicyPlace::VirtualHost => policy_of("virtual_host_metadata"),
            PolicyPlace::Annotation(name) => {
                let mut path = ANNOTATIONS.to_vec();
                path.extend(["annotations", name]);
                text(hostcalls::get_property(path))
            }
            PolicyPlace::RouteName => text(hostcalls::get_property(vec!["xds", "route_name"])),
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
