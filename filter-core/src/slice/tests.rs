//! Slices of one VM and of several, on cells in memory.

use contract::rate::WHOLE;
use proptest::prelude::*;

use super::*;
use crate::cells::memory::MemoryCells;

const KEY: KeyId = KeyId([7; 16]);
const SECOND_NS: u64 = 1_000_000_000;
const NOW: u64 = 1_800_000_000 * SECOND_NS;

fn names() -> Names {
    Names::of("cluster", "default")
}

fn limit(requests: u32, window_s: u32) -> RateLimit {
    RateLimit { name: "own".into(), requests, window_s, burst: requests }
}

fn of_own(own: &[RateLimit]) -> Limits<'_> {
    Limits { own, alone: u32::MAX, route: None }
}

/// How many of so many requests that come at once are admitted.
fn admitted(slices: &Slices, cells: &MemoryCells, limits: &Limits<'_>, requests: u32, now_ns: u64) -> u32 {
    let ask = |_: &u32| slices.take(cells, &names(), KEY, limits, WHOLE, || now_ns).is_ok();
    (0..requests).filter(ask).count() as u32
}

fn give_back(slices: &Slices, cells: &MemoryCells, now_ns: u64) {
    (0..4).for_each(|quarter| slices.give_back(quarter, cells, &names(), WHOLE, now_ns));
}

#[test]
fn a_busy_key_seldom_asks_shared_data() {
    let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(1_000_000, 1)]);
    assert_eq!(admitted(&slices, &cells, &of_own(&own), 1_000, NOW), 1_000);
    // 1, 8, 40, and then 64 at a time.
    assert!(cells.writes.get() <= 3 + 15, "{}", cells.writes.get());
    let writes = cells.writes.get();
    give_back(&slices, &cells, NOW);
    assert_eq!(cells.writes.get(), writes + 1);
}

#[test]
fn all_of_a_limit_can_be_used_and_no_more() {
    for requests in [1, 63, 64, 127, 128, 1_000, 9_999] {
        let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(requests, 3_600)]);
        assert_eq!(admitted(&slices, &cells, &of_own(&own), 2 * requests, NOW), requests);
    }
}

#[test]
fn a_small_limit_is_asked_each_time() {
    let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(127, 1), limit(1_000_000, 1)]);
    assert_eq!(admitted(&slices, &cells, &of_own(&own), 127, NOW), 127);
    assert_eq!(cells.writes.get(), 127);
}

#[test]
fn what_was_not_used_is_given_back_within_a_second() {
    let (cells, own) = (MemoryCells::default(), [limit(1_280, 3_600)]);
    let [one, other] = [Slices::default(), Slices::default()];
    assert_eq!(admitted(&one, &cells, &of_own(&own), 40, NOW), 40);
    // One has taken some ahead: at most a 64th is missing.
    let at_once = admitted(&other, &cells, &of_own(&own), 2_000, NOW);
    assert!((1_240 - 20..1_240).contains(&at_once), "{at_once}");
    give_back(&one, &cells, NOW);
    give_back(&other, &cells, NOW);
    assert_eq!(at_once + admitted(&other, &cells, &of_own(&own), 2_000, NOW), 1_240);
}

#[test]
fn other_limits_than_those_of_the_slice_are_asked() {
    let (cells, slices) = (MemoryCells::default(), Slices::default());
    let (wide, route) = ([limit(1_000_000, 1)], RateLimit { name: "route".into(), ..limit(1, 60) });
    assert_eq!(admitted(&slices, &cells, &of_own(&wide), 100, NOW), 100);
    let narrow = [RateLimit { name: "narrow".into(), ..limit(5, 60) }];
    assert_eq!(admitted(&slices, &cells, &of_own(&narrow), 100, NOW), 5);
    let with_route = Limits { route: Some(&route), ..of_own(&wide) };
    assert_eq!(admitted(&slices, &cells, &of_own(&wide), 100, NOW), 100);
    assert_eq!(admitted(&slices, &cells, &with_route, 100, NOW), 1);
}

#[test]
fn keys_that_have_rested_and_keys_beyond_the_bound_have_no_slice() {
    let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(1_000_000, 1)]);
    for number in 0..2 * KEYS as u32 {
        let mut key = KEY;
        key.0[..4].copy_from_slice(&number.to_be_bytes());
        assert_eq!(slices.take(&cells, &names(), key, &of_own(&own), WHOLE, || NOW), Ok(()));
    }
    assert_eq!(slices.of_keys.borrow().len(), KEYS);
    let writes = cells.writes.get();
    give_back(&slices, &cells, NOW);
    assert_eq!((slices.of_keys.borrow().len(), cells.writes.get()), (0, writes));
}

