//! Slices of one VM and of several, on cells in memory.

use contract::rate::WHOLE;
use proptest::prelude::*;

use super::*;
use crate::mock::{TestData, new_data};
use crate::time::NS_PER_S;

const KEY: KeyId = KeyId([7; 16]);
const NOW: u64 = 1_800_000_000 * NS_PER_S;

fn limit(requests: u32, window_s: u32) -> RateLimit {
    RateLimit { name: "own".into(), requests, window_s, burst: requests, shared: false }
}

fn of_own(own: &[RateLimit]) -> Limits<'_> {
    Limits { own, route: None }
}

/// How many of so many requests that come at once are admitted.
fn admitted(slices: &Slices, data: &TestData, limits: &Limits<'_>, requests: u32, now_ns: u64) -> u32 {
    let ask = |_: &u32| slices.take(data, KEY, limits, WHOLE, || now_ns).is_ok();
    (0..requests).filter(ask).count() as u32
}

fn give_back(slices: &Slices, data: &TestData, now_ns: u64) {
    (0..4).for_each(|quarter| slices.give_back(quarter, data, WHOLE, now_ns));
}

#[test]
fn a_busy_key_seldom_asks_shared_data() {
    let (data, slices, own) = (new_data(), Slices::default(), [limit(1_000_000, 1)]);
    assert_eq!(admitted(&slices, &data, &of_own(&own), 1_000, NOW), 1_000);
    // 1, 8, 40, and then 64 at a time.
    assert!(data.host().writes() <= 3 + 15, "{}", data.host().writes());
    let writes = data.host().writes();
    give_back(&slices, &data, NOW);
    assert_eq!(data.host().writes(), writes + 1);
}

#[test]
fn all_of_a_limit_can_be_used_and_no_more() {
    for requests in [1, 63, 64, 127, 128, 1_000, 9_999] {
        let (data, slices, own) = (new_data(), Slices::default(), [limit(requests, 3_600)]);
        assert_eq!(admitted(&slices, &data, &of_own(&own), 2 * requests, NOW), requests);
    }
}

#[test]
fn a_small_limit_is_asked_each_time() {
    let (data, slices, own) = (new_data(), Slices::default(), [limit(127, 1), limit(1_000_000, 1)]);
    assert_eq!(admitted(&slices, &data, &of_own(&own), 127, NOW), 127);
    assert_eq!(data.host().writes(), 127);
}

#[test]
fn what_was_not_used_is_given_back_within_a_second() {
    let (data, own) = (new_data(), [limit(1_280, 3_600)]);
    let [one, other] = [Slices::default(), Slices::default()];
    assert_eq!(admitted(&one, &data, &of_own(&own), 40, NOW), 40);
    // One has taken some ahead: at most a 64th is missing.
    let at_once = admitted(&other, &data, &of_own(&own), 2_000, NOW);
    assert!((1_240 - 20..1_240).contains(&at_once), "{at_once}");
    give_back(&one, &data, NOW);
    give_back(&other, &data, NOW);
    assert_eq!(at_once + admitted(&other, &data, &of_own(&own), 2_000, NOW), 1_240);
}

#[test]
fn other_limits_than_those_of_the_slice_are_asked() {
    let (data, slices) = (new_data(), Slices::default());
    let (wide, route) = ([limit(1_000_000, 1)], RateLimit { name: "route".into(), ..limit(1, 60) });
    assert_eq!(admitted(&slices, &data, &of_own(&wide), 100, NOW), 100);
    let narrow = [RateLimit { name: "narrow".into(), ..limit(5, 60) }];
    assert_eq!(admitted(&slices, &data, &of_own(&narrow), 100, NOW), 5);
    let with_route = Limits { route: Some(&route), ..of_own(&wide) };
    assert_eq!(admitted(&slices, &data, &of_own(&wide), 100, NOW), 100);
    assert_eq!(admitted(&slices, &data, &with_route, 100, NOW), 1);
}

#[test]
fn keys_that_have_rested_and_keys_beyond_the_bound_have_no_slice() {
    let (data, slices, own) = (new_data(), Slices::default(), [limit(1_000_000, 1)]);
    for number in 0..2 * KEYS as u32 {
        let mut key = KEY;
        key.0[..4].copy_from_slice(&number.to_be_bytes());
        assert_eq!(slices.take(&data, key, &of_own(&own), WHOLE, || NOW), Ok(()));
    }
    assert_eq!(slices.of_keys.borrow().len(), KEYS);
    let writes = data.host().writes();
    give_back(&slices, &data, NOW);
    assert_eq!((slices.of_keys.borrow().len(), data.host().writes()), (0, writes));
}

#[test]
fn a_key_that_comes_back_takes_at_once_what_keys_usually_need() {
    let (data, slices, own) = (new_data(), Slices::default(), [limit(1_000_000, 1)]);
    // Each key makes so many requests and rests; gives how often the last of them asked shared data before it rested.
    let writes_of_the_last = |requests: u32| {
        let mut asked = 0;
        for number in 0..200 {
            let mut key = KEY;
            key.0[15] = number;
            let before = data.host().writes();
            for _ in 0..requests {
                assert_eq!(slices.take(&data, key, &of_own(&own), WHOLE, || NOW), Ok(()));
            }
            asked = data.host().writes() - before;
            (0..8).for_each(|_| give_back(&slices, &data, NOW));
        }
        asked
    };
    assert_eq!(writes_of_the_last(1), 1);
    assert_eq!(slices.wanted_at_first(), 1);
    // The first takes for all of them.
    assert_eq!(writes_of_the_last(5), 1);
    // Once more they come but once: nothing is taken ahead that would have to be given back.
    writes_of_the_last(1);
    assert_eq!(slices.wanted_at_first(), 1);
}

