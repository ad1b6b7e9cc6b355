//! Envoy outside of a request. This file and `stream` have all hostcalls of the filter.
//!
//! The SDK returns an error from every hostcall. Where none is possible or none can be handled, it is dropped here.

use std::cell::Cell;
use std::time::{Duration, UNIX_EPOCH};

use filter_core::host::{
    Call, CallResponse, Clock, Cluster, Environment, Log, MetricId, Random, Stats, Wake, random_bytes,
};
use filter_core::shared::{Cell as SharedCell, Cells, Conflict};
use proxy_wasm::hostcalls;
use proxy_wasm::types::{BufferType, LogLevel, MapType, MetricType, Status};

/// Envoy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Envoy;

impl Cells for Envoy {
    fn get(&self, name: &str) -> Option<SharedCell> {
        match hostcalls::get_shared_data(name) {
            Ok((value, Some(version))) => Some(SharedCell { value: value.unwrap_or_default(), version }),
            Ok((_, None)) | Err(_) => None,
        }
    }

    fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Conflict> {
        // Zero would overwrite any version. Every other number inserts a cell that is absent.
        let seen = seen.unwrap_or(u32::MAX);
        hostcalls::set_shared_data(name, Some(value), Some(seen)).map_err(|_: Status| Conflict)
    }
}

impl Clock for Envoy {
    fn now_ns(&self) -> u64 {
        let now = hostcalls::get_current_time().ok().and_then(|now| now.duration_since(UNIX_EPOCH).ok());
        now.and_then(|now: Duration| u64::try_from(now.as_nanos()).ok()).unwrap_or_default()
    }
}

thread_local! {
    /// The queue by which this VM wakes its newest root context.
    static QUEUE: Cell<Option<u32>> = const { Cell::new(None) };
}

impl Envoy {
    /// Makes the present root context the one that is woken. The name of its queue is its own: Envoy would give a queue of the
    /// same name to whoever registered it last. If Envoy's configuration keeps queues from the filter, the SDK traps here, so
    /// that Envoy refuses the configuration and its log names the function.
    pub(crate) fn register_queue() -> Result<(), String> {
        let number = random_bytes(&Self).map(u64::from_le_bytes).ok_or("the system has no randomness")?;
        let queue = hostcalls::register_shared_queue(&format!("portcullis-{number:016x}"));
        QUEUE.set(Some(queue.map_err(|status| format!("no shared queue: {status:?}"))?));
        Ok(())
    }

    /// Empties a queue that has woken its root context.
    pub(crate) fn empty_queue(queue: u32) {
        while let Ok(Some(_)) = hostcalls::dequeue_shared_queue(queue) {}
    }
}

impl Wake for Envoy {
    fn wake(&self) {
        if let Some(queue) = QUEUE.get() {
            let _ = hostcalls::enqueue_shared_queue(queue, Some(b"1"));
        }
    }
}

impl Random for Envoy {
    fn fill(&self, bytes: &mut [u8]) -> bool {
        getrandom::fill(bytes).is_ok()
    }
}

impl Log for Envoy {
    fn info(&self, message: &str) {
        let _ = hostcalls::log(LogLevel::Info, message);
    }

    fn warn(&self, message: &str) {
        let _ = hostcalls::log(LogLevel::Warn, message);
    }

    fn error(&self, message: &str) {
        let _ = hostcalls::log(LogLevel::Error, message);
    }
}

impl Stats for Envoy {
    fn define_counter(&self, name: &str) -> Option<MetricId> {
        hostcalls::define_metric(MetricType::Counter, name).ok().map(MetricId)
    }

    fn define_gauge(&self, name: &str) -> Option<MetricId> {
        hostcalls::define_metric(MetricType::Gauge, name).ok().map(MetricId)
    }

    fn add(&self, MetricId(metric): MetricId, more: u64) {
        let _ = hostcalls::increment_metric(metric, i64::try_from(more).unwrap_or(i64::MAX));
    }

    fn set(&self, MetricId(metric): MetricId, value: u64) {
        let _ = hostcalls::record_metric(metric, value);
    }

    fn value(&self, MetricId(metric): MetricId) -> u64 {
        hostcalls::get_metric(metric).unwrap_or_default()
    }
}

impl Cluster for Envoy {
    fn dispatch(&self, call: &Call<'_>) -> Option<u32> {
        let Call { cluster, headers, body, timeout } = call;
        hostcalls::dispatch_http_call(cluster, headers.clone(), *body, vec![], *timeout).ok()
    }
}

impl Environment for Envoy {
    fn configuration(&self) -> Vec<u8> {
        hostcalls::get_buffer(BufferType::PluginConfiguration, 0, usize::MAX).ok().flatten().unwrap_or_default()
    }

    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn may_read_properties(&self) -> bool {
        hostcalls::get_property(vec!["plugin_root_id"]).is_ok()
    }
}

/// The response to a call, during its callback.
pub(crate) struct Response {
    /// Without headers the call failed. The SDK would panic if one were read.
    pub(crate) has_headers: bool,
    pub(crate) body_bytes: usize,
}

impl CallResponse for Response {
    fn status(&self) -> Option<u16> {
        self.number(":status").and_then(|status| u16::try_from(status).ok())
    }

    fn number(&self, header: &str) -> Option<u64> {
        if !self.has_headers {
            return None;
        }
        let value = hostcalls::get_map_value_bytes(MapType::HttpCallResponseHeaders, header).ok().flatten()?;
        std::str::from_utf8(&value).ok()?.parse().ok()
    }

    fn body(&self) -> Vec<u8> {
        hostcalls::get_buffer(BufferType::HttpCallResponseBody, 0, self.body_bytes).ok().flatten().unwrap_or_default()
    }
}
