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

const MINUTE: u64 = 60_000;

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
    let mut ask =
        Ask { pool, session: 1, granted: 0, spent: 0, returned: 0, ahead_ns: 0, interval_ns: 0, need: 0, want: 0 };
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
    // The tick tells what was spent, and asks for twice as much ahead.
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

/// A key with all three kinds of limits.
fn metered(requests: u32) -> Record {
    Record { quota: budget(1), credits: budget(1), ..with_limit(requests) }
}

#[test]
fn without_an_answer_the_operators_choice_applies_to_each_kind() {
    let only = |kind: Kind| {
        let all = metered(2);
        match kind {
            Kind::Rate => with_limit(2),
            Kind::Quota => Record { rate_limits: vec![], credits: None, ..all },
            Kind::Credits => Record { rate_limits: vec![], quota: None, ..all },
        }
    };
    let limited = Fate::refused(429, "rate_limited", Some(30));
    let cases = [
        ("{}", Kind::Rate, vec![Fate::Admitted, Fate::Admitted, limited]),
        (r#"{"rate_limits": "deny"}"#, Kind::Rate, vec![unavailable(); 3]),
        (r#"{"rate_limits": "allow"}"#, Kind::Rate, vec![Fate::Admitted; 3]),
        ("{}", Kind::Quota, vec![unavailable(); 3]),
        (r#"{"quotas": "allow", "rate_limits": "deny"}"#, Kind::Quota, vec![Fate::Admitted; 3]),
        ("{}", Kind::Credits, vec![unavailable(); 3]),
        (r#"{"credits": "allow"}"#, Kind::Credits, vec![Fate::Admitted; 3]),
    ];
    for (modes, kind, expected) in cases {
        let fields = format!(r#", "on_limits_unreachable": {modes}"#);
        // A call without an answer, an answer that is none, and an Envoy whose requests do not wait.
        for response in [MockResponse::default(), MockResponse::of_status(503), MockResponse::ok(b"?".to_vec())] {
            let mut envoy = Envoy::new(&fields, &[("k", only(kind))]);
            for _ in 0..3 {
                assert_eq!(envoy.ask(0, "k"), Fate::Waits);
            }
            envoy.wake(0);
            assert_eq!(envoy.respond(0, &response), expected, "{kind:?} {modes}");
            assert_eq!(envoy.metric("limits.call_failures_total"), 1);
        }
        let fields = format!(r#"{fields}, "limits": {{"wait": "0s"}}"#);
        let mut envoy = Envoy::new(&fields, &[("k", only(kind))]);
        let fates: Vec<Fate> = (0..3).map(|_| envoy.ask(0, "k")).collect();
        assert_eq!(fates, expected, "{kind:?} {modes}");
        assert_eq!(envoy.metric("limits.waits_total"), 0);
        envoy.wake(0);
        let (sent, call) = envoy.call(0);
        assert_eq!((sent.timeout.as_millis(), call.asks.len()), (50, 1));
        assert_eq!(call.asks[0].need, 1);
    }
}

#[test]
fn after_two_failures_no_request_waits_until_a_call_on_a_tick_is_answered() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 80, None)]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    envoy.ask(0, "k");
    envoy.wake(0);
    assert_eq!(envoy.respond(0, &MockResponse::default()), [unavailable()]);
    assert_eq!(envoy.host.take_log().len(), 1, "only that the store is loaded");
    // The call that follows at once fails too.
    assert_eq!(envoy.respond(0, &MockResponse::of_status(403)), []);
    let why = "allowances of shared limits cannot be asked for: the sync key may not ask for allowances (403): \
               it needs the scope sync, and a reporter of its own";
    assert_eq!(envoy.host.take_log(), [("warn", why.to_owned())]);
    assert_eq!((envoy.ask(0, "k"), envoy.is_woken(0)), (unavailable(), false));
    for tick in 1..4 {
        envoy.tick_at(0, NOW + tick * TICK);
        assert_eq!(envoy.respond(0, &MockResponse::default()), []);
        assert_eq!(envoy.ask(0, "k"), unavailable());
    }
    assert_eq!(envoy.host.take_log(), [], "the cause is logged once");
    envoy.tick_at(0, NOW + 4 * TICK);
    envoy.serve(0, &mut plane);
    assert_eq!(envoy.ask(0, "k"), Fate::Admitted, "the call on the tick asked for what was missing");
    assert_eq!(envoy.metric("limits.call_failures_total"), 5);
}

#[test]
fn where_no_request_waits_the_envoy_asks_for_what_requests_missed() {
    let fields = r#", "limits": {"wait": "0s"}"#;
    let (one, two) = (Record { quota: budget(1), ..record(7) }, Record { quota: budget(1), ..record(9) });
    let mut plane = Plane::with([quota_pool(&one, 80, None), quota_pool(&two, 0, Some(5_000))]);
    let mut envoy = Envoy::new(fields, &[("one", one), ("two", two)]);
    assert_eq!(envoy.ask(0, "one"), unavailable());
    envoy.wake(0);
    assert_eq!(envoy.ask(0, "two"), unavailable());
    envoy.serve(0, &mut plane);
    envoy.serve(0, &mut plane);
    assert_eq!(envoy.ask(0, "one"), Fate::Admitted);
    assert_eq!(envoy.ask(0, "two"), Fate::refused(429, "quota_exceeded", Some(5)));
}

#[test]
fn an_envoy_without_the_cluster_or_without_randomness_cannot_ask() {
    type Break = fn(&Envoy);
    let breaks: [Break; 2] = [|envoy| envoy.host.without_cluster(true), |envoy| envoy.host.without_randomness(true)];
    for break_it in breaks {
        let mut envoy = Envoy::new("", &[("k", Record { quota: budget(1), ..record(7) })]);
        break_it(&envoy);
        envoy.host.take_log();
        envoy.ask(0, "k");
        envoy.wake(0);
        assert_eq!(envoy.tick_at(0, NOW + TICK), [Fate::Waits]);
        assert_eq!(envoy.metric("limits.call_failures_total"), 2);
        let log = envoy.host.take_log();
        assert!(
            log.iter().any(|(_, line)| line.ends_with("cannot be asked for: the call could not be sent")),
            "{log:?}"
        );
        assert_eq!(envoy.tick_at(0, NOW + 2 * TICK), [unavailable()]);
    }
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
fn all_vms_spend_from_one_allowance() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 1_000, None)]);
    let mut envoy = Envoy::with_vms(2, "", &[("k", key)]);
    for _ in 0..5 {
        envoy.ask(0, "k");
    }
    envoy.wake(0);
    envoy.serve(0, &mut plane);
    envoy.tick_at(0, NOW + TICK);
    envoy.serve(0, &mut plane);
    // The other VM has not ticked since: it does not know that the Envoy is in contact with the control plane.
    assert_eq!(envoy.ask(1, "k"), Fate::Waits);
    assert_eq!(envoy.tick_at(1, NOW + TICK), [Fate::Admitted]);
    assert_eq!(envoy.call(1).1.asks[0].spent, 6, "it tells that");
    assert_eq!(envoy.admitted(1, "k", 2), 2);
    assert_eq!(envoy.admitted(0, "k", 2), 2);
    let (pool, ..) = quota_pool(&Record { quota: budget(1), ..record(7) }, 0, None);
    let cell = envoy.vms[0].filter.data().get(cell_of(pool.subject)).unwrap();
    assert_eq!(Entries::read(&cell.value).holding(&pool).spent, 10);
}

