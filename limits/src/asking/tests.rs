use super::*;
use crate::pool::{Kind, Subject};

const NOW: u64 = 1_800_000_000_000;

fn pool(number: u16) -> PoolId {
    PoolId { kind: Kind::Rate, subject: Subject([7; 16]), tag: number.into() }
}

fn sorted(due: Option<Vec<Due>>) -> Vec<(u64, u64)> {
    let mut due: Vec<_> = due.unwrap().into_iter().map(|due| (due.pool.tag, due.need)).collect();
    due.sort_unstable();
    due
}

#[test]
fn waiting_requests_of_a_pool_add_up_and_are_urgent() {
    let mut asking = Asking::default();
    assert!(!asking.is_urgent());
    asking.need(pool(1), 3, false);
    asking.need(pool(1), 4, false);
    assert_eq!((asking.waiting(&pool(1)), asking.waiting(&pool(2)), asking.is_urgent()), (7, 0, true));
    assert_eq!(sorted(asking.due(false, NOW)), [(1, 7)]);
    assert_eq!((asking.waiting(&pool(1)), asking.is_urgent()), (0, false));
    asking.need(pool(1), 3, false);
    asking.start_over();
    assert_eq!(asking.waiting(&pool(1)), 0);
}

#[test]
fn requests_that_wait_for_others_are_asked_for_after_a_pause() {
    let mut asking = Asking::default();
    asking.need(pool(1), 3, true);
    assert!(!asking.is_urgent() && asking.is_to_ask_again());
    asking.ask_again();
    assert!(asking.is_urgent() && !asking.is_to_ask_again());
    // One of several that may not pause.
    let mut asking = Asking::default();
    asking.need(pool(1), 3, true);
    asking.need(pool(2), 3, false);
    assert!(asking.is_urgent() && !asking.is_to_ask_again());
    asking.start_over();
    asking.ask_again();
    assert!(!asking.is_urgent());
}

#[test]
fn usage_is_reported_on_ticks_and_low_allowances_at_once() {
    let mut asking = Asking::default();
    asking.spent(pool(1), false);
    assert!(!asking.is_urgent());
    assert_eq!(sorted(asking.due(false, NOW)), []);
    asking.spent(pool(2), true);
    asking.queue(pool(3));
    assert!(asking.is_urgent());
    assert_eq!(sorted(asking.due(false, NOW)), [(2, 0), (3, 0)]);
    assert_eq!(sorted(asking.due(true, NOW)), [(1, 0)]);
    assert_eq!(sorted(asking.due(true, NOW)), []);
}

#[test]
fn tokens_that_decided_requests_lacked_are_asked_for_without_a_wait() {
    let mut asking = Asking::default();
    asking.ask_for(pool(1), 3);
    asking.ask_for(pool(1), 2);
    asking.ask_for(pool(2), 1);
    asking.need(pool(2), 5, false);
    assert_eq!((asking.waiting(&pool(1)), asking.is_urgent()), (0, true));
    asking.start_over();
    asking.need(pool(2), 5, false);
    assert_eq!(sorted(asking.due(false, NOW)), [(1, 3), (2, 5)]);
    assert_eq!(sorted(asking.due(true, NOW)), []);
}

#[test]
fn one_call_is_under_way_unless_it_is_lost() {
    let mut asking = Asking::default();
    asking.need(pool(1), 1, false);
    asking.sent(5, vec![pool(1)], NOW);
    assert!(!asking.is_urgent());
    assert_eq!(asking.due(true, NOW + 8 * TICK_MS), None);
    assert_eq!(asking.take_response(6), None);
    assert!(asking.due(true, NOW + 8 * TICK_MS + 1).is_some());
    assert_eq!(asking.take_response(5), Some(Sent { sent_ms: NOW, pools: vec![pool(1)] }));
    assert_eq!(asking.take_response(5), None);
}

#[test]
fn after_two_failures_no_request_waits_and_the_usage_is_reported_again() {
    let mut asking = Asking::default();
    let sent = Sent { sent_ms: NOW, pools: vec![pool(1)] };
    asking.on_failure(&sent);
    assert!(!asking.is_unreachable());
    asking.on_failure(&sent);
    asking.ask_for(pool(2), 1);
    assert!(asking.is_unreachable() && !asking.is_urgent());
    assert_eq!(sorted(asking.due(true, NOW)), [(1, 0), (2, 1)]);
    asking.on_answer();
    assert!(!asking.is_unreachable());
}

#[test]
fn a_call_has_a_bounded_number_of_pools_and_the_others_follow() {
    let mut asking = Asking::default();
    for number in 0..700 {
        asking.spent(pool(number), false);
    }
    for number in 700..1_300 {
        asking.need(pool(number), 1, false);
    }
    let first = asking.due(true, NOW).unwrap();
    assert_eq!((first.len(), first.iter().all(|due| due.need == 1)), (POOLS, true));
    let rest = [asking.due(true, NOW), asking.due(true, NOW)].map(|due| due.unwrap().len());
    assert_eq!(rest, [POOLS, 300]);
}

#[test]
fn a_pool_is_idle_after_one_to_two_idle_periods() {
    let mut asking = Asking::default();
    assert_eq!(asking.idle(false, NOW), []);
    asking.needed(pool(1));
    asking.needed(pool(2));
    assert_eq!(asking.idle(false, NOW + IDLE_MS - 1), []);
    assert_eq!(asking.idle(false, NOW + IDLE_MS), []);
    asking.needed(pool(2));
    assert_eq!(asking.idle(false, NOW + 2 * IDLE_MS), [pool(1)]);
    assert_eq!(asking.idle(false, NOW + 3 * IDLE_MS), [pool(2)]);
    assert_eq!(asking.idle(false, NOW + 4 * IDLE_MS), []);
    // Also after the clock has stepped back.
    asking.needed(pool(1));
    assert_eq!(asking.idle(false, NOW), []);
    assert_eq!(asking.idle(false, NOW + IDLE_MS), [pool(1)]);
}

