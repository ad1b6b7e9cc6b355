//! A trap on demand, for tests of the loss of a VM. Only the feature `trap` compiles it, and no shipped filter has it: a client
//! could stop a worker's VM with it, and a control plane the leader.

use proxy_wasm::hostcalls::get_map_value_bytes;
use proxy_wasm::types::MapType;

/// A request, or the response to a poll, with this header traps.
const HEADER: &str = "x-portcullis-trap";

/// Ends this VM if the request asks for it.
pub(crate) fn on_request() {
    end_if_in(MapType::HttpRequestHeaders);
}

/// Ends this VM, which leads then, if the response to its call asks for it.
pub(crate) fn on_response(headers: usize) {
    // Without headers the call failed, and the SDK would panic.
    if headers > 0 {
        end_if_in(MapType::HttpCallResponseHeaders);
    }
}

fn end_if_in(headers: MapType) {
    if get_map_value_bytes(headers, HEADER).ok().flatten().is_some() {
        core::arch::wasm32::unreachable();
    }
}
