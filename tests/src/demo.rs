//! The demo API behind Envoy: answers every request with what it received, so that one sees that the key is gone and the
//! identity has come.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::extract::{Request, State};
use axum::http::header::{HOST, LOCATION};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::{Json, Router};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// A running demo API. It ends when dropped.
#[derive(Debug)]
pub struct DemoApi {
    address: SocketAddr,
    seen: Arc<Seen>,
    server: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Seen {
    requests: AtomicU64,
    delay_ms: AtomicU64,
}

impl DemoApi {
    /// Starts it. Port 0: any that is free.
    ///
    /// # Errors
    /// If the port is taken.
    pub async fn start(listen: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(listen).await.with_context(|| format!("{listen} is taken"))?;
        let address = listener.local_addr()?;
        let seen = Arc::new(Seen::default());
        let router = Router::new().fallback(echo).with_state(Arc::clone(&seen));
        let server = tokio::spawn(async move {
            // Ends with the task only.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, seen, server })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many requests have come through to it.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.seen.requests.load(Ordering::SeqCst)
    }

    /// Lets each answer take this long from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.seen.delay_ms.store(delay.as_millis().try_into().unwrap_or(u64::MAX), Ordering::SeqCst);
    }
}

impl Drop for DemoApi {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// The path whose answer waits for the whole request and tells of its trailers too.
pub const TRAILERS: &str = "/trailers";

/// The path that redirects to `/redirected`.
pub const REDIRECT: &str = "/redirect";

async fn echo(State(seen): State<Arc<Seen>>, request: Request) -> Result<Json<Value>, (StatusCode, HeaderMap)> {
    let (Parts { method, uri, headers, .. }, body) = request.into_parts();
    seen.requests.fetch_add(1, Ordering::SeqCst);
    let delay = seen.delay_ms.load(Ordering::SeqCst);
    if delay > 0 {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    let mut seen = json!({"method": method.as_str(), "path": uri.to_string(), "headers": names_and_values(&headers)});
    match uri.path() {
        REDIRECT => {
            // A whole URL: Envoy follows no other by itself.
            let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
            let location = HeaderValue::try_from(format!("http://{host}/redirected"));
            let location = location.map_err(|_| (StatusCode::BAD_REQUEST, HeaderMap::new()))?;
            return Err((StatusCode::FOUND, HeaderMap::from_iter([(LOCATION, location)])));
        }
        TRAILERS => {
            let body = body.collect().await.map_err(|_| (StatusCode::BAD_REQUEST, HeaderMap::new()))?;
            seen["trailers"] = names_and_values(body.trailers().unwrap_or(&HeaderMap::new()));
        }
        _ => {}
    }
    Ok(Json(seen))
}

fn names_and_values(headers: &HeaderMap) -> Value {
    let mut all = BTreeMap::<&str, Vec<String>>::new();
    for (name, value) in headers {
        all.entry(name.as_str()).or_default().push(String::from_utf8_lossy(value.as_bytes()).into_owned());
    }
    json!(all)
}