#[test]
fn a_key_that_comes_on_two_routes_in_turn_costs_no_more_than_without_slices() {
    let (data, slices, own) = (new_data(), Slices::default(), [limit(1_000_000, 1)]);
    let route = RateLimit { name: "route".into(), ..limit(1_000_000, 60) };
    let with_route = Limits { route: Some(&route), ..of_own(&own) };
    assert_eq!(admitted(&slices, &data, &of_own(&own), 100, NOW), 100);
    let writes = data.host().writes();
    for limits in [with_route, of_own(&own)].iter().cycle().take(100) {
        assert_eq!(admitted(&slices, &data, limits, 1, NOW), 1);
    }
    assert!(data.host().writes() - writes <= 100, "{}", data.host().writes() - writes);
}

#[test]
fn what_is_given_back_after_a_share_has_grown_is_no_more_than_was_taken() {
    let (data, slices, own) = (new_data(), Slices::default(), [RateLimit { shared: true, ..limit(12_800, 3_600) }]);
    let shared = Limits { own: &own, route: None };
    let tenth = WHOLE / 10;
    limiter::grant(&data, KEY, Some(tenth), &[], 1, NOW).unwrap();
    assert_eq!(admitted(&slices, &data, &shared, 40, NOW), 40);
    let left = ahead(std::slice::from_ref(&slices));
    assert!(left > 0);
    let unused = [limiter::Used::told(contract::rate::tag("own"), 0)];
    limiter::grant(&data, KEY, Some(WHOLE), &unused, 1, NOW).unwrap();
    give_back(&slices, &data, NOW);
    // All but the forty, which is told to the nanosecond.
    assert!((12_759..=12_760).contains(&admitted(&slices, &data, &shared, 20_000, NOW)));
}

#[test]
fn what_has_passed_is_not_written_again() {
    let (data, slices, own) = (new_data(), Slices::default(), [limit(1_000, 1)]);
    assert_eq!(admitted(&slices, &data, &of_own(&own), 40, NOW), 40);
    let writes = data.host().writes();
    give_back(&slices, &data, NOW + NS_PER_S);
    assert_eq!((data.host().writes(), ahead(std::slice::from_ref(&slices))), (writes, 0));
}

/// What one of three VMs does next.
#[derive(Clone, Debug)]
enum Step {
    Ask { vm: usize, requests: u32 },
    GiveBack { vm: usize },
    Wait { ms: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..3_usize, 1..60_u32).prop_map(|(vm, requests)| Step::Ask { vm, requests }),
        2 => (0..3_usize).prop_map(|vm| Step::GiveBack { vm }),
        2 => (1..2_000_u64).prop_map(|ms| Step::Wait { ms }),
    ];
    prop::collection::vec(step, 1..120)
}

/// How many requests of a limit a VM has ahead.
fn ahead(vms: &[Slices]) -> u64 {
    vms.iter().flat_map(|vm| vm.of_keys.borrow().values().map(|slice| u64::from(slice.left)).collect::<Vec<_>>()).sum()
}

proptest! {
    /// Against the bound that the module states, for every span of time that begins or ends with a step; and once all VMs have
    /// given back, not a request has got lost.
    #[test]
    fn never_more_than_the_bound_and_nothing_is_lost(steps in steps(), requests in 100..4_000_u32) {
        let (data, own) = (new_data(), [limit(requests, 10)]);
        let vms = [Slices::default(), Slices::default(), Slices::default()];
        let (mut now_ns, mut used) = (NOW, 0_u64);
        // Of each beginning: when, how many were admitted before, how many were ahead.
        let mut begun = vec![(NOW, 0, 0)];
        for step in steps {
            match step {
                Step::Ask { vm, requests } => {
                    used += u64::from(admitted(&vms[vm], &data, &of_own(&own), requests, now_ns));
                }
                Step::GiveBack { vm } => give_back(&vms[vm], &data, now_ns),
                Step::Wait { ms } => now_ns += ms * 1_000_000,
            }
            for (since_ns, before, ahead) in &begun {
                let refilled = (now_ns - since_ns) * u64::from(requests) / (10 * NS_PER_S) + 1;
                let may = u64::from(requests) + refilled + ahead;
                prop_assert!(used - before <= may, "{} of {may} since {since_ns}", used - before);
            }
            begun.push((now_ns, used, ahead(&vms)));
        }
        vms.iter().for_each(|vm| give_back(vm, &data, now_ns));
        // Whatever came before: after a full rest, the burst is there again, to the last request.
        let rested_ns = now_ns + 10 * NS_PER_S;
        prop_assert_eq!(admitted(&vms[0], &data, &of_own(&own), 2 * requests, rested_ns), requests);
    }
}
