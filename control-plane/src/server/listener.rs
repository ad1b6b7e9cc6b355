//! Accepts connections and serves the routes, in plain text or over TLS, by HTTP/1.1 or HTTP/2. A connection ends
//! if its client sends no request, or takes no response, within the read time-out. [`crate::net::admission`] bounds
//! the number of connections.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::tls::Tls;
use crate::error::ApiError;
use crate::net::admission::{Admission, AdmittedConnection, Place};
use crate::net::connection::{Connection, FirstRequest, Peer};
use crate::net::delivery::{StreamExecutor, Streams, deliver};

/// Where paths of the filters begin.
const SYNC_PATHS: &str = "/sync/";

/// Room for the head of a request over HTTP/1.1, in bytes.
const HEAD_BYTES: usize = 64 * 1_024;

/// Longest head of a request over HTTP/2, in bytes.
const HEADER_LIST_BYTES: u32 = 16 * 1_024;

/// Most concurrent streams of a connection over HTTP/2. An Envoy needs two: it reports usage while its poll waits.
const STREAMS: u32 = 16;

/// How much of request bodies a connection over HTTP/2 may send before they are read, in bytes.
const WINDOW_BYTES: u32 = 256 * 1_024;

/// Interval and time-out of PINGs over HTTP/2.
const ALIVE: Duration = Duration::from_secs(20);

/// Pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(500);

/// How connections are served.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Certificates, if connections use TLS.
    pub tls: Option<Arc<Tls>>,
    /// Time-out for the TLS handshake, for the head of a request while no other runs, and for reading each 64 KiB of a response.
    pub read_timeout: Duration,
    /// How many connections there may be.
    pub admission: Arc<Admission>,
}

/// A connection that has its place.
struct Accepted {
    peer: SocketAddr,
    held: AdmittedConnection,
    router: Router,
    options: ServerOptions,
    stopping: watch::Receiver<bool>,
}

/// Serves until `ended`, then waits for running requests.
pub async fn serve(listener: TcpListener, router: Router, options: ServerOptions, ended: impl Future<Output = ()>) {
    let mut ended = pin!(ended);
    let (stop, stopping) = watch::channel(false);
    let mut connections = JoinSet::new();
    loop {
        let mut next = pin!(accept(&listener, &options.admission));
        let accepted = loop {
            tokio::select! {
                () = &mut ended => break None,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = next.as_mut() => break Some(accepted),
            }
        };
        let Some((stream, peer, held)) = accepted else { break };
        let (router, options, stopping) = (router.clone(), options.clone(), stopping.clone());
        connections.spawn(connection(stream, Accepted { peer, held, router, options, stopping }));
    }
    drop(listener);
    let _ = stop.send(true);
    while connections.join_next().await.is_some() {}
}

