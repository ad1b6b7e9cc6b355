//! The built filter in a real Envoy with a fake control plane: each outcome that a record can
//! cause, including those that the real control plane cannot cause yet, and the reported counts.

use anyhow::Result;
use contract::outcome::Outcome;
use contract::record::{Flags, Per, RateLimit, Requires};
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::fake_control_plane::{Change, Faults};
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::wait_for_status;
use portcullis_tests::wait::eventually;
use serde_json::json;

#[tokio::test]
async fn each_record_has_its_outcome_and_each_outcome_is_reported_once() -> Result<()> {
    let keys = [
        ("revoked", with(1, |r| r.flags = Flags::REVOKED), Outcome::Revoked),
        ("expired", with(2, |r| r.expires_at_s = Some(1_000_000_000)), Outcome::Expired),
        ("disabled", with(3, |r| r.flags = Flags::DISABLED), Outcome::Disabled),
        ("unsupported", with(4, |r| r.requires = Requires(1 << 31)), Outcome::Unsupported),
        ("address", with(5, |r| r.networks = vec!["192.0.2.0/24".parse().unwrap()]), Outcome::AddressDenied),
        ("quota", with(6, |r| r.flags = Flags::QUOTA_EXCEEDED), Outcome::QuotaExceeded),
        ("credits", with(7, |r| r.flags = Flags::CREDITS_EXHAUSTED), Outcome::CreditsExhausted),
    ];
    let records: Vec<_> = keys.iter().map(|(key, record, _)| (*key, record.clone())).collect();
    let harness = FilterHarness::start(&records).await?;
    for (key, _, outcome) in &keys {
        assert_refused(&harness.get("/", Some(key)).await?, *outcome, &[]);
    }
    assert_eq!(harness.demo.requests(), 0);
    for (_, _, outcome) in &keys {
        let what = format!("one report of {outcome:?}");
        eventually(&what, async || (harness.control_plane.reported(*outcome) == 1).then_some(())).await?;
    }
    // The end of Envoy adds no counts.
    harness.envoy.stop(Signal::SIGTERM).await?;
    for (_, _, outcome) in &keys {
        assert_eq!(harness.control_plane.reported(*outcome), 1, "{outcome:?}");
    }
    Ok(())
}

#[tokio::test]
async fn damaged_updates_change_nothing_and_lost_acknowledgements_count_nothing_twice() -> Result<()> {
    let faults = Faults { updates: 8, acknowledgements: 3, ..Faults::default() };
    let harness = FilterHarness::builder().faults(faults).start_unsynced(&[("good", record(1))]).await?;
    wait_for_status(&harness.envoy, Some("no such key"), 401).await?;
    // The store is loaded, so all damaged updates were fetched again.
    assert_eq!(harness.control_plane.faults().updates, 0);
    assert!(harness.envoy.stat("wasmcustom.portcullis.sync.failures_total").await? >= 8);
    for _ in 0..5 {
        assert_upstream(&harness.get("/", Some("good")).await?, &IDENTITY);
    }
    let acknowledged_once = async || {
        let all = harness.control_plane.faults().acknowledgements == 0
            && harness.control_plane.reported(Outcome::Allowed) == 5;
        all.then_some(())
    };
    eventually("reports to be sent until they are acknowledged", acknowledged_once).await?;
    harness.stat_is("usage.pending_requests", 0).await?;
    assert_eq!((harness.control_plane.reported(Outcome::Allowed), harness.control_plane.changed_reports()), (5, 0));
    assert!(harness.envoy.stat("wasmcustom.portcullis.usage.report_failures_total").await? >= 3);
    Ok(())
}

#[tokio::test]
async fn keys_of_a_control_plane_that_has_lost_its_database_are_stale_though_it_answers() -> Result<()> {
    let faults = Faults { age_s: 3_600, ..Faults::default() };
    let keys = [("good", record(1))];
    let harness = FilterHarness::builder().faults(faults).plugin(json!({"max_staleness": "600s"})).start(&keys).await?;
    assert_refused(&harness.get("/", Some("good")).await?, Outcome::Stale, &[]);
    assert_eq!(harness.demo.requests(), 0);
    Ok(())
}

#[tokio::test]
async fn a_keys_own_limits_hold_over_all_workers() -> Result<()> {
    let limits = vec![
        // Both refill one request each hour, so none during the test.
        RateLimit { name: "day".into(), requests: 24, window_s: 86_400, burst: 20, shared: true, per: Per::Key },
        RateLimit { name: "month".into(), requests: 720, window_s: 2_592_000, burst: 10, shared: true, per: Per::Key },
    ];
    let harness = FilterHarness::start(&[("limited", with(1, |r| r.rate_limits = limits))]).await?;
    let mut workers = harness.envoy.connection_per_worker().await?;
    let mut allowed = 0;
    for _ in 0..10 {
        for worker in &mut workers {
            let reply = worker.get("/", Some("limited")).await?;
            if reply.status == 200 {
                allowed += 1;
            } else {
                assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
                assert_eq!(reply.header("ratelimit-policy"), Some("\"day\";q=24;w=86400, \"month\";q=720;w=2592000"));
            }
        }
    }
    // The smaller burst.
    assert_eq!((allowed, harness.demo.requests()), (10, 10));
    Ok(())
}

/// The VM of Envoy's main thread leads, and nothing makes it anew when it traps, for no request ever comes to it.
#[tokio::test]
async fn when_the_vm_that_leads_traps_a_worker_goes_on_with_the_store_and_the_counts() -> Result<()> {
    // No report is acknowledged before the trap, so the next leader takes all counts over.
    let faults = Faults { acknowledgements: u32::MAX, ..Faults::default() };
    let keys = [("a", record(1)), ("b", record(2))];
    let harness = FilterHarness::builder().that_can_trap().faults(faults).start(&keys).await?;
    let polls = || {
        let polls = harness.control_plane.polls();
        polls.iter().filter_map(|poll| poll.get("revision")?.parse::<u64>().ok()).collect::<Vec<_>>()
    };
    assert_eq!(harness.get_many(50, "/", Some("a")).await?.0, 50);
    // A VM publishes its counts on each tick. Any VM may lead, a worker's as well, and a trap loses what it has not published.
    harness.stat_is("usage.pending_requests", 50).await?;
    harness.control_plane.disturb(Faults { traps: 1, ..Faults::default() });
    harness.change(&[Change::Key("a", Box::new(with(1, |r| r.flags = Flags::REVOKED)))]).await?;
    let asked = polls();
    assert_refused(&harness.get("/", Some("a")).await?, Outcome::Revoked, &[]);
    assert_eq!(harness.get_many(50, "/", Some("b")).await?.0, 50);
    // The response that trapped was not applied: the next leader sent the same poll again.
    assert!(asked.windows(2).any(|two| two[0] == two[1]), "{asked:?}");
    eventually("all counts", async || (harness.control_plane.reported(Outcome::Allowed) == 100).then_some(())).await?;
    assert_eq!((harness.control_plane.reported(Outcome::Revoked), harness.control_plane.changed_reports()), (1, 0));
    Ok(())
}
