//! No log contains a key, at any level.

use anyhow::Result;
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use serde_json::json;

#[tokio::test]
async fn no_key_and_no_hash_stands_in_any_log_even_at_level_debug() -> Result<()> {
    let stack = Stack::builder().debug_logs().start().await?;
    let rest = stack.rest();
    let key = stack.working_key("ada@example.com").await?;
    assert_eq!(stack.get(Some("sk_live_nobodyhasthiskeyatall")).await?.status, 401);
    for misplaced in
        [json!({"email": key, "key_name": "a"}), json!({"email": "a@example.com", "key_name": "a", (&key): 1})]
    {
        assert_eq!(rest.call(hyper::Method::POST, "/api/user/key", Some(&misplaced)).await?.status, 400);
    }
    assert_eq!(rest.call(hyper::Method::GET, &format!("/v1/keys/{key}"), None).await?.status, 400);
    stack.wait_for_usage("ada@example.com", stack.demo.requests()).await?;
    rest.revoke("ada@example.com").await?;
    stack.wait_for_status(Some(&key), 401).await?;
    stack.envoy().stop(Signal::SIGTERM).await?;
    stack.control_plane.stop(Signal::SIGTERM).await?;

    let settings = stack.control_plane.settings();
    let (ours, envoys) = (stack.control_plane.log().text(), stack.envoy().log().text());
    assert!(ours.contains("DEBUG") && envoys.contains("[debug]"), "the logs are not at level debug");
    // The filter's own lines and those of the control plane hold no key. Envoy's own debug log prints the headers of each
    // request, which is why nobody runs it in production; whatever else it prints must not hold one.
    let header_dumps = |line: &&str| line.starts_with('\'');
    let rest_of_envoy: String = envoys.lines().filter(|line| !header_dumps(line)).collect::<Vec<_>>().join("\n");
    for secret in [settings.admin_key.reveal(), settings.sync_key.reveal(), &key, "sk_live_nobodyhasthiskeyatall"] {
        let random = &secret["sk_live_".len() + 6..];
        let hash = contract::hash::KeyHash::of(secret.as_bytes()).to_string();
        for (name, log) in [("the control plane", &ours), ("Envoy", &rest_of_envoy)] {
            for part in [random, &hash] {
                let found: Vec<_> = log.lines().filter(|line| line.contains(part)).collect();
                assert!(found.is_empty(), "{name} logged a secret: {found:?}");
            }
        }
    }
    Ok(())
}