/// The next connection that has a place.
async fn accept(listener: &TcpListener, admission: &Arc<Admission>) -> (TcpStream, SocketAddr, AdmittedConnection) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => match admission.admit(peer.ip()).await {
                Some(held) => return (stream, peer, held),
                None => metrics::counter!("portcullis_connections_refused_total").increment(1),
            },
            Err(error) if broke(&error) => debug!(%error, "a client closed its connection before it was accepted"),
            Err(error) => {
                warn!(%error, "could not accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Whether the client ended the connection, so that the next one can be accepted at once. Otherwise the process lacks something,
/// such as file descriptors, and would retry in a tight loop.
fn broke(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(stream: TcpStream, mut accepted: Accepted) {
    // Otherwise the second frame of a response waits for a delayed acknowledgement of the peer: 40 ms in which a revoked key
    // still works.
    let _ = stream.set_nodelay(true);
    let Some(tls) = accepted.options.tls.clone() else { return speak(stream, accepted).await };
    let shaking = tokio::time::timeout(accepted.options.read_timeout, tls.acceptor().accept(stream));
    let shaken = tokio::select! {
        shaken = shaking => shaken,
        () = stopped(&mut accepted.stopping) => return,
        () = accepted.held.place().evicted() => return refused(),
    };
    match shaken {
        Ok(Ok(stream)) => speak(stream, accepted).await,
        failed => {
            metrics::counter!("portcullis_tls_handshakes_failed_total").increment(1);
            let why = failed
                .map_or_else(|late| late.to_string(), |done| done.err().map_or_else(String::new, |e| e.to_string()));
            debug!(peer = %accepted.peer, why, "TLS handshake failed");
        }
    }
}

async fn speak<S>(stream: S, accepted: Accepted)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Accepted { peer, held, router, options: ServerOptions { read_timeout, .. }, mut stopping } = accepted;
    let (begun, streams, place) = (FirstRequest::default(), Arc::<Streams>::default(), held.place());
    let io = TokioIo::new(Connection::new(stream, read_timeout, begun.clone()));
    let dismissed = Arc::new(Notify::new());
    let service = service_fn(|request: Request<Incoming>| {
        begun.set();
        let (router, place, dismissed) = (router.clone(), Arc::clone(place), Arc::clone(&dismissed));
        async move { Ok::<_, Infallible>(deliver(answer(request, peer, router, place, &dismissed).await)) }
    });
    let executor = StreamExecutor { streams: Arc::clone(&streams), timeout: read_timeout };
    let builder = protocols(executor, read_timeout);
    let mut served = pin!(builder.serve_connection(io, service));
    // The shutdown of the process has a time limit of its own.
    let limit = tokio::select! {
        served = served.as_mut() => return report(peer, served),
        () = streams.stuck() => return debug!(%peer, "the client did not read a response in time"),
        () = place.evicted() => return refused(),
        () = stopped(&mut stopping) => None,
        () = dismissed.notified() => Some(read_timeout),
        () = streams.idle(read_timeout) => Some(read_timeout),
    };
    served.as_mut().graceful_shutdown();
    let late = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        served = served => report(peer, served),
        () = streams.stuck() => debug!(%peer, "the client did not read a response in time"),
        () = place.evicted() => refused(),
        () = late => debug!(%peer, "the client did not close its connection"),
    }
}

fn protocols(executor: StreamExecutor, read_timeout: Duration) -> Builder<StreamExecutor> {
    let mut builder = Builder::new(executor);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(read_timeout).max_buf_size(HEAD_BYTES);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(ALIVE).keep_alive_timeout(ALIVE);
    builder.http2().max_header_list_size(HEADER_LIST_BYTES).max_concurrent_streams(STREAMS);
    builder.http2().initial_connection_window_size(WINDOW_BYTES).initial_stream_window_size(WINDOW_BYTES);
    builder
}

/// Answers a request. A newcomer may only present a sync key; otherwise its connection is closed.
async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    router: Router,
    place: Arc<Place>,
    dismissed: &Notify,
) -> Response {
    if place.is_newcomer() && !request.uri().path().starts_with(SYNC_PATHS) {
        refused();
        dismissed.notify_one();
        let why = "Too many connections are open, from your address or in total. Close some, or try again shortly.";
        return ApiError::Unavailable(why).into_response();
    }
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(ConnectInfo(Peer(peer)));
    request.extensions_mut().insert(Arc::clone(&place));
    let response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
    if place.is_newcomer() {
        refused();
        dismissed.notify_one();
    }
    response
}

fn refused() {
    metrics::counter!("portcullis_connections_refused_total").increment(1);
}

fn report(peer: SocketAddr, served: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    if let Err(error) = served {
        debug!(%peer, error, "a connection broke");
    }
}

/// Returns when the process shuts down.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_broke_keeps_no_other_waiting() {
        for (kind, expected) in [
            (io::ErrorKind::ConnectionAborted, true),
            (io::ErrorKind::ConnectionReset, true),
            (io::ErrorKind::ConnectionRefused, true),
            (io::ErrorKind::OutOfMemory, false),
            (io::ErrorKind::Other, false),
        ] {
            assert_eq!(broke(&kind.into()), expected, "{kind}");
        }
        // Too many open files.
        assert!(!broke(&io::Error::from_raw_os_error(24)));
    }
}
