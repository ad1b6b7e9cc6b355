//! One line of the log and one count for each request, under a request id. Headers, bodies and queries are not logged, so no
//! key is.

use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use tracing::{Instrument, debug, info, info_span};
use uuid::Uuid;

/// Where the request id stands, coming and going.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The length of a UUID with hyphens. Nothing else is taken over from a client: Envoy's request ids are UUIDs, and a UUID
/// can neither hold a key nor be mistaken for another part of a log line.
const REQUEST_ID_BYTES: usize = 36;

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
}
