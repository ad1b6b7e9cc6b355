//! Limits that all Envoys share, at one Envoy: requests that wait for an allowance, and what becomes
//! of them if the control plane does not answer, the client leaves or the filter's VM ends.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use contract::id::OwnerId;
use contract::outcome::Outcome;
use contract::rate::Rate;
use contract::record::{Budget, Flags, Per, RateLimit, Record, Requires};
use futures_util::future::join_all;
use limits::pool::PoolId;
use portcullis_tests::expect::assert_refused;
use portcullis_tests::fake_control_plane::Change;
use portcullis_tests::fake_limits::Mode;
use portcullis_tests::filter_harness::{FilterHarness, record, with};
use portcullis_tests::http::{Reply, get_request};
use portcullis_tests::wait::eventually;
use serde_json::{Value, json};

/// A window so long that a limit refills nothing during a test, however slow the machine.
const MONTH_S: u32 = 30 * 86_400;
const OWNER: OwnerId = OwnerId([0x22; 16]);

fn limited(number: u8, requests: u32) -> Record {
    let limit =
        RateLimit { name: "month".into(), requests, window_s: MONTH_S, burst: requests, shared: true, per: Per::Key };
    with(number, |r| r.rate_limits = vec![limit])
}

fn pool_of(record: &Record) -> (PoolId, Rate) {
    let limit = &record.rate_limits[0];
    (PoolId::of_limit(limit, record), Rate::of(limit))
}

const fn budget(fill: u32, resets_at_s: Option<u64>) -> Option<Budget> {
    Some(Budget { fill, resets_at_s, per: Per::Key })
}

fn metered(number: u8, quota: Option<Budget>, credits: Option<Budget>) -> Record {
    with(number, |r| {
        r.quota = quota;
        r.credits = credits;
        r.requires = Requires::BUDGETS;
    })
}

fn quota_of(number: u8) -> PoolId {
    PoolId::of_quota(Per::Key, &record(number))
}

/// Sends this many requests at once.
async fn at_once(harness: &FilterHarness, requests: usize, path: &str, key: &str) -> Result<Vec<Reply>> {
    join_all((0..requests).map(|_| harness.get(path, Some(key)))).await.into_iter().collect()
}

fn admitted(replies: &[Reply]) -> usize {
    replies.iter().filter(|reply| reply.status == 200).count()
}

fn code(reply: &Reply) -> Result<String> {
    let body: Value = serde_json::from_slice(&reply.body)?;
    Ok(body["code"].as_str().context("no code")?.to_owned())
}

#[tokio::test]
async fn requests_that_come_at_once_get_all_tokens_of_a_limit_and_no_more() -> Result<()> {
    let keys = [("limited", limited(1, 12)), ("quota", metered(2, budget(1, None), None))];
    let harness = FilterHarness::start(&keys).await?;
    // Two Envoys are live, so this one asks for each of its allowances.
    harness.control_plane.limits().live = 2;
    harness.control_plane.limits().set_left(quota_of(2), 12, Some(90_000));
    for (key, outcome) in [("limited", Outcome::RateLimited), ("quota", Outcome::QuotaExceeded)] {
        let replies = at_once(&harness, 20, "/", key).await?;
        assert_eq!(admitted(&replies), 12, "{key}");
        for reply in replies.iter().filter(|reply| reply.status != 200) {
            let more: &[&str] = if key == "limited" { &["ratelimit", "ratelimit-policy"] } else { &[] };
            assert_refused(reply, outcome, more);
        }
    }
    let reply = harness.get("/", Some("quota")).await?;
    let wait: u64 = reply.header("retry-after").context("no retry-after")?.parse()?;
    assert!((1..=90).contains(&wait), "{wait}");
    assert_eq!(harness.demo.requests(), 24);
    Ok(())
}

#[tokio::test]
async fn requests_beyond_an_empty_limit_cause_no_calls() -> Result<()> {
    let harness = FilterHarness::start(&[("limited", limited(1, 3))]).await?;
    harness.control_plane.limits().live = 2;
    assert_eq!(admitted(&at_once(&harness, 5, "/", "limited").await?), 3);
    let needs = || {
        let limits = harness.control_plane.limits();
        limits.calls.iter().flat_map(|call| &call.asks).filter(|ask| ask.need > 0).count()
    };
    let before = needs();
    let (allowed, reply) = harness.get_many(200, "/", Some("limited")).await?;
    assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
    assert_eq!((allowed, needs()), (0, before));
    Ok(())
}

