//! Sources of a key: each one, their order, and the removal of the key before the upstream.

use anyhow::Result;
use contract::outcome::Outcome;
use http_body_util::Full;
use hyper::Request;
use hyper::http::request::Builder;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::filter_harness::{FilterHarness, record};
use portcullis_tests::http::{Reply, over_http_2};
use serde_json::{Value, json};

const KEYS: [&str; 2] = ["sk_live_good", "a+b/c=%&;d"];
/// The second key as it stands in a URL.
const ENCODED: &str = "a%2Bb/c%3d%25%26%3Bd";

fn sources() -> Value {
    json!([{"header": "x-api-key"}, {"bearer": true}, {"query": "api_key"}, {"cookie": "session_key"}])
}

async fn start(plugin: Value) -> Result<FilterHarness> {
    let keys: Vec<_> = KEYS.iter().zip(1..).map(|(key, number)| (*key, record(number))).collect();
    FilterHarness::builder().plugin(plugin).start(&keys).await
}

async fn ask(harness: &FilterHarness, request: Builder) -> Result<Reply> {
    harness.send(request.body(Full::default())?).await
}

fn path(reply: &Reply) -> Result<Value> {
    Ok(reply.json()?["path"].clone())
}

#[tokio::test]
async fn a_key_is_found_in_each_place_and_taken_out_of_it() -> Result<()> {
    let harness = start(json!({"key_sources": sources()})).await?;
    for key in KEYS {
        let header = ask(&harness, Request::get("/a?b=1").header("X-Api-Key", key)).await?;
        let bearer = ask(&harness, Request::get("/a?b=1").header("authorization", format!("bearer {key}"))).await?;
        for reply in [header, bearer] {
            let headers = assert_upstream(&reply, &IDENTITY);
            assert!(!headers.to_string().contains(key), "{headers}");
            assert_eq!(path(&reply)?, "/a?b=1");
        }
    }
    for (sent, received) in [
        ("/a?api_key=sk_live_good", "/a"),
        ("/a?b=1&api_key=sk_live_good&c=%20d", "/a?b=1&c=%20d"),
        ("/a?b&api_key=&api_key=sk_live_good&api_key=other", "/a?b"),
        ("/a?%61pi%5Fkey=sk%5flive_good&b", "/a?b"),
        (&format!("/a?api_key={ENCODED}&b=1"), "/a?b=1"),
    ] {
        let reply = ask(&harness, Request::get(sent)).await?;
        assert_upstream(&reply, &IDENTITY);
        assert_eq!(path(&reply)?, received, "{sent}");
    }
    let reply = ask(&harness, Request::get("/").header("cookie", "session_key=sk_live_good")).await?;
    assert_upstream(&reply, &IDENTITY);
    let cookies = "a=1; session_key=\"sk_live_good\"; b=2; session_key=other";
    let reply = ask(&harness, Request::get("/").header("cookie", cookies)).await?;
    let headers = assert_upstream(&reply, &["cookie", "x-consumer-id", "x-credential-identifier"]);
    assert_eq!(headers["cookie"], json!(["a=1; b=2"]));
    // The access log has none of it.
    let log = harness.envoy.log().text();
    assert!(!log.contains("sk_live_good") && !log.contains(ENCODED), "{log}");
    Ok(())
}

#[tokio::test]
async fn the_first_place_that_has_a_key_counts() -> Result<()> {
    let harness = start(json!({"key_sources": sources()})).await?;
    let good = "sk_live_good";
    let first = Request::get("/?api_key=bad").header("x-api-key", good).header("authorization", "Bearer bad");
    let headers = assert_upstream(&ask(&harness, first).await?, &["authorization", IDENTITY[0], IDENTITY[1]]);
    // What is not the key is for the upstream to judge.
    assert_eq!(headers["authorization"], json!(["Bearer bad"]));
    let second = Request::get("/").header("x-api-key", "").header("authorization", format!("Bearer {good}"));
    assert_upstream(&ask(&harness, second).await?, &IDENTITY);
    let third = Request::get(format!("/?api_key={good}")).header("authorization", "Basic YTpi");
    let headers = assert_upstream(&ask(&harness, third).await?, &["authorization", IDENTITY[0], IDENTITY[1]]);
    assert_eq!(headers["authorization"], json!(["Basic YTpi"]));
    for request in [
        Request::get(format!("/?api_key={good}")).header("authorization", "Bearer bad"),
        Request::get("/?api_key=bad").header("cookie", format!("session_key={good}")),
    ] {
        assert_eq!(ask(&harness, request).await?.json()?["code"], "unknown");
    }
    Ok(())
}

