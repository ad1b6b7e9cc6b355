//! A proxy in front of PostgreSQL that delays every `ROLLBACK` and knows which connections have an open transaction.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};

/// How long a rollback takes: far longer than the way from a handler to its caller.
const DELAY: Duration = Duration::from_millis(300);

/// Longest message that is forwarded.
const MESSAGE_BYTES: usize = 64 << 20;

/// The proxy, and a pool of connections through it.
pub struct SlowRollback {
    pub pool: PgPool,
    counts: Arc<Counts>,
    _home: TempDir,
    accepting: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Counts {
    open: AtomicUsize,
    rolled_back: AtomicUsize,
}

impl SlowRollback {
    /// Connects to the database of another pool.
    pub fn to_database_of(pool: &PgPool) -> Self {
        let options = pool.connect_options().as_ref().clone();
        let home = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket(home.path(), 5432)).unwrap();
        let counts = Arc::new(Counts::default());
        let through = options.clone().socket(home.path()).port(5432).ssl_mode(PgSslMode::Disable);
        let accepting = tokio::spawn(accept(listener, options, Arc::clone(&counts)));
        let pool = PgPoolOptions::new().max_connections(4).connect_lazy_with(through);
        Self { pool, counts, _home: home, accepting }
    }

    /// Connections that are in a transaction, as the last answer of PostgreSQL to each has it.
    pub fn open(&self) -> usize {
        self.counts.open.load(Ordering::SeqCst)
    }

    /// Transactions that were rolled back.
    pub fn rolled_back(&self) -> usize {
        self.counts.rolled_back.load(Ordering::SeqCst)
    }
}

impl Drop for SlowRollback {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: UnixListener, server: PgConnectOptions, counts: Arc<Counts>) {
    while let Ok((client, _)) = listener.accept().await {
        let counts = Arc::clone(&counts);
        match server.get_socket() {
            Some(directory) => {
                let socket = socket(directory, server.get_port());
                tokio::spawn(serve(client, UnixStream::connect(socket).await.unwrap(), counts));
            }
            None => {
                let address = (server.get_host(), server.get_port());
                tokio::spawn(serve(client, TcpStream::connect(address).await.unwrap(), counts));
            }
        }
    }
}

fn socket(directory: &Path, port: u16) -> PathBuf {
    directory.join(format!(".s.PGSQL.{port}"))
}

async fn serve(client: UnixStream, server: impl AsyncRead + AsyncWrite, counts: Arc<Counts>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let requests = async {
        // The first message of a connection has no type.
        let first = message(&mut from_client, false).await?;
        to_server.write_all(&first).await?;
        loop {
            let message = message(&mut from_client, true).await?;
            if message.starts_with(b"Q") && message.ends_with(b"ROLLBACK\0") {
                tokio::time::sleep(DELAY).await;
                counts.rolled_back.fetch_add(1, Ordering::SeqCst);
            }
            to_server.write_all(&message).await?;
        }
        #[expect(unreachable_code, reason = "it says what the errors are")]
        std::io::Result::Ok(())
    };
    let answers = async {
        let mut open = false;
        loop {
            let message = message(&mut from_server, true).await?;
            // ReadyForQuery: idle, in a transaction, or in one that has failed.
            if let [b'Z', .., status] = *message.as_slice() {
                let now = status != b'I';
                match (open, now) {
                    (false, true) => _ = counts.open.fetch_add(1, Ordering::SeqCst),
                    (true, false) => _ = counts.open.fetch_sub(1, Ordering::SeqCst),
                    _ => {}
                }
                open = now;
            }
            to_client.write_all(&message).await?;
        }
        #[expect(unreachable_code, reason = "it says what the errors are")]
        std::io::Result::Ok(())
    };
    let _ = tokio::try_join!(requests, answers);
}

/// One message: its type, unless it is the first of a client, its length, and what follows.
async fn message(from: &mut (impl AsyncRead + Unpin), typed: bool) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; if typed { 5 } else { 4 }];
    from.read_exact(&mut message).await?;
    let length = u32::from_be_bytes(*message.last_chunk().unwrap()) as usize;
    assert!((4..MESSAGE_BYTES).contains(&length), "not a message of PostgreSQL");
    let head = message.len();
    message.resize(head + length - 4, 0);
    from.read_exact(&mut message[head..]).await?;
    Ok(message)
}
