//! The calls to the control plane.

use std::time::Duration;

use contract::sightings::Sightings;
use contract::usage::{Report, write_reports};
use contract::usage_log::LogKey;
use limits::TICK_MS;
use limits::message::Call as AllowanceCall;

use super::reporter::REPORT_TIMEOUT_MS;
use super::sync::POLL_TIMEOUT_MS;
use crate::config::Config;
use crate::host::{Call, Cluster, Log};
use crate::setup::Setup;

const USAGE: &str = "application/vnd.portcullis.usage";
const SIGHTINGS: &str = "application/vnd.portcullis.sightings";
const ALLOWANCES: &str = "application/vnd.portcullis.allowances";

/// The least time-out of a call for allowances, also where no request waits for it.
const MIN_ASK_TIMEOUT_MS: u64 = 50;

/// Polls for an update. Returns the token of the call; `None` if the host has no such cluster.
pub(super) fn poll_store(host: &impl Cluster, setup: &Setup, path: &str) -> Option<u32> {
    host.dispatch(&call(setup, "GET", path, None, POLL_TIMEOUT_MS))
}

/// Sends usage reports. Returns the token of the call; `None` if the host has no such cluster.
pub(super) fn send_reports(host: &impl Cluster, setup: &Setup, reports: &[Report]) -> Option<u32> {
    let body = write_reports(reports).ok()?;
    host.dispatch(&call(setup, "POST", "/sync/v1/usage", Some((USAGE, &body)), REPORT_TIMEOUT_MS))
}

/// Sends unknown keys and named policies. Returns the token of the call; `None` if the host has no such cluster.
pub(crate) fn send_sightings(host: &impl Cluster, setup: &Setup, message: &Sightings) -> Option<u32> {
    let body = message.write().ok()?;
    host.dispatch(&call(setup, "POST", "/sync/v1/sightings", Some((SIGHTINGS, &body)), REPORT_TIMEOUT_MS))
}

/// Asks for allowances of shared limits. Returns the token of the call; `None` if the host has no such cluster. An Envoy that is
/// alone must report in time, so its calls do not last longer than a tick, however long requests may wait.
pub(crate) fn ask(host: &impl Cluster, setup: &Setup, asked: &AllowanceCall, is_alone: bool) -> Option<u32> {
    let body = asked.write().ok()?;
    let most_ms = if is_alone { TICK_MS } else { u64::MAX };
    let timeout_ms = setup.config.limits_wait_ms.clamp(MIN_ASK_TIMEOUT_MS, most_ms);
    host.dispatch(&call(setup, "POST", "/sync/v1/allowances", Some((ALLOWANCES, &body)), timeout_ms))
}

/// Logs usage reports, as the line that `portcullis usage import` reads.
pub(super) fn write_to_log(log: &impl Log, sync_key: &str, reports: &[Report]) {
    if let Ok(reports) = write_reports(reports) {
        log.warn(&LogKey::derive(sync_key.as_bytes()).line(&reports));
    }
}

/// Why a call failed, and what to do about it.
pub(crate) fn explain(status: Option<u16>, what: &str) -> String {
    match status {
        None => "the control plane did not answer".into(),
        Some(401) => {
            "the control plane does not know the sync key (401): check the environment variable that holds it".into()
        }
        Some(403) => format!("the sync key may not {what} (403): it needs the scope sync, and a reporter of its own"),
        Some(status) => format!("the control plane answered {status}"),
    }
}

fn call<'a>(
    setup: &'a Setup,
    method: &'a str,
    path: &'a str,
    body: Option<(&'a str, &'a [u8])>,
    timeout_ms: u64,
) -> Call<'a> {
    let Config { cluster, authority, .. } = &setup.config;
    let mut headers = vec![
        (":method", method),
        (":path", path),
        (":authority", authority),
        (":scheme", "http"),
        ("x-api-key", &setup.sync_key),
    ];
    if let Some((content_type, _)) = body {
        headers.push(("content-type", content_type));
    }
    let body = body.map(|(_, body)| body);
    Call { cluster, headers, body, timeout: Duration::from_millis(timeout_ms) }
}