#[tokio::test]
async fn a_key_that_stands_in_several_places_is_taken_out_of_all_of_them() -> Result<()> {
    let list =
        json!([{"header": "x-api-key"}, {"bearer": true}, {"query": "api_key"}, {"query": "k"}, {"cookie": "s"}]);
    let harness = start(json!({"key_sources": list})).await?;
    let good = "sk_live_good";
    let everywhere = Request::get(format!("/a?api_key={good}&b=1&k={good}"))
        .header("x-api-key", good)
        .header("authorization", format!("Bearer {good}"))
        .header("cookie", format!("s={good}"));
    let reply = ask(&harness, everywhere).await?;
    assert_upstream(&reply, &IDENTITY);
    assert_eq!(path(&reply)?, "/a?b=1");
    // The first of two parameters of one header counts, and the rest of the header is looked at without it.
    let reply = ask(&harness, Request::get(format!("/a?k={good}&api_key={good}")).header("cookie", "s=other")).await?;
    assert_upstream(&reply, &["cookie", IDENTITY[0], IDENTITY[1]]);
    assert_eq!(path(&reply)?, "/a");
    // Behind something else of the same name, too.
    let behind = Request::get(format!("/a?k=other&k={good}&b=1")).header("x-api-key", good);
    let reply = ask(&harness, behind.header("cookie", format!("s=other; s={good}; c=1"))).await?;
    let headers = assert_upstream(&reply, &["cookie", IDENTITY[0], IDENTITY[1]]);
    assert_eq!((path(&reply)?, &headers["cookie"]), (json!("/a?b=1"), &json!(["c=1"])));
    Ok(())
}

#[tokio::test]
async fn where_bearers_are_taken_a_refusal_offers_both_schemes_and_elsewhere_one() -> Result<()> {
    let harness = start(json!({"key_sources": sources()})).await?;
    for request in [Request::get("/"), Request::get("/?api_key=").header("cookie", "session_key=; session_key")] {
        let reply = ask(&harness, request).await?;
        assert_eq!((reply.status, &reply.json()?["code"]), (401, &json!("missing")));
        let challenges: Vec<_> = reply.headers.get_all("www-authenticate").iter().collect();
        assert_eq!(challenges, ["ApiKey realm=\"portcullis\"", "Bearer realm=\"portcullis\""]);
    }
    assert_eq!(harness.demo.requests(), 0);
    let harness = start(json!({"key_sources": [{"query": "api_key"}]})).await?;
    assert_refused(&ask(&harness, Request::get("/").header("x-api-key", KEYS[0])).await?, Outcome::Missing, &[]);
    Ok(())
}

#[tokio::test]
async fn without_strip_key_the_upstream_gets_the_key_as_it_was_sent() -> Result<()> {
    let harness = start(json!({"key_sources": sources(), "strip_key": false})).await?;
    let reply = ask(&harness, Request::get("/?%61pi_key=sk_live_good")).await?;
    assert_upstream(&reply, &IDENTITY);
    assert_eq!(path(&reply)?, "/?%61pi_key=sk_live_good");
    let reply = ask(&harness, Request::get("/").header("cookie", "a;session_key=sk_live_good")).await?;
    let headers = assert_upstream(&reply, &["cookie", IDENTITY[0], IDENTITY[1]]);
    assert_eq!(headers["cookie"], json!(["a;session_key=sk_live_good"]));
    Ok(())
}

