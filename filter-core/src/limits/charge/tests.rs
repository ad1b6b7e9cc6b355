//! Charging on cells in memory: local limits, several limits at once, refunds, and contention.

use contract::id::{KeyId, OwnerId};
use limits::contact::Contact;

use super::*;
use crate::address::Client;
use crate::limits::client::charge_client;
use crate::limits::testing::{budget, limit, record, shared};
use crate::mock::{TestData, new_data};
use crate::shared::CellKey;
use crate::time::NS_PER_S;

const NOW: u64 = 1_800_000_000 * NS_PER_S;
const MS: u64 = 1_000_000;

const YES: Charged = Charged::Yes(Vec::new());

/// The control plane answers.
const REACHABLE: Attempt = Attempt {
    modes: LimitModes { rate_limits: RateMode::SafeRate, quotas: FailureMode::Deny, credits: FailureMode::Deny },
    is_unreachable: false,
    waited_ms: 0,
    reports_left: false,
};

fn of(requests: u32, window_s: u32, burst: u32) -> RateLimit {
    RateLimit { window_s, burst, ..limit("default", requests) }
}

/// A request of the key that has these limits.
fn take_of(data: &TestData, key: u8, own: &[RateLimit], now_ns: u64) -> Charged {
    let limits = Limits { record: &record(key), own, route: PolicyLimits::NONE, cost: 1 };
    charge(data, &Allowances::default(), &limits, REACHABLE, || now_ns)
}

fn admitted(data: &TestData, own: &[RateLimit], at: impl IntoIterator<Item = u64>) -> usize {
    at.into_iter().filter(|now| take_of(data, 7, own, *now) == YES).count()
}

fn limited(own: &[RateLimit], limit: usize, retry_after_s: u64) -> Charged {
    Charged::No(Outcome::RateLimited, RetryAfter::Limits(own.to_vec(), Exceeded { limit, retry_after_s }))
}

#[test]
fn a_burst_is_admitted_and_then_the_steady_rate() {
    let (data, limits) = (new_data(), [of(10, 1, 5)]);
    assert_eq!(admitted(&data, &limits, [NOW; 20]), 5);
    // One token each 100 ms; asked every 10 ms for two seconds.
    assert_eq!(admitted(&data, &limits, (1..=200).map(|tick| NOW + tick * 10 * MS)), 20);
}

#[test]
fn a_refused_request_is_admitted_after_the_time_that_the_refusal_states() {
    let (data, limits) = (new_data(), [of(1, 10, 1)]);
    assert_eq!(take_of(&data, 7, &limits, NOW), YES);
    assert_eq!(take_of(&data, 7, &limits, NOW + 500 * MS), limited(&limits, 0, 10));
    assert_eq!(take_of(&data, 7, &limits, NOW + 9_999 * MS), limited(&limits, 0, 1));
    assert_eq!(take_of(&data, 7, &limits, NOW + 10_000 * MS), YES);
}

#[test]
fn with_several_limits_all_or_none_are_taken_and_the_longest_wait_is_named() {
    let data = new_data();
    let limits = [
        of(100, 1, 100),
        RateLimit { name: "hour".into(), ..of(2, 3_600, 2) },
        RateLimit { name: "minute".into(), ..of(2, 60, 2) },
    ];
    assert_eq!(admitted(&data, &limits, [NOW; 10]), 2);
    assert_eq!(take_of(&data, 7, &limits, NOW), limited(&limits, 1, 1_800));
    // The refused requests have not touched the first limit.
    assert_eq!(admitted(&data, &limits[..1], [NOW; 200]), 98);
}

#[test]
fn keys_that_share_a_cell_do_not_share_a_limit() {
    let data = new_data();
    let neighbour = Record { key_id: KeyId([8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7, 7]), ..record(7) };
    let limits = [of(1, 60, 1)];
    let take_neighbour = || {
        let limits = Limits { record: &neighbour, own: &limits, route: PolicyLimits::NONE, cost: 1 };
        charge(&data, &Allowances::default(), &limits, REACHABLE, || NOW)
    };
    assert_eq!((take_of(&data, 7, &limits, NOW), take_neighbour()), (YES, YES));
    let refused = limited(&limits, 0, 60);
    assert_eq!((take_of(&data, 7, &limits, NOW), take_neighbour()), (refused.clone(), refused));
    assert_eq!(data.host().cell_names().len(), 1);
}

