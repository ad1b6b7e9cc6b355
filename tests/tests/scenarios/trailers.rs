//! Trailers of a request: an HTTP/2 upstream gets them, except those that look like an identity or
//! a key.

use std::convert::Infallible;

use anyhow::Result;
use axum::body::Bytes;
use filter_core::identity::{FOREIGN, USUAL};
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper::{HeaderMap, Request};
use portcullis_tests::demo::TRAILERS;
use portcullis_tests::filter_harness::{Builder, FilterHarness, record};
use portcullis_tests::http::{over_http_2, with_key};
use serde_json::{Value, json};

const UPSTREAM: &str = "    - name: upstream
      type: STRICT_DNS
";

/// An upstream that speaks HTTP/2: only such a one gets trailers.
fn with_http_2_upstream(builder: Builder) -> Builder {
    let options = "      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          explicit_http_config: { http2_protocol_options: {} }
";
    builder.edit(UPSTREAM, &format!("{UPSTREAM}{options}"))
}

/// The trailers that the upstream receives, if it answers with 200.
async fn received(harness: &FilterHarness, key: Option<&str>, trailers: &[(&str, &str)]) -> Result<Value> {
    let mut map = HeaderMap::new();
    for (name, value) in trailers {
        map.append(axum::http::HeaderName::try_from(*name)?, value.parse()?);
    }
    let frames: [Result<_, Infallible>; 2] = [Ok(Frame::data(Bytes::from_static(b"a"))), Ok(Frame::trailers(map))];
    let request = with_key(Request::post(format!("http://api{TRAILERS}")), key);
    let request = request.body(StreamBody::new(futures_util::stream::iter(frames)))?;
    let reply = over_http_2(harness.envoy.address(), request).await?;
    assert_eq!(reply.status, 200, "{:?}", reply.body);
    Ok(reply.json()?["trailers"].clone())
}

#[tokio::test]
async fn an_http_2_upstream_gets_no_trailer_that_looks_like_an_identity_or_a_key() -> Result<()> {
    let plugin = json!({
        "remove_headers": ["X-Tenant"],
        "key_sources": [{"header": "x-api-key"}, {"bearer": true}, {"query": "api_key"}, {"cookie": "session"}],
        "identity_headers": {"consumer": "x-who", "credential": "x-credential-identifier", "scopes": ""},
    });
    let policies = json!({"default": {"key": "optional"}});
    let harness = with_http_2_upstream(FilterHarness::builder().plugin(plugin).policies(&policies))
        .start(&[("good", record(1))])
        .await?;
    let names = ["x-who", "x-api-key", "authorization", "cookie", "x-tenant", "x-portcullis-shadow"];
    let mut trailers = vec![("x-checksum", "1"), ("x-checksum", "2")];
    // Each twice: neither may get through.
    trailers.extend(names.into_iter().chain(USUAL).chain(FOREIGN).flat_map(|name| [(name, "root"), (name, "admin")]));
    for key in [Some("good"), None, Some("stranger")] {
        assert_eq!(received(&harness, key, &trailers).await?, json!({"x-checksum": ["1", "2"]}), "{key:?}");
        assert_eq!(received(&harness, key, &[]).await?, json!({}), "{key:?}");
    }
    Ok(())
}
