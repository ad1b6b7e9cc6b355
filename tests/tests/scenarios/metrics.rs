//! Metrics for operators, and the alerts and dashboards that read them.

mod alerts;
pub mod dashboards;
mod promql;
mod scrape;

use std::collections::BTreeSet;

use anyhow::Result;
use http_body_util::Full;
use hyper::Request;
use portcullis_tests::http;
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

#[tokio::test]
async fn envoys_statistics_tell_of_decisions_keys_and_the_state_of_the_sync() -> Result<()> {
    let stack = Stack::start().await?;
    let envoy = stack.envoy();
    let key = stack.working_key("ada@example.com").await?;
    stack.get(None).await?;
    stack.get(Some("sk_live_nobody")).await?;
    let name = |stat: &str| format!("wasmcustom.portcullis.{stat}");
    // Workers write the statistics of decisions on their ticks.
    envoy.wait_for_stat(&name("decisions.allowed_total"), |allowed| allowed == stack.demo.requests()).await?;
    envoy.wait_for_stat(&name("decisions.missing_total"), |missing| missing == 1).await?;
    envoy.wait_for_stat(&name("decisions.unknown_total"), |unknown| unknown >= 1).await?;

    // The admin key, the sync key and Ada's.
    envoy.wait_for_stat(&name("store.keys"), |keys| keys == 3).await?;
    let revision = envoy.stat(&name("store.revision")).await?;
    assert!(revision > 0);
    stack.rest().revoke("ada@example.com").await?;
    stack.wait_for_status(Some(&key), 401).await?;
    envoy.wait_for_stat(&name("store.revision"), |now| now > revision).await?;
    envoy.wait_for_stat(&name("usage.pending_requests"), |pending| pending == 0).await?;
    assert_eq!(envoy.stat(&name("usage.report_failures_total")).await?, 0);
    assert!(envoy.stat(&name("sync.age_seconds")).await? <= 30);

    let failures = envoy.stat(&name("sync.failures_total")).await?;
    stack.control_plane.stop(Signal::SIGKILL).await?;
    stack.get(None).await?;
    for stat in ["sync.failures_total", "usage.report_failures_total", "usage.pending_requests", "sync.age_seconds"] {
        let before = if stat == "sync.failures_total" { failures } else { 0 };
        envoy.wait_for_stat(&name(stat), |now| now > before).await?;
    }
    Ok(())
}

/// What Prometheus shows of the filter: the label that the shipped configurations cut out of the names.
#[tokio::test]
async fn prometheus_shows_decisions_as_one_metric_with_a_label_for_the_outcome() -> Result<()> {
    let stack = Stack::start().await?;
    stack.working_key("ada@example.com").await?;
    stack.get(None).await?;
    let metrics = async || {
        let reply = http::get(stack.envoy().admin(), "/stats/prometheus?filter=^wasmcustom").await.ok()?;
        Some(String::from_utf8_lossy(&reply.body).into_owned())
    };
    let allowed = format!("portcullis_decisions_total{{outcome=\"allowed\"}} {}\n", stack.demo.requests());
    let shown = async || {
        let text = metrics().await?;
        let both = [allowed.as_str(), "portcullis_decisions_total{outcome=\"missing\"} 1\n"];
        both.iter().all(|sample| text.contains(sample)).then_some(text)
    };
    let text = eventually("the decisions by outcome", shown).await?;
    assert!(text.contains("portcullis_shadow_decisions_total{outcome=\"scope_denied\"} 0\n"), "{text}");
    let names: BTreeSet<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let expected = [
        "portcullis_decisions_total counter",
        "portcullis_internal_store_generation gauge",
        "portcullis_limits_call_failures_total counter",
        "portcullis_limits_calls_total counter",
        "portcullis_limits_live_envoys gauge",
        "portcullis_limits_waits_total counter",
        "portcullis_shadow_decisions_total counter",
        "portcullis_store_keys gauge",
        "portcullis_store_revision gauge",
        "portcullis_sync_age_seconds gauge",
        "portcullis_sync_failures_total counter",
        "portcullis_usage_pending_requests gauge",
        "portcullis_usage_report_failures_total counter",
    ];
    assert_eq!(names, BTreeSet::from(expected));
    Ok(())
}

