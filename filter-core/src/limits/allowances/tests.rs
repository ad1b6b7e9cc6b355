//! Waiting for the control plane, over whole VMs on a mock host. The control plane's side is the real ledger.

use contract::id::{KeyId, OwnerId, ReporterId};
use contract::rate::Rate;
use contract::record::{Budget, Flags, Per, Record};
use limits::message::Grant;
use limits::pool::{Kind, PoolId, Terms};
use limits::{ALONE_MS, LONGEST_WAIT_MS};

use super::*;
use crate::limits::testing::{Envoy, Fate, NOW, Plane, budget, limit, record, shared};
use crate::mock::{MockResponse, new_data};
use crate::vm::TICK_MS as TICK;

mod allowance;
mod failures;

fn with_limit(requests: u32) -> Record {
    Record { rate_limits: vec![shared("own", requests)], ..record(7) }
}

fn rate_pool(record: &Record) -> (PoolId, Terms) {
    let limit = &record.rate_limits[0];
    (PoolId::of_limit(limit, record), Terms::Rate(Rate::of(limit)))
}

fn stock(left: i64) -> Terms {
    Terms::Stock { left, renews_in_ms: None }
}

fn quota_pool(record: &Record, left: i64, renews_in_ms: Option<u64>) -> (PoolId, Terms) {
    (PoolId::of_quota(record.quota.unwrap().per, record), Terms::Stock { left, renews_in_ms })
}

fn unavailable() -> Fate {
    Fate::refused(503, "limits_unavailable", Some(1))
}

/// What another Envoy does with a pool.
fn other(plane: &mut Plane, pool: PoolId, change: impl FnOnce(&mut Ask), now_ms: u64) {
    let mut ask = Ask::new(pool, 1);
    change(&mut ask);
    plane.answer(&Call { reporter: ReporterId([9; 16]), is_last: false, asks: vec![ask] }, now_ms * NS_PER_MS);
}

#[test]
fn a_request_without_an_allowance_waits_unchanged_and_goes_on_with_the_answer() {
    let key = with_limit(100);
    let mut envoy = Envoy::new("", &[("k", key.clone())]);
    let (fate, stream) = envoy.send(0, "k");
    assert_eq!(fate, Fate::Waits);
    // Nothing is changed or counted.
    assert_eq!(stream.headers(), [("x-api-key", "k"), ("x-consumer-id", "forged")]);
    assert_eq!((stream.writes, stream.reply, envoy.vms[0].calls.len()), (0, None, 0));
    assert_eq!(envoy.ask(0, "k"), Fate::Waits);
    envoy.wake(0);
    assert!(!envoy.is_woken(0), "it is woken once for both");
    let (sent, call) = envoy.call(0);
    assert_eq!((sent.cluster.as_str(), sent.timeout.as_millis()), ("cp", 250));
    assert_eq!(sent.header("content-type"), "application/vnd.portcullis.allowances");
    let (pool, terms) = rate_pool(&key);
    let [ask] = call.asks[..] else { panic!("{call:?}") };
    let expected = Ask {
        pool,
        session: NOW,
        granted: 0,
        spent: 0,
        returned: 0,
        ahead_ns: 0,
        interval_ns: 600_000_000,
        need: 2,
        least: 1,
        want: 0,
    };
    assert_eq!((ask, call.is_last), (expected, false));

    let mut plane = Plane::with([(pool, terms)]);
    let answer = MockResponse::ok(plane.answer(&call, NOW * NS_PER_MS).write().unwrap());
    envoy.vms[0].calls.push(sent);
    assert_eq!(envoy.respond(0, &answer), [Fate::Admitted, Fate::Admitted]);
    assert_eq!(envoy.metric("limits.waits_total"), 2);
    assert_eq!(envoy.metric("limits.calls_total"), 1);
    envoy.tick_at(0, NOW + TICK);
    assert_eq!(envoy.metric("decisions.allowed_total"), 2);
    // On the tick, the filter reports what was spent, and asks for twice as much ahead.
    let (_, call) = envoy.call(0);
    assert_eq!((call.asks[0].spent, call.asks[0].need, call.asks[0].want), (2, 0, 4));
}