#[test]
fn a_cell_drops_keys_whose_limits_are_full_again() {
    let (data, limits) = (new_data(), [of(1, 1, 1)]);
    for number in 0..100 {
        let mut id = [7; 16];
        id[0] = number;
        let record = Record { key_id: KeyId(id), ..record(7) };
        let limits = Limits { record: &record, own: &limits, route: PolicyLimits::NONE, cost: 1 };
        assert_eq!(charge(&data, &Allowances::default(), &limits, REACHABLE, || NOW), YES);
    }
    let bytes = || data.get(CellKey::Limits(0x0707)).unwrap().value.len();
    assert_eq!(bytes(), 100 * 33);
    assert_eq!(take_of(&data, 7, &limits, NOW + 5 * NS_PER_S), YES);
    assert_eq!(bytes(), 33);
}

#[test]
fn two_workers_that_meet_take_two_tokens() {
    let (data, limits) = (new_data(), [of(1, 60, 1)]);
    let (other, data_of_other) = (limits.clone(), data.clone());
    data.host().before_next_put(move || assert_eq!(take_of(&data_of_other, 7, &other, NOW), YES));
    assert_eq!(take_of(&data, 7, &limits, NOW), limited(&limits, 0, 60));
}

#[test]
fn too_much_contention_counts_as_an_exceeded_limit() {
    let (data, limits) = (new_data(), [of(1, 60, 1)]);
    data.host().refuse_writes(true);
    assert_eq!(take_of(&data, 7, &limits, NOW), limited(&limits, 0, 1));
    let client = Client::of("192.0.2.1".parse().unwrap());
    let wait = RetryAfter::Limits(limits.to_vec(), Exceeded { limit: 0, retry_after_s: 1 });
    assert_eq!(charge_client(&data, client, &limits[..1], NOW), Some(wait));
}

#[test]
fn a_clock_that_steps_back_costs_a_burst_at_the_most() {
    let (data, limits) = (new_data(), [of(10, 1, 5)]);
    assert_eq!(admitted(&data, &limits, [NOW; 10]), 5);
    let back = NOW - 3_600 * NS_PER_S;
    assert_eq!(admitted(&data, &limits, [back; 10]), 0);
    assert_eq!(admitted(&data, &limits, [back + NS_PER_S; 10]), 5);
    let (client, limit) = (Client::of("192.0.2.1".parse().unwrap()), &limits[0]);
    let admitted = |now_ns| {
        (0..10).filter(|_| charge_client(&data, client, std::slice::from_ref(limit), now_ns).is_none()).count()
    };
    assert_eq!([admitted(NOW), admitted(back), admitted(back + NS_PER_S)], [5, 0, 5]);
}

#[test]
fn after_the_clock_stepped_back_the_only_envoy_and_the_safe_rate_go_on() {
    let own = [RateLimit { shared: true, ..of(10, 1, 5) }];
    let (key, back) = (record(7), NOW - 3_600 * NS_PER_S);
    let pool = PoolId::of_limit(&own[0], &key);
    let contact = |now_ns: u64| Contact {
        since_ms: 1,
        answered_ms: now_ns / MS,
        live: 1,
        alone_term: 3,
        alone_until_ms: now_ns / MS + 400,
    };
    for attempt in [REACHABLE, Attempt { is_unreachable: true, ..REACHABLE }] {
        let (data, allowances) = (new_data(), Allowances::default());
        let limits = Limits { record: &key, own: &own, route: PolicyLimits::NONE, cost: 1 };
        let admitted = |now_ns: u64| {
            if !attempt.is_unreachable {
                allowances.set_contact(contact(now_ns));
            }
            let admit = |_: &u32| charge(&data, &allowances, &limits, attempt, || now_ns) == YES;
            (0..10).filter(admit).count()
        };
        change(&data, pool, |holding| {
            (holding.session, holding.alone_term) = (1, 3);
            (holding.interval_ns, holding.terms) = (NS_PER_S / 10, NS_PER_S / 2);
        });
        assert_eq!([admitted(NOW), admitted(back), admitted(back + NS_PER_S)], [5, 0, 5], "{attempt:?}");
    }
}

