//! The log and the metrics: one line and one count for each request, under a request id. Headers, bodies and queries
//! never get here, so no key does.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing::{Instrument, info, info_span};
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

use crate::config::LogFormat;

/// Where the request id stands, coming and going.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id of a client's that is taken over.
const REQUEST_ID_BYTES: usize = 64;

/// Starts the log, on standard error.
///
/// # Errors
/// One line, if `filter` makes no sense.
pub fn start_log(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::builder().parse(filter).map_err(|error| format!("--log: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Starts collecting metrics; the handle prints them.
///
/// # Errors
/// One line, if they are collected already.
pub fn start_metrics() -> Result<PrometheusHandle, String> {
    let seconds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("seconds".into()), &seconds)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| format!("metrics: {error}"))
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
        info!(%method, route, status, ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX), "answered");
        let labels = [("method", label_of(&method).to_owned()), ("route", route), ("status", status.to_string())];
        metrics::counter!("portcullis_http_requests_total", &labels).increment(1);
        metrics::histogram!("portcullis_http_request_duration_seconds", &labels[..2]).record(elapsed.as_secs_f64());
        response.headers_mut().insert(REQUEST_ID, id);
        response
    }
    .instrument(span)
    .await
}

/// Clients may make up methods: those that are not well known count together, or each would be a series of its own.
fn label_of(method: &Method) -> &'static str {
    let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    known.into_iter().find(|known| *known == method.as_str()).unwrap_or("OTHER")
}

fn is_sane(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
    (1..=REQUEST_ID_BYTES).contains(&bytes.len()) && bytes.iter().all(plain) && !bytes.starts_with(b"sk_")
}

fn new_id() -> HeaderValue {
    HeaderValue::try_from(Uuid::now_v7().to_string()).unwrap_or_else(|_| HeaderValue::from_static("none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_clients_make_up_count_together() {
        assert_eq!(label_of(&Method::PATCH), "PATCH");
        for made_up in ["TRACE", "get", "X1"] {
            assert_eq!(label_of(&Method::from_bytes(made_up.as_bytes()).unwrap()), "OTHER");
        }
    }
}
