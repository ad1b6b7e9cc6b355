use contract::record::{Per, RateLimit};
use contract::time::NS_PER_S;

use super::*;
use crate::pool::{Kind, PoolId, Subject};

const NOW_MS: u64 = 1_800_000_000_000;
const NOW: u64 = NOW_MS * NS_PER_MS;
const ONE: ReporterId = ReporterId([1; 16]);
const TWO: ReporterId = ReporterId([2; 16]);

fn rate(requests: u32, window_s: u32) -> Terms {
    let name = "a".into();
    Terms::Rate(Rate::of(&RateLimit { name, requests, window_s, burst: requests, shared: true, per: Per::Key }))
}

const fn stock(left: i64) -> Terms {
    Terms::Stock { left, renews_in_ms: None }
}

fn ask() -> Ask {
    let pool = PoolId { kind: Kind::Rate, subject: Subject([7; 16]), tag: 0 };
    let (interval_ns, need, least) = (NS_PER_S, 0, 0);
    Ask { pool, session: 5, granted: 0, spent: 0, returned: 0, ahead_ns: 0, interval_ns, need, least, want: 0 }
}

fn needs(need: u64) -> Ask {
    Ask { need, ..ask() }
}

fn granted(pool: &mut Pool, reporter: ReporterId, ask: &Ask) -> u64 {
    pool.answer(reporter, ask, OtherEnvoys::Several, NOW).granted
}

#[test]
fn requests_that_wait_get_all_that_is_left_and_tokens_ahead_a_part() {
    for (terms, ahead, why) in [
        (rate(100, 10), 48, "all of 96, in equal parts"),
        (rate(100, 11), 6, "an eighth of 96, in equal parts"),
        (stock(100), 2, "all hold a sixteenth of 96"),
    ] {
        let mut pool = Pool::new(terms);
        assert_eq!(granted(&mut pool, ONE, &needs(4)), 4);
        assert_eq!(granted(&mut pool, TWO, &Ask { want: 50, ..ask() }), ahead, "{why}");
        assert_eq!(granted(&mut pool, TWO, &Ask { granted: ahead, ..needs(99) }), 96);
        assert_eq!((pool.held(), pool.room(NOW), pool.left(NOW)), (100, 0, 100));
    }
}

#[test]
fn tokens_that_suffice_for_no_request_that_waits_are_left_for_others() {
    let mut pool = Pool::new(stock(100));
    let asked = Ask { least: 60, ..needs(120) };
    assert_eq!(granted(&mut pool, ONE, &asked), 100);
    let mut pool = Pool::new(stock(59));
    assert_eq!(granted(&mut pool, ONE, &asked), 0);
    assert_eq!(granted(&mut pool, TWO, &needs(59)), 59);
    // With what the Envoy holds already they suffice.
    let mut pool = Pool::new(stock(100));
    assert_eq!(granted(&mut pool, ONE, &needs(5)), 5);
    assert_eq!(granted(&mut pool, TWO, &needs(35)), 35);
    assert_eq!(granted(&mut pool, ONE, &Ask { granted: 5, least: 65, ..needs(65) }), 65);
}

#[test]
fn an_idle_envoy_does_not_lessen_what_others_get_ahead() {
    let mut pool = Pool::new(stock(800));
    granted(&mut pool, ONE, &needs(1));
    assert_eq!(granted(&mut pool, TWO, &Ask { want: 99, ..ask() }), 24);
    let mut pool = Pool::new(stock(800));
    granted(&mut pool, ONE, &needs(1));
    let later = NOW + IDLE_MS * NS_PER_MS;
    assert_eq!(pool.answer(TWO, &Ask { want: 99, ..ask() }, OtherEnvoys::Several, later).granted, 48);
}

#[test]
fn a_call_that_comes_twice_or_late_grants_nothing_more() {
    let mut pool = Pool::new(stock(100));
    assert_eq!([granted(&mut pool, ONE, &needs(5)), granted(&mut pool, ONE, &needs(5))], [5, 5]);
    let later = Ask { session: 6, ..needs(7) };
    assert_eq!((granted(&mut pool, ONE, &later), pool.held()), (7, 7), "what the earlier session held is free");
    let late = pool.answer(ONE, &needs(5), OtherEnvoys::Several, NOW);
    assert_eq!(late, Grant { session: 6, ..Grant::default() });
    assert_eq!(pool.held(), 7);
}

