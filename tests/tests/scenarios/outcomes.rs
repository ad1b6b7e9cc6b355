//! Every outcome that a key or the state of the store can cause, with its whole response. For those
//! that routes cause, `scope_denied`, `anonymous` and `policy_unknown`, see `policies.rs`; for
//! `unsupported` see `wasm.rs`.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use contract::outcome::Outcome;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::http;
use portcullis_tests::process::Signal;
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::wait::{DEADLINE, eventually, eventually_within};
use serde_json::json;

/// What the database has to say of a key for each outcome that the key itself causes.
const BY_THE_KEY: [(Outcome, &str); 6] = [
    (Outcome::Revoked, "revoked_at = now()"),
    (Outcome::Expired, "expires_at = now() - interval '1 second'"),
    (Outcome::Disabled, "disabled = true"),
    (Outcome::AddressDenied, "networks = '{192.0.2.0/24}'"),
    (Outcome::QuotaExceeded, "quota_exceeded = true"),
    (Outcome::CreditsExhausted, "credits_exhausted = true"),
];

#[tokio::test]
async fn each_fault_of_a_key_has_its_response_and_never_reaches_the_upstream() -> Result<()> {
    let stack = Stack::start().await?;
    assert_refused(&stack.get(None).await?, Outcome::Missing, &[]);
    assert_refused(&stack.get(Some("")).await?, Outcome::Missing, &[]);
    assert_refused(&stack.get(Some("sk_live_nobody")).await?, Outcome::Unknown, &[]);
    assert_eq!(stack.demo.requests(), 0);

    for (outcome, change) in BY_THE_KEY {
        let email = format!("{}@example.com", outcome.name());
        let key = stack.working_key(&email).await?;
        stack.change_key(&email, change).await?;
        let status = outcome.refusal().map_or(200, |refusal| refusal.status);
        stack.wait_for_status(Some(&key), status).await?;
        assert_refused(&stack.get(Some(&key)).await?, outcome, &[]);
        // The requests that were let in while the change was on its way are all that came through.
        let seen_after = stack.demo.requests();
        assert_refused(&stack.get(Some(&key)).await?, outcome, &[]);
        assert_eq!(stack.demo.requests(), seen_after, "{outcome:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_key_that_runs_out_of_time_stops_working_without_any_message() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("brief@example.com").await?;
    let before = SystemTime::now();
    stack.change_key("brief@example.com", "expires_at = now() + interval '8 seconds'").await?;
    stack.in_step().await?;
    stack.control_plane.stop(Signal::SIGKILL).await?;
    // The key works until its end, which is cut to a whole second. On a busy machine, that may have passed already.
    let ended = async || {
        let reply = stack.get(Some(&key)).await.ok()?;
        if reply.status == 200 {
            assert_upstream(&reply, &IDENTITY);
        }
        (reply.status == 401).then_some(())
    };
    eventually("the key to end", ended).await?;
    let lived = before.elapsed()?;
    assert!(lived >= Duration::from_secs(7), "it ended after {lived:?}");
    assert_refused(&stack.get(Some(&key)).await?, Outcome::Expired, &[]);
    Ok(())
}

#[tokio::test]
async fn a_key_that_is_used_too_fast_is_told_when_to_come_back() -> Result<()> {
    let plugin = json!({"rate_limit": {"requests": 2, "window": "86400s", "burst": 2}});
    let stack = Stack::builder().plugin(&plugin).start().await?;
    let key = stack.rest().generate("fast@example.com").await?;
    stack.wait_for_status(Some(&key), 200).await?;
    assert_eq!(stack.get(Some(&key)).await?.status, 200);
    let reply = stack.get(Some(&key)).await?;
    assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    assert_eq!(reply.header("ratelimit-policy"), Some("\"default\";q=2;w=86400"));
    // One request refills each twelve hours.
    let wait: u64 = reply.header("retry-after").unwrap_or_default().parse()?;
    assert!((42_000..=43_200).contains(&wait), "{wait}");
    assert_eq!(reply.header("ratelimit"), Some(format!("\"default\";r=0;t={wait}").as_str()));

    let other = stack.rest().generate("slow@example.com").await?;
    stack.wait_for_status(Some(&other), 200).await
}

#[tokio::test]
async fn before_the_first_sync_requests_are_refused_or_by_choice_let_in_without_identity() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("early@example.com").await?;
    stack.control_plane.stop(Signal::SIGKILL).await?;
    let envoy = stack.envoy();
    envoy.stop(Signal::SIGKILL).await?;
    envoy.restart().await?;
    assert_refused(&stack.get(Some(&key)).await?, Outcome::NotReady, &[]);
    assert_refused(&stack.get(None).await?, Outcome::NotReady, &[]);

    envoy.stop(Signal::SIGKILL).await?;
    envoy.change_settings(|settings| {
        settings.replacements.plugin.insert("failure_mode".into(), json!({"not_ready": "allow"}));
    });
    envoy.restart().await?;
    // A key that was not checked is removed too.
    assert_upstream(&stack.get(Some(&key)).await?, &[]);
    assert_upstream(&stack.get(None).await?, &[]);
    let failed_open = "wasmcustom.portcullis.decisions.failed_open_total";
    envoy.wait_for_stat(failed_open, |requests| requests == 2).await
}

#[tokio::test]
async fn keys_that_are_older_than_the_operator_allows_are_refused_or_by_choice_let_in() -> Result<()> {
    let stale = json!({"max_staleness": "60s"});
    let stack = Stack::builder().plugin(&stale).envoys(2).start().await?;
    let [refuses, allows] = &stack.envoys[..] else { anyhow::bail!("two Envoys were asked for") };
    let key = stack.rest().generate("late@example.com").await?;
    allows.stop(Signal::SIGTERM).await?;
    allows.change_settings(|settings| {
        settings.replacements.plugin.insert("failure_mode".into(), json!({"stale": "allow"}));
    });
    allows.restart().await?;
    stack.wait_for_status(Some(&key), 200).await?;
    stack.control_plane.stop(Signal::SIGKILL).await?;
    assert_upstream(&stack.get(Some(&key)).await?, &IDENTITY);

    // Nothing is to be seen for a minute, then this.
    let minute = Duration::from_secs(60);
    eventually_within("the keys to be stale", minute + DEADLINE, async || {
        let reply = http::send(allows.address(), http::get_request("/", None).ok()?).await.ok()?;
        (reply.status == 200).then_some(())
    })
    .await?;
    let failed_open = "wasmcustom.portcullis.decisions.failed_open_total";
    allows.wait_for_stat(failed_open, |requests| requests > 0).await?;
    wait_for_status(refuses, Some(&key), 503).await?;
    assert_refused(&stack.get(Some(&key)).await?, Outcome::Stale, &[]);

    stack.control_plane.restart().await?;
    stack.wait_for_status(Some(&key), 200).await?;
    stack.wait_for_status(None, 401).await
}
