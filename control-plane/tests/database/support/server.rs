//! A listener that serves the router of a test.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use control_plane::net::admission::{Admission, Limits};
use control_plane::server::listener::{self, ServerOptions};
use control_plane::server::tls::Tls;
use portcullis_tests::wait::eventually;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

pub struct Server {
    pub address: SocketAddr,
    pub admission: Arc<Admission>,
    pub serving: JoinHandle<()>,
    /// Tells it to end.
    pub end: Arc<Notify>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Server {
    pub async fn start(router: Router, tls: Option<Arc<Tls>>, limits: Limits, read_timeout: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, admission, end) =
            (listener.local_addr().unwrap(), Admission::new(limits), Arc::<Notify>::default());
        let options = ServerOptions { tls, read_timeout, admission: Arc::clone(&admission) };
        let ended = Arc::clone(&end);
        let serving = tokio::spawn(async move { listener::serve(listener, router, options, ended.notified()).await });
        Self { address, admission, serving, end }
    }

    /// For as many connections as a test makes.
    pub async fn open(router: Router, tls: Option<Arc<Tls>>, read_timeout: Duration) -> Self {
        Self::start(router, tls, Limits::new(1_000, 1_000, None), read_timeout).await
    }

    /// Waits until all connections have ended.
    pub async fn empties(&self) {
        let none = async || (self.admission.open() == 0).then_some(());
        eventually("all connections to end", none).await.unwrap();
    }
}
