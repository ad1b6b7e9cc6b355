//! Calls that are not answered, and cells that cannot be written.

use super::*;

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
fn an_unexpected_response_changes_nothing() {
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
    assert_eq!(envoy.tick_at(0, NOW + 8 * TICK), [Fate::Admitted], "at the safe rate");
    assert_eq!(envoy.ask(0, "k"), Fate::Waits);
    envoy.tick_at(0, NOW + 9 * TICK);
    assert_eq!(envoy.call(0).1.asks[0].need, 1);
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

#[test]
fn a_vm_whose_calls_failed_lets_requests_wait_again_once_another_vm_was_answered() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 80, None)]);
    let mut envoy = Envoy::with_vms(2, "", &[("k", key)]);
    envoy.ask(1, "k");
    envoy.wake(1);
    assert_eq!(envoy.respond(1, &MockResponse::default()), [unavailable()]);
    assert_eq!(envoy.respond(1, &MockResponse::default()), []);
    assert_eq!(envoy.ask(1, "k"), unavailable());
    envoy.host.set_now_ms(NOW + 1);
    envoy.ask(0, "k");
    envoy.wake(0);
    envoy.serve(0, &mut plane);
    assert_eq!(envoy.ask(1, "k"), Fate::Waits);
}
