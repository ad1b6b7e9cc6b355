//! The log and the metrics: one line and one count for each request, under a request id. Headers, bodies and queries
//! never get here, so no key does.

use std::io::Write;
use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::{Instrument, debug, info, info_span};
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::config::LogFormat;
use crate::metric;

/// Where the request id stands, coming and going.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The length of a UUID with hyphens. Nothing else is taken over from a client: Envoy's request ids are UUIDs, and a UUID
/// can neither hold a key nor be mistaken for another part of a log line.
const REQUEST_ID_BYTES: usize = 36;

/// Starts the log, on standard error.
///
/// # Errors
/// One line, if `filter` makes no sense.
pub fn start_log(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::builder().parse(filter).map_err(|error| format!("--log: {error}"))?;
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(|| LogWriter(std::io::stderr()));
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Writes events of the log, one line each: control characters within an event are escaped. Otherwise the text of a client
/// or of the database could begin a line of its own, or steer the terminal that shows it.
struct LogWriter<W>(W);

impl<W: Write> Write for LogWriter<W> {
    /// Takes a whole event, which ends with a newline.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        let (line, end) = event.strip_suffix(b"\n").map_or((event, &b""[..]), |line| (line, b"\n"));
        match one_line(&String::from_utf8_lossy(line)) {
            Some(escaped) => self.0.write_all(&[escaped.as_bytes(), end].concat())?,
            None => self.0.write_all(event)?,
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// The text with its control characters escaped, if it has any.
fn one_line(text: &str) -> Option<String> {
    let breaks = |c: char| c.is_control() || ['\u{2028}', '\u{2029}'].contains(&c);
    text.contains(breaks).then(|| {
        let escaped = |c: char| if breaks(c) { c.escape_default().to_string() } else { c.to_string() };
        text.chars().map(escaped).collect()
    })
}

/// Starts collecting metrics; the handle prints them.
///
/// # Errors
/// One line, if they are collected already.
pub fn start_metrics() -> Result<PrometheusHandle, String> {
    let seconds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("seconds".into()), &seconds)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| format!("metrics: {error}"))?;
    metric::describe();
    Ok(handle)
}

/// Gives the request its id, logs and counts it.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(&REQUEST_ID).filter(|id| is_sane(id)).cloned();
    let id = given.unwrap_or_else(new_id);
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let span = info_span!("request", id = id.to_str().unwrap_or_default());
    let start = Instant::now();
    async move {
        let mut response = next.run(request).await;
        let (status, elapsed) = (response.status().as_u16(), start.elapsed());
        let ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        if is_quiet_probe(&route, status) {
            debug!(%method, route, status, ms, "answered");
        } else {
            info!(%method, route, status, ms, "answered");
        }
        let labels = [("method", label_of(&method).to_owned()), ("route", route), ("status", status.to_string())];
        metrics::counter!("portcullis_http_requests_total", &labels).increment(1);
        metrics::histogram!("portcullis_http_request_duration_seconds", &labels[..2]).record(elapsed.as_secs_f64());
        response.headers_mut().insert(REQUEST_ID, id);
        response
    }
    .instrument(span)
    .await
}

/// Whether a platform asked how the process is, as it does every few seconds, and all is well.
fn is_quiet_probe(route: &str, status: u16) -> bool {
    ["/healthz", "/readyz", "/metrics"].contains(&route) && status < 400
}

/// Clients may make up methods: those that are not well known count together, or each would be a series of its own.
fn label_of(method: &Method) -> &'static str {
    let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    known.into_iter().find(|known| *known == method.as_str()).unwrap_or("OTHER")
}

fn is_sane(id: &HeaderValue) -> bool {
    id.len() == REQUEST_ID_BYTES && Uuid::try_parse_ascii(id.as_bytes()).is_ok()
}

fn new_id() -> HeaderValue {
    HeaderValue::try_from(Uuid::now_v7().to_string()).unwrap_or_else(|_| HeaderValue::from_static("none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_probes_that_succeed_are_quiet() {
        assert!(is_quiet_probe("/readyz", 200) && is_quiet_probe("/healthz", 200) && is_quiet_probe("/metrics", 200));
        assert!(!is_quiet_probe("/readyz", 503) && !is_quiet_probe("/v1/keys", 200) && !is_quiet_probe("none", 404));
    }

    #[test]
    fn methods_that_clients_make_up_count_together() {
        assert_eq!(label_of(&Method::PATCH), "PATCH");
        for made_up in ["TRACE", "get", "X1"] {
            assert_eq!(label_of(&Method::from_bytes(made_up.as_bytes()).unwrap()), "OTHER");
        }
    }

    #[test]
    fn request_ids_of_clients_are_uuids_or_not_taken_over() {
        let sane = |id: &str| is_sane(&HeaderValue::from_str(id).unwrap());
        assert!(sane("0192f0c1-2f0e-7c3a-8a53-3f1f0a9f6e11") && sane("0192F0C1-2F0E-7C3A-8A53-3F1F0A9F6E11"));
        for other in [
            "",
            "x",
            "0192f0c12f0e7c3a8a533f1f0a9f6e11",
            "{0192f0c1-2f0e-7c3a-8a53-3f1f0a9f6e}",
            "sk_live_0192f0c12f0e7c3a8a533f1f0a9f",
            "0192f0c1-2f0e-7c3a-8a53-3f1f0a9f6e11\tstatus=200",
        ] {
            assert!(!sane(other), "{other}");
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_its_text() {
        let mut log = Vec::new();
        let event = "INFO why=a\nINFO answered\r\x1b[31m\u{85}\u{2028}é\n";
        LogWriter(&mut log).write_all(event.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(log).unwrap(), "INFO why=a\\nINFO answered\\r\\u{1b}[31m\\u{85}\\u{2028}é\n");
    }
}