#[test]
fn one_call_is_under_way_at_a_time() {
    let (one, two) = (with_limit(100), Record { key_id: KeyId([9; 16]), ..with_limit(100) });
    let mut plane = Plane::with([rate_pool(&one), rate_pool(&two)]);
    let mut envoy = Envoy::new("", &[("one", one), ("two", two.clone())]);
    envoy.ask(0, "one");
    envoy.wake(0);
    assert_eq!(envoy.ask(0, "two"), Fate::Waits);
    assert!(!envoy.is_woken(0), "the answer comes first");
    assert_eq!(envoy.tick_at(0, NOW + TICK), [Fate::Waits, Fate::Waits]);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted, Fate::Waits]);
    let pools = envoy.call(0).1.asks.iter().map(|ask| ask.pool).collect::<Vec<_>>();
    assert!(pools.contains(&rate_pool(&two).0), "{pools:?}");
}

#[test]
fn an_exhausted_pool_refuses_after_one_answer_and_then_without_a_call() {
    let key = Record { quota: budget(3), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 0, Some(90_000))]);
    let mut envoy = Envoy::new("", &[("k", key.clone())]);
    let refused = Fate::refused(429, "quota_exceeded", Some(90));
    envoy.ask(0, "k");
    envoy.wake(0);
    assert_eq!(envoy.serve(0, &mut plane), std::slice::from_ref(&refused));
    assert_eq!((envoy.ask(0, "k"), envoy.is_woken(0), envoy.vms[0].calls.len()), (refused, false, 0));
    // Once it has been filled, the Envoy asks again.
    envoy.update(2, &[("k", Record { quota: budget(4), ..key.clone() })]);
    plane.pools.insert(quota_pool(&key, 5, None).0, limits::ledger::Pool::new(stock(5)));
    assert_eq!(envoy.ask(0, "k"), Fate::Waits);
    envoy.wake(0);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted]);
}

#[test]
fn a_price_above_the_balance_is_refused_without_a_time_to_retry() {
    let key = Record { cost: 10, credits: budget(1), ..record(7) };
    // Of an empty balance it is not known when it is filled.
    for (left, retry_after_s) in [(9, None), (0, Some(60))] {
        let mut plane = Plane::with([(PoolId::of_credits(key.owner_id), stock(left))]);
        let mut envoy = Envoy::new("", &[("k", key.clone())]);
        envoy.ask(0, "k");
        envoy.wake(0);
        let refused = Fate::refused(429, "credits_exhausted", retry_after_s);
        assert_eq!(envoy.serve(0, &mut plane), std::slice::from_ref(&refused));
        assert_eq!((envoy.ask(0, "k"), envoy.is_woken(0)), (refused, false));
    }
}

#[test]
fn a_request_waits_for_what_other_envoys_hand_back() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 100, None);
    let mut plane = Plane::with([(pool, terms)]);
    other(&mut plane, pool, |ask| ask.need = 100, NOW);
    let mut envoy = Envoy::new("", &[("k", key)]);
    envoy.ask(0, "k");
    envoy.wake(0);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Waits]);
    assert!(!envoy.is_woken(0) && envoy.vms[0].calls.is_empty(), "it pauses before it asks again");
    assert_eq!(envoy.vms[0].filter.tick_ms(), AGAIN_MS);
    // A tick before its time.
    assert_eq!(envoy.tick_at(0, NOW + AGAIN_MS), []);
    assert_eq!(envoy.vms[0].filter.tick_ms(), TICK);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Waits]);
    other(&mut plane, pool, |ask| (ask.granted, ask.returned) = (100, 100), NOW + AGAIN_MS);
    envoy.tick_at(0, NOW + 2 * AGAIN_MS);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted]);
    assert_eq!(envoy.metric("limits.waits_total"), 1);
}

#[test]
fn after_the_longest_wait_a_request_is_refused() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 100, None);
    let mut plane = Plane::with([(pool, terms)]);
    other(&mut plane, pool, |ask| ask.need = 100, NOW);
    let mut envoy = Envoy::new("", &[("k", key)]);
    envoy.ask(0, "k");
    envoy.wake(0);
    let mut now = NOW;
    while now < NOW + LONGEST_WAIT_MS - AGAIN_MS {
        // The other Envoy reports, and keeps what it holds.
        other(&mut plane, pool, |ask| ask.granted = 100, now);
        let served = if envoy.vms[0].calls.is_empty() { vec![Fate::Waits] } else { envoy.serve(0, &mut plane) };
        assert_eq!(served, [Fate::Waits], "{}", now - NOW);
        now += AGAIN_MS;
        envoy.tick_at(0, now);
    }
    let fates = envoy.tick_at(0, NOW + LONGEST_WAIT_MS + TICK);
    assert_eq!(fates, [Fate::refused(429, "quota_exceeded", Some(60))]);
}

