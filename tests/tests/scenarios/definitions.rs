//! Roles and plans reach every worker like a revocation does.

use anyhow::Result;
use contract::definition::Definition;
use contract::outcome::Outcome;
use contract::record::{Per, RateLimit, Requires};
use portcullis_tests::expect::{SCOPED, assert_refused, assert_upstream};
use portcullis_tests::fake_control_plane::Change;
use portcullis_tests::filter_harness::{FilterHarness, with};
use portcullis_tests::http::Connection;
use portcullis_tests::stack::wait_for_status;
use serde_json::json;

fn scopes(scopes: &[&str]) -> Definition {
    Definition { scopes: scopes.iter().map(ToString::to_string).collect(), ..Definition::default() }
}

/// The statuses of a path on each worker, at once.
async fn statuses(workers: &mut [Connection], path: &str, key: &str) -> Result<Vec<u16>> {
    let mut statuses = Vec::new();
    for worker in workers {
        statuses.push(worker.get(path, Some(key)).await?.status);
    }
    Ok(statuses)
}

#[tokio::test]
async fn once_a_role_has_changed_no_worker_uses_the_old_one() -> Result<()> {
    let policies =
        json!({"read": {"scopes": {"all": ["orders:read"]}}, "write": {"scopes": {"all": ["orders:write"]}}});
    let clerk = with(1, |r| {
        r.scopes = vec!["base".into()];
        r.roles = vec![1, 3];
    });
    let harness = FilterHarness::builder().policies(&policies).route("/read", "read").route("/write", "write");
    let harness = harness.change(Change::Define(1, scopes(&["orders:read"]))).start(&[("clerk", clerk)]).await?;
    let headers = assert_upstream(&harness.get("/read", Some("clerk")).await?, &SCOPED);
    assert_eq!(headers["x-credential-scopes"], json!(["base orders:read"]));
    assert_refused(&harness.get("/write", Some("clerk")).await?, Outcome::ScopeDenied, &[]);

    let mut workers = harness.envoy.connection_per_worker().await?;
    for _ in 0..5 {
        harness.change(&[Change::Define(1, scopes(&["orders:*"]))]).await?;
        assert_eq!(statuses(&mut workers, "/write", "clerk").await?, [200, 200]);
        harness.change(&[Change::Define(1, scopes(&["orders:read"]))]).await?;
        assert_eq!(statuses(&mut workers, "/write", "clerk").await?, [403, 403]);
        assert_eq!(statuses(&mut workers, "/read", "clerk").await?, [200, 200]);
    }
    harness.change(&[Change::Undefine(1)]).await?;
    assert_eq!(statuses(&mut workers, "/read", "clerk").await?, [403, 403]);
    let headers = assert_upstream(&harness.get("/", Some("clerk")).await?, &SCOPED);
    assert_eq!(headers["x-credential-scopes"], json!(["base"]));
    Ok(())
}

#[tokio::test]
async fn a_plan_brings_scopes_and_limits_and_a_key_waits_for_its_plan() -> Result<()> {
    let plan = |requests, window_s| Definition {
        rate_limits: vec![RateLimit {
            name: "gold".into(),
            requests,
            window_s,
            burst: requests,
            shared: true,
            per: Per::Key,
        }],
        ..scopes(&["reports"])
    };
    let key = with(1, |r| {
        r.plan = Some(2);
        r.requires = Requires::PLAN;
    });
    let harness = FilterHarness::start(&[("gold", key)]).await?;
    assert_refused(&harness.get("/", Some("gold")).await?, Outcome::Unsupported, &[]);
    harness.change(&[Change::Define(2, plan(3, 3_600))]).await?;
    let headers = assert_upstream(&harness.get("/", Some("gold")).await?, &SCOPED);
    assert_eq!(headers["x-credential-scopes"], json!(["reports"]));
    let (allowed, reply) = harness.get_many(5, "/", Some("gold")).await?;
    assert_eq!(allowed, 2);
    assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    assert_eq!(reply.header("ratelimit-policy"), Some("\"gold\";q=3;w=3600"));
    // A larger plan admits the key again without a change of the key.
    harness.change(&[Change::Define(2, plan(1_000, 1))]).await?;
    wait_for_status(&harness.envoy, Some("gold"), 200).await
}
