use contract::record::{Per, RateLimit};
use contract::time::NS_PER_S;

use super::*;
use crate::pool::{Kind, PoolId, Subject, rescale};
use crate::{ALONE_MS, VOID_AFTER_MS};

const NOW_MS: u64 = 1_800_000_000_000;
const NOW: u64 = NOW_MS * NS_PER_MS;
const POOL: PoolId = PoolId { kind: Kind::Rate, subject: Subject([7; 16]), tag: 0 };
const STOCK: Limited<'_> = Limited::Stock { fill: 1 };

fn rate(requests: u32, window_s: u32) -> Rate {
    let name = "a".into();
    Rate::of(&RateLimit { name, requests, window_s, burst: requests, shared: true, per: Per::Key })
}

/// In contact with the control plane for long.
const fn contact() -> Contact {
    Contact { since_ms: 1, answered_ms: NOW_MS, live: 2, alone_term: 0, alone_until_ms: 0 }
}

const fn alone() -> Contact {
    Contact { live: 1, alone_term: 1, alone_until_ms: NOW_MS + ALONE_MS, ..contact() }
}

/// A holding with this many tokens of a quota.
fn with(granted: u64) -> Holding {
    let mut holding = Holding::default();
    holding.prepare(STOCK, &contact(), NOW);
    holding.ask(due(0), &contact(), NOW);
    holding.apply(&grant(granted, 0, 0, u32::MAX), &contact(), NOW_MS);
    holding
}

const fn due(need: u64) -> Due {
    Due { pool: POOL, need, least: need, is_unused: false }
}

fn grant(granted: u64, left: u64, others: u64, empty_ms: u32) -> Grant {
    let known_ms = if others > 0 { 100 } else { u32::MAX };
    Grant {
        session: NOW_MS,
        granted,
        spent: 0,
        held: granted,
        left,
        others,
        empty_ms,
        known_ms,
        ahead_ns: 0,
        interval_ns: 0,
        users: 2,
    }
}

fn spends(holding: &mut Holding, of: Limited<'_>, contact: &Contact, now: u64, most: usize) -> usize {
    (0..most).filter(|_| matches!(holding.spend(1, of, 0, contact, now), Spent::Yes { .. })).count()
}

#[test]
fn a_holding_is_read_as_it_was_stored() {
    let words: [u64; WORDS] = std::array::from_fn(|place| place as u64 + 1);
    assert_eq!(Holding::from_words(words).words(), words);
}

#[test]
fn an_envoy_spends_what_it_was_granted_and_then_asks_for_what_is_missing() {
    let mut holding = with(3);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 9), 3);
    // The last answer said that the pool is empty.
    assert_eq!(holding.spend(1, STOCK, 0, &contact(), NOW), Spent::No { empty_ms: u64::MAX });
    let later = NOW + (100 + 1) * NS_PER_MS;
    holding.apply(&grant(3, 2, 4, 0), &contact(), NOW_MS);
    assert_eq!(holding.spend(1, STOCK, 0, &contact(), later), Spent::Wait { for_others: false }, "the answer is old");
}

#[test]
fn a_grant_that_is_repeated_or_late_adds_nothing() {
    let mut holding = with(3);
    holding.apply(&grant(2, 0, 0, 0), &contact(), NOW_MS);
    holding.apply(&grant(3, 0, 0, 0), &contact(), NOW_MS);
    assert_eq!(holding.available(&contact(), NOW_MS), 3);
    // An answer to an earlier session.
    holding.apply(&Grant { session: NOW_MS - 1, ..grant(9, 0, 0, 0) }, &contact(), NOW_MS);
    assert_eq!((holding.session, holding.available(&contact(), NOW_MS)), (NOW_MS, 3));
    // The control plane knows a later one: the clock was ahead.
    holding.apply(&Grant { session: NOW_MS + 10, ..grant(9, 0, 0, 0) }, &contact(), NOW_MS);
    assert_eq!((holding.session, holding.granted), (NOW_MS + 11, 3));
}

