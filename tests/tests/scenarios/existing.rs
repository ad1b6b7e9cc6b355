//! `envoy/existing.yaml`: Portcullis in an Envoy with other filters.

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper::{HeaderMap, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis_tests::certificates::{Authority, For, TokenIssuer};
use portcullis_tests::envoy::{self, Envoy};
use portcullis_tests::envoy_config::Replacements;
use portcullis_tests::expect::{IDENTITY, assert_upstream};
use portcullis_tests::http::{Outgoing, Reply, get_request, with_key};
use portcullis_tests::log::Log;
use portcullis_tests::stack::Stack;
use portcullis_tests::tls::Client;
use portcullis_tests::tools::silently;
use portcullis_tests::wait::eventually;
use portcullis_tests::{paths, process};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::cors;

const API: &str = "api.example.com";
/// What a client sends that would pass for an identity.
const FORGED: [&str; 4] = ["x-consumer-id", "x-credential-identifier", "x-credential-scopes", "x-portcullis-shadow"];
/// The exempted route of the configuration.
const OPEN: &str = "metadata: { filter_metadata: { portcullis: { policy: open } } }
                          route: { cluster: upstream }
                        # A JWT instead";

/// A stack whose Envoy has other filters beside Portcullis.
struct Existing {
    envoy: Envoy,
    stack: Stack,
    client: Client,
    issuer: TokenIssuer,
}

impl Existing {
    /// With these texts of the configuration replaced.
    async fn start(texts: &[(&str, String)]) -> Result<Self> {
        let open = json!({"open": {"key": "anonymous_allowed"}});
        let stack = Stack::builder().envoys(0).policies(&open).start().await?;
        let home = stack.directory().join("existing");
        std::fs::create_dir_all(home.join("tls"))?;
        let authority = Authority::new("public")?;
        authority.issue(&[API], For::Servers)?.write(&home.join("tls"), "ingress")?;
        let issuer = TokenIssuer::new()?;
        std::fs::write(home.join("jwks.json"), issuer.jwks().to_string())?;
        let replacements = Replacements {
            texts: texts.iter().map(|(old, new)| ((*old).to_owned(), new.clone())).collect(),
            ..Replacements::between(stack.control_plane.address(), stack.demo.address())
        };
        let settings = envoy::Settings::new(replacements, stack.control_plane.settings().sync_key);
        let log = Log::create(&home.join("envoy.log"))?;
        let envoy = Envoy::prepare(settings, &home, log, &silently)?.with_template("existing.yaml");
        envoy.restart().await?;
        let client = Client::new(&authority.certificate, None, &["http/1.1"])?;
        let existing = Self { envoy, stack, client, issuer };
        existing.wait_for("no such key", 401).await?;
        Ok(existing)
    }

    async fn send(&self, request: Outgoing) -> Result<Reply> {
        Ok(self.client.send(self.envoy.address(), API, request).await?.0)
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Result<Reply> {
        let mut request = Request::get(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Full::default())?).await
    }

    async fn wait_for(&self, key: &str, status: u16) -> Result<()> {
        let seen = async || (self.send(get_request("/", Some(key)).ok()?).await.ok()?.status == status).then_some(());
        eventually(&format!("status {status}"), seen).await
    }

    async fn working_key(&self, email: &str) -> Result<String> {
        let key = self.stack.rest().generate(email).await?;
        self.wait_for(&key, 200).await?;
        Ok(key)
    }
}

/// What came of a gRPC call: status, headers, message, trailers.
struct Called {
    status: u16,
    headers: HeaderMap,
    message: Option<Value>,
    trailers: HeaderMap,
}

async fn call(existing: &Existing, client: &Client, key: Option<&str>) -> Result<Called> {
    let stream = client.connect(existing.envoy.address(), API).await?;
    ensure!(stream.get_ref().1.alpn_protocol() == Some(b"h2"), "no HTTP/2");
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = with_key(Request::post(format!("https://{API}/orders.v1.Orders/List")), key);
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    let request = request.header("x-consumer-id", "root");
    // One empty message.
    let body = Full::<axum::body::Bytes>::from(&[0, 0, 0, 0, 0][..]);
    let (head, body) = sender.send_request(request.body(body)?).await?.into_parts();
    let collected = body.collect().await?;
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let message = collected.to_bytes().get(5..).and_then(|text| serde_json::from_slice(text).ok());
    Ok(Called { status: head.status.as_u16(), headers: head.headers, message, trailers })
}

/// Opens a WebSocket by hand, and returns the connection and Envoy's response.
async fn socket(existing: &Existing, key: Option<&str>) -> Result<(TlsStream<TcpStream>, String)> {
    let mut stream = existing.client.connect(existing.envoy.address(), API).await?;
    let key = key.map(|key| format!("x-api-key: {key}\r\n")).unwrap_or_default();
    let head = format!(
        "GET /socket HTTP/1.1\r\nhost: {API}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{key}\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await?);
    }
    Ok((stream, String::from_utf8(answer)?))
}

/// Sends a text through a WebSocket and expects it back.
async fn assert_echo(stream: &mut TlsStream<TcpStream>) -> Result<()> {
    stream.write_all(b"hello").await?;
    let mut back = [0; 5];
    stream.read_exact(&mut back).await?;
    assert_eq!(&back, b"hello");
    Ok(())
}

#[tokio::test]
async fn health_checks_preflights_jwts_grpc_websockets_and_an_exempted_route_work_beside_keys() -> Result<()> {
    let existing = Existing::start(&[]).await?;
    let key = existing.working_key("ada@example.com").await?;
    let owner = existing.stack.owner_id("ada@example.com").await?;

    let reply = existing.get("/healthz", &[]).await?;
    assert_eq!((reply.status, reply.body.len()), (200, 0), "{reply:?}");
    cors::assert_allowed(&existing.send(cors::preflight(cors::ORIGIN)?).await?);

    // Everything else needs a key.
    let reply = existing.get("/orders", &[]).await?;
    assert_eq!((reply.status, &reply.json()?["code"]), (401, &json!("missing")));
    let headers = assert_upstream(&existing.get("/orders", &[("x-api-key", &key)]).await?, &IDENTITY);
    assert_eq!(headers["x-consumer-id"], json!([owner]));

    // No key is needed where the policy says so.
    assert_upstream(&existing.get("/status", &[]).await?, &[]);
    assert_eq!(existing.get("/statuses", &[]).await?.status, 401);

    // A JWT is needed where the route asks for one, and a key neither helps nor is needed.
    let token = existing.issuer.token(&json!({"iss": "https://accounts.example.com", "aud": API, "sub": "ada"}))?;
    let of_others =
        existing.issuer.token(&json!({"iss": "https://accounts.example.com", "aud": "other", "sub": "ada"}))?;
    let bearer = format!("Bearer {token}");
    assert_upstream(&existing.get("/account", &[("authorization", &bearer)]).await?, &[]);
    assert_upstream(&existing.get("/account", &[("authorization", &bearer), ("x-api-key", &key)]).await?, &IDENTITY);
    for (headers, why) in [
        (&[][..], "Jwt is missing"),
        (&[("x-api-key", key.as_str())], "Jwt is missing"),
        (&[("authorization", format!("Bearer {of_others}").as_str())], "Audiences in Jwt are not allowed"),
    ] {
        let reply = existing.get("/account", headers).await?;
        assert_eq!((reply.status == 200, &*String::from_utf8_lossy(&reply.body)), (false, why));
    }

    // gRPC over HTTP/2 on both sides: messages and trailers pass, refusals are gRPC statuses.
    let client = existing.client.speaking(&["h2"]);
    let called = call(&existing, &client, Some(&key)).await?;
    assert_eq!((called.status, called.trailers.get("grpc-status").map(|s| s.as_bytes())), (200, Some(&b"0"[..])));
    let received = called.message.context("no message")?;
    assert_eq!(received["path"], "/orders.v1.Orders/List");
    assert_eq!(received["headers"]["x-consumer-id"], json!([owner]));
    assert_eq!(received["headers"]["x-api-key"], Value::Null);
    let called = call(&existing, &client, None).await?;
    // UNAUTHENTICATED.
    assert_eq!((called.status, called.headers.get("grpc-status").map(|s| s.as_bytes())), (200, Some(&b"16"[..])));

    let before = existing.stack.demo.requests();
    let (mut stream, answer) = socket(&existing, Some(&key)).await?;
    assert!(answer.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{answer}");
    assert_echo(&mut stream).await?;
    let (_, answer) = socket(&existing, None).await?;
    assert!(answer.starts_with("HTTP/1.1 401 Unauthorized\r\n"), "{answer}");
    assert_eq!(existing.stack.demo.requests(), before + 1);
    Ok(())
}

/// What the book says of streams; what bounds them is in `hardened.rs`.
#[tokio::test]
async fn a_websocket_that_is_open_outlives_the_revocation_of_its_key_and_no_new_one_opens() -> Result<()> {
    let existing = Existing::start(&[]).await?;
    let key = existing.working_key("ada@example.com").await?;
    let (mut stream, _) = socket(&existing, Some(&key)).await?;
    existing.stack.rest().revoke("ada@example.com").await?;
    existing.wait_for(&key, 401).await?;
    assert!(socket(&existing, Some(&key)).await?.1.starts_with("HTTP/1.1 401 "));
    assert_echo(&mut stream).await
}

#[tokio::test]
async fn envoys_own_rate_limit_refuses_floods_of_unknown_keys_before_the_filter_sees_them() -> Result<()> {
    let bucket = "{ max_tokens: 10000, tokens_per_fill: 5000, fill_interval: 1s }";
    let small = "{ max_tokens: 500, tokens_per_fill: 1, fill_interval: 3600s }".to_owned();
    let existing = Existing::start(&[(bucket, small)]).await?;
    let headers = [("x-api-key", "no such key"), ("origin", cors::ORIGIN)];
    let mut reply = existing.get("/orders", &headers).await?;
    for _ in 0..500 {
        if reply.status == 429 {
            break;
        }
        reply = existing.get("/orders", &headers).await?;
    }
    assert_eq!((reply.status, &reply.body[..]), (429, &b"local_rate_limited"[..]));
    // gRPC clients get RESOURCE_EXHAUSTED, so they do not retry at once.
    let grpc = [("x-api-key", "no such key"), ("content-type", "application/grpc")];
    let refused = existing.get("/orders", &grpc).await?;
    assert_eq!((refused.status, refused.header("grpc-status")), (200, Some("8")));
    // Pages can read this refusal too, and health checks and preflights pass.
    assert_eq!(reply.header("access-control-allow-origin"), Some(cors::ORIGIN));
    assert_eq!(existing.get("/healthz", &[]).await?.status, 200);
    cors::assert_allowed(&existing.send(cors::preflight(cors::ORIGIN)?).await?);
    Ok(())
}

fn forged(key: &str) -> Vec<(&'static str, &str)> {
    FORGED.map(|name| (name, "root")).into_iter().chain([("x-api-key", key)]).collect()
}

#[tokio::test]
async fn a_route_that_is_exempted_by_policy_keeps_forged_identities_and_keys_from_the_upstream() -> Result<()> {
    let existing = Existing::start(&[]).await?;
    let key = existing.working_key("ada@example.com").await?;
    let owner = existing.stack.owner_id("ada@example.com").await?;
    let forging = FORGED.map(|name| (name, "root"));
    assert_upstream(&existing.get("/status", &forging).await?, &[]);
    let headers = assert_upstream(&existing.get("/status", &forged(&key)).await?, &IDENTITY);
    assert_eq!(headers["x-consumer-id"], json!([owner]));
    // A key that is no good is refused, so that its owner notices.
    assert_eq!(existing.get("/status", &forged("no such key")).await?.status, 401);
    Ok(())
}

/// The limit of the promise: the filter cannot clean requests that Envoy does not pass to it.
#[tokio::test]
async fn a_route_that_disables_the_filter_passes_forged_identities_and_keys_unless_envoy_removes_them() -> Result<()> {
    let disabled = "typed_per_filter_config:
                            portcullis:
                              \"@type\": type.googleapis.com/envoy.config.route.v3.FilterConfig
                              disabled: true
                          route: { cluster: upstream }
                        # A JWT instead"
        .to_owned();
    // As it is shipped, Envoy removes identity headers of clients on all routes, and no keys.
    let existing = Existing::start(&[(OPEN, disabled.clone())]).await?;
    let headers = assert_upstream(&existing.get("/status", &forged("a key")).await?, &["x-api-key"]);
    assert_eq!(headers["x-api-key"], json!(["a key"]));
    existing.envoy.stop(process::Signal::SIGTERM).await?;

    let kept = FORGED.iter().map(|name| format!("- remove: {name}\n"));
    let kept: Vec<(String, String)> = kept.map(|line| (line, "\n".to_owned())).collect();
    let mut texts = vec![(OPEN, disabled.clone())];
    texts.extend(kept.iter().map(|(line, nothing)| (line.as_str(), nothing.clone())));
    let existing = Existing::start(&texts).await?;
    let all: Vec<&str> = FORGED.into_iter().chain(["x-api-key"]).collect();
    let headers = assert_upstream(&existing.get("/status", &forged("a key")).await?, &all);
    assert_eq!((&headers["x-consumer-id"], &headers["x-api-key"]), (&json!(["root"]), &json!(["a key"])));
    existing.envoy.stop(process::Signal::SIGTERM).await?;

    // The list of the book.
    let page = std::fs::read_to_string(paths::workspace().join("docs/src/operating/envoy.md"))?;
    let (_, list) = page.split_once("request_headers_to_remove:").context("the page names no headers to remove")?;
    let (list, _) = list.split_once("```").context("the page's block has no end")?;
    let removal = format!("request_headers_to_remove: {}\n                          {disabled}", list.trim());
    let existing = Existing::start(&[(OPEN, removal)]).await?;
    assert_upstream(&existing.get("/status", &forged("a key")).await?, &[]);
    Ok(())
}

/// What stands between two lines of a configuration, without its indentation.
fn block(configuration: &str, number: u8) -> Result<String> {
    let (_, rest) = configuration.split_once(&format!("# >>> Portcullis {number} of 2")).context("no start")?;
    let (block, _) = rest.split_once(&format!("# <<< Portcullis {number} of 2")).context("no end")?;
    let lines: Vec<&str> = block.lines().skip(1).filter(|line| !line.trim().is_empty()).collect();
    let indent = lines.iter().map(|line| line.len() - line.trim_start().len()).min().unwrap_or_default();
    Ok(lines.iter().filter_map(|line| line.get(indent..)).map(|line| format!("{line}\n")).collect())
}

#[test]
fn the_blocks_to_paste_in_the_docs_are_those_of_the_configuration() -> Result<()> {
    let read = |file: &str| std::fs::read_to_string(paths::workspace().join(file));
    let (page, configuration) = (read("docs/src/getting-started/existing-envoy.md")?, read("envoy/existing.yaml")?);
    let blocks: Vec<&str> = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    for number in [1, 2] {
        let wanted = block(&configuration, number)?;
        assert!(blocks.contains(&wanted.as_str()), "the page should have this block:\n{wanted}");
    }
    let tags = blocks.iter().find(|block| block.starts_with("stats_config:")).context("no statistics")?;
    let missing: Vec<&str> = tags.lines().filter(|line| !configuration.contains(line)).collect();
    assert!(missing.is_empty(), "the configuration lacks {missing:?}");
    Ok(())
}
