//! Envoy, as this filter sees it. The only file that names hostcalls, so that their number per request can be counted
//! here: those that return data are marked, for they cost several times as much as most others.
//!
//! The SDK's hostcalls return an error only where one is possible; where none is, their result is dropped here.

use std::net::IpAddr;
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};

use proxy_wasm::hostcalls;
use proxy_wasm::types::{BufferType, LogLevel, MapType, MetricType, Status};

use filter_core::address;
use filter_core::cells::{Cell, Cells, Raced};
use filter_core::reply::Reply;

/// Where the metadata of a route holds what is meant for this filter.
const METADATA: [&str; 4] = ["xds", "route_metadata", "filter_metadata", "portcullis"];

/// Metadata without members as Envoy encodes it: the number of its pairs.
const NO_MEMBERS: [u8; 4] = [0; 4];

/// Shared data (`get` returns data).
pub(crate) struct SharedData;

impl Cells for SharedData {
    fn get(&self, name: &str) -> Option<Cell> {
        match hostcalls::get_shared_data(name) {
            Ok((value, Some(version))) => Some(Cell { value: value.unwrap_or_default(), version }),
            Ok((_, None)) | Err(_) => None,
        }
    }

    fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Raced> {
        // Zero would overwrite whatever is there; any other number inserts a cell that is absent.
        let seen = seen.unwrap_or(u32::MAX);
        hostcalls::set_shared_data(name, Some(value), Some(seen)).map_err(|_: Status| Raced)
    }
}

/// Nanoseconds of Unix time.
pub(crate) fn now_ns() -> u64 {
    let now = hostcalls::get_current_time().ok().and_then(|now| now.duration_since(UNIX_EPOCH).ok());
    now.and_then(|now| u64::try_from(now.as_nanos()).ok()).unwrap_or_default()
}

/// Randomness of the operating system, if it has any.
pub(crate) fn random_bytes<const N: usize>() -> Option<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).is_ok().then_some(bytes)
}

/// An environment variable that Envoy's `vm_config` passes on.
pub(crate) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The plugin configuration (returns data).
pub(crate) fn plugin_configuration() -> Vec<u8> {
    hostcalls::get_buffer(BufferType::PluginConfiguration, 0, usize::MAX).ok().flatten().unwrap_or_default()
}

/// Asks for a tick each so often.
pub(crate) fn tick_every(period: Duration) {
    let _ = hostcalls::set_tick_period(period);
}

/// Writes to Envoy's log.
pub(crate) fn warn(message: &str) {
    let _ = hostcalls::log(LogLevel::Warn, message);
}

/// Writes to Envoy's log.
pub(crate) fn error(message: &str) {
    let _ = hostcalls::log(LogLevel::Error, message);
}

/// Writes to Envoy's log.
pub(crate) fn info(message: &str) {
    let _ = hostcalls::log(LogLevel::Info, message);
}

/// A header of the request, the first of its name (returns data). Any bytes.
pub(crate) fn request_header(name: &str) -> Option<Vec<u8>> {
    hostcalls::get_map_value_bytes(MapType::HttpRequestHeaders, name).ok().flatten()
}

/// All headers of a name of the request, joined by commas in their order; `None` if there is none, or nothing in them (returns
/// data). The first of them where Envoy gives no properties.
pub(crate) fn request_header_lines(name: &str) -> Option<Vec<u8>> {
    match hostcalls::get_property(vec!["request", "headers", name]) {
        Ok(lines) => lines,
        Err(_) => request_header(name),
    }
}

/// Sets a header of the request in place of all of its name.
pub(crate) fn replace_request_header(name: &str, value: &str) {
    let _ = hostcalls::set_map_value(MapType::HttpRequestHeaders, name, Some(value));
}

/// The same, with a value of any bytes.
pub(crate) fn replace_request_header_bytes(name: &str, value: &[u8]) {
    let _ = hostcalls::set_map_value_bytes(MapType::HttpRequestHeaders, name, Some(value));
}

/// Removes all headers of a name from the request.
pub(crate) fn remove_request_header(name: &str) {
    let _ = hostcalls::remove_map_value(MapType::HttpRequestHeaders, name);
}

/// Removes all trailers of a name from the request.
pub(crate) fn remove_request_trailer(name: &str) {
    let _ = hostcalls::remove_map_value(MapType::HttpRequestTrailers, name);
}