#[test]
fn a_key_that_comes_back_takes_at_once_what_keys_usually_need() {
    let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(1_000_000, 1)]);
    // Each key makes so many requests and rests; gives how often the last of them asked shared data before it rested.
    let writes_of_the_last = |requests: u32| {
        let mut asked = 0;
        for number in 0..200 {
            let mut key = KEY;
            key.0[15] = number;
            let before = cells.writes.get();
            for _ in 0..requests {
                assert_eq!(slices.take(&cells, &names(), key, &of_own(&own), WHOLE, || NOW), Ok(()));
            }
            asked = cells.writes.get() - before;
            (0..8).for_each(|_| give_back(&slices, &cells, NOW));
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
    let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(1_000_000, 1)]);
    let route = RateLimit { name: "route".into(), ..limit(1_000_000, 60) };
    let with_route = Limits { route: Some(&route), ..of_own(&own) };
    assert_eq!(admitted(&slices, &cells, &of_own(&own), 100, NOW), 100);
    let writes = cells.writes.get();
    for limits in [with_route, of_own(&own)].iter().cycle().take(100) {
        assert_eq!(admitted(&slices, &cells, limits, 1, NOW), 1);
    }
    assert!(cells.writes.get() - writes <= 100, "{}", cells.writes.get() - writes);
}

#[test]
fn what_is_given_back_after_a_share_has_grown_is_no_more_than_was_taken() {
    let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(12_800, 3_600)]);
    let shared = Limits { own: &own, alone: 0, route: None };
    let tenth = WHOLE / 10;
    limiter::grant(&cells, &names(), KEY, Some(tenth), &[], 1, NOW).unwrap();
    assert_eq!(admitted(&slices, &cells, &shared, 40, NOW), 40);
    let left = ahead(std::slice::from_ref(&slices));
    assert!(left > 0);
    let unused = [limiter::Used::told(contract::rate::tag("own"), 0)];
    limiter::grant(&cells, &names(), KEY, Some(WHOLE), &unused, 1, NOW).unwrap();
    give_back(&slices, &cells, NOW);
    // All but the forty, which is told to the nanosecond.
    assert!((12_759..=12_760).contains(&admitted(&slices, &cells, &shared, 20_000, NOW)));
}

#[test]
fn what_has_passed_is_not_written_again() {
    let (cells, slices, own) = (MemoryCells::default(), Slices::default(), [limit(1_000, 1)]);
    assert_eq!(admitted(&slices, &cells, &of_own(&own), 40, NOW), 40);
    let writes = cells.writes.get();
    give_back(&slices, &cells, NOW + SECOND_NS);
    assert_eq!((cells.writes.get(), ahead(std::slice::from_ref(&slices))), (writes, 0));
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
        let (cells, own) = (MemoryCells::default(), [limit(requests, 10)]);
        let vms = [Slices::default(), Slices::default(), Slices::default()];
        let (mut now_ns, mut used) = (NOW, 0_u64);
        // Of each beginning: when, how many were admitted before, how many were ahead.
        let mut begun = vec![(NOW, 0, 0)];
        for step in steps {
            match step {
                Step::Ask { vm, requests } => {
                    used += u64::from(admitted(&vms[vm], &cells, &of_own(&own), requests, now_ns));
                }
                Step::GiveBack { vm } => give_back(&vms[vm], &cells, now_ns),
                Step::Wait { ms } => now_ns += ms * 1_000_000,
            }
            for (since_ns, before, ahead) in &begun {
                let refilled = (now_ns - since_ns) * u64::from(requests) / (10 * SECOND_NS) + 1;
                let may = u64::from(requests) + refilled + ahead;
                prop_assert!(used - before <= may, "{} of {may} since {since_ns}", used - before);
            }
            begun.push((now_ns, used, ahead(&vms)));
        }
        vms.iter().for_each(|vm| give_back(vm, &cells, now_ns));
        // Whatever came before: after a full rest, the burst is there again, to the last request.
        let rested_ns = now_ns + 10 * SECOND_NS;
        prop_assert_eq!(admitted(&vms[0], &cells, &of_own(&own), 2 * requests, rested_ns), requests);
    }
}
