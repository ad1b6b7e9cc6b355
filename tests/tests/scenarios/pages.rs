//! Clients that send several calls at once, as a web page does, again and again, over several Envoys: all calls pass until the
//! quota is used up to the last request, however a client's requests reach the Envoys.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use futures_util::future::{join_all, try_join_all};
use portcullis_harness::dice::Dice;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{Reply, get_request, send};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

const ENVOYS: usize = 4;

/// How the requests of a client reach the Envoys.
#[derive(Clone, Copy, Debug)]
enum Spread {
    /// All requests of a page at one Envoy, those of the next page at the next Envoy.
    Sticky,
    RoundRobin,
    Random,
}

/// A client with a key of its own.
struct Client {
    spread: Spread,
    key: String,
    id: String,
    page: usize,
    sent: usize,
    admitted: u64,
    dice: Dice,
}

impl Client {
    async fn new(stack: &Stack, spread: Spread, requests: u64, period: &str) -> Result<Self> {
        let quota = json!({"requests": requests, "period": period, "time_zone": "UTC"});
        let body = json!({"email": format!("{spread:?}@example.com"), "name": "pages", "quota": quota});
        let (id, key) = stack.rest().create_with(body).await?;
        Ok(Self { spread, key, id, page: 0, sent: 0, admitted: 0, dice: Dice::new(7) })
    }

    /// Sends this many requests at once.
    async fn page(&mut self, stack: &Stack, requests: usize) -> Result<Vec<Reply>> {
        let (page, first) = (self.page, self.sent);
        self.page += 1;
        self.sent += requests;
        let places: Vec<usize> = (first..first + requests)
            .map(|number| match self.spread {
                Spread::Sticky => page % ENVOYS,
                Spread::RoundRobin => number % ENVOYS,
                Spread::Random => self.dice.below(ENVOYS),
            })
            .collect();
        let ask =
            async |place: usize| send(stack.envoys[place].address(), get_request("/orders", Some(&self.key))?).await;
        let replies = join_all(places.into_iter().map(ask)).await.into_iter().collect::<Result<Vec<_>>>()?;
        self.admitted += replies.iter().filter(|reply| reply.status == 200).count() as u64;
        Ok(replies)
    }

    /// Waits until all admitted requests are counted. Each Envoy then holds only what it would like to hold ahead.
    async fn wait_until_counted(&self, stack: &Stack) -> Result<()> {
        let path = format!("/v1/keys/{}/quota", self.id);
        let used = async || (stack.rest().get(&path).await.ok()?["used"] == self.admitted).then_some(());
        eventually("all requests to be counted", used).await
    }

    /// Sends pages until the quota is used up, and waits after each until it is counted: all requests pass up to the last of
    /// the quota, and then none.
    async fn use_up(mut self, stack: &Stack, quota: u64, page: usize) -> Result<()> {
        let spread = self.spread;
        for number in 0..quota / page as u64 {
            self.page(stack, page).await?;
            assert_eq!(self.admitted, (number + 1) * page as u64, "{spread:?}, page {number}");
            self.wait_until_counted(stack).await?;
        }
        for _ in 0..2 {
            let refused: Vec<_> =
                self.page(stack, page).await?.into_iter().filter(|reply| reply.status != 200).collect();
            let statuses: Vec<_> = refused.iter().map(|reply| reply.status).collect();
            assert_eq!(self.admitted, quota, "{spread:?}: the others were refused with {statuses:?}");
            assert!(!refused.is_empty(), "{spread:?}");
            for reply in refused {
                assert_refused(&reply, Outcome::QuotaExceeded, &[]);
                self.assert_true_wait(stack, &reply).await?;
            }
        }
        self.wait_until_counted(stack).await
    }

    /// A refused request says when the window ends, as the REST API does.
    async fn assert_true_wait(&self, stack: &Stack, reply: &Reply) -> Result<()> {
        let wait: u64 = reply.header("retry-after").context("no retry-after")?.parse()?;
        let view = stack.rest().get(&format!("/v1/keys/{}/quota", self.id)).await?;
        let end = view["window_end"].as_str().context("no end")?;
        let end: u64 = stack
            .database
            .text(&format!("select extract(epoch from '{end}'::timestamptz)::bigint::text"))
            .await?
            .parse()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let expected = end.saturating_sub(now);
        assert!(wait.abs_diff(expected) <= 5, "{:?}: retry after {wait}, the window ends in {expected}", self.spread);
        Ok(())
    }
}

async fn use_up(quota: u64, period: &str, page: usize) -> Result<()> {
    // The longest time that the setting allows, for a machine that is busy.
    let plugin = json!({"rate_limit": null, "limits": {"wait": "0.8s"}});
    let stack = Stack::builder().envoys(ENVOYS).plugin(&plugin).start().await?;
    let mut clients = Vec::new();
    for spread in [Spread::Sticky, Spread::RoundRobin, Spread::Random] {
        clients.push(Client::new(&stack, spread, quota, period).await?);
    }
    stack.in_step().await?;
    try_join_all(clients.into_iter().map(|client| client.use_up(&stack, quota, page))).await?;
    assert_eq!(stack.demo.requests(), 3 * quota);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_12_calls_pass_on_100_a_day_until_all_are_used_and_refusals_say_when_the_day_ends() -> Result<()> {
    use_up(100, "day", 12).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_38_calls_pass_on_1000_a_month_until_all_are_used() -> Result<()> {
    use_up(1_000, "month", 38).await
}
