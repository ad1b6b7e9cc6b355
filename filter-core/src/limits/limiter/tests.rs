//! Limits, shares and their cells, on cells in memory.

use super::*;
use crate::mock::{TestData, new_data};

const KEY: KeyId = KeyId([7; 16]);
const NOW: u64 = 1_800_000_000 * NS_PER_S;
const MS: u64 = 1_000_000;

fn limit(requests: u32, window_s: u32, burst: u32) -> RateLimit {
    RateLimit { name: "default".into(), requests, window_s, burst, shared: true }
}

fn placed(limits: &[RateLimit], shared: bool) -> Vec<Limit<'_>> {
    let placed = |(place, limit)| Limit { limit, tag: Tag(place as u64), shared };
    limits.iter().enumerate().map(placed).collect()
}

fn take_of(data: &TestData, key: KeyId, limits: &[RateLimit], now_ns: u64) -> Result<(), Refused> {
    take(data, Subject::Key(key), &placed(limits, false), 1, 1, now_ns).map(|_| ())
}

fn admitted(data: &TestData, limits: &[RateLimit], at: impl IntoIterator<Item = u64>) -> usize {
    at.into_iter().filter(|now| take_of(data, KEY, limits, *now).is_ok()).count()
}

/// How many of a hundred are admitted of a shared limit, when nothing else was granted but what `cells` remember.
fn admitted_of_share(data: &TestData, default_share: u32, now_ns: u64) -> usize {
    let limits = [limit(100, 1, 100)];
    let limits = placed(&limits, true);
    let subject = Subject::Key(KEY);
    (0..100).filter(|_| take(data, subject, &limits, 1, default_share, now_ns).is_ok()).count()
}

fn client(address: &str) -> Subject {
    Subject::Client(Client::of(address.parse().unwrap()))
}

#[test]
fn a_burst_is_admitted_and_then_the_steady_rate() {
    let data = new_data();
    let limits = [limit(10, 1, 5)];
    assert_eq!(admitted(&data, &limits, [NOW; 20]), 5);
    // One token each 100 ms; asked every 10 ms for two seconds.
    assert_eq!(admitted(&data, &limits, (1..=200).map(|tick| NOW + tick * 10 * MS)), 20);
}

#[test]
fn a_refusal_says_when_to_come_back_and_that_is_true() {
    let data = new_data();
    let limits = [limit(1, 10, 1)];
    assert_eq!(take_of(&data, KEY, &limits, NOW), Ok(()));
    let refused = take_of(&data, KEY, &limits, NOW + 500 * MS).unwrap_err();
    assert_eq!(refused, Refused { limit: 0, retry_after_s: 10 });
    assert!(take_of(&data, KEY, &limits, NOW + 9_999 * MS).is_err());
    assert_eq!(take_of(&data, KEY, &limits, NOW + 10_000 * MS), Ok(()));
}

#[test]
fn with_several_limits_all_or_none_are_taken() {
    let data = new_data();
    let limits = [limit(100, 1, 100), limit(2, 3_600, 2)];
    assert_eq!(admitted(&data, &limits, [NOW; 10]), 2);
    let refused = take_of(&data, KEY, &limits, NOW).unwrap_err();
    assert_eq!(refused, Refused { limit: 1, retry_after_s: 1_800 });
    // The eight refused requests have not touched the first limit.
    assert_eq!(admitted(&data, &limits[..1], [NOW; 200]), 98);
}

#[test]
fn keys_that_share_a_cell_do_not_share_a_limit() {
    let data = new_data();
    let mut neighbour = KEY;
    neighbour.0[0] = 8;
    let limits = [limit(1, 60, 1)];
    assert_eq!(take_of(&data, KEY, &limits, NOW), Ok(()));
    assert_eq!(take_of(&data, neighbour, &limits, NOW), Ok(()));
    assert!(take_of(&data, KEY, &limits, NOW).is_err());
    assert!(take_of(&data, neighbour, &limits, NOW).is_err());
    assert_eq!(data.host().cell_names().len(), 1);
}

#[test]
fn a_cell_forgets_the_keys_that_have_rested() {
    let data = new_data();
    let limits = [limit(1, 1, 1)];
    for number in 0..100 {
        let mut key = KEY;
        key.0[0] = number;
        assert_eq!(take_of(&data, key, &limits, NOW), Ok(()));
    }
    assert_eq!(take_of(&data, KEY, &limits, NOW + 5 * NS_PER_S), Ok(()));
    let cell = data.get(CellKey::KeyLimits(0x0707)).unwrap();
    assert_eq!(cell.value.len(), ENTRY_BYTES);
}

