//! Several limits of one key, and limits that several Envoys share.

use std::time::Instant;

use anyhow::{Context, Result};
use contract::budget::Stock;
use contract::outcome::Outcome;
use contract::record::RateLimit;
use contract::usage::Grant;
use portcullis_tests::bench::{Bench, record, with};
use portcullis_tests::expect::assert_refused;
use portcullis_tests::scripted::{Change, Faults};
use portcullis_tests::wait::eventually;
use serde_json::json;

fn limit(name: &str, requests: u32, window_s: u32) -> RateLimit {
    RateLimit { name: name.into(), requests, window_s, burst: requests }
}

fn share(number: u8, amount: u64) -> Grant {
    Grant { stock: Stock::Share.code(), of: [number; 16], amount, turn: 0 }
}

/// Sends grants with the next acknowledgement, and waits until Envoy has noted them: then it sends an empty report.
async fn grant(bench: &Bench, grants: &[Grant]) -> Result<()> {
    bench.script.grant(grants);
    bench.get("/", None).await?;
    eventually("the grants to be noted", async || (bench.script.acknowledged_with_grants() >= 2).then_some(())).await
}

#[tokio::test]
async fn of_several_limits_the_one_that_refuses_is_named_among_all() -> Result<()> {
    let limits = vec![limit("second", 10, 1), limit("hour", 30, 3_600)];
    let bench = Bench::start(&[("limited", with(1, |r| r.rate_limits = limits))]).await?;
    let all = Some("\"second\";q=10;w=1, \"hour\";q=30;w=3600");
    let mut workers = bench.envoy.connection_per_worker().await?;
    let (mut allowed, mut by_second, mut by_hour) = (0, 0, 0);
    let done = async || {
        for worker in &mut workers {
            let reply = worker.get("/", Some("limited")).await.ok()?;
            if reply.status == 200 {
                allowed += 1;
                continue;
            }
            assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
            assert_eq!(reply.header("ratelimit-policy"), all);
            let wait: u64 = reply.header("retry-after")?.parse().ok()?;
            let named = |name: &str| reply.header("ratelimit") == Some(&format!("\"{name}\";r=0;t={wait}"));
            if named("second") {
                assert_eq!(wait, 1);
                by_second += 1;
            } else {
                assert!(named("hour") && (100..=120).contains(&wait), "{reply:?}");
                by_hour += 1;
            }
        }
        (by_hour > 20).then_some(())
    };
    eventually("the limit of the hour", done).await?;
    // Two seconds and some went by until the hour's burst was used up, which grows by one each 120 s.
    assert_eq!((allowed, by_second > 0), (30, true));
    assert_eq!(bench.demo.requests(), 30);
    Ok(())
}

/// Workers take some of a large limit ahead. What one has and does not use comes back within a second.
#[tokio::test]
async fn of_a_large_limit_workers_use_all_and_no_more() -> Result<()> {
    let own = with(1, |r| {
        r.rate_limits = vec![limit("hour", 1_280, 3_600)];
        r.further.alone = 1;
    });
    let bench = Bench::start(&[("large", own)]).await?;
    let start = Instant::now();
    let mut workers = bench.envoy.connection_per_worker().await?;
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
    let own = |number, alone| {
        with(number, |r| {
            r.rate_limits = vec![limit("hour", 40, 3_600)];
            r.further.alone = alone;
        })
    };
    let keys = [
        ("shared", own(1, 0)),
        ("granted", own(2, 0)),
        ("alone", own(3, 1)),
        ("default", record(4)),
        ("route", own(5, 1)),
    ];
    let plugin = json!({
        "rate_limit": {"requests": 40, "window_seconds": 3600},
        "policies": {"search": {"rate_limit": {"requests": 8, "window_seconds": 3600}}},
    });
    // One of four Envoys.
    let bench = Bench::builder().plugin(plugin).route("/search", "search").change(Change::Filters(4));
    let bench = bench.start(&keys).await?;
    grant(&bench, &[share(2, 500_000), share(3, 1), share(4, 1), share(5, 1)]).await?;
    for (key, path, expected) in
        [("shared", "/", 10), ("granted", "/", 20), ("alone", "/", 40), ("default", "/", 40), ("route", "/search", 8)]
    {
        let (allowed, reply) = bench.get_many(50, path, Some(key)).await?;
        assert_eq!(allowed, expected, "{key}");
        assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    }
    // The whole limit is told, whatever the share.
    let reply = bench.get("/", Some("granted")).await?;
    assert_eq!(reply.header("ratelimit-policy"), Some("\"hour\";q=40;w=3600"));
    // One each 90 s: 3,600 s, 40 requests. Half of them are here, but shares change in less.
    let wait: u64 = reply.header("retry-after").unwrap_or_default().parse()?;
    assert!((30..=90).contains(&wait), "{wait}");
    Ok(())
}