#[test]
fn an_envoy_asks_ahead_when_its_allowance_runs_low() {
    let key = with_limit(1_000);
    let mut plane = Plane::with([rate_pool(&key)]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    for _ in 0..8 {
        envoy.ask(0, "k");
    }
    envoy.wake(0);
    envoy.serve(0, &mut plane);
    envoy.tick_at(0, NOW + TICK);
    envoy.serve(0, &mut plane);
    // It holds 16, twice what it spent in a tick.
    assert_eq!((envoy.admitted(0, "k", 8), envoy.is_woken(0)), (8, false));
    envoy.host.set_now_ms(NOW + TICK + 30);
    assert_eq!((envoy.ask(0, "k"), envoy.is_woken(0)), (Fate::Admitted, true));
    envoy.wake(0);
    let call = envoy.call(0).1;
    assert_eq!((call.asks[0].need, call.asks[0].spent, call.asks[0].want), (0, 17, 18));
}

#[test]
fn a_recalled_allowance_is_handed_back_at_once() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 100, None);
    let mut plane = Plane::with([(pool, terms)]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    for _ in 0..4 {
        envoy.ask(0, "k");
    }
    envoy.wake(0);
    envoy.serve(0, &mut plane);
    envoy.tick_at(0, NOW + TICK);
    envoy.serve(0, &mut plane);
    other(&mut plane, pool, |ask| ask.need = 100, NOW + TICK);
    envoy.tick_at(0, NOW + 2 * TICK);
    envoy.serve(0, &mut plane);
    let (_, call) = envoy.call(0);
    assert_eq!((call.asks[0].spent, call.asks[0].returned, call.asks[0].want), (4, 4, 0));
}