#[test]
fn two_workers_that_meet_take_two_tokens() {
    let data = new_data();
    let limits = [limit(1, 60, 1)];
    let other = limits.clone();
    let data_of_other = data.clone();
    data.host().before_next_put(move || assert_eq!(take_of(&data_of_other, KEY, &other, NOW), Ok(())));
    assert!(take_of(&data, KEY, &limits, NOW).is_err());
}

#[test]
fn a_clock_that_steps_back_costs_a_burst_at_the_most() {
    let data = new_data();
    let limits = [limit(10, 1, 5)];
    assert_eq!(admitted(&data, &limits, [NOW; 10]), 5);
    let back = NOW - 3_600 * NS_PER_S;
    assert_eq!(admitted(&data, &limits, [back; 10]), 0);
    assert_eq!(admitted(&data, &limits, [back + NS_PER_S; 10]), 5);
}

#[test]
fn a_limit_of_nothing_admits_one_burst_a_window() {
    let data = new_data();
    assert_eq!(admitted(&data, &[limit(0, 1, 0)], [NOW; 3]), 1);
}

#[test]
fn of_a_shared_limit_an_envoy_admits_its_share_and_of_others_the_whole() {
    let data = new_data();
    assert_eq!(admitted_of_share(&data, WHOLE / 4, NOW), 25);
    let data = new_data();
    grant(&data, KEY, Some(WHOLE / 10), &[], WHOLE / 4, NOW).unwrap();
    assert_eq!(admitted_of_share(&data, WHOLE / 4, NOW), 10);
    let data = new_data();
    grant(&data, KEY, Some(WHOLE / 10), &[], WHOLE / 4, NOW).unwrap();
    assert_eq!(admitted(&data, &[limit(100, 1, 100)], [NOW; 200]), 100);
}

#[test]
fn a_share_is_remembered_as_long_as_it_is_used_and_an_hour_more() {
    let data = new_data();
    grant(&data, KEY, Some(WHOLE / 10), &[], WHOLE, NOW).unwrap();
    let half_an_hour = |number: u64| NOW + number * 1_800 * NS_PER_S;
    for number in 1..10 {
        assert_eq!(admitted_of_share(&data, WHOLE, half_an_hour(number)), 10);
    }
    assert_eq!(admitted_of_share(&data, WHOLE, half_an_hour(12)), 100);
}

#[test]
fn a_share_that_is_the_default_again_takes_no_room() {
    let data = new_data();
    grant(&data, KEY, Some(WHOLE), &[], WHOLE, NOW).unwrap();
    assert_eq!(data.host().cell_names(), Vec::<String>::new());
    grant(&data, KEY, Some(5), &[], WHOLE, NOW).unwrap();
    grant(&data, KEY, Some(7), &[], WHOLE, NOW).unwrap();
    let bytes = || data.get(CellKey::KeyLimits(0x0707)).unwrap().value.len();
    assert_eq!(bytes(), ENTRY_BYTES);
    grant(&data, KEY, Some(WHOLE), &[], WHOLE, NOW).unwrap();
    assert_eq!(bytes(), 0);
}

/// How many requests of a shared limit, of 1,000 an hour, are admitted at once.
fn admitted_of_an_hour(data: &TestData, default_share: u32, most: usize, now_ns: u64) -> usize {
    let limits = [limit(1_000, 3_600, 1_000)];
    let limits = [Limit { limit: &limits[0], tag: Tag::of_key("hour"), shared: true }];
    let subject = Subject::Key(KEY);
    (0..most).filter(|_| take(data, subject, &limits, 1, default_share, now_ns).is_ok()).count()
}

fn used(requests: u64) -> [Used; 1] {
    [Used { tag: Tag::of_key("hour"), ahead_ns: requests * 3_600 * MS }]
}

#[test]
fn a_share_that_was_left_to_others_begins_anew_and_forgets_nothing_that_was_used() {
    let data = new_data();
    // One Envoy: bursts of five, each followed by a rest in which the control plane takes the share back.
    for round in 0..20 {
        let now_ns = NOW + round * 5 * NS_PER_S;
        assert_eq!(admitted_of_an_hour(&data, WHOLE, 5, now_ns), 5);
        grant(&data, KEY, Some(WHOLE), &used(5 * (round + 1)), WHOLE, now_ns).unwrap();
        grant(&data, KEY, None, &[], WHOLE, now_ns).unwrap();
    }
    // A hundred are used, and those came back that an interval of 3.6 s gives in 95 seconds.
    assert_eq!(admitted_of_an_hour(&data, WHOLE, 2_000, NOW + 95 * NS_PER_S), 926);
}

