//! Keys of another system open the door as soon as they are imported.

use anyhow::Result;
use contract::hash::KeyHash;
use contract::outcome::Outcome;
use portcullis_tests::expect::{assert_refused, assert_upstream};
use portcullis_tests::stack::Stack;
use serde_json::json;

const IDENTITY: [&str; 2] = ["x-consumer-id", "x-credential-identifier"];

#[tokio::test]
async fn imported_keys_open_whether_they_came_in_the_clear_or_as_hashes() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let (plain, hashed, off) = ("key-of-the-old-gateway-1", "key of the old gateway 2", "key-of-the-old-gateway-3");
    let hash: String = KeyHash::of(hashed.as_bytes()).0.iter().map(|byte| format!("{byte:02x}")).collect();
    let lines = [
        json!({"email": "ada@example.com", "name": "plain", "key": plain}),
        json!({"email": "bob@example.com", "name": "hashed", "hash": format!("sha256:{hash}")}),
        json!({"email": "bob@example.com", "name": "twice", "key": plain}),
        json!({"email": "eve@example.com", "name": "off", "key": off, "disabled": true}),
    ];
    let told = stack.rest().import(lines.map(|line| line.to_string()).join("\n")).await?;
    let expected = json!({
        "imported": 3, "failed": 1, "errors_truncated": false,
        "errors": [{"line": 3, "code": "duplicate", "reason": "this key stands in an earlier line"}],
    });
    assert_eq!(told, expected);
    for key in [plain, hashed] {
        stack.wait_for_status(Some(key), 200).await?;
        assert_upstream(&stack.get(Some(key)).await?, &IDENTITY);
    }
    assert_refused(&stack.get(Some(off)).await?, Outcome::Disabled, &[]);
    Ok(())
}