#[test]
fn an_idle_allowance_is_handed_back_and_forgotten() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 1_000, None);
    let mut plane = Plane::with([(pool, terms)]);
    let mut envoy = Envoy::with_vms(2, "", &[("k", key)]);
    envoy.ask(0, "k");
    envoy.wake(0);
    envoy.serve(0, &mut plane);
    let mut now = NOW;
    let mut returned = Vec::new();
    while now < NOW + 12 * MINUTE {
        now += 10_000;
        envoy.tick_at(0, now);
        envoy.tick_at(1, now);
        assert_eq!(envoy.vms[1].calls.len(), 0, "only the leader shows that the Envoy is live");
        while !envoy.vms[0].calls.is_empty() {
            let (sent, call) = envoy.call(0);
            // The usage report has what was spent.
            plane.pools.values_mut().flat_map(|pool| &mut pool.holders).for_each(|holder| holder.spent = 1);
            returned.extend(call.asks.iter().filter(|ask| ask.returned > 0).map(|_| (now - NOW) / MINUTE));
            let answer = plane.answer(&call, now * NS_PER_MS);
            envoy.respond_to(0, &sent, &MockResponse::ok(answer.write().unwrap()));
        }
    }
    assert_eq!(returned.len(), 1, "{returned:?}");
    assert!((5..=10).contains(&returned[0]), "{returned:?}");
    assert_eq!(plane.pools[&pool].held(), 0);
    let cell = envoy.vms[0].filter.data().get(cell_of(pool.subject)).unwrap();
    assert!(cell.value.is_empty(), "{:?}", Entries::read(&cell.value));
    // Without use, it does not call for ever.
    envoy.tick_at(0, NOW + 30 * MINUTE);
    assert_eq!(envoy.vms[0].calls.len(), 0);
}

#[test]
fn a_vm_that_ends_tells_and_hands_back_and_the_last_one_signs_off() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 1_000, None)]);
    let mut envoy = Envoy::with_vms(3, "", &[("k", key)]);
    envoy.ask(1, "k");
    envoy.wake(1);
    envoy.serve(1, &mut plane);
    envoy.tick_at(1, NOW + TICK);
    envoy.serve(1, &mut plane);
    envoy.tick_at(0, NOW + TICK);
    envoy.tick_at(0, NOW + 2 * TICK);
    assert_eq!(envoy.call(0).1.asks, [], "the leader shows that the Envoy is live");
    let ends = |envoy: &mut Envoy, vm: usize, is_in_use| {
        envoy.vms[vm].filter.on_end(&envoy.setup, is_in_use);
        let calls = envoy.host.take_calls();
        let calls = calls.iter().filter(|call| call.header(":path") == "/sync/v1/allowances");
        calls.map(|call| Call::read(&call.body).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(ends(&mut envoy, 1, true), [], "another configuration goes on");
    let [call] = &ends(&mut envoy, 1, false)[..] else { panic!("one call") };
    assert_eq!((call.asks.len(), call.asks[0].spent, call.asks[0].returned, call.is_last), (1, 1, 1, false));
    assert_eq!(ends(&mut envoy, 2, false), [], "it has nothing to say");
    let [call] = &ends(&mut envoy, 0, false)[..] else { panic!("one call") };
    assert_eq!((call.asks.len(), call.is_last), (0, true));
    // An Envoy that never asked says nothing.
    let mut unused = Envoy::new("", &[("k", record(7))]);
    assert_eq!(ends(&mut unused, 0, false), []);
}

#[test]
fn a_vm_that_ends_with_many_pools_tells_them_in_several_calls() {
    let keys: Vec<(String, Record)> = (0..=POOLS as u16)
        .map(|number| {
            let mut id = [7; 16];
            id[..2].copy_from_slice(&number.to_be_bytes());
            id[14..].copy_from_slice(&number.to_be_bytes());
            (format!("k{number}"), Record { key_id: KeyId(id), quota: budget(1), ..record(7) })
        })
        .collect();
    let keys: Vec<(&str, Record)> = keys.iter().map(|(key, record)| (key.as_str(), record.clone())).collect();
    let mut envoy = Envoy::new("", &keys);
    for (key, _) in &keys {
        envoy.ask(0, key);
    }
    envoy.wake(0);
    // A call has at most so many pools; the others follow.
    let (sent, call) = envoy.call(0);
    assert_eq!(call.asks.len(), POOLS);
    let mut plane = Plane::with(keys.iter().map(|(_, record)| quota_pool(record, 10, None)));
    let answer = plane.answer(&call, NOW * NS_PER_MS);
    let fates = envoy.respond_to(0, &sent, &MockResponse::ok(answer.write().unwrap()));
    assert_eq!(fates.iter().filter(|fate| **fate == Fate::Waits).count(), 1);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted]);
    envoy.vms[0].filter.on_end(&envoy.setup, false);
    let calls = envoy.host.take_calls();
    let calls = calls.iter().filter(|call| call.header(":path") == "/sync/v1/allowances");
    let told: Vec<_> =
        calls.map(|call| Call::read(&call.body).unwrap()).map(|call| (call.asks.len(), call.is_last)).collect();
    assert_eq!(told, [(POOLS, false), (1, true)]);
}

