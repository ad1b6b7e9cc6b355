//! gRPC calls: `grpc-status` tells clients the reason of a refusal, and whether to retry.

use anyhow::Result;
use axum::body::Bytes;
use contract::outcome::Outcome;
use contract::record::Flags;
use http_body_util::Full;
use hyper::Request;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::http::{Reply, over_http_2, with_key};
use serde_json::json;

/// A call as gRPC has it: one message of no bytes.
async fn call(harness: &FilterHarness, content_type: &str, key: Option<&str>) -> Result<Reply> {
    let request = with_key(Request::post("http://api/orders.Orders/List").header("te", "trailers"), key);
    let request = request.header("content-type", content_type);
    over_http_2(harness.envoy.address(), request.body(Full::new(Bytes::from_static(&[0; 5])))?).await
}

#[tokio::test]
async fn a_grpc_client_is_told_of_a_limit_as_one_and_of_a_bad_key_as_one() -> Result<()> {
    let keys = [
        ("quota", with(1, |r| r.flags = Flags::QUOTA_EXCEEDED), Outcome::QuotaExceeded, "8"),
        ("credits", with(2, |r| r.flags = Flags::CREDITS_EXHAUSTED), Outcome::CreditsExhausted, "8"),
        ("disabled", with(3, |r| r.flags = Flags::DISABLED), Outcome::Disabled, "16"),
        ("revoked", with(4, |r| r.flags = Flags::REVOKED), Outcome::Revoked, "16"),
    ];
    let mut records: Vec<_> = keys.iter().map(|(key, record, ..)| (*key, record.clone())).collect();
    records.push(("fast", record(5)));
    let limit = json!({"rate_limit": {"requests": 1, "window": "3600s"}});
    let harness = FilterHarness::builder().plugin(limit).start(&records).await?;
    assert_eq!(harness.get("/", Some("fast")).await?.status, 200);
    let mut expected: Vec<_> = keys.iter().map(|(key, _, outcome, status)| (Some(*key), *outcome, *status)).collect();
    expected.extend([(Some("fast"), Outcome::RateLimited, "8"), (None, Outcome::Missing, "16")]);
    for (key, outcome, status) in expected {
        for content_type in ["application/grpc", "application/grpc+proto"] {
            let reply = call(&harness, content_type, key).await?;
            assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/grpc")), "{key:?}");
            assert_eq!(reply.header("grpc-status"), Some(status), "{key:?}");
            // The problem, percent-encoded where gRPC asks for it.
            let message = reply.header("grpc-message").unwrap_or_default();
            assert!(message.contains(&outcome.problem_type()), "{message}");
            let id = reply.header("x-request-id").unwrap_or_default();
            assert!(id.len() == 36 && message.contains(id), "{id} {message}");
            assert_eq!(reply.header("retry-after").is_some(), status == "8", "{key:?}");
        }
    }
    // Clients that speak no gRPC get no gRPC status.
    assert_refused(&call(&harness, "application/json", Some("quota")).await?, Outcome::QuotaExceeded, &[]);
    assert_eq!(harness.demo.requests(), 1);
    Ok(())
}
