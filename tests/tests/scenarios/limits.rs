//! Several limits of one key, and limits that several Envoys share.

use std::time::Instant;

use anyhow::{Context, Result};
use contract::budget::Stock;
use contract::outcome::Outcome;
use contract::record::RateLimit;
use contract::usage::Grant;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::fake_control_plane::{Change, Faults};
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::wait::eventually;
use serde_json::json;

fn limit(name: &str, requests: u32, window_s: u32) -> RateLimit {
    RateLimit { name: name.into(), requests, window_s, burst: requests, shared: true }
}

fn share(number: u8, amount: u64) -> Grant {
    Grant { stock: Stock::Share.code(), of: [number; 16], amount, turn: 0 }
}

/// Sends grants with the next acknowledgement, and waits until Envoy has noted them: then it sends an empty report.
async fn grant(harness: &FilterHarness, grants: &[Grant]) -> Result<()> {
    harness.control_plane.grant(grants);
    harness.get("/", None).await?;
    eventually("the grants to be noted", async || (harness.control_plane.acknowledged_with_grants() >= 2).then_some(()))
        .await
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

/// Workers take some of a large limit ahead. What one has and does not use comes back within a second.
#[tokio::test]
async fn of_a_large_limit_workers_use_all_and_no_more() -> Result<()> {
    let own = with(1, |r| {
        r.rate_limits = vec![RateLimit { shared: false, ..limit("hour", 1_280, 3_600) }];
    });
    let harness = FilterHarness::start(&[("large", own)]).await?;
    let start = Instant::now();
    let mut workers = harness.envoy.connection_per_worker().await?;
    assert!(workers.len() > 1);
    let mut allowed: u64 = 0;
    for worker in &mut workers {
        for _ in 0..600 {
            allowed += u64::from(worker.get("/", Some("large")).await?.status == 200);
        }
    }
    assert_eq!(allowed, 600 * workers.len() as u64, "the burst was not used up yet");
    // One is added each 2.8 s. Only the first worker goes on: what the other has ahead has to come back.
    let added = || start.elapsed().as_secs() / 2 + 1;
    let [first, ..] = &mut workers[..] else { anyhow::bail!("no workers") };
    let used_up = async || {
        allowed += u64::from(first.get("/", Some("large")).await.ok()?.status == 200);
        assert!(allowed <= 1_280 + added(), "{allowed}");
        (allowed >= 1_280).then_some(())
    };
    eventually("all of the limit to be used", used_up).await?;
    Ok(())
}

#[tokio::test]
async fn of_shared_limits_an_envoy_judges_its_share_and_of_others_the_whole() -> Result<()> {
    let own =
        |number, shared| with(number, |r| r.rate_limits = vec![RateLimit { shared, ..limit("month", 40, MONTH_S) }]);
    let keys = [
        ("shared", own(1, true)),
        ("granted", own(2, true)),
        ("alone", own(3, false)),
        ("default", record(4)),
        ("route", own(5, false)),
    ];
    let month = format!("{MONTH_S}s");
    let plugin = json!({
        "rate_limit": {"requests": 40, "window": month},
        "policies": {"search": {"rate_limit": {"requests": 8, "window": month}}},
    });
    // One of four Envoys.
    let harness = FilterHarness::builder().plugin(plugin).route("/search", "search").change(Change::Filters(4));
    let harness = harness.start(&keys).await?;
    grant(&harness, &[share(2, 500_000), share(3, 1), share(4, 1), share(5, 1)]).await?;
    for (key, path, expected) in
        [("shared", "/", 10), ("granted", "/", 20), ("alone", "/", 40), ("default", "/", 40), ("route", "/search", 8)]
    {
        let (allowed, reply) = harness.get_many(50, path, Some(key)).await?;
        assert_eq!(allowed, expected, "{key}");
        assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    }
    // Headers show the whole limit, not the share.
    let reply = harness.get("/", Some("granted")).await?;
    assert_eq!(reply.header("ratelimit-policy"), Some("\"month\";q=40;w=2592000"));
    // The whole limit refills one of 40 requests in a fortieth of the window. This Envoy has half of it, but shares change
    // sooner than that.
    let wait: u32 = reply.header("retry-after").unwrap_or_default().parse()?;
    assert!((MONTH_S / 80..=MONTH_S / 40).contains(&wait), "{wait}");
    Ok(())
}

#[tokio::test]
async fn an_envoy_that_was_granted_something_and_falls_quiet_sends_empty_reports_for_a_while() -> Result<()> {
    let harness = FilterHarness::start(&[("good", record(1))]).await?;
    harness.get("/", Some("good")).await?;
    let counted = async || (harness.control_plane.reported(Outcome::Allowed) == 1).then_some(());
    eventually("the request to be reported", counted).await?;
    grant(&harness, &[share(1, 5)]).await?;
    let quiet = async || harness.control_plane.report_sizes().ends_with(&[0; 4]).then_some(());
    eventually("four empty reports", quiet)
        .await
        .with_context(|| format!("{:?}", harness.control_plane.report_sizes()))?;
    harness.control_plane.grant(&[]);
    harness.get("/", Some("good")).await?;
    let counted = async || (harness.control_plane.reported(Outcome::Allowed) == 2).then_some(());
    eventually("the next request to be reported", counted).await?;
    // Before the grants, after them, and what came since.
    let sizes = harness.control_plane.report_sizes();
    assert!(sizes.starts_with(&[1, 1, 0, 0, 0, 0]) && sizes.ends_with(&[0, 1]), "{sizes:?}");
    assert_eq!(harness.control_plane.changed_reports(), 0);
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
async fn without_the_control_plane_an_envoy_keeps_its_last_share() -> Result<()> {
    let shared = with(1, |r| r.rate_limits = vec![limit("month", 40, MONTH_S)]);
    // One of four Envoys, and half of the limit is leased to it.
    let harness = FilterHarness::builder().change(Change::Filters(4)).start(&[("shared", shared)]).await?;
    grant(&harness, &[share(1, 500_000)]).await?;
    harness.control_plane.disturb(Faults { updates: u32::MAX, acknowledgements: u32::MAX, ..Faults::default() });
    let (mut allowed, reply) = harness.get_many(10, "/", Some("shared")).await?;
    assert_eq!((allowed, reply.status), (10, 200));
    let alone = async || {
        (harness.envoy.stat("wasmcustom.portcullis.usage.report_failures_total").await.ok()? >= 1).then_some(())
    };
    eventually("a report to go unanswered", alone).await?;
    allowed += harness.get_many(30, "/", Some("shared")).await?.0;
    assert_eq!(allowed, 20);
    Ok(())
}
