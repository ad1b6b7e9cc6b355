//! Malformed keys: each gets a response, none is admitted, and none harms the filter.

use anyhow::Result;
use axum::http::HeaderValue;
use contract::outcome::Outcome;
use http_body_util::Full;
use hyper::Request;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::http::{Reply, send};
use portcullis_tests::stack::Stack;

async fn with_keys(stack: &Stack, keys: &[&[u8]]) -> Result<Reply> {
    let mut request = Request::get("/");
    for key in keys {
        request = request.header("x-api-key", HeaderValue::from_bytes(key)?);
    }
    send(stack.envoy().address(), request.body(Full::default())?).await
}

#[tokio::test]
async fn malformed_keys_are_refused_and_valid_ones_work_afterwards() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let through = stack.demo.requests();
    let good = key.as_bytes();
    let long = vec![b'k'; 8 * 1024];
    let mut doubled = good.to_vec();
    doubled.extend_from_slice(good);

    assert_refused(&with_keys(&stack, &[b""]).await?, Outcome::Missing, &[]);
    let strangers: [&[u8]; 10] = [
        &long,
        &vec![b'k'; 1_024],
        &vec![b'k'; 1_025],
        b"\xff\xfe\x80 no text at all",
        "sk_live_schlüssel".as_bytes(),
        b"null",
        &good[..good.len() - 1],
        &doubled,
        &key.to_uppercase().into_bytes(),
        &[good, b",", good].concat(),
    ];
    for stranger in strangers {
        let reply = with_keys(&stack, &[stranger]).await?;
        assert_refused(&reply, Outcome::Unknown, &[]);
        // Nothing of it comes back.
        let body = String::from_utf8_lossy(&reply.body).into_owned();
        assert!(!body.contains("kkkk") && !body.contains(&key[8..20]), "{body}");
    }
    assert_eq!(stack.demo.requests(), through);

    // Blanks around a header's value are not part of it (RFC 9110, section 5.5).
    assert_upstream(&with_keys(&stack, &[&[b"  ", good, b" "].concat()]).await?, &IDENTITY);
    assert!(stack.envoy().log().lines_with("panicked").is_empty());
    Ok(())
}

#[tokio::test]
async fn a_key_elsewhere_than_in_its_header_is_no_key() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let elsewhere = [
        Request::get(format!("/?x-api-key={key}")),
        Request::get("/").header("authorization", format!("Bearer {key}")),
        Request::get("/").header("cookie", format!("x-api-key={key}")),
    ];
    for request in elsewhere {
        let reply = send(stack.envoy().address(), request.body(Full::default())?).await?;
        assert_refused(&reply, Outcome::Missing, &[]);
    }
    Ok(())
}
