//! Redirects that Envoy follows itself, and redirects that it sends.

use anyhow::Result;
use contract::outcome::Outcome;
use hyper::Request;
use portcullis_tests::demo::REDIRECT;
use portcullis_tests::expect::{assert_refused, assert_upstream};
use portcullis_tests::filter_harness::{FilterHarness, record};
use serde_json::{Value, json};

const ROUTE: &str = "route: { cluster: upstream }\n";
const MATCH: &str = "                      routes:\n";

async fn following(plugin: Value) -> Result<FilterHarness> {
    let policy = "route: { cluster: upstream, internal_redirect_policy: { max_internal_redirects: 1 } }\n";
    FilterHarness::builder().plugin(plugin).edit(ROUTE, policy).start(&[("good", record(1))]).await
}

/// The second pass of a redirect that Envoy follows has the headers that the first one left.
#[tokio::test]
async fn an_internal_redirect_needs_the_key_to_be_left_on_the_request() -> Result<()> {
    let harness = following(json!({})).await?;
    assert_refused(&harness.get(REDIRECT, Some("good")).await?, Outcome::Missing, &[]);
    // The upstream received one request, without a key.
    assert_eq!(harness.demo.requests(), 1);

    let harness = following(json!({"strip_key": false})).await?;
    let reply = harness.get(REDIRECT, Some("good")).await?;
    let more = ["x-api-key", "x-consumer-id", "x-credential-identifier", "x-envoy-original-url"];
    let headers = assert_upstream(&reply, &more);
    assert_eq!(headers["x-credential-identifier"], json!(["01010101-0101-0101-0101-010101010101"]));
    assert_eq!(reply.json()?["path"], "/redirected");
    assert_eq!(harness.demo.requests(), 2);
    assert_refused(&harness.get(REDIRECT, None).await?, Outcome::Missing, &[]);
    Ok(())
}

/// The filter runs before Envoy makes the answer of a route with `redirect`, so such a route is for before the filter.
#[tokio::test]
async fn a_redirect_that_envoy_answers_keeps_the_key_only_where_the_filter_is_off() -> Result<()> {
    let off = "typed_per_filter_config: { portcullis: { \"@type\": type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true } }";
    let routes = format!(
        "{MATCH}                        - match: {{ prefix: /off }}
                          redirect: {{ https_redirect: true }}
                          {off}
                        - match: {{ prefix: /on }}
                          redirect: {{ https_redirect: true }}
"
    );
    let harness = FilterHarness::builder().plugin(json!({"key_sources": [{"query": "api_key"}]})).edit(MATCH, &routes);
    let harness = harness.start(&[("good", record(1))]).await?;
    for (sent, query) in [("/off?a=1&api_key=good", "/off?a=1&api_key=good"), ("/on?a=1&api_key=good", "/on?a=1")] {
        let reply = harness.send(Request::get(sent).body(http_body_util::Full::default())?).await?;
        assert_eq!(reply.status, 301);
        let location = reply.header("location").unwrap_or_default();
        assert_eq!(location, format!("https://{}{query}", harness.envoy.address()), "{sent}");
    }
    assert_eq!(harness.demo.requests(), 0);
    Ok(())
}