#[test]
fn a_limit_of_nothing_admits_one_burst_a_window() {
    let data = new_data();
    assert_eq!(admitted(&data, &[of(0, 1, 0)], [NOW; 3]), 1);
}

#[test]
fn a_routes_limit_stands_beside_those_of_the_key_and_is_named() {
    let data = new_data();
    let own = [RateLimit { name: "own".into(), ..of(100, 1, 100) }];
    let route = |name: &str| RateLimit { name: name.into(), ..of(3, 60, 3) };
    let take = |route: Option<&RateLimit>| {
        let route = PolicyLimits { key: route.cloned().into_iter().collect(), ..PolicyLimits::default() };
        let limits = Limits { record: &record(7), own: &own, route: &route, cost: 1 };
        charge(&data, &Allowances::default(), &limits, REACHABLE, || NOW)
    };
    let admitted = |route: Option<&RateLimit>| (0..10).filter(|_| take(route) == YES).count();
    assert_eq!(admitted(Some(&route("search"))), 3);
    assert_eq!(take(Some(&route("search"))), limited(&[own[0].clone(), route("search")], 1, 20));
    assert_eq!(admitted(Some(&route("export"))), 3);
    // A route's limit is another than that of a key with its name.
    assert_eq!(admitted(Some(&route("own"))), 3);
    assert_eq!(admitted(None), 10);
}

#[test]
fn keys_of_one_owner_share_a_routes_limit_for_owners_and_a_refusal_takes_nothing() {
    let data = new_data();
    let route = PolicyLimits {
        key: vec![RateLimit { name: "key".into(), ..of(3, 60, 3) }],
        owner: vec![RateLimit { name: "owner".into(), ..of(4, 60, 4) }],
        address: Vec::new(),
    };
    let take = |key| {
        let limits = Limits { record: &record(key), own: &[], route: &route, cost: 1 };
        charge(&data, &Allowances::default(), &limits, REACHABLE, || NOW)
    };
    assert_eq!([1, 1, 1].map(take), [YES, YES, YES]);
    let all = [route.key[0].clone(), route.owner[0].clone()];
    assert_eq!(take(1), limited(&all, 0, 20));
    // The refusal left one for the other key of the owner.
    assert_eq!(take(2), YES);
    assert_eq!(take(2), limited(&all, 1, 15));
}

#[test]
fn a_client_is_taken_from_all_limits_for_addresses_or_from_none() {
    let data = new_data();
    let named = |name: &str, limit| RateLimit { name: name.into(), ..limit };
    let limits = [named("minute", of(2, 60, 2)), named("second", of(1, 1, 1))];
    let client = Client::of("192.0.2.1".parse().unwrap());
    let second = 1_000_000_000;
    let wait = |now_ns| match charge_client(&data, client, &limits, now_ns) {
        None => None,
        Some(RetryAfter::Limits(_, exceeded)) => Some((exceeded.limit, exceeded.retry_after_s)),
        Some(other) => panic!("{other:?}"),
    };
    assert_eq!(wait(NOW), None);
    assert_eq!(wait(NOW), Some((1, 1)));
    assert_eq!(wait(NOW + second), None);
    assert_eq!(wait(NOW + 2 * second), Some((0, 28)));
}

#[test]
fn without_limits_nothing_is_read_and_not_even_the_clock() {
    let data = new_data();
    let limits = Limits { record: &record(7), own: &[], route: PolicyLimits::NONE, cost: 0 };
    assert_eq!(charge(&data, &Allowances::default(), &limits, REACHABLE, || unreachable!()), YES);
    // A free request needs no credits.
    let metered = Record { credits: budget(1), ..record(7) };
    let limits = Limits { record: &metered, ..limits };
    assert_eq!(charge(&data, &Allowances::default(), &limits, REACHABLE, || unreachable!()), YES);
    assert_eq!(data.host().reads(), 0);
}