#[tokio::test]
async fn malformed_requests_are_refused_and_valid_ones_work_afterwards() -> Result<()> {
    let harness =
        start(json!({"key_sources": [{"query": "api_key"}, {"cookie": "session_key"}, {"bearer": true}]})).await?;
    let long = "x".repeat(20_000);
    let pairs = "api_key=&a&".repeat(1_500);
    let odd = [
        (Request::get(format!("/?api_key={long}")), "unknown"),
        (Request::get(format!("/?{pairs}")), "missing"),
        (Request::get("/?api_key=%ff%fe%00"), "unknown"),
        (Request::get("/?api_key=%&%=%&%%="), "unknown"),
        (Request::get("/?&&=&api_key&=api_key"), "missing"),
        (Request::get("/").header("cookie", &b"session_key=\xff\xfe"[..]), "unknown"),
        (Request::get("/").header("cookie", &b";;=;\xff=\xff; session_key"[..]), "missing"),
        (Request::get("/").header("authorization", &b"Bearer \xff"[..]), "unknown"),
        (Request::get("/").header("authorization", "Bearer"), "missing"),
    ];
    for (request, code) in odd {
        assert_eq!(ask(&harness, request).await?.json()?["code"], code);
    }
    assert_eq!(harness.demo.requests(), 0);
    assert_upstream(&ask(&harness, Request::get("/?api_key=sk_live_good")).await?, &IDENTITY);
    assert!(harness.envoy.log().lines_with("panicked").is_empty());
    Ok(())
}