#[test]
fn a_request_that_began_to_wait_before_the_clock_stepped_back_waits_no_longer() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 100, None);
    let mut plane = Plane::with([(pool, terms)]);
    other(&mut plane, pool, |ask| ask.need = 100, NOW);
    let mut envoy = Envoy::new("", &[("k", key)]);
    envoy.host.set_now_ms(NOW + 5_000);
    other(&mut plane, pool, |ask| ask.granted = 100, NOW + 5_000);
    envoy.ask(0, "k");
    envoy.wake(0);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Waits]);
    assert_eq!(envoy.tick_at(0, NOW + TICK), [Fate::refused(429, "quota_exceeded", Some(60))]);
}

#[test]
fn of_several_requests_only_as_many_wait_as_others_hold_tokens() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 2, None);
    let mut plane = Plane::with([(pool, terms)]);
    other(&mut plane, pool, |ask| ask.need = 2, NOW);
    let mut envoy = Envoy::new("", &[("k", key)]);
    for _ in 0..3 {
        envoy.ask(0, "k");
    }
    envoy.wake(0);
    let refused = Fate::refused(429, "quota_exceeded", Some(60));
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Waits, Fate::Waits, refused.clone()]);
    assert_eq!(envoy.ask(0, "k"), refused);
}

#[test]
fn a_key_that_is_revoked_while_its_request_waits_is_refused() {
    let key = with_limit(100);
    let mut plane = Plane::with([rate_pool(&key)]);
    let mut envoy = Envoy::new("", &[("k", key.clone())]);
    envoy.ask(0, "k");
    envoy.wake(0);
    envoy.update(2, &[("k", Record { flags: Flags::REVOKED, ..key })]);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::refused(401, "revoked", None)]);
}

#[test]
fn the_token_of_a_client_that_has_left_serves_the_next_request() {
    let key = with_limit(100);
    let mut plane = Plane::with([rate_pool(&key)]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    envoy.ask(0, "k");
    envoy.wake(0);
    envoy.vms[0].waiting.clear();
    assert_eq!(envoy.serve(0, &mut plane), []);
    assert_eq!(envoy.ask(0, "k"), Fate::Admitted);
    assert_eq!((envoy.is_woken(0), envoy.vms[0].calls.len()), (false, 0));
    envoy.tick_at(0, NOW + TICK);
    assert_eq!(envoy.metric("decisions.allowed_total"), 1);
}

#[test]
fn keys_of_one_owner_and_plan_share_limits_and_quota_of_the_owner() {
    let of_owner = |number: u8| {
        let limit = contract::record::RateLimit { per: Per::Owner, ..shared("own", 10) };
        let quota = Some(Budget { fill: 1, resets_at_s: None, per: Per::Owner });
        Record { rate_limits: vec![limit], quota, ..record(number) }
    };
    let (one, two) = (of_owner(1), of_owner(2));
    let stranger = Record { owner_id: OwnerId([5; 16]), ..of_owner(3) };
    assert_eq!(rate_pool(&one).0, rate_pool(&two).0);
    let (pool, terms) = rate_pool(&one);
    let quotas = [quota_pool(&one, 100, None), quota_pool(&stranger, 100, None)];
    let mut plane = Plane::with([(pool, terms), rate_pool(&stranger)].into_iter().chain(quotas));
    let mut envoy = Envoy::new("", &[("one", one), ("two", two), ("stranger", stranger)]);
    for _ in 0..6 {
        envoy.ask(0, "one");
        envoy.ask(0, "two");
    }
    envoy.wake(0);
    let fates = envoy.serve(0, &mut plane);
    let limited = Fate::refused(429, "rate_limited", Some(6));
    assert_eq!(fates[..10], vec![Fate::Admitted; 10]);
    assert_eq!(fates[10..], [limited.clone(), limited]);
    assert_eq!(envoy.ask(0, "stranger"), Fate::Waits);
}

#[test]
fn a_local_limit_beside_a_shared_one_is_not_taken_while_the_request_waits() {
    let key = Record { rate_limits: vec![limit("alone", 1), shared("own", 100)], ..record(7) };
    let pool = (PoolId::of_limit(&key.rate_limits[1], &key), Terms::Rate(Rate::of(&key.rate_limits[1])));
    let mut plane = Plane::with([pool]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    assert_eq!((envoy.ask(0, "k"), envoy.ask(0, "k")), (Fate::Waits, Fate::Waits));
    envoy.wake(0);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted, Fate::refused(429, "rate_limited", Some(60))]);
}
