//! What an Envoy holds: shared by its VMs, filled ahead, recalled, and handed back; and the only Envoy.

use super::*;

const MINUTE: u64 = 60_000;

/// Admits so many requests of the key `k`, and lets the Envoy ask for tokens ahead on its next tick.
fn hold_ahead(envoy: &mut Envoy, plane: &mut Plane, requests: usize) {
    for _ in 0..requests {
        envoy.ask(0, "k");
    }
    envoy.wake(0);
    envoy.serve(0, plane);
    envoy.tick_at(0, NOW + TICK);
    envoy.serve(0, plane);
}

#[test]
fn all_vms_spend_from_one_allowance() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 1_000, None)]);
    let mut envoy = Envoy::with_vms(2, "", &[("k", key)]);
    hold_ahead(&mut envoy, &mut plane, 5);
    // The other VM has not ticked since: it does not know that the Envoy is in contact with the control plane.
    assert_eq!(envoy.ask(1, "k"), Fate::Waits);
    assert_eq!(envoy.tick_at(1, NOW + TICK), [Fate::Admitted]);
    assert_eq!(envoy.call(1).1.asks[0].spent, 6, "the call reports its request");
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
    hold_ahead(&mut envoy, &mut plane, 8);
    // It holds 16, twice what it spent in a tick.
    assert_eq!((envoy.admitted(0, "k", 8), envoy.is_woken(0)), (8, false));
    envoy.host.set_now_ms(NOW + TICK + 30);
    assert_eq!((envoy.ask(0, "k"), envoy.is_woken(0)), (Fate::Admitted, true));
    envoy.wake(0);
    let call = envoy.call(0).1;
    assert_eq!((call.asks[0].need, call.asks[0].spent, call.asks[0].want), (0, 17, 18));
}

#[test]
fn after_a_tick_without_use_most_of_the_allowance_of_a_limit_is_handed_back() {
    let mut key = with_limit(100);
    key.rate_limits[0].window_s = 10;
    let (pool, terms) = rate_pool(&key);
    let mut plane = Plane::with([(pool, terms)]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    hold_ahead(&mut envoy, &mut plane, 20);
    assert_eq!(plane.pools[&pool].held(), 40, "twice what it spent in a tick");
    // Of the 80 tokens that are left, an unused Envoy keeps an eighth at most.
    envoy.tick_at(0, NOW + 2 * TICK);
    let call = &envoy.vms[0].calls.last().unwrap().clone();
    let call = Call::read(&call.body).unwrap();
    assert_eq!((call.asks[0].spent, call.asks[0].returned, call.asks[0].want), (20, 30, 0));
    envoy.serve(0, &mut plane);
    assert_eq!(plane.pools[&pool].held(), 10);
    envoy.tick_at(0, NOW + 3 * TICK);
    assert_eq!(envoy.call(0).1.asks, [], "there is nothing more to report");
}

#[test]
fn a_recalled_allowance_is_handed_back_at_once() {
    let key = Record { quota: budget(1), ..record(7) };
    let (pool, terms) = quota_pool(&key, 100, None);
    let mut plane = Plane::with([(pool, terms)]);
    let mut envoy = Envoy::new("", &[("k", key)]);
    hold_ahead(&mut envoy, &mut plane, 4);
    other(&mut plane, pool, |ask| ask.need = 100, NOW + TICK);
    envoy.tick_at(0, NOW + 2 * TICK);
    envoy.serve(0, &mut plane);
    let (_, call) = envoy.call(0);
    // A sixteenth of what is left.
    assert_eq!((call.asks[0].spent, call.asks[0].returned, call.asks[0].want), (4, 6, 0));
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

/// A VM ends: its calls for allowances.
fn ends(envoy: &mut Envoy, vm: usize, is_in_use: bool) -> Vec<Call> {
    envoy.vms[vm].filter.on_end(&envoy.setup, is_in_use);
    let calls = envoy.host.take_calls();
    let calls = calls.iter().filter(|call| call.header(":path") == "/sync/v1/allowances");
    calls.map(|call| Call::read(&call.body).unwrap()).collect()
}

#[test]
fn the_last_vm_sends_the_last_call_though_it_had_no_tick_since_another_one_was_answered() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 1_000, None)]);
    let mut envoy = Envoy::with_vms(2, "", &[("k", key)]);
    envoy.ask(1, "k");
    envoy.wake(1);
    assert_eq!(envoy.serve(1, &mut plane), [Fate::Admitted]);
    assert_eq!(ends(&mut envoy, 1, false), [], "Envoy would drop it");
    let [call] = &ends(&mut envoy, 0, false)[..] else { panic!("one call") };
    assert!(call.is_last);
    let [ask] = &call.asks[..] else { panic!("one pool") };
    assert_eq!((ask.need, ask.want, ask.spent, ask.spent + ask.returned), (0, 0, 1, ask.granted));
}