#[test]
fn the_last_answer_decides_whether_a_request_waits_waits_for_others_or_is_refused() {
    let judged = |left, others, waiting, cost| {
        let mut holding = with(0);
        holding.apply(&grant(0, left, others, 500), &contact(), NOW_MS);
        holding.spend(cost, STOCK, waiting, &contact(), NOW + 5 * NS_PER_MS)
    };
    let (wait, for_others, no) =
        (Spent::Wait { for_others: false }, Spent::Wait { for_others: true }, Spent::No { empty_ms: 495 });
    assert_eq!([judged(1, 0, 0, 1), judged(1, 0, 1, 1), judged(1, 1, 1, 1)], [wait; 3]);
    assert_eq!([judged(0, 0, 0, 1), judged(0, 2, 1, 1), judged(0, 1, 1, 1)], [no, for_others, no]);
    assert_eq!([judged(9, 0, 0, 10), judged(9, 1, 0, 10), judged(9, 0, 0, 9)], [no, for_others, wait]);
    let mut holding = with(0);
    holding.apply(&grant(0, 9, 0, 500), &contact(), NOW_MS);
    assert!(holding.has_some());
    assert!(!with(0).has_some() && with(1).has_some());
}

#[test]
fn an_answer_is_valid_until_a_token_comes_and_shorter_while_others_hold_tokens() {
    for (others, empty_ms, known_ms) in
        [(0, 500, 500), (0, 0, LEAST_EMPTY_MS), (5, 500, 100), (5, 50, 50), (5, u32::MAX, 100)]
    {
        let mut holding = with(0);
        holding.apply(&grant(0, 0, others, empty_ms), &contact(), NOW_MS);
        assert_eq!(holding.known_until_ms, NOW_MS + known_ms, "{others} {empty_ms}");
    }
    let mut holding = with(0);
    holding.apply(&grant(0, 0, 0, u32::MAX), &contact(), NOW_MS);
    assert_eq!((holding.known_until_ms, holding.empty_ms(NOW_MS + 9)), (u64::MAX, u64::MAX));
    // A clock that has stepped back makes it unknown.
    let back = NOW - NS_PER_S;
    let near = Contact { answered_ms: NOW_MS - 1_000, ..contact() };
    assert_eq!(holding.spend(1, STOCK, 0, &near, back), Spent::Wait { for_others: false });
}

#[test]
fn a_change_of_the_terms_makes_the_next_request_ask() {
    let mut holding = with(0);
    assert_eq!(holding.spend(1, STOCK, 0, &contact(), NOW), Spent::No { empty_ms: u64::MAX });
    let filled = Limited::Stock { fill: 2 };
    assert_eq!(holding.spend(1, filled, 0, &contact(), NOW), Spent::Wait { for_others: false });
    // The use of a rate limit is brought to the new interval: half of it stays half.
    let (slow, fast) = (rate(10, 100), rate(100, 100));
    let mut holding = Holding::default();
    holding.prepare(Limited::Rate(&slow), &contact(), NOW);
    holding.arrival_ns = NOW + 50 * NS_PER_S;
    holding.prepare(Limited::Rate(&fast), &contact(), NOW);
    assert_eq!((holding.arrival_ns, holding.interval_ns), (NOW + 5 * NS_PER_S, NS_PER_S));
    assert_eq!(rescale(NOW + 7, 0, 5, NOW), NOW);
    assert_eq!(rescale(u64::MAX, 1, u64::MAX, NOW), NOW);
}

#[test]
fn a_change_of_the_terms_hands_back_what_the_envoy_holds() {
    let mut holding = Holding::default();
    holding.prepare(STOCK, &contact(), NOW);
    holding.apply(&grant(9, 0, 0, u32::MAX), &contact(), NOW_MS);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 4), 4);
    let lowered = Limited::Stock { fill: 2 };
    assert_eq!(holding.spend(1, lowered, 0, &contact(), NOW), Spent::Wait { for_others: false });
    let ask = holding.ask(due(1), &contact(), NOW);
    assert_eq!((ask.granted, ask.spent, ask.returned), (9, 4, 5));
}