#[test]
fn what_comes_to_a_share_is_used_as_far_as_all_envoys_have_used_the_limit() {
    let data = new_data();
    // Another Envoy had the limit and has used all of it: this one begins with its third, and gets no more with the rest.
    assert_eq!(admitted_of_an_hour(&data, WHOLE / 3, 2_000, NOW), 333);
    grant(&data, KEY, Some(WHOLE), &used(1_000), WHOLE / 3, NOW).unwrap();
    assert_eq!(admitted_of_an_hour(&data, WHOLE / 3, 2_000, NOW), 0);
    // Nobody else has used any.
    let data = new_data();
    assert_eq!(admitted_of_an_hour(&data, WHOLE / 2, 2_000, NOW), 500);
    grant(&data, KEY, Some(WHOLE), &used(0), WHOLE / 2, NOW).unwrap();
    assert_eq!(admitted_of_an_hour(&data, WHOLE / 2, 2_000, NOW), 500);
    // A share that shrinks is used to the same part.
    let data = new_data();
    assert_eq!(admitted_of_an_hour(&data, WHOLE, 500, NOW), 500);
    grant(&data, KEY, Some(WHOLE / 10), &used(500), WHOLE, NOW).unwrap();
    assert_eq!(admitted_of_an_hour(&data, WHOLE, 2_000, NOW), 50);
}

#[test]
fn who_is_refused_by_a_small_share_waits_no_longer_than_the_whole_limit_would_have_it() {
    let data = new_data();
    let limits = [limit(1_000, 3_600, 1_000)];
    let limits = [Limit { limit: &limits[0], tag: Tag::of_key("hour"), shared: true }];
    grant(&data, KEY, Some(1), &[], WHOLE, NOW).unwrap();
    let ask = || take(&data, Subject::Key(KEY), &limits, 1, WHOLE, NOW).map(|_| ());
    assert_eq!((ask(), ask()), (Ok(()), Err(Refused { limit: 0, retry_after_s: 4 })));
}

#[test]
fn a_policys_limit_stands_beside_those_of_the_key() {
    let data = new_data();
    let (own, policy) = (limit(100, 1, 100), limit(3, 60, 3));
    let own = Limit { limit: &own, tag: Tag::of_key("own"), shared: false };
    let of = |name| Limit { limit: &policy, tag: Tag::of_policy(name), shared: false };
    let admitted =
        |limits: &[Limit<'_>]| (0..10).filter(|_| take(&data, Subject::Key(KEY), limits, 1, 1, NOW).is_ok()).count();
    assert_eq!(admitted(&[own, of("search")]), 3);
    assert_eq!(admitted(&[own, of("export")]), 3);
    assert_eq!(admitted(&[own]), 10);
}

#[test]
fn clients_without_a_key_are_told_apart_by_address_and_v6_by_network() {
    let data = new_data();
    let limits = [limit(1, 60, 1)];
    let one = |client| take(&data, client, &placed(&limits, false), 1, WHOLE, NOW).is_ok();
    assert!(one(client("192.0.2.1")) && one(client("192.0.2.2")) && one(client("2001:db8::1")));
    assert!(!one(client("192.0.2.1")) && !one(client("2001:db8::ffff")) && one(client("2001:db8:0:1::1")));
    assert!(data.host().cell_names().iter().all(|name| name.contains(":a")));
}

#[test]
fn a_cell_of_addresses_is_bounded_and_keeps_those_that_are_furthest_ahead() {
    let mut entries = Entries(Vec::new());
    for number in 0..600_u64 {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        entries.0.push(Entry { id, tag: Tag(0), value: NOW + 1 + number });
    }
    let bytes = entries.write(NOW, ADDRESS_ENTRIES);
    assert_eq!(bytes.len(), ADDRESS_ENTRIES * ENTRY_BYTES);
    let least = Entries::read(&bytes).0.iter().map(|entry| entry.value).min();
    assert_eq!(least, Some(NOW + 600 - ADDRESS_ENTRIES as u64 + 1));
}