#[test]
fn clients_without_a_key_are_told_apart_by_address_and_v6_by_network() {
    let (data, limit) = (new_data(), of(1, 60, 1));
    let one = |address: &str| {
        charge_client(&data, Client::of(address.parse().unwrap()), std::slice::from_ref(&limit), NOW).is_none()
    };
    assert!(one("192.0.2.1") && one("192.0.2.2") && one("2001:db8::1"));
    assert!(!one("192.0.2.1") && !one("2001:db8::ffff") && one("2001:db8:0:1::1"));
    assert!(data.host().cell_names().iter().all(|name| name.contains(":a")));
}

/// Allowances of an Envoy that has just been answered.
fn in_contact(contact: Contact) -> Allowances {
    let allowances = Allowances::default();
    allowances.set_contact(Contact { since_ms: 1, answered_ms: NOW / MS, ..contact });
    allowances
}

/// Makes the terms of the limits known to the Envoy, which holds nothing yet.
fn learn(data: &TestData, limits: &Limits<'_>) {
    assert_eq!(charge(data, &in_contact(Contact::default()), limits, REACHABLE, || NOW), Charged::Wait);
}

/// Grants tokens of a pool to the Envoy.
fn grant(data: &TestData, pool: PoolId, tokens: u64) {
    change(data, pool, |holding| {
        holding.session = NOW / MS;
        holding.granted += tokens;
    });
}

fn change(data: &TestData, pool: PoolId, change: impl Fn(&mut Holding)) {
    let changed = data.update(cell_of(pool.subject), |cell| {
        let mut entries = Entries::read(cell);
        let mut holding = entries.holding(&pool);
        change(&mut holding);
        entries.set_holding(&pool, holding);
        Ok::<_, ()>((entries.write(NOW), ()))
    });
    changed.unwrap();
}

fn holding(data: &TestData, pool: PoolId) -> Holding {
    data.get(cell_of(pool.subject)).map_or_else(Holding::default, |cell| Entries::read(&cell.value).holding(&pool))
}

/// A key with a limit of its own, a shared one, a quota, and credits of its owner; their pools.
fn metered() -> (Record, [PoolId; 3]) {
    let record = Record {
        owner_id: OwnerId([8; 16]),
        rate_limits: vec![limit("alone", 5), shared("own", 100)],
        quota: budget(1),
        credits: budget(1),
        ..record(7)
    };
    let pools = [
        PoolId::of_limit(&record.rate_limits[1], &record),
        PoolId::of_quota(Per::Key, &record),
        PoolId::of_credits(record.owner_id),
    ];
    (record, pools)
}

#[test]
fn a_request_is_taken_from_all_its_limits_with_two_reads_and_two_writes() {
    let (data, (record, pools)) = (new_data(), metered());
    let allowances = in_contact(Contact::default());
    let limits = Limits { record: &record, own: &record.rate_limits, route: PolicyLimits::NONE, cost: 4 };
    learn(&data, &limits);
    pools.into_iter().zip([10, 10, 20]).for_each(|(pool, tokens)| grant(&data, pool, tokens));
    let before = (data.host().reads(), data.host().writes());
    assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), YES);
    assert_eq!((data.host().reads() - before.0, data.host().writes() - before.1), (2, 2));
    assert_eq!(pools.map(|pool| holding(&data, pool).spent), [1, 1, 4]);
    // The limit of this Envoy alone ends it after five.
    let charges: Vec<Charged> = (0..5)
        .map(|_| charge(&data, &allowances, &limits, REACHABLE, || NOW))
        .filter(|charged| *charged != YES)
        .collect();
    assert_eq!(charges, [limited(&record.rate_limits, 0, 12)]);
    assert_eq!(pools.map(|pool| holding(&data, pool).spent), [5, 5, 20]);
}