#[test]
fn what_an_envoy_spent_counts_at_once_for_a_rate_and_with_the_report_for_a_quota() {
    let mut limit = Pool::new(rate(10, 10));
    granted(&mut limit, ONE, &needs(6));
    let report = Ask { granted: 6, spent: 4, ahead_ns: 4 * NS_PER_S, ..ask() };
    granted(&mut limit, ONE, &report);
    assert_eq!((limit.held(), limit.left(NOW), limit.room(NOW)), (2, 6, 4));
    // Reported twice, it counts once.
    granted(&mut limit, ONE, &report);
    assert_eq!((limit.held(), limit.left(NOW)), (2, 6));

    let mut quota = Pool::new(stock(10));
    granted(&mut quota, ONE, &needs(6));
    granted(&mut quota, ONE, &Ask { granted: 6, spent: 4, ..ask() });
    assert_eq!((quota.held(), quota.room(NOW)), (6, 4));
    quota.holders[0].book(4);
    quota.terms = stock(6);
    assert_eq!((quota.held(), quota.room(NOW)), (2, 4));
    // Usage beyond the grants is no debt of the Envoy, and no grant that it may spend.
    quota.holders[0].book(9);
    assert_eq!((quota.held(), quota.holders[0].granted), (0, 13));
}

#[test]
fn an_envoy_keeps_grants_that_a_crash_of_the_database_lost() {
    let mut pool = Pool::new(stock(100));
    assert_eq!(granted(&mut pool, ONE, &Ask { granted: 30, spent: 5, returned: 3, ..ask() }), 30);
    assert_eq!(pool.held(), 27);
    // It spent beyond what it was granted: alone.
    let mut pool = Pool::new(rate(10, 10));
    assert_eq!(granted(&mut pool, ONE, &Ask { spent: 4, ahead_ns: 4 * NS_PER_S, ..ask() }), 4);
    assert_eq!((pool.held(), pool.left(NOW)), (0, 6));
}

#[test]
fn others_hand_back_when_a_request_misses_tokens_or_the_pool_is_scarce() {
    let is_recalled =
        |pool: &Pool, reporter| pool.holders.iter().any(|holder| holder.reporter == reporter && holder.is_recalled);
    let mut pool = Pool::new(stock(100));
    granted(&mut pool, ONE, &needs(9));
    granted(&mut pool, TWO, &needs(5));
    assert!(!is_recalled(&pool, ONE), "86 are left");
    granted(&mut pool, TWO, &needs(30));
    assert!(is_recalled(&pool, ONE), "61 are left");
    granted(&mut pool, ONE, &Ask { granted: 9, returned: 9, ..ask() });
    assert!(!is_recalled(&pool, ONE) && is_recalled(&pool, TWO));
    let answer = pool.answer(ONE, &Ask { granted: 9, returned: 9, ..needs(99) }, OtherEnvoys::Several, NOW);
    assert_eq!((answer.left, answer.others, answer.held), (0, 30, 70));
    // An Envoy that is silent cannot hand back.
    let silent = NOW + SILENT_MS * NS_PER_MS;
    let answer = pool.answer(ONE, &Ask { granted: 79, returned: 9, ..needs(99) }, OtherEnvoys::Several, silent);
    assert_eq!(answer.others, 0);
}

#[test]
fn nothing_is_granted_while_another_envoy_may_decide_by_itself() {
    let mut pool = Pool::new(stock(100));
    let answer = pool.answer(ONE, &Ask { want: 9, ..needs(5) }, OtherEnvoys::AnotherIsAlone, NOW);
    assert_eq!((answer.granted, answer.left, answer.others), (0, 0, u64::MAX));
    assert_eq!(pool.held(), 0);
}

#[test]
fn the_answer_says_when_the_next_token_comes() {
    let empty_ms = |pool: &mut Pool, ask: &Ask| pool.answer(ONE, ask, OtherEnvoys::Several, NOW).empty_ms;
    assert_eq!(empty_ms(&mut Pool::new(rate(10, 10)), &needs(9)), 0);
    // If all tokens of a rate limit are held, the time is that as if all were spent now.
    assert_eq!(empty_ms(&mut Pool::new(rate(10, 10)), &needs(10)), 1_000);
    assert_eq!(empty_ms(&mut Pool::new(rate(10, 10)), &needs(11)), 1_000);
    let mut used = Pool { arrival_ns: NOW + 10 * NS_PER_S, interval_ns: NS_PER_S, ..Pool::new(rate(10, 10)) };
    let answer = used.answer(ONE, &needs(1), OtherEnvoys::Several, NOW);
    assert_eq!((answer.empty_ms, answer.ahead_ns), (1_000, 10 * NS_PER_S));
    assert_eq!(empty_ms(&mut Pool::new(stock(-5)), &needs(1)), u32::MAX);
    let renews = |ms| Terms::Stock { left: 0, renews_in_ms: Some(ms) };
    assert_eq!(empty_ms(&mut Pool::new(renews(700)), &needs(1)), 700);
    assert_eq!(empty_ms(&mut Pool::new(renews(u64::MAX)), &needs(1)), u32::MAX - 1);
}

