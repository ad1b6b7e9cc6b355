//! Requests, keys and counts while a part of the stack is down and after it returns.

use anyhow::Result;
use contract::outcome::Outcome;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

const ADA: &str = "ada@example.com";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_flow_and_are_counted_while_the_control_plane_is_killed_and_comes_back() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let key = stack.working_key(ADA).await?;
    let load = Load::start(Plan::endless(&stack.envoys, vec![key.clone()], Some(500)));
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL] {
        stack.control_plane.stop(signal).await?;
        let sent = load.sent();
        eventually("requests without a control plane", async || (load.sent() > sent + 300).then_some(())).await?;
        stack.control_plane.restart().await?;
    }
    let answers = load.stop().await;
    assert_eq!(with_status(&answers, 200), answers.values().sum::<u64>(), "{answers:?}");
    stack.wait_for_usage(ADA, stack.demo.requests()).await?;

    // And changes flow again.
    stack.rest().revoke(ADA).await?;
    stack.wait_for_status(Some(&key), 401).await
}

#[tokio::test]
async fn an_envoy_that_starts_without_a_control_plane_refuses_until_there_is_one() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key(ADA).await?;
    stack.control_plane.stop(Signal::SIGTERM).await?;
    stack.envoy().stop(Signal::SIGTERM).await?;
    stack.envoy().restart().await?;
    assert_refused(&stack.get(Some(&key)).await?, Outcome::NotReady, &[]);
    stack.control_plane.restart().await?;
    stack.wait_for_status(Some(&key), 200).await?;
    assert_upstream(&stack.get(Some(&key)).await?, &IDENTITY);
    Ok(())
}

#[tokio::test]
async fn without_postgresql_envoys_go_on_even_new_ones_and_nothing_counted_is_lost() -> Result<()> {
    let stack = Stack::builder().own_postgres().start().await?;
    let postgres = stack.postgres.as_ref().ok_or_else(|| anyhow::anyhow!("no server of its own"))?;
    let key = stack.working_key(ADA).await?;
    postgres.stop(Signal::SIGQUIT).await?;
    for _ in 0..20 {
        assert_upstream(&stack.get(Some(&key)).await?, &IDENTITY);
    }
    // The REST API answers 503.
    let refused = stack.rest().call(hyper::Method::GET, &format!("/api/user/key/{ADA}"), None).await?;
    assert_eq!((refused.status, refused.header("content-type")), (503, Some("application/problem+json")));

    // A new Envoy gets its keys from the control plane's memory.
    stack.envoy().stop(Signal::SIGTERM).await?;
    // One line or several: each VM that led for a moment has its say.
    stack.envoy().log().wait_for("portcullis-usage ").await?;
    let last_words = stack.envoy().log().text();
    stack.envoy().restart().await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let before = stack.demo.requests();
    assert!(before > 20 && last_words.len() > 40);

    postgres.start().await?;
    assert_upstream(&stack.get(Some(&key)).await?, &IDENTITY);
    let rest = stack.rest();
    eventually("the REST API to recover", async || rest.status(ADA).await.ok()).await?;
    stack.control_plane.import_usage(&last_words)?;
    stack.wait_for_usage(ADA, stack.demo.requests()).await?;
    Ok(())
}

#[tokio::test]
async fn an_envoy_that_is_told_to_stop_reports_every_request_or_logs_it() -> Result<()> {
    let stack = Stack::builder().plugin(&json!({"rate_limit": null})).start().await?;
    let key = stack.working_key(ADA).await?;
    for round in 1..=3 {
        let mut workers = stack.envoy().connection_per_worker().await?;
        for worker in &mut workers {
            for _ in 0..50 {
                assert_upstream(&worker.get("/", Some(&key)).await?, &IDENTITY);
            }
        }
        drop(workers);
        // At once: the last requests cannot have been reported yet. Envoy may close the connection before the last report
        // is written; then it stands in the log, and importing it twice or after it arrived does no harm.
        stack.envoy().stop(Signal::SIGTERM).await?;
        let log = stack.envoy().log().text();
        stack.control_plane.import_usage(&log)?;
        stack.control_plane.import_usage(&log)?;
        stack.wait_for_usage(ADA, stack.demo.requests()).await?;
        stack.envoy().restart().await?;
        stack.wait_for_status(Some(&key), 200).await?;
        assert!(stack.demo.requests() > 100 * round);
    }
    Ok(())
}

#[tokio::test]
async fn changes_made_while_an_envoy_was_cut_off_reach_it_when_it_is_back() -> Result<()> {
    let stack = Stack::start().await?;
    let (old, doomed) = (stack.working_key(ADA).await?, stack.working_key("bob@example.com").await?);
    stack.control_plane.stop(Signal::SIGKILL).await?;
    stack.change_key("bob@example.com", "revoked_at = now()").await?;
    assert_upstream(&stack.get(Some(&doomed)).await?, &IDENTITY);
    stack.control_plane.restart().await?;
    let new = stack.rest().generate("eve@example.com").await?;
    stack.wait_for_status(Some(&doomed), 401).await?;
    stack.wait_for_status(Some(&new), 200).await?;
    stack.wait_for_status(Some(&old), 200).await
}