#[test]
fn what_the_owner_lacks_is_asked_for_and_what_the_key_has_spent_goes_back() {
    let (data, (record, pools)) = (new_data(), metered());
    let allowances = in_contact(Contact::default());
    let limits = Limits { record: &record, own: &record.rate_limits, route: PolicyLimits::NONE, cost: 4 };
    learn(&data, &limits);
    grant(&data, pools[0], 1);
    grant(&data, pools[1], 1);
    for waiting in 1..=7 {
        assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), Charged::Wait);
        assert_eq!(pools.map(|pool| allowances.waiting(&pool)), [0, 0, 4 * waiting], "of the key nothing is missing");
    }
    allowances.start_over();
    grant(&data, pools[2], 9);
    assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), YES);
    let spent = pools.map(|pool| (holding(&data, pool).spent, holding(&data, pool).refunded));
    assert_eq!(spent, [(1, 0), (1, 0), (4, 0)]);
    assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), Charged::Wait);
    assert_eq!(pools.map(|pool| allowances.waiting(&pool)), [1, 1, 0], "the owner's credits are there");
}

#[test]
fn all_that_is_lacking_of_key_and_owner_is_asked_for_at_once() {
    let (data, (record, pools)) = (new_data(), metered());
    let allowances = in_contact(Contact::default());
    let limits = Limits { record: &record, own: &record.rate_limits, route: PolicyLimits::NONE, cost: 4 };
    assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), Charged::Wait);
    assert_eq!(pools.map(|pool| allowances.waiting(&pool)), [1, 1, 4]);
    // A refusal goes before a wait: nothing more is asked for.
    allowances.start_over();
    let full = [of(1, 60, 1), record.rate_limits[1].clone()];
    let limits = Limits { own: &full, ..limits };
    assert_eq!(take_of(&data, 7, &full[..1], NOW), YES);
    assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), limited(&full, 0, 60));
    assert_eq!(pools.map(|pool| allowances.waiting(&pool)), [0, 0, 0]);
}

#[test]
fn a_refusal_by_the_owner_gives_back_what_the_key_has_spent() {
    let (data, (record, pools)) = (new_data(), metered());
    let allowances = in_contact(Contact::default());
    let limits = Limits { record: &record, own: &record.rate_limits, route: PolicyLimits::NONE, cost: 4 };
    learn(&data, &limits);
    grant(&data, pools[0], 2);
    grant(&data, pools[1], 2);
    // The credits are known to be exhausted for seven seconds.
    change(&data, pools[2], |holding| {
        (holding.session, holding.terms) = (NOW / MS, 1);
        (holding.known_until_ms, holding.empty_until_ms) = (NOW / MS + 7_000, NOW / MS + 7_000);
    });
    for _ in 0..7 {
        let refused = Charged::No(Outcome::CreditsExhausted, RetryAfter::Seconds(7));
        assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), refused);
    }
    assert_eq!(holding(&data, pools[1]).spent, 0);
    assert_eq!((holding(&data, pools[0]).spent, holding(&data, pools[0]).refunded), (1, 1));
    // None of the seven counts against the limit of five.
    let free = Limits { cost: 0, ..limits };
    let fates: Vec<Charged> = (0..3).map(|_| charge(&data, &allowances, &free, REACHABLE, || NOW)).collect();
    assert_eq!(fates, [YES, YES, Charged::Wait]);
    // What cannot be given back for contention is lost.
    data.host().refuse_writes_of("l0707", true);
    assert!(matches!(charge(&data, &allowances, &limits, REACHABLE, || NOW), Charged::No(..)));
}

#[test]
fn a_refunded_token_of_a_rate_limit_is_void_once_it_has_come_back_by_itself() {
    let (record, pools) = metered();
    let own = [shared("own", 60)];
    let record = Record { quota: None, ..record };
    // One token comes back each second.
    for (later_ms, expected) in [(0, YES), (999, YES), (1_000, Charged::Wait)] {
        let (data, allowances) = (new_data(), in_contact(Contact::default()));
        let limits = Limits { record: &record, own: &own, route: PolicyLimits::NONE, cost: 4 };
        learn(&data, &limits);
        grant(&data, pools[0], 1);
        assert_eq!(charge(&data, &allowances, &limits, REACHABLE, || NOW), Charged::Wait);
        allowances.start_over();
        let free = Limits { cost: 0, ..limits };
        let now_ns = NOW + later_ms * MS;
        assert_eq!(charge(&data, &allowances, &free, REACHABLE, || now_ns), expected, "{later_ms}");
        if expected == YES {
            let spent = holding(&data, pools[0]);
            assert_eq!((spent.spent, spent.refunded, spent.arrival_ns), (1, 0, now_ns + NS_PER_S));
        }
    }
}