#[test]
fn an_envoy_wants_twice_the_most_that_it_spent_in_a_tick_and_hands_back_the_surplus() {
    let mut holding = with(100);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 10), 10);
    let ask = holding.ask(due(0), &contact(), NOW);
    assert_eq!((ask.granted, ask.spent, ask.want, ask.returned), (100, 10, 20, 50), "it keeps twice of what it wants");
    assert_eq!((holding.asked_ms, holding.available(&contact(), NOW_MS)), (NOW_MS, 40));
    // The memory of the peak fades with the ticks in which tokens are spent.
    let mut now = NOW;
    for tick in 1..=20 {
        now = NOW + tick * TICK_MS * NS_PER_MS;
        assert_eq!(spends(&mut holding, STOCK, &contact(), now, 1), 1);
    }
    let ask = holding.ask(due(0), &contact(), now);
    assert!((10..16).contains(&ask.want), "{}", ask.want);
    // What requests wait for is no surplus.
    let mut holding = with(100);
    assert_eq!(holding.ask(due(100), &contact(), NOW).returned, 0);
    assert_eq!(holding.ask(due(0), &contact(), NOW).returned, 100);
}

#[test]
fn an_allowance_is_low_below_half_of_what_the_envoy_wants() {
    let mut holding = with(25);
    let later = NOW + TOP_UP_PAUSE_MS * NS_PER_MS;
    let low: Vec<Spent> = (0..14).map(|_| holding.spend(1, STOCK, 0, &contact(), later)).collect();
    let first = low.iter().position(|spent| *spent == Spent::Yes { is_low: true });
    assert_eq!(first, Some(12), "13 are spent and 12 are left");
    // It has just asked.
    let mut holding = with(25);
    assert!((0..25).all(|_| holding.spend(1, STOCK, 0, &contact(), NOW) == Spent::Yes { is_low: false }));
}

#[test]
fn a_refunded_token_can_be_spent_again() {
    let mut holding = with(1);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 2), 1);
    holding.refund(1);
    assert_eq!((holding.spent, spends(&mut holding, STOCK, &contact(), NOW, 2)), (0, 1));

    let rate = rate(10, 10);
    let of = Limited::Rate(&rate);
    for contact in [contact(), alone()] {
        let mut holding = Holding { session: NOW_MS, ..Holding::default() };
        holding.prepare(of, &contact, NOW);
        (holding.granted, holding.alone_term, holding.arrival_ns) = (1, 1, NOW + 9 * NS_PER_S);
        assert_eq!(spends(&mut holding, of, &contact, NOW, 2), 1);
        holding.refund(1);
        assert_eq!((holding.spent, spends(&mut holding, of, &contact, NOW, 2)), (1, 1));
    }
}

#[test]
fn the_only_envoy_needs_no_allowance() {
    let rate = rate(10, 10);
    let (of, contact) = (Limited::Rate(&rate), alone());
    let mut holding = Holding::default();
    holding.prepare(of, &contact, NOW);
    assert_eq!(holding.spend(1, of, 0, &contact, NOW), Spent::Wait { for_others: false }, "it does not know the pool");
    // Others have used four until just now.
    holding.apply(
        &Grant { ahead_ns: 4 * NS_PER_S, interval_ns: rate.interval_ns(), ..grant(0, 6, 0, 0) },
        &contact,
        NOW_MS,
    );
    assert_eq!(spends(&mut holding, of, &contact, NOW, 9), 6);
    assert_eq!(holding.spend(1, of, 0, &contact, NOW), Spent::No { empty_ms: 1_000 });
    // A further answer in the term does not change what the Envoy knows better.
    holding.apply(&grant(0, 9, 0, 0), &contact, NOW_MS);
    assert_eq!(spends(&mut holding, of, &contact, NOW, 9), 0);
    let over = NOW + ALONE_MS * NS_PER_MS;
    assert_eq!(holding.spend(1, of, 0, &contact, over), Spent::Wait { for_others: false });
    // A clock that has stepped back does not prolong the time.
    assert!(contact.is_alone(NOW_MS));
    assert!(!contact.is_alone(NOW_MS - 1));

    let mut holding = Holding::default();
    holding.prepare(STOCK, &contact, NOW);
    holding.apply(&grant(2, 3, 0, u32::MAX), &contact, NOW_MS);
    assert_eq!(spends(&mut holding, STOCK, &contact, NOW, 9), 5);
    holding.refund(2);
    assert_eq!(spends(&mut holding, STOCK, &contact, NOW, 9), 2);
}