#[test]
fn a_rate_that_changes_keeps_what_is_used_of_it() {
    let mut pool = Pool { arrival_ns: NOW + 5 * NS_PER_S, interval_ns: NS_PER_S, ..Pool::new(rate(10, 10)) };
    pool.terms = rate(100, 10);
    granted(&mut pool, ONE, &ask());
    assert_eq!((pool.interval_ns, pool.left(NOW)), (NS_PER_S / 10, 95));
    // A time that is out of reach, from before the clock stepped back.
    pool.arrival_ns = NOW + 3_600 * NS_PER_S;
    granted(&mut pool, ONE, &ask());
    assert_eq!(pool.arrival_ns, NOW + 10 * NS_PER_S);
    // An Envoy that counts by another interval has used as many.
    let mut pool = Pool::new(rate(10, 10));
    granted(&mut pool, ONE, &Ask { spent: 3, ahead_ns: 3 * NS_PER_S / 2, interval_ns: NS_PER_S / 2, ..ask() });
    assert_eq!(pool.left(NOW), 7);
}

#[test]
fn only_a_rate_limit_has_a_rate() {
    assert!(rate_of(&rate(1, 1)).is_some() && rate_of(&stock(1)).is_none());
}

#[test]
fn a_recall_stands_until_the_envoy_has_handed_back_or_needs_tokens_itself() {
    let mut quota = Pool::new(stock(100));
    granted(&mut quota, ONE, &needs(40));
    granted(&mut quota, TWO, &needs(99));
    let is_recalled = |quota: &Pool| quota.holders.iter().find(|of| of.reporter == ONE).unwrap().is_recalled;
    assert!(is_recalled(&quota));
    // The first Envoy reports its usage before it receives the recall.
    let reported = Ask { granted: 40, spent: 10, ..ask() };
    granted(&mut quota, ONE, &reported);
    assert!(is_recalled(&quota));
    let mut other = quota.clone();
    granted(&mut other, ONE, &Ask { need: 31, least: 1, ..reported });
    assert!(!is_recalled(&other));
    granted(&mut quota, ONE, &Ask { returned: 30, ..reported });
    assert!(!is_recalled(&quota));
}

#[test]
fn idle_envoys_that_hold_more_than_an_eighth_of_a_limit_hand_back_and_busy_ones_if_tokens_are_missing() {
    let third = ReporterId([3; 16]);
    let at = |later_ms: u64| NOW + later_ms * NS_PER_MS;
    for (want, is_too_much) in [(102, false), (103, true)] {
        let mut limit = Pool::new(rate(820, 10));
        let recalled = |limit: &Pool| {
            let holder = |of| limit.holders.iter().find(|holder| holder.reporter == of).unwrap();
            [ONE, third].map(|of| holder(of).is_recalled)
        };
        let uses = Ask { granted: 1, spent: 1, want, ..ask() };
        limit.answer(ONE, &uses, OtherEnvoys::Several, NOW);
        limit.answer(third, &uses, OtherEnvoys::Several, at(UNUSED_MS - 1));
        limit.answer(TWO, &needs(1), OtherEnvoys::Several, at(UNUSED_MS - 1));
        assert_eq!((limit.held(), recalled(&limit)), (2 * want + 1, [false; 2]), "both may be busy");
        limit.answer(TWO, &Ask { granted: 1, ..needs(1) }, OtherEnvoys::Several, at(UNUSED_MS));
        assert_eq!((limit.left(at(UNUSED_MS)), recalled(&limit)), (820, [is_too_much, false]));
        limit.answer(TWO, &Ask { granted: 1, ..needs(819) }, OtherEnvoys::Several, at(UNUSED_MS));
        assert_eq!(recalled(&limit), [true; 2]);
    }
}

#[test]
fn an_empty_pool_is_not_known_to_be_empty_for_longer_than_a_silent_envoy_holds_tokens() {
    let mut quota = Pool::new(stock(100));
    granted(&mut quota, ONE, &needs(40));
    let answer = |quota: &mut Pool, later_ms: u64| {
        let answer = quota.answer(TWO, &needs(99), OtherEnvoys::Several, NOW + later_ms * NS_PER_MS);
        (answer.left, answer.others, answer.empty_ms, answer.known_ms)
    };
    assert_eq!(answer(&mut quota, 1_000), (0, 40, u32::MAX, OTHERS_MS));
    assert_eq!(answer(&mut quota, 2_000), (0, 0, 58_000, SILENT_KNOWN_MS));
    assert_eq!(answer(&mut quota, 59_500), (0, 0, 1_000, SILENT_KNOWN_MS));
    granted(&mut quota, ONE, &Ask { granted: 40, returned: 40, ..ask() });
    granted(&mut quota, TWO, &Ask { granted: 60, ..needs(100) });
    assert_eq!(answer(&mut quota, 2_000), (0, 0, u32::MAX, u32::MAX));
}