#[test]
fn while_the_control_plane_does_not_answer_each_kind_follows_its_mode() {
    let (record, pools) = metered();
    let unreachable = |rate_limits, quotas, credits| Attempt {
        modes: LimitModes { rate_limits, quotas, credits },
        is_unreachable: true,
        ..REACHABLE
    };
    let unavailable = Charged::No(Outcome::LimitsUnavailable, RetryAfter::Seconds(1));
    let (safe, deny, allow) = (RateMode::SafeRate, RateMode::Deny, RateMode::Allow);
    for (attempt, expected) in [
        (unreachable(safe, FailureMode::Allow, FailureMode::Allow), YES),
        (unreachable(allow, FailureMode::Allow, FailureMode::Allow), YES),
        (unreachable(deny, FailureMode::Allow, FailureMode::Allow), unavailable.clone()),
        (unreachable(allow, FailureMode::Deny, FailureMode::Allow), unavailable.clone()),
        (unreachable(allow, FailureMode::Allow, FailureMode::Deny), unavailable),
    ] {
        let (data, allowances) = (new_data(), in_contact(Contact::default()));
        let limits = Limits { record: &record, own: &record.rate_limits, route: PolicyLimits::NONE, cost: 4 };
        assert_eq!(charge(&data, &allowances, &limits, attempt, || NOW), expected, "{attempt:?}");
        let spent = if attempt.modes.rate_limits == safe { [1, 0, 0] } else { [0, 0, 0] };
        assert_eq!(pools.map(|pool| holding(&data, pool).spent), spent, "{attempt:?}");
        // What let it through unchecked has nothing to give back.
        assert!(pools.iter().all(|pool| holding(&data, *pool).refunded == 0));
    }
}

#[test]
fn the_safe_rate_is_the_limit_divided_by_the_live_envoys() {
    let (data, allowances) = (new_data(), in_contact(Contact { live: 4, ..Contact::default() }));
    let own = [RateLimit { shared: true, ..of(40, 60, 8) }];
    let attempt = Attempt { is_unreachable: true, ..REACHABLE };
    let plain = record(7);
    let limits = Limits { record: &plain, own: &own, route: PolicyLimits::NONE, cost: 1 };
    let charges: Vec<Charged> = (0..3).map(|_| charge(&data, &allowances, &limits, attempt, || NOW)).collect();
    assert_eq!(charges, [YES, YES, limited(&own, 0, 6)]);
}

#[test]
fn a_request_that_may_not_wait_longer_is_refused() {
    let (data, allowances) = (new_data(), in_contact(Contact::default()));
    let attempt = Attempt { waited_ms: LONGEST_WAIT_MS, ..REACHABLE };
    let (record, pools) = metered();
    let limits = Limits { record: &record, own: &record.rate_limits, route: PolicyLimits::NONE, cost: 4 };
    learn(&data, &limits);
    grant(&data, pools[0], 1);
    grant(&data, pools[1], 1);
    let unanswered = charge(&data, &allowances, &limits, attempt, || NOW);
    assert_eq!(unanswered, Charged::No(Outcome::LimitsUnavailable, RetryAfter::Seconds(1)));
    change(&data, pools[2], |holding| holding.known_until_ms = NOW / MS - LONGEST_WAIT_MS + 1);
    assert_eq!(
        charge(&data, &allowances, &limits, attempt, || NOW),
        Charged::No(Outcome::CreditsExhausted, RetryAfter::Seconds(1))
    );
    grant(&data, pools[2], 3);
    assert_eq!(
        charge(&data, &allowances, &limits, attempt, || NOW),
        Charged::No(Outcome::CreditsExhausted, RetryAfter::Hopeless)
    );
}