#[test]
fn the_last_vm_that_ends_reports_and_hands_back_for_all() {
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
    assert_eq!(ends(&mut envoy, 1, true), [], "another configuration goes on");
    assert_eq!(ends(&mut envoy, 1, false), [], "Envoy would drop it");
    assert_eq!(ends(&mut envoy, 2, false), []);
    let [call] = &ends(&mut envoy, 0, false)[..] else { panic!("one call") };
    assert_eq!((call.asks.len(), call.asks[0].spent, call.asks[0].returned, call.is_last), (1, 1, 2, true));
    // An Envoy that never asked counts as live while it polls, so it signs off too.
    let mut unused = Envoy::new("", &[("k", record(7))]);
    let [call] = &ends(&mut unused, 0, false)[..] else { panic!("one call") };
    assert_eq!((call.is_last, call.asks.len()), (true, 0));
}

#[test]
fn an_envoy_that_ends_with_many_pools_reports_them_in_several_calls() {
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
    // A call has at most this many pools; the others follow.
    let (sent, call) = envoy.call(0);
    assert_eq!(call.asks.len(), POOLS);
    let mut plane = Plane::with(keys.iter().map(|(_, record)| quota_pool(record, 10, None)));
    let answer = plane.answer(&call, NOW * NS_PER_MS);
    let fates = envoy.respond_to(0, &sent, &MockResponse::ok(answer.write().unwrap()));
    assert_eq!(fates.iter().filter(|fate| **fate == Fate::Waits).count(), 1);
    assert_eq!(envoy.serve(0, &mut plane), [Fate::Admitted]);
    let sent: Vec<_> = ends(&mut envoy, 0, false).iter().map(|call| (call.asks.len(), call.is_last)).collect();
    assert_eq!(sent, [(POOLS, false), (1, true)]);
}

#[test]
fn the_only_envoy_decides_by_itself_as_long_as_the_control_plane_allows_it() {
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
fn an_allowance_that_another_vm_uses_is_not_handed_back() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 1_000, None)]);
    let mut envoy = Envoy::with_vms(2, "", &[("k", key)]);
    envoy.ask(0, "k");
    envoy.wake(0);
    envoy.serve(0, &mut plane);
    for minute in 1..=11 {
        for vm in [0, 1] {
            envoy.tick_at(vm, NOW + minute * MINUTE);
            while !envoy.vms[vm].calls.is_empty() {
                envoy.serve(vm, &mut plane);
            }
        }
        if envoy.ask(1, "k") == Fate::Waits {
            envoy.wake(1);
            envoy.serve(1, &mut plane);
        }
    }
    assert!(plane.pools.values().all(|pool| pool.holders[0].returned == 0), "{plane:?}");
}

/// The leader ticks and its calls are answered until none is under way. Returns how many pools they asked for.
fn settle(envoy: &mut Envoy, plane: &mut Plane, now_ms: u64) -> usize {
    envoy.tick_at(0, now_ms);
    let mut asked = 0;
    while !envoy.vms[0].calls.is_empty() {
        let (sent, call) = envoy.call(0);
        asked += call.asks.len();
        let answer = plane.answer(&call, now_ms * NS_PER_MS);
        envoy.respond_to(0, &sent, &MockResponse::ok(answer.write().unwrap()));
    }
    asked
}

