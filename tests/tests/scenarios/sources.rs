//! Where a key may stand: each place, their order, and that nothing of the key goes upstream.

use anyhow::Result;
use contract::outcome::Outcome;
use http_body_util::Full;
use hyper::Request;
use hyper::http::request::Builder;
use portcullis_tests::bench::{Bench, record};
use portcullis_tests::expect::{assert_refused, assert_upstream};
use portcullis_tests::http::Reply;
use serde_json::{Value, json};

const IDENTITY: [&str; 2] = ["x-consumer-id", "x-credential-identifier"];
const KEYS: [&str; 2] = ["sk_live_good", "a+b/c=%&;d"];
/// The second key as it stands in a URL.
const ENCODED: &str = "a%2Bb/c%3d%25%26%3Bd";

fn sources() -> Value {
    json!([{"header": "x-api-key"}, {"bearer": true}, {"query": "api_key"}, {"cookie": "session_key"}])
}

async fn start(plugin: Value) -> Result<Bench> {
    let keys: Vec<_> = KEYS.iter().zip(1..).map(|(key, number)| (*key, record(number))).collect();
    Bench::builder().plugin(plugin).start(&keys).await
}

async fn ask(bench: &Bench, request: Builder) -> Result<Reply> {
    bench.send(request.body(Full::default())?).await
}

fn path(reply: &Reply) -> Result<Value> {
    Ok(reply.json()?["path"].clone())
}

#[tokio::test]
async fn a_key_is_found_in_each_place_and_taken_out_of_it() -> Result<()> {
    let bench = start(json!({"key_sources": sources()})).await?;
    for key in KEYS {
        let header = ask(&bench, Request::get("/a?b=1").header("X-Api-Key", key)).await?;
        let bearer = ask(&bench, Request::get("/a?b=1").header("authorization", format!("bearer {key}"))).await?;
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
        let reply = ask(&bench, Request::get(sent)).await?;
        assert_upstream(&reply, &IDENTITY);
        assert_eq!(path(&reply)?, received, "{sent}");
    }
    let reply = ask(&bench, Request::get("/").header("cookie", "session_key=sk_live_good")).await?;
    assert_upstream(&reply, &IDENTITY);
    let cookies = "a=1; session_key=\"sk_live_good\"; b=2; session_key=other";
    let reply = ask(&bench, Request::get("/").header("cookie", cookies)).await?;
    let headers = assert_upstream(&reply, &["cookie", "x-consumer-id", "x-credential-identifier"]);
    assert_eq!(headers["cookie"], json!(["a=1; b=2"]));
    // The access log has none of it.
    let log = bench.envoy.log().text();
    assert!(!log.contains("sk_live_good") && !log.contains(ENCODED), "{log}");
    Ok(())
}

#[tokio::test]
async fn the_first_place_that_has_a_key_counts() -> Result<()> {
    let bench = start(json!({"key_sources": sources()})).await?;
    let good = "sk_live_good";
    let first = Request::get("/?api_key=bad").header("x-api-key", good).header("authorization", "Bearer bad");
    let headers = assert_upstream(&ask(&bench, first).await?, &["authorization", IDENTITY[0], IDENTITY[1]]);
    // What is not the key is for the upstream to judge.
    assert_eq!(headers["authorization"], json!(["Bearer bad"]));
    let second = Request::get("/").header("x-api-key", "").header("authorization", format!("Bearer {good}"));
    assert_upstream(&ask(&bench, second).await?, &IDENTITY);
    let third = Request::get(format!("/?api_key={good}")).header("authorization", "Basic YTpi");
    let headers = assert_upstream(&ask(&bench, third).await?, &["authorization", IDENTITY[0], IDENTITY[1]]);
    assert_eq!(headers["authorization"], json!(["Basic YTpi"]));
    for request in [
        Request::get(format!("/?api_key={good}")).header("authorization", "Bearer bad"),
        Request::get("/?api_key=bad").header("cookie", format!("session_key={good}")),
    ] {
        assert_eq!(ask(&bench, request).await?.json()?["code"], "unknown");
    }
    Ok(())
}