#[tokio::test]
async fn the_access_log_names_the_key_by_its_id_and_the_reason_of_a_refusal() -> Result<()> {
    let stack = Stack::start().await?;
    let key = stack.working_key("ada@example.com").await?;
    let seen = http::send(stack.envoy().address(), http::get_request("/named?secret=1", Some(&key))?).await?.json()?;
    let id = seen["headers"]["x-credential-identifier"][0].as_str().unwrap_or_default().to_owned();
    let refused = http::send(stack.envoy().address(), http::get_request("/nameless", None)?).await?;

    let line: serde_json::Value = serde_json::from_str(&stack.envoy().log().wait_for("/named").await?)?;
    assert_eq!((&line["key_id"], &line["refused"]), (&id.into(), &serde_json::Value::Null));
    assert_eq!((&line["path"], &line["status"]), (&"/named".into(), &200.into()));
    assert_eq!(line["request_id"], seen["headers"]["x-request-id"][0]);
    let line: serde_json::Value = serde_json::from_str(&stack.envoy().log().wait_for("/nameless").await?)?;
    assert_eq!((&line["key_id"], &line["refused"]), (&serde_json::Value::Null, &"missing".into()));
    assert_eq!((&line["status"], &line["rejected_key_id"]), (&401.into(), &serde_json::Value::Null));
    // The id of a refusal leads to its line in the access log.
    let id = refused.header("x-request-id").unwrap_or_default();
    assert_eq!((&line["request_id"], id.len()), (&id.into(), 36));
    assert_eq!(refused.json()?["request_id"], id);

    // A known key that is refused has its id elsewhere, and a client cannot write the id into the log.
    stack.rest().revoke("ada@example.com").await?;
    stack.wait_for_status(Some(&key), 401).await?;
    let forging = Request::get("/forged").header("x-api-key", &key).header("x-credential-identifier", "root");
    http::send(stack.envoy().address(), forging.body(Full::default())?).await?;
    let line: serde_json::Value = serde_json::from_str(&stack.envoy().log().wait_for("/forged").await?)?;
    assert_eq!((&line["key_id"], &line["refused"]), (&serde_json::Value::Null, &"revoked".into()));
    assert_eq!(line["rejected_key_id"], seen["headers"]["x-credential-identifier"][0]);
    Ok(())
}

#[tokio::test]
async fn the_control_plane_tells_prometheus_and_the_platform_how_it_is() -> Result<()> {
    let stack = Stack::start().await?;
    let address = stack.control_plane.address();
    assert_eq!(http::get(address, "/healthz").await?.status, 200);
    assert_eq!(http::get(address, "/readyz").await?.status, 200);
    // Each reply has a request id, and the line of the log that tells of it has the same.
    let reply = http::get(address, "/openapi.json").await?;
    let id = reply.header("x-request-id").unwrap_or_default().to_owned();
    assert_eq!(id.len(), 36, "{reply:?}");
    let line = stack.control_plane.log().wait_for(&id).await?;
    let line: Value = serde_json::from_str(&line)?;
    assert_eq!(
        (&line["message"], &line["route"], &line["status"]),
        (&json!("answered"), &json!("/openapi.json"), &json!(200))
    );
    // Probes come every few seconds. Those above were answered before that line was written, and have no line.
    let log = stack.control_plane.log().text();
    let of_probe = |line: &&str| line.contains("/readyz") || line.contains("/healthz");
    let good: Vec<_> = log.lines().filter(of_probe).filter(|line| line.contains("\"status\":200")).collect();
    assert!(good.is_empty(), "{good:?}");
    let metrics = http::get(address, "/metrics").await?;
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")), "{metrics:?}");
    let text = String::from_utf8_lossy(&metrics.body).into_owned();
    let samples = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    for sample in samples.clone() {
        let value = sample.rsplit(' ').next().unwrap_or_default();
        assert!(value.parse::<f64>().is_ok(), "{sample}");
    }
    // Each metric has a help text, of which promtool says more, and then its type, once.
    let lines_of = |mark: &str| -> Vec<_> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(mark)?.split(' ').next());
        lines.map(ToOwned::to_owned).collect()
    };
    let (helped, typed) = (lines_of("# HELP "), lines_of("# TYPE "));
    assert_eq!(helped, typed);
    assert_eq!(typed.iter().collect::<BTreeSet<_>>().len(), typed.len(), "{typed:?}");
    for sample in samples.clone() {
        let name = sample.split(['{', ' ']).next().unwrap_or_default();
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        assert!(typed.iter().any(|known| known == family), "{sample}");
    }
    let (version, revision) = (env!("CARGO_PKG_VERSION"), option_env!("PORTCULLIS_REVISION").unwrap_or("unknown"));
    let build = format!("portcullis_build_info{{version=\"{version}\",revision=\"{revision}\"}} 1\n");
    assert!(text.contains(&build), "{text}");
    // A counter that nothing has raised yet stands at zero.
    assert!(text.contains("portcullis_tls_handshakes_failed_total 0\n"), "{text}");
    // One admin key, one sync key; both Envoy's polls and our own calls were seen.
    assert!(text.contains("portcullis_mirror_keys 2\n"), "{text}");
    for name in ["portcullis_mirror_revision ", "portcullis_sync_updates_total ", "portcullis_http_requests_total{"] {
        let sample = samples.clone().find(|sample| sample.starts_with(name));
        let value = sample.and_then(|sample| sample.rsplit(' ').next()?.parse::<f64>().ok());
        assert!(value.is_some_and(|value| value >= 1.0), "{name}: {text}");
    }
    Ok(())
}