#[test]
fn an_envoy_that_is_alone_asks_before_the_first_request_of_a_key() {
    let limited = |number: u8| Record { key_id: KeyId([number; 16]), quota: budget(1), ..with_limit(100) };
    let records: Vec<Record> = (1..=201).map(limited).collect();
    let names: Vec<String> = (1..=201).map(|number| format!("k{number}")).collect();
    let keys: Vec<(&str, Record)> = names.iter().map(String::as_str).zip(records.iter().cloned()).collect();
    let mut plane = Plane::with(records.iter().flat_map(|key| [rate_pool(key), quota_pool(key, 20, None)]));
    (plane.live, plane.alone_ms) = (1, ALONE_MS as u32);
    let mut envoy = Envoy::new("", &[&keys[..200], &[("free", record(8))]].concat());
    assert_eq!(settle(&mut envoy, &mut plane, NOW + TICK), 400);
    for (key, _) in &keys[..200] {
        assert_eq!(envoy.ask(0, key), Fate::Admitted);
    }
    // A key that is created later, and one that is changed.
    settle(&mut envoy, &mut plane, NOW + 2 * TICK);
    let raised = Record { quota: budget(2), ..records[0].clone() };
    envoy.update(2, &[keys[200].clone(), (keys[0].0, raised)]);
    assert_eq!(settle(&mut envoy, &mut plane, NOW + 2 * TICK), 3);
    assert_eq!([envoy.ask(0, "k201"), envoy.ask(0, "k1")], [Fate::Admitted, Fate::Admitted]);
    // After a long idle time, in which the leader goes on calling, and after an interruption.
    let mut now = NOW + 2 * TICK;
    while now < NOW + 14 * MINUTE {
        now += TICK;
        settle(&mut envoy, &mut plane, now);
    }
    assert_eq!(envoy.admitted(0, "k1", 3), 3);
    now += 10 * ALONE_MS;
    assert_eq!(settle(&mut envoy, &mut plane, now), 402);
    assert_eq!(envoy.admitted(0, "k2", 3), 3);
    assert_eq!(envoy.metric("limits.waits_total"), 0);
}

#[test]
fn every_vm_knows_at_a_request_that_the_envoy_is_alone() {
    let key = Record { quota: budget(1), ..record(7) };
    let mut plane = Plane::with([quota_pool(&key, 20, None)]);
    (plane.live, plane.alone_ms) = (1, ALONE_MS as u32);
    let mut envoy = Envoy::with_vms(2, "", &[("k", key)]);
    settle(&mut envoy, &mut plane, NOW + TICK);
    assert_eq!(envoy.ask(1, "k"), Fate::Admitted);
    envoy.tick_at(1, NOW + 2 * TICK - 1);
    settle(&mut envoy, &mut plane, NOW + 2 * TICK);
    // The second VM has not ticked since, and what it knew of ended meanwhile.
    envoy.host.set_now_ms(NOW + TICK + ALONE_MS + 1);
    assert_eq!(envoy.ask(1, "k"), Fate::Admitted);
    envoy.host.set_now_ms(NOW + 2 * TICK + ALONE_MS + 1);
    assert_eq!(envoy.ask(1, "k"), Fate::Waits);
}

#[test]
fn an_envoy_among_others_asks_for_nothing_before_the_first_request() {
    let key = with_limit(100);
    let mut plane = Plane::with([rate_pool(&key)]);
    let mut envoy = Envoy::new("", &[("k", key.clone())]);
    assert_eq!(settle(&mut envoy, &mut plane, NOW + TICK), 0);
    envoy.tick_at(0, NOW + 2 * TICK);
    assert_eq!(envoy.vms[0].calls.len(), 0);
    envoy.update(2, &[("k", key)]);
    envoy.tick_at(0, NOW + 3 * TICK);
    assert_eq!((envoy.vms[0].calls.len(), envoy.ask(0, "k")), (0, Fate::Waits));
}

#[test]
fn an_envoy_without_limited_keys_never_calls() {
    let mut envoy = Envoy::new("", &[("k", record(7))]);
    envoy.tick_at(0, NOW + TICK);
    assert_eq!((envoy.vms[0].calls.len(), envoy.ask(0, "k")), (0, Fate::Admitted));
}
