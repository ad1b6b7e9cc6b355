//! Limits that two Envoys share, while PostgreSQL or the control plane is killed and comes back: requests that wait are
//! answered, no quota or balance is exceeded, and requests that were admitted meanwhile count.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use contract::outcome::Outcome;
use futures_util::future::join_all;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::http::{Reply, get_request, send};
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually;
use serde_json::json;

const LIMIT: u32 = 40;
const QUOTA: u64 = 100;
const CREDITS: u64 = 100;
/// The longest time that the setting allows, so that a busy machine has time to kill a process.
const WAIT: Duration = Duration::from_millis(800);
/// Requests with each key that are on their way when something is killed: few enough for the safe rate of each Envoy.
const WAITING: usize = 20;
/// Statistics of the filter.
const WAITS: &str = "wasmcustom.portcullis.limits.waits_total";

/// What is killed and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killed {
    PostgreSql,
    ControlPlane,
}

impl Killed {
    async fn kill(self, stack: &Stack) -> Result<()> {
        match self {
            Self::PostgreSql => stack.postgres.as_ref().context("no server of its own")?.stop(Signal::SIGKILL).await,
            Self::ControlPlane => stack.control_plane.stop(Signal::SIGKILL).await.map(|_| ()),
        }
    }

    async fn start(self, stack: &Stack) -> Result<()> {
        match self {
            // It refuses to start until the last process of the one that was killed has ended.
            Self::PostgreSql => {
                let server = stack.postgres.as_ref().context("no server of its own")?;
                eventually("PostgreSQL to start", async || server.start().await.ok()).await
            }
            Self::ControlPlane => stack.control_plane.restart().await,
        }
    }
}

/// A key with one shared limit.
struct Metered {
    name: &'static str,
    key: String,
    /// Requests with it that were admitted.
    admitted: u64,
}

impl Metered {
    /// Sends this many requests at once, to the Envoys in rotation.
    async fn page(&mut self, stack: &Stack, requests: usize) -> Result<Vec<Reply>> {
        let replies = page(stack, &self.key, requests).await?;
        self.count(&replies);
        Ok(replies)
    }

    fn count(&mut self, replies: &[Reply]) {
        self.admitted += admitted(replies) as u64;
    }
}

async fn page(stack: &Stack, key: &str, requests: usize) -> Result<Vec<Reply>> {
    let ask = async |number: usize| {
        let envoy = &stack.envoys[number % stack.envoys.len()];
        send(envoy.address(), get_request("/orders", Some(key))?).await
    };
    join_all((0..requests).map(ask)).await.into_iter().collect()
}

fn admitted(replies: &[Reply]) -> usize {
    replies.iter().filter(|reply| reply.status == 200).count()
}

/// Asserts that all requests that were not admitted were refused as `limits_unavailable`.
fn assert_unavailable(replies: &[Reply]) {
    replies
        .iter()
        .filter(|reply| reply.status != 200)
        .for_each(|reply| assert_refused(reply, Outcome::LimitsUnavailable, &[]));
}

async fn waits(stack: &Stack) -> Result<u64> {
    let mut waits = 0;
    for envoy in &stack.envoys {
        waits += envoy.stat(WAITS).await?;
    }
    Ok(waits)
}

/// A key with a rate limit, one with a quota, and one with credits, on every Envoy. No token comes back during the test.
async fn three_keys(stack: &Stack) -> Result<[Metered; 3]> {
    let rest = stack.rest();
    let limit = json!([{"name": "limit", "requests": LIMIT, "window_seconds": 30 * 86_400}]);
    let limit = json!({"email": "limit@example.com", "name": "limit", "rate_limits": limit});
    let quota = json!({"requests": QUOTA, "period": "month", "time_zone": "UTC"});
    let quota = json!({"email": "quota@example.com", "name": "quota", "quota": quota});
    let credits = json!({"email": "credits@example.com", "name": "credits"});
    let metered = async |name, body| {
        let (_, key) = rest.create_with(body).await?;
        Ok::<_, anyhow::Error>(Metered { name, key, admitted: 0 })
    };
    let keys = [metered("limit", limit).await?, metered("quota", quota).await?, metered("credits", credits).await?];
    let user = rest.user("credits@example.com").await?;
    rest.post(&format!("{user}/ledger"), json!({"amount": CREDITS})).await?;
    stack.in_step().await?;
    Ok(keys)
}

/// Requests that wait while something is killed: how they are answered.
async fn answers_of_those_that_wait(stack: &Stack, killed: Killed, keys: &mut [Metered; 3]) -> Result<()> {
    let before = waits(stack).await?;
    // Calls for allowances wait for the lock, so the requests wait for the calls.
    let database = stack.database.clone();
    let lock = "begin; lock table pools in exclusive mode; select pg_sleep(5); commit";
    let lock = tokio::spawn(async move { database.execute(lock).await });
    let locks =
        "select count(*) from pg_locks where relation = 'pools'::regclass and mode = 'ExclusiveLock' and granted";
    eventually("the lock", async || (stack.database.number(locks).await.ok()? > 0).then_some(())).await?;
    let [limit, quota, credits] = &*keys;
    let start = Instant::now();
    let ask = async |key: &str| {
        let replies = page(stack, key, WAITING).await?;
        Ok::<_, anyhow::Error>((replies, start.elapsed()))
    };
    let kill = async {
        eventually("requests to wait", async || (waits(stack).await.ok()? >= before + 24).then_some(())).await?;
        killed.kill(stack).await
    };
    let (limited, quotas, credit, done) = tokio::join!(ask(&limit.key), ask(&quota.key), ask(&credits.key), kill);
    done?;
    for (of, answered) in keys.iter_mut().zip([limited?, quotas?, credit?]) {
        let (replies, took) = answered;
        println!("{killed:?}: {} of {WAITING} with the {} admitted within {took:.0?}", admitted(&replies), of.name);
        // The difference is for a machine that is busy.
        assert!(took < WAIT + Duration::from_millis(700), "{}: {took:?}", of.name);
        if of.name == "limit" {
            assert_eq!(admitted(&replies), WAITING);
        }
        assert_unavailable(&replies);
        of.count(&replies);
    }
    // If PostgreSQL was killed, it fails.
    let _ = lock.await?;
    Ok(())
}

