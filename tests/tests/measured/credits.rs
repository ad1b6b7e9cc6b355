//! Credits of one owner over three Envoys: they are spent once, whatever the requests cost, and after a
//! top-up requests are admitted as soon as with a new key.

use std::time::Instant;

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use futures_util::future::try_join_all;
use portcullis_tests::envoy::Envoy;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{Connection, get_request, send};
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::{Stack, wait_for_status};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

const ADA: &str = "ada@example.com";
const CREDITS: u64 = 1_000;

async fn account(stack: &Stack) -> Result<Value> {
    stack.rest().get(&format!("{}/balance", stack.rest().user(ADA).await?)).await
}

async fn top_up(stack: &Stack, amount: u64) -> Result<()> {
    let ledger = format!("{}/ledger", stack.rest().user(ADA).await?);
    stack.rest().post(&ledger, json!({"amount": amount})).await.map(|_| ())
}

/// As many requests as come through, at every Envoy, until each refuses for want of credits. What was admitted.
async fn spend_all(stack: &Stack, key: &str) -> Result<u64> {
    let load = Load::start(Plan {
        targets: stack.envoys.iter().map(Envoy::address).collect(),
        keys: vec![key.to_owned()],
        connections: 12,
        requests: u64::MAX,
        per_second: None,
    });
    let spent = async || (account(stack).await.ok()?["balance"].as_i64()? <= 0).then_some(());
    eventually("all credits to be spent", spent).await?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(key), 429).await?;
    }
    let answers = load.stop().await;
    let admitted = with_status(&answers, 200);
    let (refused, unasked) = (with_status(&answers, 429), with_status(&answers, 503));
    assert_eq!(admitted + refused + unasked, answers.values().sum::<u64>(), "{answers:?}");
    assert!(refused > 0);
    // On a busy machine the control plane may take longer than a request waits, and the code then says so.
    assert!(unasked * 100 <= refused, "{answers:?}");
    Ok(admitted)
}

/// Waits until the ledger has a balance, and says whether it is the sum of its rows.
async fn wait_for_balance(stack: &Stack, balance: i64) -> Result<()> {
    let reached = async || (account(stack).await.ok()?["balance"] == balance).then_some(());
    eventually(&format!("a balance of {balance}"), reached).await.with_context(|| "credits are counted wrongly")?;
    let sum = stack.database.text("select sum(amount)::text from ledger").await?;
    assert_eq!(sum.parse::<i64>()?, balance);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_at_full_load_spend_a_balance_once_and_refuse_the_rest() -> Result<()> {
    let plugin = json!({"rate_limit": null, "limits": {"wait": "0.8s"}});
    let stack = Stack::builder().envoys(3).plugin(&plugin).start().await?;
    let key = stack.rest().generate(ADA).await?;
    stack.wait_for_status(Some(&key), 200).await?;
    // Requests from before the user is metered are free, even those that are reported later.
    let free = stack.demo.requests();
    top_up(&stack, CREDITS).await?;
    stack.in_step().await?;

    let start = Instant::now();
    let admitted = spend_all(&stack, &key).await?;
    let seen = stack.demo.requests() - free;
    println!("credits: {seen} requests were admitted in {:.1?}, {CREDITS} credits", start.elapsed());
    assert_eq!((admitted, seen), (CREDITS, CREDITS));
    wait_for_balance(&stack, 0).await?;
    for envoy in &stack.envoys {
        let reply = send(envoy.address(), get_request("/orders", Some(&key))?).await?;
        assert_refused(&reply, Outcome::CreditsExhausted, &[]);
    }
    assert_eq!(stack.demo.requests() - free, seen);

    // A top-up reaches every Envoy as fast as a new key.
    let start = Instant::now();
    top_up(&stack, CREDITS).await?;
    for envoy in &stack.envoys {
        wait_for_status(envoy, Some(&key), 200).await?;
    }
    println!("credits: a top-up opened three doors after {:.0?}", start.elapsed());
    spend_all(&stack, &key).await?;
    let again = stack.demo.requests() - free - seen;
    assert_eq!(again, CREDITS);
    wait_for_balance(&stack, 0).await?;

    // So do those that come by themselves.
    let refill = json!({"refill": {"amount": 500, "period": "day", "time_zone": "Europe/Berlin"}});
    let path = stack.rest().user(ADA).await?;
    let user = stack.rest().patch(&path, refill).await?;
    assert_eq!(user["refill"]["amount"], 500);
    assert!(user["refill_at"].is_string(), "{user}");
    stack.database.execute("update user_preferences set refill_at = now() where refill is not null").await?;
    stack.wait_for_status(Some(&key), 200).await?;
    let ledger = stack.rest().get(&format!("{path}/ledger?limit=200")).await?;
    let refills = ledger["entries"].as_array().into_iter().flatten().filter(|entry| entry["kind"] == "refill");
    assert_eq!(refills.map(|entry| &entry["amount"]).collect::<Vec<_>>(), [500]);
    Ok(())
}

/// The routes, with what a request to each costs. The last is the least.
const PRICES: [(&str, u64); 3] = [("/export", 29), ("/search", 7), ("/", 3)];

/// Requests to all routes in turn over one connection, until the balance does not pay for the cheapest. What was spent.
async fn spend_on_all_routes(envoy: &Envoy, key: &str, first: usize) -> Result<u64> {
    let mut connection = Connection::open(envoy.address()).await?;
    let mut spent = 0;
    for turn in first.. {
        let (path, price) = PRICES[turn % PRICES.len()];
        let reply = connection.get(path, Some(key)).await?;
        match reply.status {
            200 => spent += price,
            429 if path == "/" => break,
            status => assert_eq!(status, 429, "{reply:?}"),
        }
    }
    Ok(spent)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_envoys_at_full_load_spend_a_balance_on_routes_of_different_cost_down_to_less_than_the_least()
-> Result<()> {
    let policies = json!({"export": {"cost": 29}, "search": {"cost": 7}, "usual": {"cost": 3}});
    let plugin = json!({"rate_limit": null, "limits": {"wait": "0.8s"}});
    let builder = Stack::builder().envoys(3).plugin(&plugin).policies(&policies);
    let builder = builder.route("/export", "export").route("/search", "search").route("/", "usual");
    let stack = builder.start().await?;
    let (_, key) = stack.rest().create(ADA).await?;
    top_up(&stack, CREDITS).await?;
    stack.in_step().await?;

    let start = Instant::now();
    let spend = (0..12).map(|number| spend_on_all_routes(&stack.envoys[number % 3], &key, number));
    let spent: u64 = try_join_all(spend).await?.into_iter().sum();
    println!("credits: {spent} of {CREDITS} were spent on routes of different cost in {:.1?}", start.elapsed());
    let left = CREDITS.checked_sub(spent).context("more was spent than there was")?;
    assert!(left < 3, "{left} are left");
    wait_for_balance(&stack, left.try_into()?).await
}
