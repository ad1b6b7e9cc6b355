//! Connections: responses that clients do not read, idle connections, and more connections than are allowed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::routing::get;
use contract::key::Secret;
use control_plane::net::admission::Limits;
use portcullis_tests::raw_http2::{Client, DATA, Frame, GOAWAY, HEADERS, RST_STREAM, connect};
use portcullis_tests::wait::{DEADLINE, eventually};
use sqlx::PgPool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::binary::{serving, url};
use crate::support::Fixture;
use crate::support::server::Server;

/// The read time-out, unless a test needs another one.
const PATIENCE: Duration = Duration::from_secs(1);

/// Larger than all buffers between server and client.
const LARGE_BYTES: usize = 24 << 20;

/// With a large response, one that is as large as a window may be at first, and a small one.
async fn with_documents(read_timeout: Duration) -> Server {
    let document = |bytes: usize| {
        let body = Bytes::from(vec![b'x'; bytes]);
        get(async move || body)
    };
    let router = Router::new()
        .route("/large", document(LARGE_BYTES))
        .route("/medium", document(60_000))
        .route("/small", document(3));
    Server::open(router, None, read_timeout).await
}

/// Waits until every connection that was made so far is accepted and there are no more than so many.
async fn settles(server: &Server, connections: usize) {
    // Connections are accepted in their order. One that comes while many give way may be closed unanswered.
    let _ = status(server.address, host(254), "/healthz", None).await;
    let settled = async || (server.admission.open() <= connections).then_some(());
    eventually("connections to give way", settled).await.unwrap();
}

async fn next(client: &mut Client) -> Option<Frame> {
    tokio::time::timeout(DEADLINE, client.next()).await.expect("nothing comes")
}

/// Frames until the stream ends; how many bytes of data there were, and whether it was reset.
async fn outcome(client: &mut Client, stream: u32) -> (usize, bool) {
    let mut bytes = 0;
    loop {
        let frame = next(client).await.expect("the connection ended");
        if frame.stream != stream {
            continue;
        }
        match frame.kind {
            RST_STREAM => return (bytes, true),
            DATA => bytes += frame.payload.len(),
            _ => {}
        }
        if frame.ends {
            return (bytes, false);
        }
    }
}

#[tokio::test]
async fn an_unread_http_2_response_is_reset_and_its_connection_serves_others() {
    // The client must grant within this time after it asked, on a busy machine too.
    let server = with_documents(Duration::from_secs(4)).await;
    let mut client = Client::open(server.address, None, 0).await.unwrap();
    client.get(1, "/medium", &[]).await.unwrap();
    // Of another one something is taken, but not all.
    client.get(3, "/medium", &[]).await.unwrap();
    client.grant(3, 5).await.unwrap();
    assert_eq!(outcome(&mut client, 1).await, (0, true));
    client.get(5, "/medium", &[]).await.unwrap();
    client.grant(5, 1 << 20).await.unwrap();
    assert_eq!(outcome(&mut client, 5).await, (60_000, false));
    client.get(7, "/medium", &[]).await.unwrap();
    client.grant(7, 5).await.unwrap();
    assert_eq!(outcome(&mut client, 7).await, (5, true));
    // The end of a small response cannot be held back: its connection ends.
    client.get(9, "/small", &[]).await.unwrap();
    while next(&mut client).await.is_some() {}
    server.empties().await;
}

#[tokio::test]
async fn a_slow_client_that_reads_its_response_gets_all_of_it() {
    let read_timeout = Duration::from_secs(3);
    let server = with_documents(read_timeout).await;
    let mut client = Client::open(server.address, None, 0).await.unwrap();
    client.grant(0, 1 << 30).await.unwrap();
    client.get(1, "/large", &[]).await.unwrap();
    let (start, mut taken) = (tokio::time::Instant::now(), 0);
    while taken < LARGE_BYTES {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let grant = (1 << 20).min(LARGE_BYTES - taken);
        client.grant(1, u32::try_from(grant).unwrap()).await.unwrap();
        let until = taken + grant;
        while taken < until {
            let frame = next(&mut client).await.expect("the connection ended");
            assert!([HEADERS, DATA].contains(&frame.kind), "{} after {taken} bytes", frame.kind);
            taken += if frame.kind == DATA { frame.payload.len() } else { 0 };
        }
    }
    assert!(start.elapsed() > read_timeout * 2, "it was not slow");
    assert!(next(&mut client).await.unwrap().ends);

    let mut plain = ask_for(server.address, "/large").await;
    let (start, mut read) = (tokio::time::Instant::now(), 0);
    let mut piece = vec![0; 1 << 20];
    while read < LARGE_BYTES {
        tokio::time::sleep(Duration::from_millis(300)).await;
        read += plain.read_exact(&mut piece).await.unwrap();
    }
    assert!(start.elapsed() > read_timeout * 2, "it was not slow");
}

/// Sends a request over HTTP/1.1 and reads nothing.
async fn ask_for(address: SocketAddr, path: &str) -> TcpStream {
    let mut stream = connect(address, None).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_disconnected_over_both_protocols() {
    let server = with_documents(PATIENCE).await;
    let mut plain = ask_for(server.address, "/large").await;
    let mut client = Client::open(server.address, None, 1 << 30).await.unwrap();
    client.grant(0, 1 << 30).await.unwrap();
    client.get(1, "/large", &[]).await.unwrap();
    let came = async || (server.admission.open() == 2).then_some(());
    eventually("both connections", came).await.unwrap();
    server.empties().await;
    let mut all = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, plain.read_to_end(&mut all)).await.expect("it ends");
    assert!(all.len() < LARGE_BYTES, "it was sent whole");
}

