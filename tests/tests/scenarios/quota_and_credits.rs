//! Quotas and credits, spent from the lease of one Envoy.

use anyhow::Result;
use contract::budget::Stock;
use contract::outcome::Outcome;
use contract::record::{Budget, Flags, Record, Requires};
use contract::usage::Grant;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::fake_control_plane::Change;
use portcullis_tests::filter_harness::{FilterHarness, with};
use portcullis_tests::wait::eventually;
use serde_json::json;

const OWNER: [u8; 16] = [0x22; 16];

const fn budget(starter: u32, turn: u32, resets_at_s: Option<u64>) -> Option<Budget> {
    Some(Budget { starter, turn, resets_at_s })
}

fn metered(number: u8, quota: Option<Budget>, credits: Option<Budget>) -> Record {
    with(number, |r| {
        r.quota = quota;
        r.credits = credits;
        r.requires = Requires::BUDGETS;
    })
}

fn of(stock: Stock, of: [u8; 16], amount: u64, turn: u32) -> Grant {
    Grant { stock: stock.code(), of, amount, turn }
}

/// Sends grants with the next acknowledgement, and waits until Envoy has noted them: then it sends an empty report.
async fn grant(harness: &FilterHarness, grants: &[Grant]) -> Result<()> {
    harness.control_plane.grant(grants);
    harness.get("/", None).await?;
    eventually("the grants to be noted", async || (harness.control_plane.acknowledged_with_grants() >= 2).then_some(()))
        .await
}

/// Asks on both workers in turn; how many were allowed. All others were refused with this outcome and this wait.
async fn allowed(harness: &FilterHarness, path: &str, key: &str, refused: Outcome, wait: &str) -> Result<usize> {
    let mut workers = harness.envoy.connection_per_worker().await?;
    let mut allowed = 0;
    for _ in 0..8 {
        for worker in &mut workers {
            let reply = worker.get(path, Some(key)).await?;
            if reply.status == 200 {
                allowed += 1;
            } else {
                assert_refused(&reply, refused, &[]);
                assert_eq!(reply.header("retry-after"), Some(wait));
            }
        }
    }
    Ok(allowed)
}

#[tokio::test]
async fn a_quota_is_spent_from_the_starter_and_then_from_grants_over_all_workers() -> Result<()> {
    let harness = FilterHarness::start(&[("metered", metered(1, budget(3, 1, None), None))]).await?;
    let (exceeded, quota) = (Outcome::QuotaExceeded, Stock::Quota);
    assert_eq!(allowed(&harness, "/", "metered", exceeded, "1").await?, 3);
    grant(&harness, &[of(quota, [1; 16], 8, 1), of(Stock::Credits, [1; 16], 100, 1), of(quota, [9; 16], 100, 1)])
        .await?;
    // It comes with every acknowledgement, and says all that was ever granted.
    assert_eq!(allowed(&harness, "/", "metered", exceeded, "1").await?, 5);
    assert_eq!(harness.demo.requests(), 8);

    // The record says that the quota is exhausted, at first without, then with an end.
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let flagged = |resets_at_s| {
        let mut record = metered(1, budget(3, 1, resets_at_s), None);
        record.flags = Flags::QUOTA_EXCEEDED;
        Change::Key("metered", Box::new(record))
    };
    harness.change(&[flagged(None)]).await?;
    assert_eq!(allowed(&harness, "/", "metered", exceeded, "60").await?, 0);
    harness.change(&[flagged(Some(now_s + 50_000))]).await?;
    let reply = harness.get("/", Some("metered")).await?;
    let wait: u64 = reply.header("retry-after").unwrap_or_default().parse()?;
    assert!((49_000..=50_000).contains(&wait), "{wait}");

    // A new window admits requests at once; grants of the old window do not end that.
    harness.change(&[Change::Key("metered", Box::new(metered(1, budget(2, 2, None), None)))]).await?;
    assert_eq!(allowed(&harness, "/", "metered", exceeded, "1").await?, 2);
    assert_eq!(harness.demo.requests(), 10);
    Ok(())
}

