//! Malicious requests, byte by byte: each gets its documented response or the end of the
//! connection, nothing reaches the upstream, and the filter does not trap.

use anyhow::{Result, ensure};
use axum::body::Bytes;
use contract::outcome::Outcome;
use http_body_util::{Full, StreamBody};
use hyper::body::Frame;
use hyper::{HeaderMap, Request};
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::http::{over_http_2, with_key};
use portcullis_tests::raw_http::{Heard, fields, frame, frames, opening, say};
use portcullis_tests::stack::Stack;

/// What must hold after all of it: the filter was never made anew, and good keys work.
async fn assert_unharmed(stack: &Stack, key: &str) -> Result<()> {
    let reloads = stack.envoy().stats("vm_reload").await?;
    ensure!(!reloads.is_empty(), "Envoy counts no reloads under that name");
    for (name, value) in reloads {
        assert_eq!(value, 0, "{name}");
    }
    assert!(stack.envoy().log().lines_with("panicked").is_empty());
    stack.envoy().must_run()?;
    assert_upstream(&stack.get(Some(key)).await?, &IDENTITY);
    Ok(())
}

/// A request over HTTP/1.1, its lines as they are.
fn request(lines: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in [&[b"GET / HTTP/1.1", &b"host: api"[..]], lines].concat() {
        bytes.extend_from_slice(line);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// What is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The filter's, as for everybody.
    Filter(Outcome),
    /// Envoy's own, before the filter sees anything.
    Envoy(u16),
    /// The upstream's.
    Upstream,
}

fn judge(name: &str, heard: &Heard, expected: Answer) {
    let body = heard.body();
    let (status, fits) = match expected {
        Answer::Filter(outcome) => {
            let status = outcome.refusal().map_or(200, |refusal| refusal.status);
            (status, body.contains(&outcome.problem_type()))
        }
        Answer::Envoy(status) => (status, !body.contains("portcullis")),
        Answer::Upstream => (200, body.contains("\"headers\"") && !body.contains("sk_live_")),
    };
    let said = String::from_utf8_lossy(&heard.bytes).into_owned();
    assert_eq!(heard.statuses(), [status], "{name}: {said}");
    assert!(fits, "{name}: {said}");
}

/// Each case with its bytes and the expected answer. Longer than a screen: it is one table.
fn http_1_table(key: &str) -> Vec<(&'static str, Vec<u8>, Answer)> {
    use Answer::{Envoy, Filter, Upstream};
    let good = format!("x-api-key: {key}").into_bytes();
    let long = |bytes: usize| [b"x-api-key: ".to_vec(), vec![b'k'; bytes]].concat();
    let flood: Vec<Vec<u8>> = (0..101).map(|number| format!("x-{number}: 1").into_bytes()).collect();
    let flood: Vec<&[u8]> = flood.iter().map(Vec::as_slice).collect();
    let plain = |text: &str| text.replace('\n', "\r\n").replace("KEY", key).into_bytes();
    vec![
        ("a hundred headers too many", request(&flood), Envoy(431)),
        ("a good key behind a flood of headers", request(&[&flood[..], &[&good]].concat()), Envoy(431)),
        ("a key of 64 KiB", request(&[&long(65_536)]), Envoy(431)),
        ("a key of 50 KiB", request(&[&long(50_000)]), Filter(Outcome::Unknown)),
        ("a key of nothing", request(&[b"x-api-key:"]), Filter(Outcome::Missing)),
        ("a key of blanks", request(&[b"x-api-key: \t  "]), Filter(Outcome::Missing)),
        ("a key that is no text", request(&[b"x-api-key: \xff\xfe\x80\xc3\x28"]), Filter(Outcome::Unknown)),
        ("a key with a NUL", request(&[b"x-api-key: a\0b"]), Envoy(400)),
        ("a key with a carriage return", request(&[b"x-api-key: a\rb"]), Filter(Outcome::Unknown)),
        ("a name in upper case", request(&[format!("X-API-KEY: {key}").as_bytes()]), Upstream),
        ("a name in any case", request(&[format!("x-ApI-kEy:{key}").as_bytes()]), Upstream),
        ("a name with a blank after it", request(&[format!("x-api-key : {key}").as_bytes()]), Envoy(400)),
        ("a name with an underscore", request(&[&good, b"x_consumer_id: root"]), Envoy(400)),
        ("a key folded over two lines", request(&[b"x-api-key:", format!(" {key}").as_bytes()]), Upstream),
        ("a header folded onto the key", request(&[&good, b" more"]), Filter(Outcome::Unknown)),
        ("two keys, the good one first", request(&[&good, b"x-api-key: other"]), Upstream),
        ("two keys, the good one last", request(&[b"x-api-key: other", &good]), Filter(Outcome::Unknown)),
        (
            "a hundred empty keys",
            request(&[&vec![&b"x-api-key:"[..]; 90][..], &[&good]].concat()),
            Filter(Outcome::Missing),
        ),
        ("HTTP/1.0", plain("GET / HTTP/1.0\nx-api-key: KEY\n\n"), Envoy(426)),
        ("no host", plain("GET / HTTP/1.1\nx-api-key: KEY\n\n"), Envoy(400)),
        ("two hosts", plain("GET / HTTP/1.1\nhost: a\nhost: b\nx-api-key: KEY\n\n"), Upstream),
        ("no version", plain("GET /\n\n"), Envoy(426)),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), Envoy(400)),
        ("a method of its own", plain("KEYS / HTTP/1.1\nhost: a\n\n"), Envoy(400)),
        ("CONNECT", plain("CONNECT api:443 HTTP/1.1\nhost: api:443\n\n"), Filter(Outcome::Missing)),
        ("CONNECT with a key", plain("CONNECT api:443 HTTP/1.1\nhost: api:443\nx-api-key: KEY\n\n"), Envoy(404)),
        ("TRACE", plain("TRACE / HTTP/1.1\nhost: a\n\n"), Filter(Outcome::Missing)),
        ("an upgrade", request(&[&good, b"connection: upgrade", b"upgrade: websocket"]), Envoy(403)),
        (
            "an upgrade to HTTP/2",
            request(&[b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAAP__"]),
            Filter(Outcome::Missing),
        ),
        (
            "two lengths",
            plain("POST / HTTP/1.1\nhost: a\nx-api-key: KEY\ncontent-length: 1\ncontent-length: 2\n\nab"),
            Envoy(400),
        ),
        (
            "a length and chunks",
            plain("POST / HTTP/1.1\nhost: a\nx-api-key: KEY\ncontent-length: 4\ntransfer-encoding: chunked\n\n0\n\n"),
            Envoy(400),
        ),
        (
            "chunks twice",
            plain("POST / HTTP/1.1\nhost: a\nx-api-key: KEY\ntransfer-encoding: chunked, chunked\n\n0\n\n"),
            Envoy(501),
        ),
        (
            "a length below nothing",
            plain("POST / HTTP/1.1\nhost: a\nx-api-key: KEY\ncontent-length: -1\n\n"),
            Envoy(400),
        ),
        (
            "a key in the trailers",
            plain("POST / HTTP/1.1\nhost: a\ntransfer-encoding: chunked\n\n0\nx-api-key: KEY\n\n"),
            Filter(Outcome::Missing),
        ),
        (
            "an identity in the trailers",
            plain(
                "POST / HTTP/1.1\nhost: a\nx-api-key: KEY\ntransfer-encoding: chunked\n\n1\na\n0\nx-consumer-id: root\n\n",
            ),
            Upstream,
        ),
        ("a path without a slash", plain("GET api HTTP/1.1\nhost: a\nx-api-key: KEY\n\n"), Envoy(400)),
        ("a path with encoded slashes", plain("GET /a%2f..%2fb HTTP/1.1\nhost: a\nx-api-key: KEY\n\n"), Envoy(400)),
        ("a whole URI", plain("GET http://other/ HTTP/1.1\nhost: a\n\n"), Filter(Outcome::Missing)),
    ]
}

#[tokio::test]
async fn malformed_http_1_gets_its_response_and_never_reaches_the_upstream() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let good = format!("x-api-key: {key}").into_bytes();
    let address = stack.envoy().address();
    // A head that never ends, which takes as long as Envoy has patience.
    let slow = tokio::spawn(say(address, b"GET / HTTP/1.1\r\nhost: a\r\nx-api-key: k", 1));
    let mut wrong = Vec::new();
    for (name, bytes, expected) in http_1_table(&key) {
        let before = stack.demo.requests();
        let heard = say(address, &bytes, 1).await?;
        let verdict = std::panic::catch_unwind(|| judge(name, &heard, expected));
        if verdict.is_err() {
            wrong.push(format!("{name}: {:?}", String::from_utf8_lossy(&heard.bytes)));
        }
        let came_through = stack.demo.requests() - before;
        assert_eq!(came_through, u64::from(expected == Answer::Upstream), "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // One connection, three requests, of which one has a key.
    let mixed = [request(&[]), request(&[&good]), request(&[b"x-api-key: other"])].concat();
    assert_eq!(say(address, &mixed, 3).await?.statuses(), [401, 200, 401]);
    let slow = slow.await??;
    assert_eq!((slow.statuses(), slow.closed), (vec![408], false), "{slow:?}");
    assert_unharmed(&stack, &key).await
}

#[tokio::test]
async fn http_2_is_decided_like_http_1_and_protocol_violations_get_no_response() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let get = |key: Option<&[u8]>| {
        let mut request = Request::get("http://api/orders");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        request.body(Full::<Bytes>::default())
    };
    assert_upstream(&over_http_2(stack.envoy().address(), get(Some(key.as_bytes()))?).await?, &IDENTITY);
    assert_refused(&over_http_2(stack.envoy().address(), get(None)?).await?, Outcome::Missing, &[]);
    for stranger in [&b"\xff\xfe\x80"[..], &[b'k'; 8_192], &[b'k'; 50_000]] {
        assert_refused(&over_http_2(stack.envoy().address(), get(Some(stranger))?).await?, Outcome::Unknown, &[]);
    }
    assert_trailers_are_ignored(&stack, &key).await?;

    let through = stack.demo.requests();
    let pseudo = [(":method", "GET"), (":scheme", "http"), (":authority", "api"), (":path", "/")];
    let good = [&pseudo[..], &[("x-api-key", &*key)]].concat();
    let block = |all: &[(&str, &str)]| frame(1, 5, 1, &fields(all));
    let with = |name, value| block(&[&good[..], &[(name, value)]].concat());
    let resets: Vec<u8> = (0..2_000_u32)
        .flat_map(|n| [frame(1, 5, 2 * n + 1, &fields(&good[..4])), frame(3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat())
        .collect();
    let continuations: Vec<u8> = std::iter::once(frame(1, 1, 1, &fields(&good)))
        .chain((0..2_000).map(|_| frame(9, 0, 1, &fields(&[("x-more", "more")]))))
        .flatten()
        .collect();
    let table: [(&str, Vec<u8>); 12] = [
        ("a name in upper case", with("X-Consumer-Id", "root")),
        ("a name with an underscore", with("x_consumer_id", "root")),
        ("a value with a line in it", with("x-a", "b\r\nx-consumer-id: root")),
        ("a value with a NUL", with("x-a", "b\0c")),
        ("a header of the connection", with("transfer-encoding", "chunked")),
        ("a path twice", with(":path", "/other")),
        ("no path", block(&[&good[..3], &good[4..]].concat())),
        ("an empty path", block(&[&good[..3], &[(":path", "")], &good[4..]].concat())),
        ("an upgrade by CONNECT", block(&[&[(":method", "CONNECT"), (":protocol", "websocket")], &good[1..]].concat())),
        ("continuations without end", continuations),
        ("requests that are taken back at once", resets),
        ("a frame that is none", [frame(1, 5, 0, &fields(&good)), vec![0xff; 64]].concat()),
    ];
    for (name, bytes) in table {
        let heard = say(stack.envoy().address(), &[opening(), bytes].concat(), 0).await?;
        let ended = frames(&heard.bytes).iter().any(|(kind, ..)| [3, 7].contains(kind));
        let refused = frames(&heard.bytes).iter().any(|(kind, ..)| *kind == 1);
        assert!(heard.closed || ended || refused, "{name}: {heard:?}");
    }
    // Requests that were taken back had no key; none of the others came through.
    assert_eq!(stack.demo.requests(), through);
    assert_unharmed(&stack, &key).await
}

/// Trailers bring neither a key nor an identity.
async fn assert_trailers_are_ignored(stack: &Stack, key: &str) -> Result<()> {
    let with_trailers = |key: Option<&str>| {
        let trailers: HeaderMap = [("x-api-key", &*key_of(stack)), ("x-consumer-id", "root")]
            .into_iter()
            .filter_map(|(name, value)| Some((name.parse().ok()?, value.parse().ok()?)))
            .collect();
        let frames: [Result<_, std::convert::Infallible>; 2] =
            [Ok(Frame::data(Bytes::from_static(b"a"))), Ok(Frame::trailers(trailers))];
        with_key(Request::post("http://api/"), key).body(StreamBody::new(futures_util::stream::iter(frames)))
    };
    assert_refused(&over_http_2(stack.envoy().address(), with_trailers(None)?).await?, Outcome::Missing, &[]);
    let seen = over_http_2(stack.envoy().address(), with_trailers(Some(key))?).await?.json()?;
    assert_ne!(seen["headers"]["x-consumer-id"][0], "root", "{seen}");
    Ok(())
}

/// A valid key, for trailers, in which the filter ignores it.
fn key_of(stack: &Stack) -> String {
    stack.control_plane.settings().admin_key.reveal().to_owned()
}
