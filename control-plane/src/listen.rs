//! Takes connections and serves the routes on them, in the clear or within TLS, over HTTP/1.1 or HTTP/2. Whoever does not
//! say in time what they want is disconnected.

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
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::connection::{Begun, Connection, Peer};
use crate::tls::Tls;

/// Most connections at once. Beyond, new ones are closed at once: each Envoy needs one, and file descriptors run out.
const CONNECTIONS: usize = 16_384;

/// Room for the head of a request over HTTP/1.1, in bytes.
const HEAD_BYTES: usize = 64 * 1_024;

/// Longest head of a request over HTTP/2, in bytes.
const HEADER_LIST_BYTES: u32 = 16 * 1_024;

/// How often a peer over HTTP/2 is asked whether it is still there, and how long it may take to say so.
const ALIVE: Duration = Duration::from_secs(20);

/// How long to wait when the operating system has no connection for us.
const PAUSE: Duration = Duration::from_millis(500);

/// How connections are taken.
#[derive(Clone, Debug)]
pub struct Manners {
    /// Within it, if there are certificates.
    pub tls: Option<Arc<Tls>>,
    /// How long a client may take to shake hands, to send its first request and, over HTTP/1.1, the head of each further one.
    /// Over HTTP/2 it may take its time over those, as long as it says that it is alive.
    pub patience: Duration,
}

/// Serves until `ended`, then lets requests that are under way end.
pub async fn serve(listener: TcpListener, router: Router, manners: Manners, ended: impl Future<Output = ()>) {
    let mut ended = pin!(ended);
    let (stop, stopping) = watch::channel(false);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = &mut ended => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok(_) if connections.len() >= CONNECTIONS => {
                    metrics::counter!("portcullis_connections_refused_total").increment(1);
                }
                Ok((stream, peer)) => {
                    connections.spawn(connection(stream, peer, router.clone(), manners.clone(), stopping.clone()));
                }
                Err(error) if broke(&error) => debug!(%error, "a connection broke before it was taken"),
                Err(error) => {
                    warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let _ = stop.send(true);
    while connections.join_next().await.is_some() {}
}

/// Whether it is the other end that gave up: then the next connection can be taken at once. Otherwise we lack something, such
/// as file descriptors, and to ask again at once would be to ask without end.
fn broke(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    manners: Manners,
    mut stopping: watch::Receiver<bool>,
) {
    // Otherwise the second frame of an answer waits for the other end's delayed acknowledgement: 40 ms in which a revoked
    // key still works.
    let _ = stream.set_nodelay(true);
    let Some(tls) = &manners.tls else { return speak(stream, peer, router, manners.patience, stopping).await };
    let shaking = tokio::time::timeout(manners.patience, tls.acceptor().accept(stream));
    let shaken = tokio::select! {
        shaken = shaking => shaken,
        () = told(&mut stopping) => return,
    };
    match shaken {
        Ok(Ok(stream)) => speak(stream, peer, router, manners.patience, stopping).await,
        refused => {
            metrics::counter!("portcullis_tls_handshakes_failed_total").increment(1);
            let why = refused
                .map_or_else(|late| late.to_string(), |done| done.err().map_or_else(String::new, |e| e.to_string()));
            debug!(%peer, why, "no TLS with this client");
        }
    }
}

async fn speak<S>(stream: S, peer: SocketAddr, router: Router, patience: Duration, mut stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let begun = Begun::default();
    let io = TokioIo::new(Connection::new(stream, patience, begun.clone()));
    let service = service_fn(move |request: Request<Incoming>| {
        begun.set();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(Peer(peer)));
        let answer = router.clone().oneshot(request);
        async move { Ok::<_, Infallible>(answer.await.unwrap_or_else(|never| match never {})) }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(patience).max_buf_size(HEAD_BYTES);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(ALIVE).keep_alive_timeout(ALIVE);
    builder.http2().max_header_list_size(HEADER_LIST_BYTES);
    let mut served = pin!(builder.serve_connection(io, service));
    let early = tokio::select! {
        served = served.as_mut() => Some(served),
        () = told(&mut stopping) => None,
    };
    let served = match early {
        Some(served) => served,
        None => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = served {
        debug!(%peer, error, "a connection broke");
    }
}

/// Returns when the process is told to end.
async fn told(stopping: &mut watch::Receiver<bool>) {
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
