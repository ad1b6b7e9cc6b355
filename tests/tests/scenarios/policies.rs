//! Policies of routes, which routes name in their metadata.

use anyhow::Result;
use contract::key::KeyKind;
use contract::outcome::Outcome;
use http_body_util::Full;
use hyper::Request;
use portcullis_tests::expect::{IDENTITY, SCOPED, assert_refused, assert_upstream};
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::http::Outgoing;
use serde_json::json;

fn from(address: &str, path: &str) -> Result<Outgoing> {
    Ok(Request::get(path).header("x-forwarded-for", address).body(Full::default())?)
}

#[tokio::test]
async fn a_route_asks_for_all_or_for_one_of_its_scopes_and_others_ask_for_what_the_default_says() -> Result<()> {
    let policies = json!({
        "both": {"scopes": {"all": ["orders:read", "orders:write"]}},
        "one": {"scopes": {"any": ["orders:write", "orders:read"]}},
        "default": {"scopes": {"all": ["base"]}},
    });
    let scopes =
        |number, scopes: &[&str]| with(number, |r| r.scopes = scopes.iter().map(ToString::to_string).collect());
    let keys =
        [("none", record(1)), ("reader", scopes(2, &["orders:read"])), ("all", scopes(3, &["orders:*", "base"]))];
    let harness =
        FilterHarness::builder().policies(&policies).route("/both", "both").route("/one", "one").start(&keys).await?;
    for (key, allowed) in [("none", &[][..]), ("reader", &["/one"]), ("all", &["/both", "/one", "/"])] {
        for path in ["/both", "/one", "/"] {
            let reply = harness.get(path, Some(key)).await?;
            if allowed.contains(&path) {
                assert_upstream(&reply, &SCOPED);
            } else {
                assert_refused(&reply, Outcome::ScopeDenied, &[]);
            }
        }
    }
    assert_eq!(harness.demo.requests(), 4);
    assert_refused(&harness.get("/one", None).await?, Outcome::Missing, &[]);
    Ok(())
}

#[tokio::test]
async fn a_route_may_let_requests_through_without_a_key_or_with_one_that_is_no_good() -> Result<()> {
    let policies = json!({"open": {"key": "anonymous_allowed"}, "any": {"key": "optional"}});
    let keys = [("good", record(1)), ("old", with(2, |r| r.expires_at_s = Some(1)))];
    let harness =
        FilterHarness::builder().policies(&policies).route("/open", "open").route("/any", "any").start(&keys).await?;
    assert_upstream(&harness.get("/open", None).await?, &[]);
    assert_upstream(&harness.get("/open", Some("good")).await?, &IDENTITY);
    assert_refused(&harness.get("/open", Some("stranger")).await?, Outcome::Unknown, &[]);
    assert_refused(&harness.get("/open", Some("old")).await?, Outcome::Expired, &[]);

    assert_upstream(&harness.get("/any", None).await?, &[]);
    assert_upstream(&harness.get("/any", Some("good")).await?, &IDENTITY);
    // The key that was no good goes no further, and neither does an identity that the client made up.
    assert_upstream(&harness.get("/any", Some("stranger")).await?, &[]);
    let spoofing = Request::get("/any").header("x-api-key", "old").header("x-consumer-id", "root");
    assert_upstream(&harness.send(spoofing.body(Full::default())?).await?, &[]);
    assert_refused(&harness.get("/", None).await?, Outcome::Missing, &[]);
    harness.stat_is("decisions.anonymous_total", 4).await?;
    Ok(())
}

