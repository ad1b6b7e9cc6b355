//! Infrequent requests: each comes after the lease of the one before was returned, and none is
//! refused while quota and credits suffice.

use anyhow::Result;
use portcullis_tests::http::{get_request, send};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

const ADA: &str = "ada@example.com";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_come_seldom_are_let_in_by_every_envoy() -> Result<()> {
    let stack = Stack::builder().envoys(2).start().await?;
    let rest = stack.rest();
    let user = rest.user(ADA).await?;
    let balance = format!("{user}/balance");
    rest.post(&format!("{user}/ledger"), json!({"amount": 1_000})).await?;
    let body = json!({
        "email": ADA, "name": "seldom", "cost": 3,
        "quota": {"requests": 500, "period": "day", "time_zone": "UTC"}
    });
    let (_, key) = rest.create_with(body).await?;
    stack.in_step().await?;
    for number in 1..=3_i64 {
        for envoy in &stack.envoys {
            let reply = send(envoy.address(), get_request("/orders", Some(&key))?).await?;
            assert_eq!(reply.status, 200, "request {number}: {:?}", reply.body);
        }
        let booked = 1_000 - 3 * 2 * number;
        let reached = async || (rest.get(&balance).await.ok()?["balance"] == booked).then_some(());
        eventually("the requests to be booked", reached).await?;
        // Nothing is held beyond what was spent once an Envoy has heard that its lease was taken back.
        let held = "select count(*)::text from leases where stock > 0 and held > spent";
        let quiet = async || (stack.database.text(held).await.ok()? == "0").then_some(());
        eventually("the leases to be given back", quiet).await?;
    }
    Ok(())
}
