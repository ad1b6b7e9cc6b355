//! A trap on demand, for tests of what is lost with a VM: compiled in with the feature `trap` only, which no filter that is
//! shipped has. Whoever can send a request could stop a worker's VM with it, and a control plane the one that leads.

use crate::host;

/// A request, or the answer to a poll, that carries this header traps.
const HEADER: &str = "x-portcullis-trap";

/// Ends this VM if the request asks for it.
pub(crate) fn spring() {
    if host::request_header(HEADER).is_some() {
        core::arch::wasm32::unreachable();
    }
}

/// Ends this VM, which leads then, if the answer to its poll asks for it.
pub(crate) fn spring_on_answer() {
    if host::answer_number::<u8>(HEADER).is_some() {
        core::arch::wasm32::unreachable();
    }
}