async fn survives(killed: Killed) -> Result<()> {
    let plugin = json!({"rate_limit": null, "limits": {"wait": "0.8s"}});
    let stack = Stack::builder().envoys(2).plugin(&plugin).own_postgres().start().await?;
    let mut keys = three_keys(&stack).await?;
    for of in &mut keys {
        assert_eq!(admitted(&of.page(&stack, 8).await?), 8, "{}", of.name);
    }
    answers_of_those_that_wait(&stack, killed, &mut keys).await?;

    // Rate limits go on, and quotas and credits do not.
    for of in &mut keys {
        let replies = of.page(&stack, 6).await?;
        if of.name == "limit" {
            assert_eq!(admitted(&replies), 6);
        }
        assert_unavailable(&replies);
    }
    killed.start(&stack).await?;

    // All is served again.
    for of in &mut keys {
        let served = async || {
            let reply = send(stack.envoys[0].address(), get_request("/orders", Some(&of.key)).ok()?).await.ok()?;
            assert!([200, 503].contains(&reply.status), "{}: {reply:?}", of.name);
            of.admitted += u64::from(reply.status == 200);
            (reply.status == 200).then_some(())
        };
        eventually(&format!("the {} to be served", of.name), served).await?;
    }
    let [limit, quota, credits] = &mut keys;
    // The Envoys report the requests that they admitted meanwhile.
    let reported = "select coalesce(sum(spent), 0)::text from allowances where kind = 0";
    let used = async || (stack.database.text(reported).await.ok()? == limit.admitted.to_string()).then_some(());
    eventually("the use of the rate limit to be reported", used).await?;
    let left = u64::from(LIMIT) - limit.admitted;
    assert_eq!(admitted(&limit.page(&stack, 20).await?) as u64, left, "after {}", limit.admitted);
    for (of, outcome, all) in [(quota, Outcome::QuotaExceeded, QUOTA), (credits, Outcome::CreditsExhausted, CREDITS)] {
        let mut refused = Vec::new();
        while refused.is_empty() {
            let replies = of.page(&stack, 12).await?;
            refused.extend(replies.into_iter().filter(|reply| reply.status != 200));
        }
        refused.iter().for_each(|reply| assert_refused(reply, outcome, &[]));
        assert_eq!(of.admitted, all, "{}", of.name);
        assert_eq!(admitted(&of.page(&stack, 6).await?), 0, "{}", of.name);
    }
    let admitted = keys.iter().map(|of| of.admitted).sum::<u64>();
    assert_eq!(stack.demo.requests(), admitted);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_are_answered_when_postgresql_is_killed_and_no_limit_is_exceeded_when_it_is_back()
-> Result<()> {
    survives(Killed::PostgreSql).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_are_answered_when_the_control_plane_is_killed_and_no_limit_is_exceeded_when_it_is_back()
-> Result<()> {
    survives(Killed::ControlPlane).await
}

/// PostgreSQL is killed right after an Envoy was granted tokens. If it lost the grant, another Envoy would be granted the same
/// tokens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_postgresql_has_not_forgotten_its_last_grants() -> Result<()> {
    let plugin = json!({"rate_limit": null, "limits": {"wait": "0.8s"}});
    let stack = Stack::builder().envoys(2).plugin(&plugin).own_postgres().start().await?;
    for round in 0..5 {
        let quota = json!({"requests": QUOTA, "period": "month", "time_zone": "UTC"});
        let body = json!({"email": format!("{round}@example.com"), "name": "quota", "quota": quota});
        let (_, key) = stack.rest().create_with(body).await?;
        stack.in_step().await?;
        let at_one = async |place: usize, requests: usize| {
            let ask = async |_| send(stack.envoys[place].address(), get_request("/orders", Some(&key))?).await;
            let replies = join_all((0..requests).map(ask)).await.into_iter().collect::<Result<Vec<_>>>()?;
            Ok::<_, anyhow::Error>(admitted(&replies) as u64)
        };
        let mut all = at_one(0, 1).await? + at_one(0, 1).await?;
        Killed::PostgreSql.kill(&stack).await?;
        Killed::PostgreSql.start(&stack).await?;
        let served = async || at_one(1, 1).await.ok().filter(|admitted| *admitted > 0);
        all += eventually("the quota to be served", served).await?;
        let (other, own) = (at_one(1, 110).await?, at_one(0, 30).await?);
        all += other + own;
        assert_eq!(all, QUOTA, "round {round}: {own} by the Envoy whose grants must not be forgotten");
    }
    Ok(())
}
