//! Usage in Envoy's log: lines of the filter are booked, and lines that a client injects into the
//! access log are not.

use anyhow::{Context, Result};
use contract::id::{KeyId, ReporterId};
use contract::outcome::Outcome;
use contract::usage::{Count, KeyRef, Report, Subject, write_reports};
use contract::usage_log::LogKey;
use portcullis_tests::http;
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;

const ADA: &str = "ada@example.com";

/// Reports as a client would forge them, of the present Envoy or of one that never was.
fn forged(key: KeyId, reporter: ReporterId) -> Vec<u8> {
    let subject =
        Subject { key: Some(KeyRef { id: key, generation: 1 }), outcome: Outcome::Allowed.code(), hour: 490_000 };
    let count = Count { of: subject, requests: 1_000_000, cost: 1_000_000, last_ms: 1_764_000_000_000 };
    write_reports(&[Report { reporter, seq: 1_000_000, counts: vec![count] }]).unwrap_or_default()
}

#[tokio::test]
async fn usage_lines_of_clients_book_nothing_and_those_of_the_filter_are_booked() -> Result<()> {
    let stack = Stack::builder().log_user_agents().own_postgres().start().await?;
    let postgres = stack.postgres.as_ref().context("no server of its own")?;
    let key = stack.working_key(ADA).await?;
    stack.wait_for_usage(ADA, stack.demo.requests()).await?;
    let listed = stack.rest().call(hyper::Method::GET, &format!("/v1/keys?email={ADA}"), None).await?.json()?;
    let id: KeyId = listed["keys"][0]["id"].as_str().context("no id")?.parse()?;
    let envoys = stack.rest().call(hyper::Method::GET, "/v1/envoys", None).await?.json()?;
    let reporter: ReporterId = envoys["envoys"][0]["id"].as_str().context("no Envoy")?.parse()?;

    // A client without a key presents forged usage as its name, also in the words of the filter.
    let reports = forged(id, reporter);
    let unsigned = format!("portcullis-usage {}", hex::encode(&reports));
    let signed = LogKey::derive(key.as_bytes()).line(&reports);
    let agents =
        [unsigned.clone(), format!("wasm log portcullis: {unsigned}"), format!("wasm log portcullis: {signed}")];
    for agent in &agents {
        let mut request = http::get_request("/", None)?;
        request.headers_mut().insert("user-agent", agent.parse()?);
        assert_eq!(http::send(stack.envoy().address(), request).await?.status, 401);
        stack.envoy().log().wait_for(agent).await?;
    }
    // The last requests cannot be reported, so the filter logs them.
    postgres.stop(Signal::SIGQUIT).await?;
    for _ in 0..5 {
        assert_eq!(stack.get(Some(&key)).await?.status, 200);
    }
    stack.envoy().stop(Signal::SIGTERM).await?;
    let log = stack.envoy().log().text();
    postgres.start().await?;
    let rest = stack.rest();
    eventually("the REST API to recover", async || rest.status(ADA).await.ok()).await?;

    let output = stack.control_plane.try_import_usage(&log)?;
    let (output_text, errors) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    let refused: Vec<&str> = errors.lines().filter(|line| line.starts_with("line ")).collect();
    assert!(!output.status.success() && refused.len() == 3, "{output_text}{errors}");
    for (line, why) in refused.iter().zip([
        "the usage does not stand where Envoy's own log prefix begins the line",
        "the line has no signature",
        "the signature is of no sync key that this control plane made and a filter has used",
    ]) {
        assert!(line.contains(why), "{line}");
    }
    assert!(
        output_text.ends_with("lines refused: 3\n") && !output_text.starts_with("reports applied: 0"),
        "{output_text}"
    );
    // All that was admitted is booked, to the last request, and nothing else.
    stack.wait_for_usage(ADA, stack.demo.requests()).await?;
    Ok(())
}