/// The lines of a request, and what the upstream receives of their headers.
type Lines<'a> = (&'a [&'a str], &'a [(&'a str, Value)]);

/// A request with several header lines of one name, over HTTP/1.1.
async fn lines(harness: &FilterHarness, lines: &[&str]) -> Result<Reply> {
    let mut request = Request::get("/a");
    for line in lines {
        let (name, value) = line.split_once(": ").unwrap_or_default();
        request = request.header(name, value);
    }
    ask(harness, request).await
}

#[tokio::test]
async fn a_key_is_found_on_every_line_of_its_header_and_none_of_them_goes_upstream_with_it() -> Result<()> {
    let harness = start(json!({"key_sources": sources()})).await?;
    let cases: [Lines<'_>; 12] = [
        (&["cookie: a=1", "cookie: session_key=sk_live_good"], &[("cookie", json!(["a=1"]))]),
        (&["cookie: session_key=sk_live_good", "cookie: a=1"], &[("cookie", json!(["a=1"]))]),
        (&["cookie: session_key=sk_live_good", "cookie: session_key=sk_live_good"], &[]),
        (
            &["cookie: a=1,2; b=3", "cookie: c=4; session_key=sk_live_good", "cookie: d=5"],
            &[("cookie", json!(["a=1,2; b=3; c=4; d=5"]))],
        ),
        (
            &["cookie: a=1,session_key=b", "cookie: session_key=sk_live_good"],
            &[("cookie", json!(["a=1,session_key=b"]))],
        ),
        (
            &["authorization: Basic eA==", "authorization: Bearer sk_live_good"],
            &[("authorization", json!(["Basic eA=="]))],
        ),
        (
            &["authorization: Bearer", "authorization: bearer sk_live_good", "authorization: Digest a=\"b\", c=d"],
            &[("authorization", json!(["Bearer,Digest a=\"b\", c=d"]))],
        ),
        // The key stood elsewhere: lines that hold it go, others stay.
        (
            &[
                "x-api-key: sk_live_good",
                "cookie: a=1",
                "cookie: session_key=sk_live_good",
                "authorization: Basic eA==",
            ],
            &[("cookie", json!(["a=1"])), ("authorization", json!(["Basic eA=="]))],
        ),
        (
            &["x-api-key: sk_live_good", "authorization: Basic eA==", "authorization: Bearer sk_live_good"],
            &[("authorization", json!(["Basic eA=="]))],
        ),
        (&["x-api-key: sk_live_good", "authorization: Bearer sk_live_good", "authorization: Basic eA=="], &[]),
        (&["x-api-key: sk_live_good", "x-api-key: sk_live_good", "x-api-key: other"], &[]),
        (&["x-api-key: sk_live_good", "cookie: a=1,2", "cookie: b=3"], &[("cookie", json!(["a=1,2", "b=3"]))]),
    ];
    for (sent, more) in cases {
        let reply = lines(&harness, sent).await?;
        let names: Vec<&str> = more.iter().map(|(name, _)| *name).chain(IDENTITY).collect();
        assert_eq!(reply.status, 200, "{sent:?}: {:?}", reply.body);
        let headers = assert_upstream(&reply, &names);
        assert!(!headers.to_string().contains("sk_live_good"), "{sent:?}: {headers}");
        for (name, value) in more {
            assert_eq!(headers[name], *value, "{sent:?}");
        }
    }
    // Two lines with a bearer first are no key: which of them is meant?
    for second in ["authorization: Basic eA==", "authorization: Bearer other"] {
        let reply = lines(&harness, &["authorization: Bearer sk_live_good", second]).await?;
        assert_eq!((reply.status, &reply.json()?["code"]), (401, &json!("unknown")), "{second}");
    }
    Ok(())
}

#[tokio::test]
async fn cookies_that_come_in_crumbs_over_http_2_are_one_header() -> Result<()> {
    let harness = start(json!({"key_sources": sources()})).await?;
    let request = Request::get("http://api/a").header("cookie", "a=1").header("cookie", "session_key=sk_live_good");
    let request = request.header("cookie", "b=2").body(Full::<axum::body::Bytes>::default())?;
    let reply = over_http_2(harness.envoy.address(), request).await?;
    let headers = assert_upstream(&reply, &["cookie", IDENTITY[0], IDENTITY[1]]);
    assert_eq!(headers["cookie"], json!(["a=1; b=2"]));
    Ok(())
}

#[tokio::test]
async fn a_key_that_was_refused_is_let_through_by_shadow_mode_on_no_line() -> Result<()> {
    let harness = start(json!({"key_sources": sources(), "shadow": true})).await?;
    for sent in [
        &["authorization: Bearer sk_live_good", "authorization: Bearer wrong_key"][..],
        &["authorization: Basic eA==", "authorization: Bearer wrong_key", "authorization: Bearer sk_live_good"],
        &["cookie: session_key=wrong_key", "cookie: a=1; session_key=sk_live_good"],
    ] {
        let reply = lines(&harness, sent).await?;
        assert_eq!(reply.status, 200, "{sent:?}");
        let headers = reply.json()?["headers"].to_string();
        assert!(!headers.contains("sk_live_good") && !headers.contains("wrong_key"), "{sent:?}: {headers}");
        assert!(headers.contains("\"x-portcullis-shadow\":[\"unknown\"]"), "{headers}");
    }
    Ok(())
}

/// Many people log paths and cookies whole.
#[tokio::test]
async fn a_request_that_is_refused_keeps_no_key_that_an_access_log_could_show() -> Result<()> {
    let marker = "path: \"%PATH(NQ:PATH)%\"";
    let plugin = json!({
        "key_sources": sources(), "strip_key": false, "rate_limit": {"requests": 1, "window": "3600s"},
    });
    let keys: Vec<_> = KEYS.iter().zip(1..).map(|(key, number)| (*key, record(number))).collect();
    let harness = FilterHarness::builder()
        .plugin(plugin)
        .edit(marker, "path: \"%REQ(:PATH)%\"\n                          cookie: \"%REQ(COOKIE)%\"");
    let harness = harness.start(&keys).await?;
    for (path, cookies, code, path_left, cookies_left) in [
        ("/1?a=1&api_key=sk_live_good&b", "", None, "/1?a=1&api_key=sk_live_good&b", None),
        ("/2?a=1&api_key=sk_live_good&b", "", Some("rate_limited"), "/2?a=1&b", None),
        ("/3?%61pi_key=sk_live_nobody", "c=1", Some("unknown"), "/3", Some("c=1")),
        ("/4", "c=1; session_key=sk_live_good", Some("rate_limited"), "/4", Some("c=1")),
        ("/5", "session_key=sk_live_nobody", Some("unknown"), "/5", None),
        // In a key's place, though another counted.
        ("/6?api_key=sk_live_nobody", "session_key=sk_live_good", Some("unknown"), "/6", None),
        ("/7?api_key=&d=e", "f", Some("missing"), "/7?d=e", Some("f")),
    ] {
        let mut request = Request::get(path);
        if !cookies.is_empty() {
            request = request.header("cookie", cookies);
        }
        let reply = ask(&harness, request).await?;
        assert_eq!(reply.json()?.get("code").and_then(Value::as_str), code, "{path}");
        let line = harness.envoy.log().wait_for(&format!("\"path\":\"{path_left}\"")).await?;
        let line: Value = serde_json::from_str(&line)?;
        assert_eq!(line["cookie"].as_str(), cookies_left, "{line}");
        if code.is_some() {
            assert!(reply.header("x-request-id").is_some(), "{path}");
            assert_eq!(line["request_id"].as_str(), reply.header("x-request-id"), "{line}");
        }
    }
    Ok(())
}
