//! A limit of an hour that three Envoys share is used once, however often the key is idle and
//! wherever its load goes.

use std::time::Instant;

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use hyper::Method;
use portcullis_tests::envoy::Envoy;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{get_request, send};
use portcullis_tests::load::{Load, Plan, with_status};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

const LIMIT: u64 = 300;
const ENVOYS: usize = 3;
const EVEN_SHARE: u64 = LIMIT / ENVOYS as u64;

/// The limit's requests at one Envoy, as fast as it answers, and one more, then a rest until all of them are counted and the
/// share is left to others. How many were admitted.
async fn burst(stack: &Stack, envoy: &Envoy, key: &str, bursts: u64) -> Result<u64> {
    let plan = Plan {
        targets: vec![envoy.address()],
        keys: vec![key.to_owned()],
        connections: 4,
        requests: LIMIT,
        per_second: None,
    };
    let answers = Load::start(plan).finish().await;
    let admitted = with_status(&answers, 200);
    assert_eq!(admitted + with_status(&answers, 429), LIMIT, "{answers:?}");
    let reply = send(envoy.address(), get_request("/", Some(key))?).await?;
    if reply.status == 429 {
        assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
        let wait: u64 = reply.header("retry-after").context("no retry-after")?.parse()?;
        assert!(wait <= 3_600, "{wait}");
    }
    let asked = (bursts * (LIMIT + 1)).to_string();
    let counts = "select coalesce(sum(requests), 0)::text from usage_hourly";
    let counted = async || (stack.database.text(counts).await.ok()? == asked).then_some(());
    eventually("all requests to be counted", counted).await?;
    let held = "select count(*)::text from leases where stock = 0 and held > 0";
    let rests = async || (stack.database.text(held).await.ok()? == "0").then_some(());
    eventually("the share to be left to others", rests).await?;
    Ok(admitted + u64::from(reply.status == 200))
}

async fn limited(stack: &Stack, email: &str) -> Result<String> {
    let body = json!({
        "email": email, "name": "hourly", "rate_limits": [{"name": "hour", "requests": LIMIT, "window_seconds": 3_600}]
    });
    let made = stack.rest().expect(Method::POST, "/v1/keys", Some(&body), 201).await?;
    let key = made["secret"].as_str().context("no key in the answer")?;
    stack.in_step().await?;
    Ok(key.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rests_and_moves_do_not_make_a_long_limit_begin_anew() -> Result<()> {
    let stack = Stack::builder().envoys(ENVOYS).start().await?;
    let mut bursts = 0;
    for (how, order) in [("rests", [0, 0, 0, 0, 0, 0]), ("moves", [0, 1, 2, 0, 1, 2])] {
        let key = limited(&stack, &format!("{how}@example.com")).await?;
        let (start, mut admitted) = (Instant::now(), Vec::new());
        for place in order {
            bursts += 1;
            let envoy = stack.envoys.get(place).context("no such Envoy")?;
            admitted.push(burst(&stack, envoy, &key, bursts).await?);
        }
        let sum: u64 = admitted.iter().sum();
        // The limit, an even share of each Envoy, and what comes back of the limit meanwhile.
        let envoys = order.iter().max().map_or(0, |last| *last as u64 + 1);
        let bound = LIMIT + envoys * EVEN_SHARE + LIMIT * start.elapsed().as_secs() / 3_600 + 1;
        println!("shares: a load that {how} was admitted {admitted:?}, {sum} of {LIMIT} an hour, the bound is {bound}");
        assert!((LIMIT * 3 / 4..=bound).contains(&sum), "{admitted:?}");
    }
    Ok(())
}