#[tokio::test]
async fn a_route_has_a_limit_of_its_own_for_each_key_and_each_address() -> Result<()> {
    let limit = |per: &str| json!([{"name": "hour", "requests": 2, "window_seconds": 3600, "per": per}]);
    let policies = json!({
        "search": {"rate_limits": limit("key")},
        "open": {"key": "anonymous_allowed", "rate_limits": limit("address")},
    });
    let keys = [("one", record(1)), ("two", record(2))];
    let harness =
        FilterHarness::builder().policies(&policies).behind_a_proxy().route("/search", "search").route("/open", "open");
    let harness = harness.start(&keys).await?;
    for key in ["one", "two"] {
        let (allowed, reply) = harness.get_many(4, "/search", Some(key)).await?;
        assert_eq!(allowed, 2);
        assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
        // The default limit applies too.
        assert_eq!(reply.header("ratelimit-policy"), Some("\"default\";q=1000;w=1, \"search.hour\";q=2;w=3600"));
        let wait = reply.header("retry-after").unwrap_or_default();
        assert_eq!(reply.header("ratelimit"), Some(format!("\"search.hour\";r=0;t={wait}").as_str()));
        // Elsewhere the key still works, and each route has its own.
        assert_eq!(harness.get("/", Some(key)).await?.status, 200);
        assert_eq!(harness.get("/open", Some(key)).await?.status, 200);
    }
    for (address, allowed) in [
        ("192.0.2.1", [true, true, false]),
        ("192.0.2.2", [true, true, false]),
        ("2001:db8::1", [true, true, false]),
        // The same network of 64 bits, and another.
        ("2001:db8::2", [false; 3]),
        ("2001:db8:0:1::1", [true, true, false]),
    ] {
        for allowed in allowed {
            let reply = harness.send(from(address, "/open")?).await?;
            assert_eq!(reply.status == 200, allowed, "{address}");
            if !allowed {
                assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
                assert_eq!(reply.header("ratelimit-policy"), Some("\"open.hour\";q=2;w=3600"));
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_route_that_names_an_unknown_policy_refuses_all_requests_and_says_so() -> Result<()> {
    let policies = json!({"read": {}});
    let harness = FilterHarness::builder().policies(&policies).route("/typo", "raed").route("/read", "read");
    let harness = harness.start(&[("good", record(1))]).await?;
    for _ in 0..20 {
        assert_refused(&harness.get("/typo", Some("good")).await?, Outcome::PolicyUnknown, &[]);
    }
    assert_refused(&harness.get("/typo", None).await?, Outcome::PolicyUnknown, &[]);
    assert_eq!(harness.demo.requests(), 0);
    assert_upstream(&harness.get("/read", Some("good")).await?, &IDENTITY);
    assert_upstream(&harness.get("/", Some("good")).await?, &IDENTITY);
    harness.stat_is("decisions.policy_unknown_total", 21).await?;
    // Once for each of the two workers, at the most.
    let lines = harness.envoy.log().lines_with("names the policy \"raed\"");
    assert!((1..=2).contains(&lines.len()), "{lines:?}");
    portcullis_tests::wait::eventually("the refusals to be reported", async || {
        (harness.control_plane.reported(Outcome::PolicyUnknown) == 21).then_some(())
    })
    .await
}

#[tokio::test]
async fn before_the_first_policy_nobody_asks_which_one_a_route_names() -> Result<()> {
    let harness = FilterHarness::builder().route("/any", "whatever").start(&[("good", record(1))]).await?;
    assert_upstream(&harness.get("/any", Some("good")).await?, &IDENTITY);
    assert_refused(&harness.get("/any", None).await?, Outcome::Missing, &[]);
    Ok(())
}

/// Only text is a policy's name: any other value must not lead to the default policy or to no policy.
#[tokio::test]
async fn a_route_whose_policy_is_no_name_refuses_all_requests() -> Result<()> {
    let wrong = [
        "{ policy: \"\" }",
        "{ policy: 5 }",
        "{ policy: 0 }",
        "{ policy: true }",
        "{ policy: null }",
        "{ policy: { name: open } }",
        "{ policy: {} }",
        "{ policy: [open] }",
        "{ policy: [] }",
        "{ polciy: open }",
        "{ polciy: null }",
    ];
    let route = |prefix: String, metadata: &str| {
        format!(
            "                        - match: {{ path: {prefix} }}
                          route: {{ cluster: upstream }}
                          metadata: {{ filter_metadata: {{ portcullis: {metadata} }} }}
"
        )
    };
    let mut routes: String =
        wrong.iter().zip(0..).map(|(metadata, n): (_, u8)| route(format!("/{n}"), metadata)).collect();
    routes += &route("/open".into(), "{ policy: open }");
    routes += &route("/none".into(), "{}");
    let marker = "                      routes:\n";
    let policies = json!({"open": {"key": "anonymous_allowed"}, "default": {"key": "optional"}});
    let harness = FilterHarness::builder().policies(&policies).edit(marker, &format!("{marker}{routes}"));
    let harness = harness.start(&[("good", record(1))]).await?;
    for (metadata, number) in wrong.iter().zip(0..) {
        let number: u8 = number;
        for key in [Some("good"), None] {
            let reply = harness.get(&format!("/{number}"), key).await?;
            assert_eq!((reply.status, &reply.json()?["code"]), (503, &json!("policy_unknown")), "{metadata}");
            assert_refused(&reply, Outcome::PolicyUnknown, &[]);
        }
    }
    assert_eq!(harness.demo.requests(), 0);
    assert!(!harness.envoy.log().lines_with("has no policy name where one belongs").is_empty());
    assert_upstream(&harness.get("/open", None).await?, &[]);
    assert_refused(&harness.get("/open", Some("stranger")).await?, Outcome::Unknown, &[]);
    // These name none.
    assert_upstream(&harness.get("/none", Some("stranger")).await?, &[]);
    assert_upstream(&harness.get("/", Some("stranger")).await?, &[]);
    Ok(())
}

#[tokio::test]
async fn a_route_that_accepts_live_keys_opens_to_no_test_key_and_the_other_way_round() -> Result<()> {
    let policies = json!({
        "live": {"kinds": ["live"]}, "test": {"kinds": ["test"]}, "both": {},
        "any": {"kinds": ["live"], "key": "optional"},
    });
    let keys = [("a-live-key", record(1)), ("a-test-key", with(2, |r| r.kind = KeyKind::Test))];
    let mut harness = FilterHarness::builder().policies(&policies);
    for name in ["live", "test", "both", "any"] {
        harness = harness.route(&format!("/{name}"), name);
    }
    let harness = harness.start(&keys).await?;
    for (path, open_to) in
        [("/live", &["a-live-key"][..]), ("/test", &["a-test-key"]), ("/both", &["a-live-key", "a-test-key"])]
    {
        for (key, _) in &keys {
            let reply = harness.get(path, Some(key)).await?;
            if open_to.contains(key) {
                assert_upstream(&reply, &IDENTITY);
            } else {
                assert_refused(&reply, Outcome::KindDenied, &[]);
            }
        }
    }
    assert_upstream(&harness.get("/any", Some("a-live-key")).await?, &IDENTITY);
    // Where a bad key counts as none, so does one of the other kind.
    assert_upstream(&harness.get("/any", Some("a-test-key")).await?, &[]);
    harness.stat_is("decisions.kind_denied_total", 2).await
}