#[test]
fn a_clock_that_stepped_back_does_not_make_the_limit_used_up_for_all_envoys() {
    let rate = rate(10, 10);
    let of = Limited::Rate(&rate);
    let stepped = |contact: &Contact, asks_first: bool| {
        let mut holding = Holding::default();
        holding.prepare(of, contact, NOW);
        holding.apply(&grant(3, 7, 0, 0), contact, NOW_MS);
        holding.arrival_ns = NOW + NS_PER_S;
        let back = NOW - 60 * NS_PER_S;
        if !asks_first {
            holding.prepare(of, contact, back);
        }
        holding.ask(due(1), contact, back).ahead_ns
    };
    assert_eq!([true, false].map(|asks_first| stepped(&contact(), asks_first)), [0, 0]);
    // The only Envoy refuses until it has made up for what it may have spent.
    let back_alone = Contact { answered_ms: NOW_MS - 60_000, alone_until_ms: NOW_MS - 60_000 + ALONE_MS, ..alone() };
    let mut holding = Holding { alone_term: 1, ..Holding::default() };
    (holding.interval_ns, holding.terms) = (rate.interval_ns(), rate.tolerance_ns());
    holding.arrival_ns = NOW + NS_PER_S;
    assert_eq!(holding.ask(due(1), &back_alone, NOW - 60 * NS_PER_S).ahead_ns, rate.tolerance_ns());
}

#[test]
fn a_term_alone_continues_while_no_other_envoy_can_have_a_grant() {
    let mut contact = Contact::default();
    contact.answered(NOW_MS, NOW_MS + 5, 1, 400);
    assert_eq!((contact.alone_term, contact.alone_until_ms, contact.live), (1, NOW_MS + 400, 1));
    contact.answered(NOW_MS + 250, NOW_MS + 255, 1, 400);
    assert_eq!((contact.alone_term, contact.alone_until_ms), (1, NOW_MS + 650));
    contact.answered(NOW_MS + 500, NOW_MS + 505, 2, 0);
    assert_eq!((contact.alone_term, contact.alone_until_ms, contact.live), (1, 0, 2));
    contact.answered(NOW_MS + 750, NOW_MS + 755, 1, 400);
    assert_eq!((contact.alone_term, contact.alone_until_ms), (2, NOW_MS + 1_150));
    contact.answered(NOW_MS + 1_400, NOW_MS + 1_500, 1, 400);
    assert_eq!((contact.alone_term, contact.alone_until_ms), (2, NOW_MS + 1_800));
    contact.answered(NOW_MS + 1_800, NOW_MS + 2_151, 1, 400);
    assert_eq!(contact.alone_term, 3);
}

#[test]
fn tokens_spent_between_two_answers_stay_spent_while_the_same_term_alone_continues() {
    let mut holding = Holding::default();
    holding.prepare(STOCK, &alone(), NOW);
    holding.apply(&Grant { granted: 6, ..grant(0, 4, 0, 0) }, &alone(), NOW_MS);
    let between = NOW + (ALONE_MS + 1) * NS_PER_MS;
    assert_eq!(spends(&mut holding, STOCK, &alone(), between, 2), 2, "of the allowance");
    let again = Contact { alone_until_ms: NOW_MS + 2 * ALONE_MS, ..alone() };
    assert_eq!(spends(&mut holding, STOCK, &again, between, 20), 8);
}