#[test]
fn the_only_envoy_judges_by_itself_as_long_as_the_control_plane_says_so() {
    let key = Record { quota: budget(1), ..with_limit(100) };
    let mut plane = Plane::with([rate_pool(&key), quota_pool(&key, 20, None)]);
    (plane.live, plane.alone_ms) = (1, ALONE_MS as u32);
    let mut envoy = Envoy::new("", &[("k", key.clone())]);
    envoy.ask(0, "k");
    envoy.wake(0);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted]);
    assert_eq!(envoy.admitted(0, "k", 15), 15);
    // Another Envoy has started. Until the time is over nothing is granted to it.
    plane.alone_ms = 0;
    envoy.host.set_now_ms(NOW + ALONE_MS - 1);
    assert_eq!(envoy.admitted(0, "k", 2), 2);
    envoy.host.set_now_ms(NOW + ALONE_MS);
    assert_eq!(envoy.ask(0, "k"), Fate::Waits);
    envoy.tick_at(0, NOW + ALONE_MS);
    envoy.serve(0, &mut plane);
    assert_eq!(plane.pools[&rate_pool(&key).0].holders[0].spent, 18);
}

#[test]
fn the_only_envoy_uses_a_pool_to_its_end() {
    let key = Record { quota: budget(1), ..with_limit(100) };
    for (requests, left, outcome) in [(100, 200, "rate_limited"), (200, 30, "quota_exceeded")] {
        let key = Record { rate_limits: vec![shared("own", requests)], ..key.clone() };
        let mut plane = Plane::with([rate_pool(&key), quota_pool(&key, left, Some(7_000))]);
        plane.alone_ms = ALONE_MS as u32;
        let mut envoy = Envoy::new("", &[("k", key)]);
        envoy.ask(0, "k");
        envoy.wake(0);
        envoy.serve(0, &mut plane);
        let most = (requests as usize).min(left as usize) - 1;
        assert_eq!(envoy.admitted(0, "k", most), most);
        let fate = envoy.ask(0, "k");
        if outcome == "rate_limited" {
            assert_eq!(fate, Fate::refused(429, outcome, Some(1)));
        } else {
            // The state of the quota is to be known anew.
            assert_eq!(fate, Fate::Waits);
        }
    }
}