#[tokio::test]
async fn a_route_has_its_price_and_credits_are_their_owners() -> Result<()> {
    let plugin = json!({"policies": {"dear": {"cost": 4}, "free": {"cost": 0}}});
    let cheap = metered(1, None, budget(10, 1, None));
    let mut double = metered(2, None, budget(10, 1, None));
    double.cost = 2;
    let harness = FilterHarness::builder().plugin(plugin).route("/dear", "dear").route("/free", "free");
    let harness = harness.start(&[("cheap", cheap), ("double", double)]).await?;
    let exhausted = Outcome::CreditsExhausted;
    assert_eq!(allowed(&harness, "/dear", "cheap", exhausted, "1").await?, 2);
    let wanted = async || (harness.control_plane.reported_cost(exhausted) == 14 * 4).then_some(());
    eventually("the cost of 14 refused requests to be reported", wanted).await?;
    // Two credits are left, for whichever key of the owner.
    assert_eq!(allowed(&harness, "/", "double", exhausted, "1").await?, 1);
    assert_eq!(allowed(&harness, "/", "cheap", exhausted, "1").await?, 0);
    assert_eq!(allowed(&harness, "/free", "cheap", exhausted, "1").await?, 16);
    grant(&harness, &[of(Stock::Credits, OWNER, 15, 1)]).await?;
    assert_eq!(allowed(&harness, "/dear", "double", exhausted, "1").await?, 1);
    assert_eq!(allowed(&harness, "/", "cheap", exhausted, "1").await?, 1);
    let cost = async || (harness.control_plane.reported_cost(Outcome::Allowed) == 15).then_some(());
    eventually("15 credits to be reported", cost).await?;
    // Exhausted according to the control plane: requests that cost nothing still go through.
    let mut flagged = metered(1, None, budget(10, 1, None));
    flagged.flags = Flags::CREDITS_EXHAUSTED;
    harness.change(&[Change::Key("cheap", Box::new(flagged))]).await?;
    assert_eq!(allowed(&harness, "/", "cheap", exhausted, "60").await?, 0);
    assert_eq!(allowed(&harness, "/free", "cheap", exhausted, "60").await?, 16);
    // A top-up is a new turn.
    harness.change(&[Change::Key("cheap", Box::new(metered(1, None, budget(6, 2, None))))]).await?;
    assert_eq!(allowed(&harness, "/", "cheap", exhausted, "1").await?, 6);
    Ok(())
}

#[tokio::test]
async fn a_request_whose_price_is_above_the_balance_is_not_told_to_wait() -> Result<()> {
    let plugin = json!({"policies": {"dear": {"cost": 4}}});
    let keys = [("k", metered(1, None, budget(0, 1, None)))];
    let harness = FilterHarness::builder().plugin(plugin).route("/dear", "dear").start(&keys).await?;
    let exhausted = Outcome::CreditsExhausted;
    // The filter does not know yet how much there is.
    assert_eq!(allowed(&harness, "/dear", "k", exhausted, "1").await?, 0);
    grant(&harness, &[of(Stock::Balance, OWNER, 3, 1)]).await?;
    let reply = harness.get("/dear", Some("k")).await?;
    let body: serde_json::Value = serde_json::from_slice(&reply.body)?;
    let detail = "This request costs more credits than the owner of this API key has. Top them up to go on: waiting does not help.";
    assert_eq!((reply.status, reply.header("retry-after")), (429, None));
    assert_eq!((&body["code"], &body["detail"]), (&json!("credits_exhausted"), &json!(detail)));
    // What costs less is worth asking for again.
    assert_eq!(allowed(&harness, "/", "k", exhausted, "1").await?, 0);
    // So is the other, once there is enough.
    grant(&harness, &[of(Stock::Balance, OWNER, 4, 1)]).await?;
    assert_eq!(allowed(&harness, "/dear", "k", exhausted, "1").await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_request_that_the_credits_refuse_leaves_the_quota_as_it_was() -> Result<()> {
    let plugin = json!({"policies": {"free": {"cost": 0}}});
    let keys = [("metered", metered(1, budget(5, 1, None), budget(2, 1, None)))];
    let harness = FilterHarness::builder().plugin(plugin).route("/free", "free").start(&keys).await?;
    assert_eq!(allowed(&harness, "/", "metered", Outcome::CreditsExhausted, "1").await?, 2);
    assert_eq!(allowed(&harness, "/free", "metered", Outcome::QuotaExceeded, "1").await?, 3);
    assert_eq!(allowed(&harness, "/", "metered", Outcome::QuotaExceeded, "1").await?, 0);
    Ok(())
}