/// Sets filter state `wasm.<name>`, for the access log.
pub(crate) fn set_filter_state(name: &str, value: &str) {
    let _ = hostcalls::set_property(vec![name], Some(value.as_bytes()));
}

/// The policy that the request's route names in its metadata, if it names one (returns data). If Envoy gives no answer, or
/// the metadata has another value in its place, the name is empty or odd, which is that of no policy.
///
/// The SDK reports an empty name like a missing one. Where there is no name, a second call asks for all of the metadata.
/// On a route that has none it returns no data.
pub(crate) fn route_policy() -> Option<String> {
    let [xds, route, kind, own] = METADATA;
    match hostcalls::get_property(vec![xds, route, kind, own, "policy"]) {
        Ok(None) => {}
        Ok(Some(name)) => return Some(String::from_utf8_lossy(&name).into_owned()),
        // A null stands there, for one.
        Err(_) => return Some(String::new()),
    }
    match hostcalls::get_property(METADATA.to_vec()) {
        Ok(None) => None,
        Ok(Some(metadata)) if metadata == NO_MEMBERS => None,
        _ => Some(String::new()),
    }
}

/// The address of the client, as far as Envoy trusts what it was told (returns data).
pub(crate) fn client_address() -> Option<IpAddr> {
    let address = hostcalls::get_property(vec!["source", "address"]).ok().flatten()?;
    address::read(&address)
}

/// Whether the filter may ask for properties at all: Envoy's configuration may restrict it (returns data).
pub(crate) fn may_ask_for_properties() -> bool {
    hostcalls::get_property(vec!["plugin_root_id"]).is_ok()
}

/// Answers the request.
pub(crate) fn send_reply(reply: &Reply) {
    let headers = reply.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let _ = hostcalls::send_http_response(u32::from(reply.status), headers, Some(reply.body.as_bytes()));
}

/// One call to the control plane.
pub(crate) struct Call<'a> {
    pub(crate) cluster: &'a str,
    pub(crate) authority: &'a str,
    pub(crate) key: &'a str,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) body: Option<&'a [u8]>,
    pub(crate) timeout: Duration,
}

impl Call<'_> {
    /// Sends it; the answer comes as a callback with the token. `None` if there is no such cluster.
    pub(crate) fn dispatch(&self) -> Option<u32> {
        let mut headers = vec![
            (":method", self.method),
            (":path", self.path),
            (":authority", self.authority),
            (":scheme", "http"),
            ("x-api-key", self.key),
        ];
        if self.body.is_some() {
            headers.push(("content-type", "application/vnd.portcullis.usage"));
        }
        hostcalls::dispatch_http_call(self.cluster, headers, self.body, vec![], self.timeout).ok()
    }
}

/// The status of the answer to a call; `None` if there was none (returns data).
pub(crate) fn answer_status() -> Option<u16> {
    answer_number(":status")
}

/// A header of the answer to a call, if it is a number (returns data).
pub(crate) fn answer_number<T: FromStr>(name: &str) -> Option<T> {
    let value = hostcalls::get_map_value_bytes(MapType::HttpCallResponseHeaders, name).ok().flatten()?;
    std::str::from_utf8(&value).ok()?.parse().ok()
}

/// The body of the answer to a call (returns data).
pub(crate) fn answer_body(bytes: usize) -> Vec<u8> {
    hostcalls::get_buffer(BufferType::HttpCallResponseBody, 0, bytes).ok().flatten().unwrap_or_default()
}

/// A counter or gauge of Envoy's, by its number.
#[derive(Clone, Copy)]
pub(crate) struct Metric(u32);

impl Metric {
    pub(crate) fn counter(name: &str) -> Option<Self> {
        hostcalls::define_metric(MetricType::Counter, name).ok().map(Self)
    }

    pub(crate) fn gauge(name: &str) -> Option<Self> {
        hostcalls::define_metric(MetricType::Gauge, name).ok().map(Self)
    }

    pub(crate) fn add(self, more: u64) {
        let _ = hostcalls::increment_metric(self.0, i64::try_from(more).unwrap_or(i64::MAX));
    }

    /// Its value, which all VMs of the process see; 0 if Envoy was told not to keep it.
    pub(crate) fn value(self) -> u64 {
        hostcalls::get_metric(self.0).unwrap_or_default()
    }

    pub(crate) fn record(self, value: u64) {
        let _ = hostcalls::record_metric(self.0, value);
    }
}