#[tokio::test]
async fn an_idle_connection_over_http_2_ends_and_one_with_a_held_request_does_not() {
    let held = Router::new().route("/", get(async || "ok\n")).route(
        "/held",
        get(async || {
            tokio::time::sleep(PATIENCE * 4).await;
            "ok\n"
        }),
    );
    let server = Server::open(held, None, PATIENCE).await;
    // One connection says nothing after its opening, another one after its first request.
    let mut silent = Client::open(server.address, None, 65_535).await.unwrap();
    let mut idle = Client::open(server.address, None, 65_535).await.unwrap();
    idle.get(1, "/", &[]).await.unwrap();
    assert_eq!(outcome(&mut idle, 1).await, (3, false));
    let mut busy = Client::open(server.address, None, 65_535).await.unwrap();
    busy.get(1, "/held", &[]).await.unwrap();
    assert_eq!(next(&mut idle).await.map(|frame| frame.kind), Some(GOAWAY));
    while next(&mut idle).await.is_some() {}
    while next(&mut silent).await.is_some() {}
    assert_eq!(outcome(&mut busy, 1).await, (3, false));
    drop(busy);
    server.empties().await;
}

/// An address of this machine that no other client of a test has.
fn host(last: u8) -> Option<IpAddr> {
    Some(Ipv4Addr::new(127, 0, 0, last).into())
}

/// The status line of a request over HTTP/1.1 on a connection of its own; nothing if the connection was closed.
async fn status(address: SocketAddr, from: Option<IpAddr>, path: &str, key: Option<&Secret>) -> String {
    let mut stream = connect(address, from).await.unwrap();
    let key = key.map_or_else(String::new, |key| format!("x-api-key: {}\r\n", key.reveal()));
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n{key}connection: close\r\n\r\n");
    let mut answer = Vec::new();
    if stream.write_all(request.as_bytes()).await.is_ok() {
        let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("it ends");
    }
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[sqlx::test(migrations = "./migrations")]
async fn a_filter_gets_in_while_strangers_hold_every_connection(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    fixture.in_step().await;
    let server =
        Server::start(fixture.router.clone(), None, Limits::new(40, 12, Some(10)), Duration::from_secs(120)).await;
    // Two addresses take all connections of strangers; a further request is answered 503.
    let mut strangers = Vec::new();
    for last in [2, 2, 2, 3, 3, 3].into_iter().flat_map(|last| [last; 4]) {
        strangers.push(Client::open(server.address, host(last), 65_535).await.unwrap());
    }
    for last in [4, 5] {
        assert_eq!(status(server.address, host(last), "/healthz", None).await, "HTTP/1.1 200 OK");
    }
    let refused = status(server.address, host(2), "/healthz", None).await;
    assert_eq!(refused, "HTTP/1.1 503 Service Unavailable");
    // Many addresses hold everything, the reserved room too.
    for last in 6..=250_u8 {
        strangers.push(Client::open(server.address, host(last), 65_535).await.unwrap());
    }
    settles(&server, 40).await;
    assert_eq!(status(server.address, host(251), "/healthz", None).await, "HTTP/1.1 503 Service Unavailable");
    let poll = "/sync/v1/keys";
    assert_eq!(status(server.address, host(252), poll, Some(&sync)).await, "HTTP/1.1 200 OK");
    // From the address of the strangers, too, as behind one load balancer. What it held stays however many come.
    let mut filter = Client::open(server.address, host(2), 65_535).await.unwrap();
    let headers = [("x-api-key", sync.reveal()), ("accept", "application/json")];
    filter.get(1, poll, &headers).await.unwrap();
    assert!(!outcome(&mut filter, 1).await.1);
    for last in 6..=250_u8 {
        strangers.push(Client::open(server.address, host(last), 65_535).await.unwrap());
    }
    settles(&server, 40).await;
    filter.get(3, poll, &headers).await.unwrap();
    assert!(!outcome(&mut filter, 3).await.1);
    // A key that is no sync key opens no reserved room.
    let (_, user) = fixture.key("user@example.com", &[]).await;
    assert_eq!(status(server.address, host(253), poll, Some(&user)).await, "HTTP/1.1 403 Forbidden");
}

#[sqlx::test(migrations = "./migrations")]
async fn one_client_with_idle_connections_does_not_exhaust_300_descriptors(pool: PgPool) {
    let (_, sync) = crate::support::key(&pool, "operator@example.com", &["sync"]).await;
    let mut serve = Command::new("sh");
    serve.args(["-c", "ulimit -n 300; exec \"$@\"", "sh"]).arg(crate::support::binary());
    serve.args(["serve", "--listen", "127.0.0.1:0", "--log-level", "warn", "--read-timeout", "10s"]);
    serve.env("DATABASE_URL", url(&pool)).stdout(Stdio::null()).stderr(Stdio::null());
    let (_running, address, _) = serving(serve, "/sync/v1/keys", &sync).await;
    let mut attackers = tokio::task::JoinSet::new();
    for _ in 0..400 {
        let mut client = Client::open(address, host(2), 65_535).await.unwrap();
        attackers.spawn(async move {
            let _ = client.get(1, "/healthz", &[]).await;
            while client.next().await.is_some() {}
        });
    }
    // Somebody else, and a filter behind the same address as the attacker.
    for _ in 0..5 {
        assert_eq!(status(address, host(3), "/healthz", None).await, "HTTP/1.1 200 OK");
        assert_eq!(status(address, host(2), "/sync/v1/keys", Some(&sync)).await, "HTTP/1.1 200 OK");
    }
    // Each connection had a request and is idle since: all of them end.
    let ended = tokio::time::timeout(DEADLINE, async { while attackers.join_next().await.is_some() {} }).await;
    assert!(ended.is_ok(), "{} connections are still open", attackers.len());
}
