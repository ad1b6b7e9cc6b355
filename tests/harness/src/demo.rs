//! The demo API behind Envoy. Its response to every request is what it received, which shows that
//! the key is gone and the identity is there. It speaks HTTP/1.1 and HTTP/2, responds to gRPC calls
//! with one message of the same text, and echoes a WebSocket.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, HOST, LOCATION, UPGRADE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::serve::ListenerExt;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A running demo API. It ends when dropped.
#[derive(Debug)]
pub struct DemoApi {
    address: SocketAddr,
    seen: Arc<Seen>,
    _server: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Seen {
    requests: AtomicU64,
    delay_ms: AtomicU64,
}

impl DemoApi {
    /// Starts it. Port 0 stands for a free port.
    pub async fn start(listen: SocketAddr) -> Result<Self> {
        let seen = Arc::new(Seen::default());
        let (address, _server) = serve(listen, Router::new().fallback(echo).with_state(Arc::clone(&seen))).await?;
        Ok(Self { address, seen, _server })
    }

    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn requests(&self) -> u64 {
        self.seen.requests.load(Ordering::SeqCst)
    }

    pub fn set_delay(&self, delay: Duration) {
        self.seen.delay_ms.store(delay.as_millis().try_into().unwrap_or(u64::MAX), Ordering::SeqCst);
    }
}

/// Serves a router until the returned tasks are dropped.
pub async fn serve(listen: SocketAddr, router: Router) -> Result<(SocketAddr, JoinSet<()>)> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("{listen} is taken"))?;
    let address = listener.local_addr()?;
    // As the control plane does: otherwise the end of each response waits for Envoy's delayed acknowledgement.
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    let mut server = JoinSet::new();
    server.spawn(async move {
        // Ends only with the task.
        let _ = axum::serve(listener, router).await;
    });
    Ok((address, server))
}

/// The path whose response comes after the whole request and contains its trailers.
pub const TRAILERS: &str = "/trailers";

/// The path that redirects to `/redirected`.
pub const REDIRECT: &str = "/redirect";

async fn echo(State(seen): State<Arc<Seen>>, request: Request) -> Response {
    seen.requests.fetch_add(1, Ordering::SeqCst);
    let delay = seen.delay_ms.load(Ordering::SeqCst);
    if delay > 0 {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    let mut received = received(&request);
    let headers = request.headers();
    if headers.get(UPGRADE).is_some_and(|protocol| protocol == "websocket") {
        return send_back(request);
    }
    if headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return grpc(&received);
    }
    match request.uri().path() {
        REDIRECT => return redirect(headers),
        TRAILERS => match request.into_body().collect().await {
            Ok(body) => received["trailers"] = names_and_values(body.trailers().unwrap_or(&HeaderMap::new())),
            Err(_) => return StatusCode::BAD_REQUEST.into_response(),
        },
        _ => {}
    }
    ([(CONTENT_TYPE, "application/json")], format!("{received}\n")).into_response()
}

/// Redirects to `/redirected` of the same host, with an absolute URL: Envoy follows only those.
fn redirect(headers: &HeaderMap) -> Response {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    match HeaderValue::try_from(format!("http://{host}/redirected")) {
        Ok(location) => (StatusCode::FOUND, [(LOCATION, location)]).into_response(),
        Err(_) => StatusCode::BAD_REQUEST.into_response(),
    }
}

fn received(request: &Request) -> Value {
    // Over HTTP/2 the URI is complete, over HTTP/1.1 it is the path.
    let path = request.uri().path_and_query().map_or_else(|| request.uri().to_string(), ToString::to_string);
    json!({"method": request.method().as_str(), "path": path, "headers": names_and_values(request.headers())})
}

fn names_and_values(headers: &HeaderMap) -> Value {
    let mut all = BTreeMap::<&str, Vec<String>>::new();
    for (name, value) in headers {
        all.entry(name.as_str()).or_default().push(String::from_utf8_lossy(value.as_bytes()).into_owned());
    }
    json!(all)
}

/// One uncompressed message, and the status OK in the trailers.
fn grpc(received: &Value) -> Response {
    let text = received.to_string();
    let length = u32::try_from(text.len()).unwrap_or_default().to_be_bytes();
    let message = Bytes::from([&[0], &length[..], text.as_bytes()].concat());
    let trailers = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let frames = [Frame::data(message), Frame::trailers(trailers)].map(Ok::<_, std::convert::Infallible>);
    let body = Body::new(StreamBody::new(stream::iter(frames)));
    ([(CONTENT_TYPE, "application/grpc")], body).into_response()
}

/// Switches protocols and echoes all bytes.
fn send_back(mut request: Request) -> Response {
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(upgraded) = upgraded.await {
            let (mut reader, mut writer) = tokio::io::split(TokioIo::new(upgraded));
            // Ends with the connection.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        }
    });
    (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, "websocket")]).into_response()
}