#[tokio::test]
async fn a_key_that_stands_in_several_places_is_taken_out_of_all_of_them() -> Result<()> {
    let list =
        json!([{"header": "x-api-key"}, {"bearer": true}, {"query": "api_key"}, {"query": "k"}, {"cookie": "s"}]);
    let bench = start(json!({"key_sources": list})).await?;
    let good = "sk_live_good";
    let everywhere = Request::get(format!("/a?api_key={good}&b=1&k={good}"))
        .header("x-api-key", good)
        .header("authorization", format!("Bearer {good}"))
        .header("cookie", format!("s={good}"));
    let reply = ask(&bench, everywhere).await?;
    assert_upstream(&reply, &IDENTITY);
    assert_eq!(path(&reply)?, "/a?b=1");
    // The first of two parameters of one header counts, and the rest of the header is looked at without it.
    let reply = ask(&bench, Request::get(format!("/a?k={good}&api_key={good}")).header("cookie", "s=other")).await?;
    assert_upstream(&reply, &["cookie", IDENTITY[0], IDENTITY[1]]);
    assert_eq!(path(&reply)?, "/a");
    // Behind something else of the same name, too.
    let behind = Request::get(format!("/a?k=other&k={good}&b=1")).header("x-api-key", good);
    let reply = ask(&bench, behind.header("cookie", format!("s=other; s={good}; c=1"))).await?;
    let headers = assert_upstream(&reply, &["cookie", IDENTITY[0], IDENTITY[1]]);
    assert_eq!((path(&reply)?, &headers["cookie"]), (json!("/a?b=1"), &json!(["c=1"])));
    Ok(())
}

#[tokio::test]
async fn where_bearers_are_taken_a_refusal_offers_both_schemes_and_elsewhere_one() -> Result<()> {
    let bench = start(json!({"key_sources": sources()})).await?;
    for request in [Request::get("/"), Request::get("/?api_key=").header("cookie", "session_key=; session_key")] {
        let reply = ask(&bench, request).await?;
        assert_eq!((reply.status, &reply.json()?["code"]), (401, &json!("missing")));
        let challenges: Vec<_> = reply.headers.get_all("www-authenticate").iter().collect();
        assert_eq!(challenges, ["ApiKey realm=\"portcullis\"", "Bearer realm=\"portcullis\""]);
    }
    assert_eq!(bench.demo.requests(), 0);
    let bench = start(json!({"key_sources": [{"query": "api_key"}]})).await?;
    assert_refused(&ask(&bench, Request::get("/").header("x-api-key", KEYS[0])).await?, Outcome::Missing, &[]);
    Ok(())
}

#[tokio::test]
async fn whoever_wants_the_key_upstream_gets_it_as_it_was_sent() -> Result<()> {
    let bench = start(json!({"key_sources": sources(), "strip_key": false})).await?;
    let reply = ask(&bench, Request::get("/?%61pi_key=sk_live_good")).await?;
    assert_upstream(&reply, &IDENTITY);
    assert_eq!(path(&reply)?, "/?%61pi_key=sk_live_good");
    let reply = ask(&bench, Request::get("/").header("cookie", "a;session_key=sk_live_good")).await?;
    let headers = assert_upstream(&reply, &["cookie", IDENTITY[0], IDENTITY[1]]);
    assert_eq!(headers["cookie"], json!(["a;session_key=sk_live_good"]));
    Ok(())
}

#[tokio::test]
async fn odd_requests_are_refused_and_good_ones_still_work_afterwards() -> Result<()> {
    let bench =
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
        assert_eq!(ask(&bench, request).await?.json()?["code"], code);
    }
    assert_eq!(bench.demo.requests(), 0);
    assert_upstream(&ask(&bench, Request::get("/?api_key=sk_live_good")).await?, &IDENTITY);
    assert!(bench.envoy.log().lines_with("panicked").is_empty());
    Ok(())
}
