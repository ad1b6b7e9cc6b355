//! Several limits of one key, and limits that one Envoy enforces alone.

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use contract::record::{Per, RateLimit};
use portcullis_tests::expect::assert_refused;
use portcullis_tests::fake_control_plane::Faults;
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::wait::eventually;
use serde_json::json;

fn limit(name: &str, requests: u32, window_s: u32) -> RateLimit {
    RateLimit { name: name.into(), requests, window_s, burst: requests, shared: true, per: Per::Key }
}

/// A window so long that a limit refills nothing during a test, however slow the machine.
const MONTH_S: u32 = 30 * 86_400;

#[tokio::test]
async fn of_several_limits_the_one_that_refuses_is_named_among_all() -> Result<()> {
    let week_s = 7 * 86_400;
    let limits = |week, month| vec![limit("week", week, week_s), limit("month", month, MONTH_S)];
    let keys = [
        ("by week", with(1, |r| r.rate_limits = limits(10, 30))),
        ("by month", with(2, |r| r.rate_limits = limits(30, 10))),
    ];
    let harness = FilterHarness::start(&keys).await?;
    let mut workers = harness.envoy.connection_per_worker().await?;
    for (key, name, all, window_s) in [
        ("by week", "week", "\"week\";q=10;w=604800, \"month\";q=30;w=2592000", week_s),
        ("by month", "month", "\"week\";q=30;w=604800, \"month\";q=10;w=2592000", MONTH_S),
    ] {
        let (mut allowed, mut refused) = (0, 0);
        for _ in 0..10 {
            for worker in &mut workers {
                let reply = worker.get("/", Some(key)).await?;
                if reply.status == 200 {
                    allowed += 1;
                    continue;
                }
                assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
                assert_eq!(reply.header("ratelimit-policy"), Some(all));
                let wait: u32 = reply.header("retry-after").context("no retry-after")?.parse()?;
                assert_eq!(reply.header("ratelimit"), Some(format!("\"{name}\";r=0;t={wait}").as_str()));
                // A tenth of the window, less the time since the limit was used up.
                assert!((window_s / 20..=window_s / 10).contains(&wait), "{wait} of {window_s}");
                refused += 1;
            }
        }
        assert_eq!((allowed, refused), (10, 10), "{key}");
    }
    assert_eq!(harness.demo.requests(), 20);
    Ok(())
}

#[tokio::test]
async fn a_key_that_a_short_limit_refused_goes_on_until_its_long_limit_is_used_up() -> Result<()> {
    let limits = vec![limit("seconds", 5, 5), limit("month", 8, MONTH_S)];
    let harness = FilterHarness::start(&[("limited", with(1, |r| r.rate_limits = limits))]).await?;
    let mut allowed = 0;
    let used_up = async || {
        let reply = harness.get("/", Some("limited")).await.ok()?;
        if reply.status == 200 {
            allowed += 1;
            return None;
        }
        let named = reply.header("ratelimit").unwrap_or_default();
        assert!(named.starts_with("\"seconds\";r=0;t=1") || named.starts_with("\"month\";r=0;t="), "{named}");
        named.starts_with("\"month\"").then_some(())
    };
    eventually("the limit of the month to refuse", used_up).await?;
    assert_eq!((allowed, harness.demo.requests()), (8, 8));
    Ok(())
}

#[tokio::test]
async fn a_limit_that_each_envoy_enforces_alone_is_exact_over_its_workers() -> Result<()> {
    let own = with(1, |r| {
        r.rate_limits = vec![RateLimit { shared: false, ..limit("month", 80, MONTH_S) }];
    });
    let harness = FilterHarness::start(&[("large", own)]).await?;
    let mut workers = harness.envoy.connection_per_worker().await?;
    assert!(workers.len() > 1);
    let mut allowed = 0;
    for _ in 0..60 {
        for worker in &mut workers {
            allowed += usize::from(worker.get("/", Some("large")).await?.status == 200);
        }
    }
    assert_eq!((allowed, harness.demo.requests()), (80, 80));
    assert!(harness.control_plane.limits().calls.is_empty(), "nothing is asked for it");
    Ok(())
}

#[tokio::test]
async fn a_poll_tells_the_version_of_the_filter_and_what_is_not_reported_yet() -> Result<()> {
    let faults = Faults { acknowledgements: u32::MAX, ..Faults::default() };
    let harness = FilterHarness::builder().faults(faults).start(&[("good", record(1))]).await?;
    let (allowed, _) = harness.get_many(5, "/", Some("good")).await?;
    assert_eq!(allowed, 5);
    harness.stat_is("usage.pending_requests", 5).await?;
    harness.change(&[]).await?;
    let reached = async || {
        let polls = harness.control_plane.polls();
        let poll = polls.last()?;
        let version = poll.get("version").map(String::as_str);
        (version == Some(env!("CARGO_PKG_VERSION")) && poll.get("pending").map(String::as_str) == Some("5"))
            .then_some(())
    };
    eventually("a poll with five requests pending", reached).await
}

#[tokio::test]
async fn with_rate_limit_state_every_response_shows_what_is_left() -> Result<()> {
    const PLACE: &str = "route_config:\n                  name: ingress\n";
    let header = |name: &str, state: &str| {
        format!(
            "
                    - header: {{ key: {name}, value: \"%FILTER_STATE(wasm.portcullis.{state}:PLAIN)%\" }}
                      append_action: OVERWRITE_IF_EXISTS_OR_ADD"
        )
    };
    let headers =
        [("ratelimit", "ratelimit"), ("ratelimit-policy", "ratelimit_policy")].map(|(name, state)| header(name, state));
    let headers = format!("                  response_headers_to_add:{}\n", headers.concat());
    let hour = RateLimit { name: "hour".into(), requests: 3, window_s: 3_600, burst: 3, shared: false, per: Per::Key };
    let keys = [("limited", with(1, |r| r.rate_limits = vec![hour])), ("free", record(2))];
    let harness = FilterHarness::builder().plugin(json!({"rate_limit_state": true, "rate_limit": null}));
    let harness = harness.edit(PLACE, &format!("{PLACE}{headers}")).start(&keys).await?;
    for (left, seconds) in [(2, 1_200), (1, 2_400), (0, 3_600)] {
        let reply = harness.get("/", Some("limited")).await?;
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("ratelimit"), Some(&*format!("\"hour\";r={left};t={seconds}")));
        assert_eq!(reply.header("ratelimit-policy"), Some("\"hour\";q=3;w=3600"));
    }
    let refused = harness.get("/", Some("limited")).await?;
    assert_refused(&refused, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    assert!(refused.header("ratelimit").is_some_and(|left| left.starts_with("\"hour\";r=0;t=")));
    let free = harness.get("/", Some("free")).await?;
    assert_eq!((free.status, free.header("ratelimit"), free.header("ratelimit-policy")), (200, None, None));
    Ok(())
}
