//! TLS: certificates, protocols, and errors about invalid files.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::routing::get;
use control_plane::net::connection::Peer;
use control_plane::server::tls::{Files, Tls};
use portcullis_tests::certificates::{Authority, For, Identity};
use portcullis_tests::http::get_request;
use portcullis_tests::tls::Client;
use portcullis_tests::wait::DEADLINE;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::server::Server;

const NAME: &str = "keys.example.com";
const BOTH: [&str; 2] = ["h2", "http/1.1"];

fn written(home: &TempDir, server: &Identity, client_ca: Option<&Authority>) -> Files {
    let (certificate, key) = server.write(home.path(), "server").unwrap();
    let client_ca = client_ca.map(|authority| {
        let file = home.path().join("client-ca.pem");
        std::fs::write(&file, &authority.certificate).unwrap();
        file
    });
    Files { certificate, key, client_ca }
}

/// A server that answers with the address of the client.
async fn start(tls: Option<Arc<Tls>>, read_timeout: Duration) -> Server {
    let address = async |ConnectInfo(Peer(peer)): ConnectInfo<Peer>| peer.ip().to_string();
    Server::open(Router::new().route("/", get(address)), tls, read_timeout).await
}

async fn with(files: Files) -> Server {
    start(Some(Arc::new(Tls::load(files).unwrap())), Duration::from_secs(20)).await
}

/// The answer and its protocol, or why there is none.
async fn ask(server: &Server, client: &Client) -> Result<(u16, &'static str), String> {
    match client.send(server.address, NAME, get_request("/", None).unwrap()).await {
        Ok((reply, protocol)) => {
            assert_eq!(&reply.body[..], b"127.0.0.1");
            Ok((reply.status, protocol))
        }
        Err(error) => Err(format!("{error:?}")),
    }
}