#[test]
fn what_was_held_before_the_envoy_was_cut_off_is_void() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 1_000, None);
    let mut plane = Plane::with([(pool, terms)]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    for _ in 0..4 {
        envoy.ask(0, "k");
    }
    envoy.wake(0);
    envoy.serve(0, &mut plane);
    envoy.tick_at(0, NOW + TICK);
    envoy.serve(0, &mut plane);
    let later = NOW + limits::VOID_AFTER_MS + TICK;
    envoy.host.set_now_ms(later);
    assert_eq!(envoy.ask(0, "k"), Fate::Admitted);
    envoy.host.set_now_ms(later + 1);
    assert_eq!(envoy.ask(0, "k"), Fate::Waits);
    envoy.host.set_now_ms(later + 3);
    envoy.wake(0);
    plane.pools.values_mut().for_each(|pool| pool.holders.clear());
    let (sent, call) = envoy.call(0);
    assert_eq!((call.asks[0].session, call.asks[0].granted, call.asks[0].spent), (later + 1, 0, 0));
    envoy.vms[0].calls.push(sent);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted]);
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

#[test]
fn grants_apply_to_the_pools_that_were_asked_for_even_if_a_cell_could_not_be_written() {
    let (one, two) = (Record { quota: budget(1), ..record(1) }, Record { quota: budget(1), ..record(2) });
    let mut plane = Plane::with([quota_pool(&one, 10, None), quota_pool(&two, 20, None)]);
    let mut envoy = Envoy::new("", &[("one", one.clone()), ("two", two)]);
    envoy.ask(0, "one");
    envoy.ask(0, "two");
    envoy.host.refuse_writes_of("l0101", true);
    envoy.wake(0);
    envoy.host.refuse_writes_of("l0101", false);
    let (sent, call) = envoy.call(0);
    assert_eq!(call.asks.len(), 1);
    envoy.vms[0].calls.push(sent);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Waits, Fate::Admitted]);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted]);
}

#[test]
fn a_response_that_nobody_expects_changes_nothing() {
    let mut envoy = Envoy::new("", &[("k", with_limit(10))]);
    envoy.ask(0, "k");
    envoy.wake(0);
    let (mut sent, _) = envoy.call(0);
    sent.token += 1;
    assert_eq!(envoy.respond_to(0, &sent, &MockResponse::default()), []);
    assert_eq!(envoy.metric("limits.call_failures_total"), 0);
    // A call whose context is gone is never answered: after eight ticks another one is sent.
    assert_eq!(envoy.tick_at(0, NOW + 2 * TICK), [Fate::Waits]);
    assert!(envoy.vms[0].calls.is_empty());
    assert_eq!(envoy.tick_at(0, NOW + 8 * TICK), [Fate::refused(429, "rate_limited", Some(1))]);
    assert_eq!(envoy.ask(0, "k"), Fate::Waits);
    envoy.tick_at(0, NOW + 9 * TICK);
    assert_eq!(envoy.call(0).1.asks[0].need, 1);
}

#[test]
fn the_contact_cell_is_read_as_it_was_written() {
    let contact = Contact { since_ms: 1, answered_ms: 2, live: 3, alone_term: 4, alone_until_ms: 5 };
    assert_eq!(read_contact(&write_contact(&contact, 6)), (contact, 6));
    assert_eq!(read_contact(b"other"), (Contact::default(), 0));
    let data = new_data();
    let allowances = Allowances::default();
    allowances.refresh(&data);
    assert_eq!(allowances.contact(), Contact::default());
    data.put(CellKey::Contact, &write_contact(&contact, 6), None).unwrap();
    allowances.refresh(&data);
    assert_eq!((allowances.contact(), allowances.used_ms.get()), (contact, 6));
}

#[test]
fn while_no_cell_can_be_written_requests_are_refused() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, _) = quota_pool(&key, 10, None);
    let mut envoy = Envoy::new("", &[("k", key)]);
    envoy.ask(0, "k");
    envoy.wake(0);
    envoy.host.refuse_writes(true);
    let grant = Grant { session: NOW, granted: 1, held: 1, ..Grant::default() };
    let answer = Answer { live: 1, alone_ms: 0, grants: vec![grant], recalls: vec![pool] };
    let refused = Fate::refused(429, "quota_exceeded", Some(1));
    assert_eq!(envoy.respond(0, &MockResponse::ok(answer.write().unwrap())), std::slice::from_ref(&refused));
    assert_eq!(envoy.ask(0, "k"), refused);
    assert_eq!(envoy.vms[0].filter.data().get(CellKey::Contact), None);
}
