//! Browsers and load balancers, which send no key: the shipped configurations answer preflights and
//! health checks before the filter, and pages can read refusals.

use anyhow::Result;
use contract::outcome::Outcome;
use http_body_util::Full;
use hyper::Request;
use portcullis_tests::expect::assert_upstream;
use portcullis_tests::filter_harness::{FilterHarness, record};
use portcullis_tests::http::{self, Outgoing, Reply, with_key};
use portcullis_tests::wait::eventually;
use serde_json::json;

/// The origin that the configurations name as an example.
pub(crate) const ORIGIN: &str = "https://app.example.com";
/// What a page may read of an answer beside the few headers that it always may.
const EXPOSED: &str = "retry-after, ratelimit, ratelimit-policy, www-authenticate, x-request-id";

/// What a browser asks before it sends a request with a key.
pub(crate) fn preflight(origin: &str) -> Result<Outgoing> {
    let request = Request::options("/orders").header("origin", origin).header("access-control-request-method", "GET");
    Ok(request.header("access-control-request-headers", "x-api-key").body(Full::default())?)
}

/// The answer to a preflight of the example's origin.
#[track_caller]
pub(crate) fn assert_allowed(reply: &Reply) {
    assert_eq!((reply.status, reply.body.len()), (200, 0), "{reply:?}");
    assert_eq!(reply.header("access-control-allow-origin"), Some(ORIGIN));
    let allowed = reply.header("access-control-allow-headers").unwrap_or_default();
    assert!(allowed.split(", ").any(|name| name == "x-api-key"), "{allowed}");
    let methods = reply.header("access-control-allow-methods").unwrap_or_default();
    assert!(methods.split(", ").any(|method| method == "GET"), "{methods}");
    assert_eq!(reply.header("access-control-max-age"), Some("600"));
    // Keys are no cookies: a page has to know one to send it.
    assert_eq!(reply.header("access-control-allow-credentials"), None);
}

/// A script of the origin can read the answer and these headers of it.
#[track_caller]
fn assert_readable(reply: &Reply, headers: &[&str]) {
    assert_eq!(reply.header("access-control-allow-origin"), Some(ORIGIN));
    assert_eq!(reply.header("access-control-expose-headers"), Some(EXPOSED));
    for name in headers {
        assert!(reply.header(name).is_some_and(|value| !value.is_empty()), "{name}: {reply:?}");
        assert!(EXPOSED.split(", ").any(|exposed| exposed == *name), "{name}");
    }
}

fn from_page(origin: &str, key: Option<&str>) -> Result<Outgoing> {
    Ok(with_key(Request::get("/orders").header("origin", origin), key).body(Full::default())?)
}

#[tokio::test]
async fn a_browser_gets_200_to_its_preflight_and_a_page_can_read_401_and_429_with_retry_after() -> Result<()> {
    let plugin = json!({"rate_limit": {"requests": 1, "window": "3600s"}});
    let harness = FilterHarness::builder().plugin(plugin).start(&[("good", record(1))]).await?;
    assert_allowed(&harness.send(preflight(ORIGIN)?).await?);
    assert_eq!(harness.demo.requests(), 0);

    let reply = harness.send(from_page(ORIGIN, None)?).await?;
    assert_eq!((reply.status, &reply.json()?["code"]), (401, &json!(Outcome::Missing.name())));
    assert_readable(&reply, &["www-authenticate"]);

    let reply = harness.send(from_page(ORIGIN, Some("good"))?).await?;
    assert_upstream(&reply, &["origin", "x-consumer-id", "x-credential-identifier"]);
    assert_readable(&reply, &[]);

    let reply = harness.send(from_page(ORIGIN, Some("good"))?).await?;
    assert_eq!((reply.status, &reply.json()?["code"]), (429, &json!(Outcome::RateLimited.name())));
    assert_readable(&reply, &["retry-after", "ratelimit", "ratelimit-policy"]);
    Ok(())
}

#[tokio::test]
async fn pages_of_other_origins_are_allowed_nothing() -> Result<()> {
    let harness = FilterHarness::start(&[("good", record(1))]).await?;
    for origin in ["https://app.example.com.attacker.example", "http://app.example.com", "null"] {
        let reply = harness.send(preflight(origin)?).await?;
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, None), "{origin}");
        for key in [None, Some("good")] {
            let reply = harness.send(from_page(origin, key)?).await?;
            assert_eq!(reply.header("access-control-allow-origin"), None, "{origin}");
        }
    }
    // What is no preflight needs a key, whichever its method.
    let plain = Request::options("/orders").header("origin", ORIGIN).body(Full::default())?;
    assert_eq!(harness.send(plain).await?.status, 401);
    Ok(())
}

#[tokio::test]
async fn a_load_balancer_gets_200_without_a_key_and_503_once_envoy_is_told_to_leave() -> Result<()> {
    let harness = FilterHarness::start(&[("good", record(1))]).await?;
    let reply = harness.get("/healthz", None).await?;
    assert_eq!((reply.status, reply.body.len()), (200, 0), "{reply:?}");
    for path in ["/healthz/", "/healthz?a=b", "/healthz/../orders"] {
        assert_eq!(harness.get(path, None).await?.status, 401, "{path}");
    }
    let admin = harness.envoy.admin();
    http::send(admin, Request::post("/healthcheck/fail").body(Full::default())?).await?;
    let failing = async || (harness.get("/healthz", None).await.ok()?.status == 503).then_some(());
    eventually("the health check to fail", failing).await?;
    // Requests that still come are served.
    assert_eq!(harness.get("/orders", Some("good")).await?.status, 200);
    assert_eq!(harness.demo.requests(), 1);
    // Health checks are not logged; what needed a key is.
    harness.envoy.log().wait_for("\"status\":200").await?;
    let logged = harness.envoy.log().lines_with("/healthz");
    assert!(!logged.is_empty() && logged.iter().all(|line| line.contains("\"status\":401")), "{logged:?}");
    Ok(())
}