#[tokio::test]
async fn requests_wait_for_tokens_of_another_envoy_but_not_for_ever() -> Result<()> {
    let (given, kept) = (limited(1, 10), limited(2, 10));
    let harness = FilterHarness::start(&[("given", given.clone()), ("kept", kept.clone())]).await?;
    {
        let mut limits = harness.control_plane.limits();
        limits.live = 2;
        let (pool, rate) = pool_of(&given);
        limits.let_another_hold(pool, Some(&rate), 6, true);
        let (pool, rate) = pool_of(&kept);
        limits.let_another_hold(pool, Some(&rate), 6, false);
    }
    assert_eq!(admitted(&at_once(&harness, 10, "/", "given").await?), 10);
    let start = Instant::now();
    let replies = at_once(&harness, 10, "/", "kept").await?;
    assert_eq!(admitted(&replies), 4);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    Ok(())
}

#[tokio::test]
async fn a_request_above_the_balance_gets_no_retry_after_and_cheaper_requests_pass() -> Result<()> {
    let policies = json!({"dear": {"cost": 900}, "free": {"cost": 0}});
    let keys = [("k", metered(1, None, budget(1, None)))];
    let harness = FilterHarness::builder().policies(&policies).route("/dear", "dear").route("/free", "free");
    let harness = harness.start(&keys).await?;
    let credits = PoolId::of_credits(OWNER);
    harness.control_plane.limits().set_left(credits, 1_000, None);
    assert_eq!(harness.get("/dear", Some("k")).await?.status, 200);
    let reply = harness.get("/dear", Some("k")).await?;
    let body: Value = serde_json::from_slice(&reply.body)?;
    let detail = "This request costs more credits than the owner of this API key has. Top them up to go on: waiting does not help.";
    assert_eq!((reply.status, reply.header("retry-after")), (429, None));
    assert_eq!((&body["code"], &body["detail"]), (&json!("credits_exhausted"), &json!(detail)));
    // A hundred are left. A call that the machine is too busy to answer in time refuses a request with 503.
    let (mut allowed, mut refused) = (0, None);
    while refused.is_none() {
        let reply = harness.get("/", Some("k")).await?;
        allowed += usize::from(reply.status == 200);
        refused = Some(reply).filter(|reply| reply.status == 429);
    }
    assert_eq!(allowed, 100);
    assert_refused(&refused.context("none was refused")?, Outcome::CreditsExhausted, &[]);
    assert_eq!(harness.get("/free", Some("k")).await?.status, 200);
    let cost = async || (harness.control_plane.reported_cost(Outcome::Allowed) == 1_000).then_some(());
    eventually("a thousand credits to be reported", cost).await?;
    // A top-up reaches the filter as a change of the record.
    harness.control_plane.limits().set_left(credits, 950, None);
    harness.change(&[Change::Key("k", Box::new(metered(1, None, budget(2, None))))]).await?;
    assert_eq!(harness.get("/dear", Some("k")).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn a_request_that_the_credits_refuse_leaves_the_quota_as_it_was() -> Result<()> {
    let keys = [("k", metered(1, budget(1, None), budget(1, None)))];
    let harness = FilterHarness::builder().policies(&json!({"free": {"cost": 0}})).route("/free", "free");
    let harness = harness.start(&keys).await?;
    harness.control_plane.limits().set_left(quota_of(1), 5, None);
    harness.control_plane.limits().set_left(PoolId::of_credits(OWNER), 2, None);
    let (allowed, reply) = harness.get_many(8, "/", Some("k")).await?;
    assert_eq!((allowed, code(&reply)?.as_str()), (2, "credits_exhausted"));
    let (allowed, reply) = harness.get_many(8, "/free", Some("k")).await?;
    assert_eq!((allowed, code(&reply)?.as_str()), (3, "quota_exceeded"));
    Ok(())
}

#[tokio::test]
async fn a_record_that_says_exhausted_refuses_until_its_time() -> Result<()> {
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let mut exhausted = metered(1, budget(1, Some(now_s + 50_000)), None);
    exhausted.flags = Flags::QUOTA_EXCEEDED;
    let harness = FilterHarness::start(&[("k", exhausted)]).await?;
    let reply = harness.get("/", Some("k")).await?;
    assert_refused(&reply, Outcome::QuotaExceeded, &[]);
    let wait: u64 = reply.header("retry-after").unwrap_or_default().parse()?;
    assert!((49_000..=50_000).contains(&wait), "{wait}");
    assert!(harness.control_plane.limits().calls.is_empty());
    Ok(())
}

#[tokio::test]
async fn without_an_answer_rate_limits_go_on_at_the_safe_rate_and_quotas_refuse_or_pass_as_configured() -> Result<()> {
    for (mode, quota_mode, of_quota) in [(Mode::Refuse, "deny", 503), (Mode::Hang, "allow", 200)] {
        let plugin = json!({"on_limits_unreachable": {"quotas": quota_mode}});
        let keys = [("limited", limited(1, 40)), ("quota", metered(2, budget(1, None), None))];
        let harness = FilterHarness::builder().plugin(plugin).start(&keys).await?;
        {
            let mut limits = harness.control_plane.limits();
            limits.live = 4;
            limits.mode = mode;
        }
        // No Envoy is known to be live yet: the burst of the whole limit is admitted, and nothing after it.
        let (allowed, reply) = harness.get_many(50, "/", Some("limited")).await?;
        assert_eq!(allowed, 40, "{mode:?}");
        assert_refused(&reply, Outcome::RateLimited, &["ratelimit", "ratelimit-policy"]);
        let reply = harness.get("/", Some("quota")).await?;
        assert_eq!(reply.status, of_quota, "{mode:?}");
        if of_quota == 503 {
            assert_refused(&reply, Outcome::LimitsUnavailable, &[]);
        }
        // Once the control plane answers again, the filter reports all that was admitted meanwhile, and asks for the quota.
        // A request that was let through unchecked may be counted now or later.
        harness.control_plane.limits().set_left(quota_of(2), 2, None);
        harness.control_plane.limits().mode = Mode::Answer;
        let (pool, _) = pool_of(&limited(1, 40));
        let known = async || {
            let limits = harness.control_plane.limits();
            let spent = limits.calls.iter().flat_map(|call| &call.asks).filter(|ask| ask.pool == pool);
            spent.map(|ask| ask.spent).max().filter(|spent| *spent >= 40)
        };
        eventually("the usage to be reported", known).await?;
        assert_eq!(harness.control_plane.limits().left(&pool), 0);
        let answered = async || (harness.get("/", Some("quota")).await.ok()?.status == 200).then_some(());
        eventually("the quota to be asked for", answered).await?;
    }
    Ok(())
}

#[tokio::test]
async fn without_an_answer_each_kind_of_limit_follows_the_operators_choice() -> Result<()> {
    for (mode, [rate_limits, quotas, credits], expected) in [
        (Mode::Refuse, ["deny", "allow", "deny"], [503, 200, 503]),
        (Mode::Hang, ["allow", "deny", "allow"], [200, 503, 200]),
    ] {
        let choice = json!({"rate_limits": rate_limits, "quotas": quotas, "credits": credits});
        let keys = [
            ("limited", limited(1, 5)),
            ("quota", metered(2, budget(1, None), None)),
            ("credits", metered(3, None, budget(1, None))),
        ];
        let plugin = json!({"on_limits_unreachable": choice});
        let harness = FilterHarness::builder().plugin(plugin).start(&keys).await?;
        harness.control_plane.limits().live = 2;
        harness.control_plane.limits().mode = mode;
        for ((key, _), status) in keys.iter().zip(expected) {
            // More than the limit.
            for reply in at_once(&harness, 8, "/", key).await? {
                assert_eq!(reply.status, status, "{key} {choice}");
                if status == 503 {
                    assert_refused(&reply, Outcome::LimitsUnavailable, &[]);
                }
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_delays_no_other_request() -> Result<()> {
    let harness = FilterHarness::start(&[("limited", limited(1, 5))]).await?;
    harness.control_plane.limits().live = 2;
    harness.control_plane.limits().mode = Mode::Hang;
    let left = tokio::time::timeout(Duration::from_millis(20), harness.get("/", Some("limited"))).await;
    harness.control_plane.limits().mode = Mode::Answer;
    assert!(left.is_err(), "the client has left");
    // Those that waited for the same call are decided at the safe rate, half of the limit. The client may be noticed to have
    // left only after its request was admitted.
    let admitted = admitted(&at_once(&harness, 8, "/", "limited").await?);
    assert!((3..=5).contains(&admitted), "{admitted}");
    assert!((admitted..=5).contains(&usize::try_from(harness.demo.requests())?), "{}", harness.demo.requests());
    Ok(())
}

#[tokio::test]
async fn a_key_that_is_revoked_while_its_request_waits_is_refused() -> Result<()> {
    let limited = limited(1, 5);
    let harness = FilterHarness::builder().plugin(json!({"limits": {"wait": "0.8s"}}));
    let harness = harness.start(&[("limited", limited.clone())]).await?;
    harness.control_plane.limits().live = 2;
    harness.control_plane.limits().mode = Mode::Hang;
    let revoked = Record { flags: Flags::REVOKED, ..limited };
    let change = async {
        eventually("the request to wait", async || {
            (harness.envoy.stat("wasmcustom.portcullis.limits.waits_total").await.ok()? > 0).then_some(())
        })
        .await?;
        harness.change(&[Change::Key("limited", Box::new(revoked))]).await
    };
    let (reply, changed) = tokio::join!(harness.get("/", Some("limited")), change);
    changed?;
    assert_refused(&reply?, Outcome::Revoked, &[]);
    assert_eq!(harness.demo.requests(), 0);
    Ok(())
}

#[tokio::test]
async fn requests_that_wait_in_a_vm_that_traps_end_with_the_stream_idle_timeout() -> Result<()> {
    let harness = FilterHarness::builder().that_can_trap();
    let harness = harness
        .edit("stream_idle_timeout: 60s", "stream_idle_timeout: 2s")
        .start(&[("limited", limited(1, 5))])
        .await?;
    harness.control_plane.limits().live = 2;
    harness.control_plane.limits().mode = Mode::Hang;
    let traps = async {
        eventually("requests to wait", async || {
            (harness.envoy.stat("wasmcustom.portcullis.limits.waits_total").await.ok()? >= 8).then_some(())
        })
        .await?;
        // On many connections, so that each worker gets one.
        let trap = async |_| {
            let mut request = get_request("/", None)?;
            request.headers_mut().insert("x-portcullis-trap", "1".parse()?);
            harness.send(request).await
        };
        join_all((0..8).map(trap)).await;
        Ok::<_, anyhow::Error>(())
    };
    let start = Instant::now();
    let (replies, trapped) = tokio::join!(at_once(&harness, 8, "/", "limited"), traps);
    trapped?;
    // Those of a VM that ended get the time-out, which has no body; those of another, if it went on, the safe rate.
    let (timed_out, others): (Vec<_>, Vec<_>) =
        replies?.into_iter().partition(|reply| reply.status == 503 && reply.body.is_empty());
    assert!(!timed_out.is_empty() && others.iter().all(|reply| reply.status == 200), "{timed_out:?} {others:?}");
    assert!(start.elapsed() > Duration::from_millis(1_900), "{:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    harness.control_plane.limits().mode = Mode::Answer;
    let serves = async || (harness.get("/", Some("limited")).await.ok()?.status != 503).then_some(());
    eventually("a new VM to serve", serves).await
}

#[tokio::test]
async fn an_envoy_that_is_alone_asks_before_the_first_request_of_a_key_and_no_request_waits() -> Result<()> {
    let harness = FilterHarness::start(&[]).await?;
    let (limited, metered) = (limited(1, 500), metered(2, budget(1, None), None));
    let pools = [pool_of(&limited).0, quota_of(2)];
    harness.control_plane.limits().set_left(quota_of(2), 500, None);
    let keys = [Change::Key("limited", Box::new(limited)), Change::Key("quota", Box::new(metered))];
    harness.change(&keys).await?;
    // The leader has one call under way at a time: a call after those that ask shows that they were answered.
    let asked = async || {
        let limits = harness.control_plane.limits();
        let (_, answered) = limits.calls.split_last()?;
        let is_asked = |pool| answered.iter().flat_map(|call| &call.asks).any(|ask| ask.pool == pool);
        pools.into_iter().all(is_asked).then_some(())
    };
    eventually("the leader to ask for both keys", asked).await?;
    for key in ["limited", "quota"] {
        let (allowed, _) = harness.get_many(300, "/", Some(key)).await?;
        assert_eq!(allowed, 300, "{key}");
    }
    assert_eq!(harness.envoy.stat("wasmcustom.portcullis.limits.waits_total").await?, 0);
    for pool in pools {
        let reported = async || (harness.control_plane.limits().left(&pool) == 200).then_some(());
        eventually("the spent tokens to be reported", reported).await?;
    }
    Ok(())
}