#[test]
fn sessions_from_before_an_envoy_was_cut_off_are_void() {
    let cut_off_ms = NOW_MS + VOID_AFTER_MS;
    let mut holding = with(3);
    assert_eq!(holding.available(&contact(), cut_off_ms), 3);
    assert_eq!(holding.available(&contact(), cut_off_ms + 1), 0);
    holding.known_until_ms = 0;
    // A session that begins then is good with the first answer, whenever it was sent.
    let now = (cut_off_ms + 10) * NS_PER_MS;
    assert_eq!(holding.spend(1, STOCK, 0, &contact(), now), Spent::Wait { for_others: false });
    assert_eq!((holding.session, holding.granted), (cut_off_ms + 10, 0));
    let ask = holding.ask(due(1), &contact(), now + 5 * NS_PER_MS);
    assert_eq!(ask.session, cut_off_ms + 10);
    let mut contact = contact();
    contact.answered(cut_off_ms + 15, cut_off_ms + 20, 1, 0);
    assert_eq!(contact.since_ms, cut_off_ms);
    holding.apply(&Grant { session: ask.session, ..grant(1, 0, 0, 0) }, &contact, cut_off_ms + 15);
    assert_eq!(holding.available(&contact, cut_off_ms + 20), 1);
    // Other holdings are void.
    assert_eq!(with(3).available(&contact, cut_off_ms + 20), 0);
    // After a step back of the clock an answer must show that allowances are good.
    let back_ms = NOW_MS - 3_600_000;
    assert_eq!(holding.available(&contact, back_ms), 0);
    contact.answered(back_ms, back_ms + 5, 1, 0);
    assert_eq!((contact.since_ms, holding.available(&contact, back_ms + 5)), (back_ms, 1));
}

#[test]
fn at_the_safe_rate_an_envoy_admits_its_part_and_reports_it_later() {
    let rate = rate(40, 60);
    let mut holding = Holding::default();
    holding.prepare(Limited::Rate(&rate), &contact(), NOW);
    let live = Contact { live: 4, ..contact() };
    let results: Vec<_> = (0..11).map(|_| holding.spend_at_safe_rate(&rate, &live, NOW)).collect();
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 10);
    assert_eq!((results[10], holding.spent), (Err(6 * NS_PER_S), 10));
    assert_eq!(holding.arrival_ns, NOW + 15 * NS_PER_S);
}

#[test]
fn a_holding_is_settled_once_neither_side_counts_anything_as_held() {
    let mut holding = with(2);
    assert!(!holding.is_settled(&grant(2, 0, 0, 0)));
    holding.hand_back();
    assert_eq!((holding.returned, holding.available(&contact(), NOW_MS)), (2, 0));
    assert!(!holding.is_settled(&grant(2, 0, 0, 0)), "the control plane does not know it yet");
    let settled = Grant { held: 0, ..grant(2, 0, 0, 0) };
    assert!(holding.is_settled(&settled));
    assert!(!holding.is_settled(&Grant { session: 5, ..settled }));
    assert!(!holding.is_idle(NOW_MS + IDLE_MS - 1) && holding.is_idle(NOW_MS + IDLE_MS));
}

#[test]
fn after_a_long_idle_time_a_new_session_begins_and_the_envoy_that_is_alone_knows_the_pool() {
    let mut holding = Holding::default();
    holding.prepare(STOCK, &alone(), NOW);
    holding.apply(&grant(0, 10, 0, 0), &alone(), NOW_MS);
    assert_eq!(spends(&mut holding, STOCK, &alone(), NOW, 4), 4);
    assert_eq!((holding.session, holding.spent), (NOW_MS, 4));
    let later_ms = NOW_MS + FORGOTTEN_MS;
    let later = Contact { answered_ms: later_ms, alone_until_ms: later_ms + ALONE_MS, ..alone() };
    assert_eq!(spends(&mut holding, STOCK, &later, later_ms * NS_PER_MS, 10), 6);
    assert_eq!((holding.session, holding.spent), (later_ms, 6));
}