#[test]
fn a_worker_that_ends_names_every_pool_once() {
    let mut asking = Asking::default();
    asking.needed(pool(1));
    asking.idle(false, NOW);
    asking.spent(pool(1), true);
    asking.needed(pool(2));
    asking.queue(pool(3));
    let mut all = asking.all();
    all.sort_unstable();
    assert_eq!(all, [pool(1), pool(2), pool(3)]);
    assert_eq!(asking.all(), []);
}

#[test]
fn a_pool_that_was_handed_back_is_not_idle_again() {
    let mut asking = Asking::default();
    asking.idle(false, NOW);
    asking.queue(pool(1));
    asking.spent(pool(2), false);
    assert_eq!(sorted(asking.due(true, NOW)), [(1, 0), (2, 0)]);
    assert_eq!(asking.idle(false, NOW + IDLE_MS), []);
    assert_eq!(asking.idle(false, NOW + 2 * IDLE_MS), [pool(2)]);
    // Usage that is still unreported when a pool is idle is reported.
    asking.queue(pool(3));
    assert_eq!(asking.idle(false, NOW + 3 * IDLE_MS), [pool(3)]);
    assert_eq!(sorted(asking.due(true, NOW)), [(3, 0)]);
}

#[test]
fn the_least_need_is_that_of_the_cheapest_request() {
    let least = |asking: &mut Asking| asking.due(true, NOW).unwrap().first().map(|due| (due.need, due.least));
    let mut asking = Asking::default();
    asking.need(pool(1), 3, false);
    asking.need(pool(1), 2, false);
    asking.need(pool(1), 4, false);
    assert_eq!(least(&mut asking), Some((9, 2)));
    asking.need(pool(1), 4, false);
    assert_eq!(least(&mut asking), Some((4, 4)));
    asking.ask_for(pool(1), 3);
    asking.ask_for(pool(1), 5);
    assert_eq!(least(&mut asking), Some((5, 5)));
    asking.spent(pool(1), true);
    assert_eq!(least(&mut asking), Some((0, 0)));
}

#[test]
fn an_envoy_that_is_alone_keeps_what_it_knows_of_a_bounded_number_of_pools() {
    let mut asking = Asking::default();
    assert!(asking.is_new());
    asking.idle(true, NOW);
    asking.needed(pool(1));
    assert!(!asking.is_new() && !asking.has_queued());
    for period in 1..5 {
        assert_eq!(asking.idle(true, NOW + period * IDLE_MS), []);
    }
    asking.needed(pool(2));
    asking.queue_all_but(&[pool(2)]);
    assert!(asking.has_queued());
    assert_eq!(sorted(asking.due(false, NOW)), [(1, 0)]);
    for number in 0..=REMEMBERED {
        asking.needed(pool(u16::try_from(number).unwrap()));
    }
    asking.idle(true, NOW + 5 * IDLE_MS);
    assert_eq!(asking.idle(true, NOW + 7 * IDLE_MS).len(), REMEMBERED + 1);
}

#[test]
fn a_tick_during_a_call_is_made_up_for_after_its_answer() {
    let mut asking = Asking::default();
    assert_eq!(asking.due(true, NOW), Some(Vec::new()));
    asking.sent(7, Vec::new(), NOW);
    assert_eq!(asking.due(true, NOW + TICK_MS), None);
    assert!(!asking.has_missed_tick(), "not while the call is under way");
    assert!(asking.take_response(7).is_some());
    assert!(asking.has_missed_tick());
    assert_eq!(asking.due(true, NOW + TICK_MS), Some(Vec::new()));
    assert!(!asking.has_missed_tick());
}

#[test]
fn a_pool_that_was_used_in_one_tick_and_not_in_the_next_is_unused_once() {
    let mut asking = Asking::default();
    let mut tick = |used: &[u16]| -> Vec<u64> {
        used.iter().for_each(|number| asking.spent(pool(*number), false));
        let unused = asking.unused().iter().map(|pool| pool.tag).collect();
        asking.due(true, NOW);
        unused
    };
    assert_eq!([tick(&[1, 2]), tick(&[2]), tick(&[]), tick(&[])], [vec![], vec![1], vec![2], vec![]]);
}

#[test]
fn a_call_between_two_ticks_does_not_make_a_pool_unused() {
    let mut asking = Asking::default();
    asking.spent(pool(1), false);
    assert_eq!(asking.unused(), []);
    asking.due(true, NOW);
    asking.spent(pool(1), true);
    asking.due(false, NOW);
    assert_eq!(asking.unused(), []);
    asking.due(true, NOW);
    assert_eq!(asking.unused(), [pool(1)]);
    asking.watch(pool(1));
    assert_eq!((asking.unused(), asking.unused()), (vec![pool(1)], vec![]));
}

#[test]
fn an_unused_pool_asks_for_nothing_unless_it_is_used_again() {
    let mut asking = Asking::default();
    (1..=3).for_each(|number| asking.queue_unused(pool(number)));
    asking.spent(pool(2), false);
    asking.need(pool(3), 1, false);
    let mut due = asking.due(true, NOW).unwrap();
    due.sort_by_key(|due| due.pool.tag);
    let is_unused: Vec<bool> = due.iter().map(|due| due.is_unused).collect();
    assert_eq!(is_unused, [true, false, false]);
    asking.queue(pool(1));
    assert!(!asking.due(false, NOW + 10_000).unwrap()[0].is_unused);
}
