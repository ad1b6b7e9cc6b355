//! The calls to the control plane.

use std::time::Duration;

use contract::usage::{Report, write_reports};
use contract::usage_log::LogKey;

use super::reporter::REPORT_TIMEOUT_MS;
use super::sync::POLL_TIMEOUT_MS;
use crate::config::Config;
use crate::host::{Call, Cluster, Log};
use crate::setup::Setup;

/// Polls for an update. Returns the token of the call; `None` if the host has no such cluster.
pub(super) fn poll_store(host: &impl Cluster, setup: &Setup, path: &str) -> Option<u32> {
    host.dispatch(&call(setup, "GET", path, None, POLL_TIMEOUT_MS))
}

/// Sends usage reports. Returns the token of the call; `None` if the host has no such cluster.
pub(super) fn send_reports(host: &impl Cluster, setup: &Setup, reports: &[Report]) -> Option<u32> {
    let body = write_reports(reports).ok()?;
    host.dispatch(&call(setup, "POST", "/sync/v1/usage", Some(&body), REPORT_TIMEOUT_MS))
}

/// Logs usage reports, as the line that `portcullis usage import` reads.
pub(super) fn write_to_log(log: &impl Log, sync_key: &str, reports: &[Report]) {
    if let Ok(reports) = write_reports(reports) {
        log.warn(&LogKey::derive(sync_key.as_bytes()).line(&reports));
    }
}

/// Why a call failed, and what to do about it.
pub(super) fn explain(status: Option<u16>, what: &str) -> String {
    match status {
        None => "the control plane did not answer".into(),
        Some(401) => {
            "the control plane does not know the sync key (401): check the environment variable that holds it".into()
        }
        Some(403) => format!("the sync key may not {what} (403): it needs the scope sync, and a reporter of its own"),
        Some(status) => format!("the control plane answered {status}"),
    }
}

fn call<'a>(setup: &'a Setup, method: &'a str, path: &'a str, body: Option<&'a [u8]>, timeout_ms: u64) -> Call<'a> {
    let Config { cluster, authority, .. } = &setup.config;
    let mut headers = vec![
        (":method", method),
        (":path", path),
        (":authority", authority),
        (":scheme", "http"),
        ("x-api-key", &setup.sync_key),
    ];
    if body.is_some() {
        headers.push(("content-type", "application/vnd.portcullis.usage"));
    }
    Call { cluster, headers, body, timeout: Duration::from_millis(timeout_ms) }
}