#[test]
fn what_an_envoy_hands_back_is_in_the_pool_so_the_next_request_asks() {
    let asks = Spent::Wait { for_others: false };
    let mut holding = with(5);
    holding.hand_back();
    assert_eq!([1, 5].map(|cost| holding.spend(cost, STOCK, 0, &contact(), NOW)), [asks; 2]);
    assert_eq!(holding.spend(6, STOCK, 0, &contact(), NOW), Spent::No { empty_ms: u64::MAX });
    // Another Envoy was faster.
    holding.apply(&Grant { held: 0, ..grant(5, 0, 0, u32::MAX) }, &contact(), NOW_MS);
    assert_eq!(holding.spend(1, STOCK, 0, &contact(), NOW), Spent::No { empty_ms: u64::MAX });
    // The surplus that goes back with an ask.
    let mut holding = with(100);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 10), 10);
    assert_eq!(holding.ask(due(0), &contact(), NOW).returned, 50);
    assert_eq!([41, 90].map(|cost| holding.spend(cost, STOCK, 0, &contact(), NOW)), [asks; 2]);
    assert_eq!(holding.spend(91, STOCK, 0, &contact(), NOW), Spent::No { empty_ms: u64::MAX });
}

#[test]
fn a_pool_is_known_to_lack_tokens_only_if_a_new_enough_answer_says_so() {
    let said = |left, others| {
        let mut holding = with(2);
        holding.apply(&grant(2, left, others, 500), &contact(), NOW_MS);
        [3, 4].map(|cost| holding.is_known_to_lack(cost, NOW_MS))
    };
    // Two of them the Envoy has.
    assert_eq!([said(0, 0), said(1, 0), said(2, 0)], [[true, true], [false, true], [false, false]]);
    // Other Envoys did not hand them back in time, or another Envoy may still decide by itself.
    assert_eq!([said(0, 9), said(0, u64::MAX)], [[true, true], [false, false]]);
    assert!(!with(0).is_known_to_lack(1, u64::MAX));
}

#[test]
fn an_envoy_that_becomes_alone_counts_the_use_of_others_from_when_the_answer_came() {
    let rate = rate(10, 10);
    let of = Limited::Rate(&rate);
    let sent_ms = NOW_MS - 3_000;
    let mut holding = Holding::default();
    holding.prepare(of, &alone(), sent_ms * NS_PER_MS);
    // The control plane measured that ten are used somewhen between; at the latest now.
    let all =
        Grant { session: sent_ms, ahead_ns: 10 * NS_PER_S, interval_ns: rate.interval_ns(), ..grant(0, 0, 0, 1_000) };
    holding.apply(&all, &alone(), sent_ms);
    assert_eq!(holding.spend(1, of, 0, &alone(), NOW), Spent::No { empty_ms: 1_000 });
}

#[test]
fn use_that_no_allowance_covered_gives_the_envoy_none() {
    let mut holding = with(10);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 10), 10);
    // Of a quota that lets requests through unchecked, 300 more were reported, and booked as granted and spent.
    holding.apply(&Grant { spent: 310, ..grant(310, 500, 0, 0) }, &contact(), NOW_MS);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 1), 0);
    holding.apply(&Grant { spent: 310, ..grant(312, 498, 0, 0) }, &contact(), NOW_MS);
    assert_eq!(spends(&mut holding, STOCK, &contact(), NOW, 9), 2);
    assert_eq!(holding.ask(due(0), &contact(), NOW).spent, 312);
}

#[test]
fn an_envoy_that_becomes_alone_counts_what_it_has_spent_since_its_call() {
    let rate = rate(10, 10);
    let of = Limited::Rate(&rate);
    let mut holding = Holding::default();
    holding.prepare(of, &alone(), NOW);
    // Others have used four. Of its own five the call reported two.
    (holding.granted, holding.spent, holding.returned) = (9, 5, 4);
    let answer = Grant { spent: 2, ahead_ns: 6 * NS_PER_S, interval_ns: rate.interval_ns(), ..grant(9, 4, 0, 0) };
    holding.apply(&answer, &alone(), NOW_MS);
    assert_eq!(spends(&mut holding, of, &alone(), NOW, 9), 1);
}

