//! Different spellings of one path: however a client writes it, a request reaches a route with a
//! policy only by the decision of that policy, and an upstream that parses paths by RFC 3986 never
//! sees a path that was decided as another one.

use anyhow::Result;
use contract::outcome::Outcome;
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::raw_http::{fields, frame, frames, opening, say};
use serde_json::{Value, json};

/// What comes of a spelling, without a key and with one that has no scopes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    /// As the route that asks for a scope.
    Strict,
    /// As a route that asks for a key.
    Plain,
    /// As the route that asks for nothing.
    Open,
    /// Envoy refuses it before the filter sees it.
    Nonsense,
}

impl Read {
    /// Statuses without a key and with one, and the code of the refusal.
    const fn answers(self) -> [(u16, Option<Outcome>); 2] {
        match self {
            Self::Strict => [(401, Some(Outcome::Missing)), (403, Some(Outcome::ScopeDenied))],
            Self::Plain => [(401, Some(Outcome::Missing)), (200, None)],
            Self::Open => [(200, None), (200, None)],
            Self::Nonsense => [(400, None), (400, None)],
        }
    }
}

/// A spelling of a path, and how it is read.
const SPELLINGS: &[(&str, Read)] = &[
    ("/strict", Read::Strict),
    ("/strict/", Read::Strict),
    ("/strict?a=/../open", Read::Strict),
    ("/strict/orders/1", Read::Strict),
    ("//strict", Read::Strict),
    ("///strict//orders", Read::Strict),
    ("/./strict", Read::Strict),
    ("/open/../strict", Read::Strict),
    ("/open/./../strict", Read::Strict),
    ("/open/%2e%2e/strict", Read::Strict),
    ("/open/.%2e/strict", Read::Strict),
    ("/open/%2E./strict", Read::Strict),
    ("/open/x/%2e%2e/%2E%2E/strict", Read::Strict),
    ("/../strict", Read::Strict),
    ("/strict/../strict", Read::Strict),
    ("/%73trict", Read::Strict),
    ("/st%72%69ct", Read::Strict),
    ("/strict;v=1", Read::Strict),
    ("/open/..;/strict", Read::Strict),
    ("/open/..;v=1/strict", Read::Strict),
    ("/open/.;/..;/strict", Read::Strict),
    ("/open;/../strict", Read::Strict),
    ("/strict%20", Read::Strict),
    ("http://api/strict", Read::Strict),
    ("http://api//open/../strict", Read::Strict),
    // The other way round: the policy of the open route applies to that route only.
    ("/open", Read::Open),
    ("/open/a", Read::Open),
    ("/open;v=1", Read::Open),
    ("/strict/..;/open", Read::Open),
    // To RFC 3986 that is no `..`; upstreams to which it is need the route of `envoy/hardened.yaml`.
    ("/open/%2e%2e;/strict", Read::Open),
    // Dots are resolved before slashes are merged, and the upstream is told the result: /open/strict.
    ("/open//..//strict", Read::Open),
    ("/open/../orders", Read::Plain),
    ("/open/%2e%2e/orders", Read::Plain),
    ("/open/..", Read::Plain),
    ("/open/..;/orders", Read::Plain),
    ("/strict/../orders", Read::Plain),
    ("/strict/%2e%2e/open", Read::Open),
    ("/orders/../open", Read::Open),
    ("http://api/open/../orders", Read::Plain),
    // Paths are told apart by case, as RFC 3986 has it.
    ("/STRICT", Read::Plain),
    // What could be read in more than one way is not served.
    ("/open%2f..%2fstrict", Read::Nonsense),
    ("/open/..%2Fstrict", Read::Nonsense),
    ("/%2fstrict", Read::Nonsense),
    ("/%5cstrict", Read::Nonsense),
    ("/open%5C..%5Cstrict", Read::Nonsense),
    ("/strict#/open", Read::Nonsense),
    ("/strict%00", Read::Nonsense),
    ("strict", Read::Nonsense),
];

/// A path as an upstream reads it that decodes what is encoded, once, then takes every slash and dot at its word.
fn resolved(path: &str) -> Vec<String> {
    let (path, _) = path.split_once('?').unwrap_or((path, ""));
    let mut decoded = Vec::new();
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let mut ahead = bytes.clone();
        let digit = |byte: Option<u8>| char::from(byte.unwrap_or(b'x')).to_digit(16);
        match (byte, digit(ahead.next()), digit(ahead.next())) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(u8::try_from(high * 16 + low).unwrap_or_default());
                bytes = ahead;
            }
            _ => decoded.push(byte),
        }
    }
    let mut segments: Vec<String> = Vec::new();
    for segment in String::from_utf8_lossy(&decoded).split(['/', '\\']) {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment.to_owned()),
        }
    }
    segments
}

async fn start() -> Result<FilterHarness> {
    let policies = json!({"strict": {"scopes": {"all": ["strict"]}}, "open": {"key": "anonymous_allowed"}});
    let keys = [("good", record(1)), ("scoped", with(2, |record| record.scopes = vec!["strict".into()]))];
    FilterHarness::builder().policies(&policies).route("/strict", "strict").route("/open", "open").start(&keys).await
}