#[tokio::test]
async fn an_envoy_that_was_granted_something_and_falls_quiet_sends_empty_reports_for_a_while() -> Result<()> {
    let bench = Bench::start(&[("good", record(1))]).await?;
    bench.get("/", Some("good")).await?;
    let counted = async || (bench.script.reported(Outcome::Allowed) == 1).then_some(());
    eventually("the request to be reported", counted).await?;
    grant(&bench, &[share(1, 5)]).await?;
    let quiet = async || bench.script.report_sizes().ends_with(&[0; 4]).then_some(());
    eventually("four empty reports", quiet).await.with_context(|| format!("{:?}", bench.script.report_sizes()))?;
    bench.script.grant(&[]);
    bench.get("/", Some("good")).await?;
    let counted = async || (bench.script.reported(Outcome::Allowed) == 2).then_some(());
    eventually("the next request to be reported", counted).await?;
    // Before the grants, after them, and what came since.
    let sizes = bench.script.report_sizes();
    assert!(sizes.starts_with(&[1, 1, 0, 0, 0, 0]) && sizes.ends_with(&[0, 1]), "{sizes:?}");
    assert_eq!(bench.script.changed_reports(), 0);
    Ok(())
}

#[tokio::test]
async fn a_poll_tells_the_version_of_the_filter_and_what_is_not_reported_yet() -> Result<()> {
    let faults = Faults { acknowledgements: u32::MAX, ..Faults::default() };
    let bench = Bench::builder().faults(faults).start(&[("good", record(1))]).await?;
    let (allowed, _) = bench.get_many(5, "/", Some("good")).await?;
    assert_eq!(allowed, 5);
    bench.stat_is("usage_pending_requests", 5).await?;
    bench.change(&[]).await?;
    let told = async || {
        let polls = bench.script.polls();
        let poll = polls.last()?;
        let version = poll.get("version").map(String::as_str);
        (version == Some(env!("CARGO_PKG_VERSION")) && poll.get("pending").map(String::as_str) == Some("5"))
            .then_some(())
    };
    eventually("a poll with five requests pending", told).await
}

#[tokio::test]
async fn without_the_control_plane_an_envoy_keeps_its_last_share() -> Result<()> {
    let shared = with(1, |r| r.rate_limits = vec![limit("hour", 40, 3_600)]);
    // One of four Envoys, and half of the limit is leased to it.
    let bench = Bench::builder().change(Change::Filters(4)).start(&[("shared", shared)]).await?;
    grant(&bench, &[share(1, 500_000)]).await?;
    bench.script.disturb(Faults { pages: u32::MAX, acknowledgements: u32::MAX, ..Faults::default() });
    let (mut allowed, reply) = bench.get_many(10, "/", Some("shared")).await?;
    assert_eq!((allowed, reply.status), (10, 200));
    let alone = async || (bench.envoy.stat("wasmcustom.portcullis_report_failures").await.ok()? >= 1).then_some(());
    eventually("a report to go unanswered", alone).await?;
    allowed += bench.get_many(30, "/", Some("shared")).await?.0;
    assert_eq!(allowed, 20);
    Ok(())
}
