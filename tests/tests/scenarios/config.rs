//! Envoy rejects an invalid configuration when it loads the filter, with one line that says what to
//! do.

use anyhow::Result;
use portcullis_tests::control_plane::fresh_key;
use portcullis_tests::envoy::{Envoy, Settings};
use portcullis_tests::envoy_config::Replacements;
use portcullis_tests::log::Log;
use portcullis_tests::tools::silently;
use serde_json::{Value, json};
use tempfile::TempDir;

const PREFIX: &str = "the plugin configuration was refused: ";

/// Starts an Envoy that should not start, and gives the lines of its log that have a part.
async fn lines_of_refusal(plugin: &Value, withheld: Option<&str>, part: &str) -> Result<Vec<String>> {
    let home = TempDir::with_prefix("portcullis-")?;
    let log = Log::create(&home.path().join("envoy.log"))?;
    let nobody = std::net::SocketAddr::from(([127, 0, 0, 1], 9));
    let plugin = plugin.as_object().cloned().unwrap_or_default();
    let mut replacements = Replacements { plugin, ..Replacements::between(nobody, nobody) };
    if let Some(capability) = withheld {
        replacements.edit(&format!("{capability}: {{}}\n"), "\n");
    }
    let quiet = Settings { workers: 1, log_level: "warning".into(), ..Settings::new(replacements, fresh_key()?) };
    let started = Envoy::start(quiet, home.path(), log.clone(), &silently).await;
    assert!(started.is_err(), "Envoy took {plugin:?}", plugin = log.tail(5));
    Ok(log.lines_with(part))
}

/// The same, but the filter's lines.
async fn refused(plugin: &Value, withheld: Option<&str>) -> Result<Vec<String>> {
    let lines = lines_of_refusal(plugin, withheld, PREFIX).await?;
    Ok(lines.iter().filter_map(|line| line.split_once(PREFIX)).map(|(_, why)| why.to_owned()).collect())
}

#[tokio::test]
async fn each_mistake_is_named_with_its_remedy() -> Result<()> {
    // The unit tests of the configuration know more.
    let mistakes = [
        (json!({"rate_limits": {}}), "rate_limits: is not a known field"),
        (json!({"rate_limit": {"requests": 0, "window": "1s"}}), "rate_limit.requests: must be at least 1"),
        (json!({"max_staleness": 600}), "max_staleness: must be whole seconds with their unit, such as \"60s\""),
        (json!({"failure_mode": {"not_ready": "open"}}), "failure_mode.not_ready: must be `deny` or `allow`"),
        (json!({"identity_headers": {"consumer": "x-api-key"}}), "x-api-key is used twice"),
        (json!({"pepper_env": "NONE"}), "pepper_env: the environment variable NONE is not set"),
        (json!({"policies": {}}), "policies: is not a known field"),
        (json!({"policy_sources": ["rules", "rules"]}), "policy_sources: name each source once"),
    ];
    for (plugin, expected) in mistakes {
        let lines = refused(&plugin, None).await?;
        // One for each of the VMs that Envoy tried it in.
        assert!(!lines.is_empty() && lines.len() <= 2, "{lines:?}");
        assert!(lines.iter().all(|line| line.contains(expected)), "{expected}: {lines:?}");
    }
    Ok(())
}

#[tokio::test]
async fn policies_are_refused_where_the_filter_may_not_ask_which_one_a_route_names() -> Result<()> {
    let lines = refused(&json!({}), Some("proxy_get_property")).await?;
    assert!(!lines.is_empty() && lines.iter().all(|line| line.contains("add proxy_get_property to")), "{lines:?}");
    Ok(())
}

#[tokio::test]
async fn a_filter_that_may_not_ask_whether_the_store_was_written_is_refused_before_any_request_comes() -> Result<()> {
    let named = "restricted proxy-wasm capability: proxy_get_metric";
    assert!(!lines_of_refusal(&json!({}), Some("proxy_get_metric"), named).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_list_of_capabilities_from_before_requests_could_wait_is_refused() -> Result<()> {
    let named = "restricted proxy-wasm capability: proxy_register_shared_queue";
    assert!(!lines_of_refusal(&json!({}), Some("proxy_register_shared_queue"), named).await?.is_empty());
    Ok(())
}