#[tokio::test]
async fn every_spelling_of_a_path_is_judged_by_the_policy_of_what_the_upstream_serves() -> Result<()> {
    let harness = start().await?;
    let mut wrong = Vec::new();
    for (path, read) in SPELLINGS {
        for (key, (status, refusal)) in ["", "x-api-key: good\r\n"].into_iter().zip(read.answers()) {
            let before = harness.demo.requests();
            let request = format!("GET {path} HTTP/1.1\r\nhost: api\r\n{key}\r\n");
            let heard = say(harness.envoy.address(), request.as_bytes(), 1).await?;
            let body = heard.body();
            let details: Value = serde_json::from_str(&body).unwrap_or_default();
            let fits = heard.statuses() == [status]
                && refusal.is_none_or(|outcome| details["code"] == outcome.name())
                && harness.demo.requests() - before == u64::from(status == 200);
            if !fits {
                wrong.push(format!("{path} {key:?}: {:?} {body}", heard.statuses()));
            }
            if status == 200 {
                let seen = resolved(details["path"].as_str().unwrap_or_default());
                let first = seen.first().map_or("", String::as_str);
                assert!(first != "strict", "{path} reached the upstream as {details}");
                let open = first.split(';').next() == Some("open");
                assert!(!key.is_empty() || open, "{path} reached the upstream without a key as {details}");
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // With the scope the strict route is open, so that what was refused above was not refused for something else.
    assert_eq!(harness.get("//strict", Some("scoped")).await?.status, 200);
    assert_eq!(harness.envoy.stats("vm_reload").await?.iter().map(|(_, count)| count).sum::<u64>(), 0);
    Ok(())
}

/// The same where no route names a policy and rules pick them. Where a path could be read in several ways, 503 is right too.
#[tokio::test]
async fn no_spelling_of_a_path_gets_past_the_rule_for_what_the_upstream_serves() -> Result<()> {
    let mut policies = json!({"strict": {"scopes": {"all": ["strict"]}}, "open": {"key": "anonymous_allowed"}});
    for name in ["strict", "open"] {
        policies[name]["match"] = json!([{"path": {"prefix": format!("/{name}")}}]);
    }
    let keys = [("good", record(1)), ("scoped", with(2, |record| record.scopes = vec!["strict".into()]))];
    let harness = FilterHarness::builder().policies(&policies).start(&keys).await?;
    for (path, read) in SPELLINGS {
        for (key, (status, _)) in ["", "x-api-key: good\r\n"].into_iter().zip(read.answers()) {
            let request = format!("GET {path} HTTP/1.1\r\nhost: api\r\n{key}\r\n");
            let heard = say(harness.envoy.address(), request.as_bytes(), 1).await?;
            let details: Value = serde_json::from_str(&heard.body()).unwrap_or_default();
            let [got] = heard.statuses()[..] else { panic!("{path}: {heard:?}") };
            // A rule for /strict is not for /strict%20, which is another segment.
            let is_ambiguous = path.contains(";/") || path.contains("..;");
            let is_other = *path == "/strict%20";
            assert!(got == status || (is_ambiguous && got == 503) || is_other, "{path} {key:?}: {got}");
            if got == 200 {
                let seen = resolved(details["path"].as_str().unwrap_or_default());
                let first = seen.first().map_or("", String::as_str);
                assert!(first.split(';').next() != Some("strict"), "{path} reached the upstream as {details}");
                let open = first.split(';').next() == Some("open");
                assert!(!key.is_empty() || open, "{path} reached the upstream without a key as {details}");
            }
        }
    }
    assert_eq!(harness.get("//strict", Some("scoped")).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn http_2_reads_paths_alike() -> Result<()> {
    let harness = start().await?;
    for (path, read) in SPELLINGS.iter().filter(|(path, _)| path.starts_with('/')) {
        let before = harness.demo.requests();
        let head =
            [(":method", "GET"), (":scheme", "http"), (":authority", "api"), (":path", path), ("x-api-key", "good")];
        let request = [opening(), frame(1, 5, 1, &fields(&head))].concat();
        let heard = say(harness.envoy.address(), &request, 0).await?;
        let answered = frames(&heard.bytes).iter().any(|(kind, ..)| [1, 3, 7].contains(kind));
        let through = read.answers()[1].0 == 200;
        assert!(answered, "{path}: {heard:?}");
        assert_eq!(harness.demo.requests() - before, u64::from(through), "{path}");
    }
    Ok(())
}

#[test]
fn the_test_upstream_resolves_paths_by_rfc_3986() {
    for (path, expected) in
        [("/a//b/./c?d/e", "a b c"), ("/a/%2e%2e/%62", "b"), ("/a%2f..%5cb%", "b%"), ("/../a/%zz", "a %zz"), ("/", "")]
    {
        assert_eq!(resolved(path).join(" "), expected, "{path}");
    }
}