#[test]
fn an_envoy_that_becomes_alone_does_not_decide_by_itself_while_it_does_not_know_of_a_changed_limit() {
    // Two of 10 in 10 s are used. The limit changes, and the Envoy learns that only after the answer.
    for (window_s, used_ns) in [(30, 6 * NS_PER_S), (2, 2 * NS_PER_S / 5)] {
        let (before, after) = (rate(10, 10), rate(10, window_s));
        let mut holding = Holding::default();
        holding.prepare(Limited::Rate(&before), &alone(), NOW);
        let answer = Grant { ahead_ns: used_ns, interval_ns: after.interval_ns(), ..grant(0, 8, 0, 0) };
        holding.apply(&answer, &alone(), NOW_MS);
        assert!(!holding.is_known(&alone()));
        holding.prepare(Limited::Rate(&after), &alone(), NOW);
        holding.apply(&answer, &alone(), NOW_MS);
        assert_eq!((holding.is_known(&alone()), holding.arrival_ns), (true, NOW + used_ns));
    }
}

#[test]
fn tokens_of_a_changed_limit_come_back_at_the_higher_rate_while_the_time_of_the_change_is_unknown() {
    // Eight of 10 in 10 s are used, 4 s ago. If the limit was raised to 10 in 2 s since, between no and four are used now.
    for (window_s, used) in [(2, 0), (20, 4)] {
        let (before, after) = (rate(10, 10), rate(10, window_s));
        let mut holding = Holding::default();
        holding.prepare(Limited::Rate(&before), &contact(), NOW);
        holding.arrival_ns = NOW + 8 * NS_PER_S;
        let now_ns = NOW + 4 * NS_PER_S;
        holding.prepare(Limited::Rate(&after), &contact(), now_ns);
        assert_eq!(holding.arrival_ns.saturating_sub(now_ns), used * after.interval_ns(), "{window_s}");
    }
}

#[test]
fn after_a_tick_without_use_an_envoy_keeps_its_part_of_an_eighth_of_a_limit() {
    let rate = rate(100, 10);
    let of = Limited::Rate(&rate);
    let mut holding = Holding::default();
    holding.prepare(of, &contact(), NOW);
    holding.apply(&grant(20, 50, 29, 0), &contact(), NOW_MS);
    assert_eq!(spends(&mut holding, of, &contact(), NOW, 3), 3);
    let later_ms = NOW_MS + TICK_MS;
    assert_eq!(holding.hand_back_after_use(NOW_MS), AfterUse::InUse);
    assert!(holding.ask(due(0), &contact(), NOW).want > 0);
    // An eighth of the 96 tokens that are left, for two Envoys.
    assert_eq!(holding.hand_back_after_use(later_ms), AfterUse::HandedBack);
    assert_eq!((holding.unspent(), holding.returned), (6, 11));
    let unused = Due { is_unused: true, ..due(0) };
    assert_eq!(holding.ask(unused, &contact(), later_ms * NS_PER_MS).want, 0, "it does not ask for the tokens again");
    assert_eq!(holding.hand_back_after_use(later_ms), AfterUse::KeepsAll);
    // The use of other Envoys is not known yet.
    holding.apply(&grant(20, 0, u64::MAX, 0), &contact(), NOW_MS);
    assert_eq!(holding.hand_back_after_use(later_ms), AfterUse::KeepsAll);
    assert_eq!(with(90).hand_back_after_use(later_ms), AfterUse::KeepsAll, "quotas are granted sparingly");
    let slow = Limited::Rate(&self::rate(100, 11));
    holding.prepare(slow, &contact(), NOW);
    holding.apply(&grant(90, 0, 0, 0), &contact(), NOW_MS);
    assert_eq!(holding.hand_back_after_use(later_ms), AfterUse::KeepsAll, "so are slow limits");
}

#[test]
fn an_answer_from_before_a_hand_back_does_not_make_the_pool_empty() {
    let mut holding = with(10);
    let unaware = Grant { known_ms: 1_000, ..grant(10, 0, 0, u32::MAX) };
    holding.hand_back();
    holding.apply(&unaware, &contact(), NOW_MS);
    assert_eq!(holding.spend(4, STOCK, 0, &contact(), NOW), Spent::Wait { for_others: false });
    holding.apply(&Grant { held: 0, ..unaware }, &contact(), NOW_MS);
    assert_eq!(holding.spend(4, STOCK, 0, &contact(), NOW), Spent::No { empty_ms: u64::MAX });
}