#[tokio::test]
async fn clients_choose_the_protocol_and_check_the_certificate() {
    let (home, authority, other) =
        (TempDir::new().unwrap(), Authority::new("one").unwrap(), Authority::new("other").unwrap());
    let mut server = with(written(&home, &authority.issue(&[NAME], For::Servers).unwrap(), None)).await;
    let client = |protocols: &[&str]| Client::new(&authority.certificate, None, protocols).unwrap();
    assert_eq!(ask(&server, &client(&BOTH)).await, Ok((200, "h2")));
    assert_eq!(ask(&server, &client(&["http/1.1"])).await, Ok((200, "http/1.1")));
    assert_eq!(ask(&server, &client(&[])).await, Ok((200, "http/1.1")));
    let refused = ask(&server, &client(&["spdy/3"])).await.unwrap_err();
    assert!(refused.contains("NoApplicationProtocol"), "{refused}");
    let stranger = ask(&server, &Client::new(&other.certificate, None, &BOTH).unwrap()).await.unwrap_err();
    assert!(stranger.contains("UnknownIssuer"), "{stranger}");
    // Plain HTTP gets no answer.
    let plain = portcullis_tests::http::get(server.address, "/").await;
    assert!(plain.is_err(), "{plain:?}");
    // It ends when it is stopped, and does not wait for idle connections.
    let _idle = tokio::net::TcpStream::connect(server.address).await.unwrap();
    server.end.notify_one();
    tokio::time::timeout(DEADLINE, &mut server.serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn with_a_client_authority_only_its_certificates_are_accepted() {
    let (home, servers, clients) =
        (TempDir::new().unwrap(), Authority::new("servers").unwrap(), Authority::new("clients").unwrap());
    let identity = servers.issue(&[NAME], For::Servers).unwrap();
    let server = with(written(&home, &identity, Some(&clients))).await;
    let client = |identity: Option<&Identity>| Client::new(&servers.certificate, identity, &BOTH).unwrap();
    let good = clients.issue(&["envoy"], For::Clients).unwrap();
    assert_eq!(ask(&server, &client(Some(&good))).await, Ok((200, "h2")));

    let none = ask(&server, &client(None)).await.unwrap_err();
    assert!(none.contains("CertificateRequired"), "{none}");
    let strangers = [
        ("of another authority", servers.issue(&["envoy"], For::Clients).unwrap(), "UnknownCA"),
        ("for servers only", clients.issue(&["envoy"], For::Servers).unwrap(), "Certificate"),
    ];
    for (what, stranger, expected) in strangers {
        let refused = ask(&server, &client(Some(&stranger))).await.unwrap_err();
        assert!(refused.contains(expected), "{what}: {refused}");
    }
    assert_eq!(ask(&server, &client(Some(&good))).await, Ok((200, "h2")));
}

#[tokio::test]
async fn silent_and_slow_clients_are_disconnected_and_others_are_not() {
    // Four times the pauses below, so that a busy machine does not lengthen a pause to it.
    let read_timeout = Duration::from_secs(4);
    let server = start(None, read_timeout).await;
    let handshake = async |text: &[u8]| {
        let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        stream.write_all(text).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
        read.map(|_| String::from_utf8_lossy(&answer).into_owned()).unwrap_or_default()
    };
    // Nothing, a piece of what could be either protocol, and heads that never end.
    let slow = [&b""[..], b"PRI", b"GET / HTTP/1.1\r\nhost: x\r\nslow: ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"];
    let slow = futures_util::future::join_all(slow.map(handshake));
    // The time-out of the first request does not end a connection that sends others later.
    let busy = async {
        let mut connection = portcullis_tests::http::Connection::open(server.address).await.unwrap();
        for _ in 0..5 {
            assert_eq!(connection.get("/", None).await.unwrap().status, 200);
            tokio::time::sleep(read_timeout / 4).await;
        }
    };
    let (answers, ()) = tokio::join!(slow, busy);
    for answer in answers {
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test]
async fn renewed_certificates_are_used_and_invalid_files_leave_the_old_ones_in_place() {
    let (home, old, new) = (TempDir::new().unwrap(), Authority::new("old").unwrap(), Authority::new("new").unwrap());
    let files = written(&home, &old.issue(&[NAME], For::Servers).unwrap(), None);
    let tls = Arc::new(Tls::load(files.clone()).unwrap());
    let server = start(Some(Arc::clone(&tls)), Duration::from_secs(20)).await;
    let of = |authority: &Authority| Client::new(&authority.certificate, None, &BOTH).unwrap();
    assert_eq!(tls.refresh(), Ok(false));
    std::fs::write(&files.certificate, "-----BEGIN CERTIFICATE-----\nhalf").unwrap();
    let why = tls.refresh().unwrap_err();
    assert!(why.starts_with("--tls-cert-file ") && why.contains("holds no certificate in PEM"), "{why}");
    assert_eq!(ask(&server, &of(&old)).await, Ok((200, "h2")));
    written(&home, &new.issue(&[NAME], For::Servers).unwrap(), None);
    assert_eq!(tls.refresh(), Ok(true));
    assert_eq!(ask(&server, &of(&new)).await, Ok((200, "h2")));
    assert!(ask(&server, &of(&old)).await.is_err());
}

fn complaint(arguments: &[(&str, &Path)]) -> String {
    let mut command = Command::new(crate::support::binary());
    command.args(["serve", "--database-url", "postgres://nobody@127.0.0.1:1/none", "--listen", "127.0.0.1:0"]);
    for (setting, value) in arguments {
        command.arg(setting).arg(value);
    }
    let output = command.env("PORTCULLIS_LOG_LEVEL", "off").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.lines().count() == 1, "{said}");
    said
}

#[test]
fn a_file_that_is_wrong_is_named_with_its_setting_in_one_line() {
    let (home, authority) = (TempDir::new().unwrap(), Authority::new("one").unwrap());
    let (good, other) =
        (authority.issue(&[NAME], For::Servers).unwrap(), authority.issue(&[NAME], For::Servers).unwrap());
    let Files { certificate, key, .. } = written(&home, &good, None);
    let (_, other_key) = other.write(home.path(), "other").unwrap();
    let (missing, empty) = (home.path().join("missing"), home.path().join("empty"));
    std::fs::write(&empty, "").unwrap();
    let cases: [(Vec<(&str, &Path)>, String); 7] = [
        (vec![("--tls-cert-file", &certificate)], "--tls-key-file".into()),
        (vec![("--tls-key-file", &key)], "--tls-cert-file".into()),
        (vec![("--tls-client-ca-file", &certificate)], "--tls-cert-file".into()),
        (both(&missing, &key), format!("--tls-cert-file {}: No such file", missing.display())),
        (both(&key, &key), format!("--tls-cert-file {}: holds no certificate in PEM", key.display())),
        (both(&certificate, &empty), format!("--tls-key-file {}: holds no private key in PEM", empty.display())),
        (both(&certificate, &other_key), format!("--tls-key-file {}: is not the key of the", other_key.display())),
    ];
    for (arguments, expected) in cases {
        let said = complaint(&arguments);
        assert!(said.starts_with("portcullis: ") && said.contains(&expected), "{expected}: {said}");
    }
    let mut all = both(&certificate, &key);
    all.push(("--tls-client-ca-file", &empty));
    let said = complaint(&all);
    assert!(said.contains(&format!("--tls-client-ca-file {}: holds no certificate in PEM", empty.display())), "{said}");
}

/// The settings of a certificate and its key.
fn both<'a>(certificate: &'a Path, key: &'a Path) -> Vec<(&'static str, &'a Path)> {
    vec![("--tls-cert-file", certificate), ("--tls-key-file", key)]
}

#[tokio::test]
async fn over_tls_a_client_that_does_not_read_its_response_is_disconnected() {
    const BYTES: usize = 24 << 20;
    let (home, authority) = (TempDir::new().unwrap(), Authority::new("one").unwrap());
    let files = written(&home, &authority.issue(&[NAME], For::Servers).unwrap(), None);
    let body = axum::body::Bytes::from(vec![b'x'; BYTES]);
    let router = Router::new().route("/large", get(async move || body));
    let tls = Arc::new(Tls::load(files).unwrap());
    let server = Server::open(router, Some(tls), Duration::from_secs(1)).await;

    let client = Client::new(&authority.certificate, None, &["http/1.1"]).unwrap();
    let mut stream = client.connect(server.address, NAME).await.unwrap();
    stream.write_all(format!("GET /large HTTP/1.1\r\nhost: {NAME}\r\n\r\n").as_bytes()).await.unwrap();
    // The response has begun, so the server has the connection.
    stream.read_u8().await.unwrap();
    server.empties().await;
    let mut rest = Vec::new();
    let ended = stream.read_to_end(&mut rest).await;
    assert!(rest.len() < BYTES, "the whole response came, {ended:?}");
}
