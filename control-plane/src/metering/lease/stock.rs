//! Leasing a stock, a quota or credits: what is left and what each Envoy holds comes in, all that one of them is granted
//! goes out.
//!
//! A lease covers what was spent in the last few moments, and some of what is left for whoever has just come; no single
//! lease takes more than its part, so that the last credits of a stock go to those who ask for them.

use contract::record::Budget;

use super::{Heard, Row};

/// How many intervals between reports a lease lasts at the present pace.
const INTERVALS: u64 = 4;

/// The part of what is left that whoever uses a stock is leased at least.
const AT_LEAST: u64 = 64;

/// How long an Envoy keeps a lease that it does not use: for longer than a client that was refused is told to wait.
const KEEP_MS: i64 = 3_000;

/// Takes note of what an Envoy has spent. To be done for all reports before any is answered, as `left` of [`answer`]
/// already lacks it.
pub fn spend(row: &mut Row, report: &Heard, budget: &Budget) {
    let before = row.held;
    row.hear(report);
    row.spent = row.spent.saturating_add(report.spent);
    if row.turn != budget.turn {
        // It may have begun with the starter of the new turn, or begin with it until it hears the answer.
        row.held = before.max(row.spent.saturating_add(budget.starter.into()));
    }
    // What was spent beyond was the starter's.
    row.told = row.told.max(row.spent);
    row.held = row.held.max(row.spent);
}

/// Answers a report of the Envoy in place `me`: all that it is granted up to now, out of what is `left` of the stock. Its
/// row is up to date then.
///
/// One that gives its lease back keeps as much as its starter, as far as there is as much: a request that comes seldom is
/// not to be refused first. That is leased to others as well, as the starter is.
pub fn answer(rows: &mut [Row], me: usize, report: &Heard, left: i64, budget: &Budget) {
    let Some(own) = rows.get(me) else { return };
    let lease = lease(rows, me, report, left);
    let told = own.spent.saturating_add(lease);
    let rest =
        if lease == 0 && report.used() == 0 { free(rows, me, report, left).min(budget.starter.into()) } else { 0 };
    if let Some(row) = rows.get_mut(me) {
        row.tell(told, report.seq, budget.turn);
        row.rest = rest;
    }
}

/// What Envoys hold and have not spent.
#[must_use]
pub fn leased<'a>(rows: impl IntoIterator<Item = &'a Row>, now_ms: i64) -> u64 {
    rows.into_iter().filter(|row| row.is_live(now_ms)).fold(0, |sum, row| sum.saturating_add(row.unspent()))
}

/// What of `left` nobody else holds.
fn free(rows: &[Row], me: usize, report: &Heard, left: i64) -> u64 {
    u64::try_from(left).unwrap_or(0).saturating_sub(leased(others(rows, me), report.now_ms))
}

fn others(rows: &[Row], me: usize) -> impl Iterator<Item = &Row> {
    rows.iter().zip(0..).filter(move |(_, place)| *place != me).map(|(row, _)| row)
}

fn lease(rows: &[Row], me: usize, report: &Heard, left: i64) -> u64 {
    let Some(own) = rows.get(me) else { return 0 };
    let others = || others(rows, me);
    let free = free(rows, me, report, left);
    let lease = own.told.saturating_sub(own.spent);
    if report.used() == 0 {
        let keeps = report.now_ms.saturating_sub(own.renewed_ms) < KEEP_MS;
        return if keeps { lease.min(free) } else { 0 };
    }
    let active = others().filter(|row| row.is_active(report.now_ms)).count() as u64;
    let price = if report.refused > 0 { report.price.max(1) } else { 1 };
    let part = (free / active.saturating_add(1).saturating_mul(2)).max(price);
    let wanted = report.spent.saturating_mul(INTERVALS).max(free / AT_LEAST).max(price);
    if report.refused == 0 || report.spent > 0 {
        return wanted.min(part).min(free);
    }
    // It holds too little for a single request, and so may others: those before it have what is left first.
    let ahead = others()
        .filter(|row| row.is_active(report.now_ms) && row.reporter < own.reporter)
        .fold(0, |most, row| row.unspent().max(most));
    if lease == 0 {
        return if free < ahead { 0 } else { wanted.min(part).min(free) };
    }
    // Who is first asks for more, until it has all. If all is not enough, others may need less.
    let more = wanted.max(lease.saturating_mul(2)).min(free);
    let grows = more > lease || (ahead == 0 && leased(others(), report.now_ms) > 0);
    if grows { more } else { 0 }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::metering::lease::{CUT_OFF_MS, place};

    const NOW: i64 = 1_800_000_000_000;
    const BUDGET: Budget = Budget { starter: 10, turn: 1, resets_at_s: None };

    fn heard(seq: u64, spent: u64, refused: u64) -> Heard {
        at(250, seq, spent, refused)
    }

    fn at(each_ms: i64, seq: u64, spent: u64, refused: u64) -> Heard {
        let now_ms = NOW + each_ms * seq.cast_signed();
        Heard { seq, now_ms, elapsed_s: 0.25, quiet: spent + refused == 0, spent, refused, price: 1 }
    }

    fn report(rows: &mut Vec<Row>, envoy: u128, report: Heard, left: i64) -> u64 {
        let me = place(rows, Uuid::from_u128(envoy));
        spend(&mut rows[me], &report, &BUDGET);
        answer(rows, me, &report, left, &BUDGET);
        rows[me].told + rows[me].rest - rows[me].spent
    }

    #[test]
    fn a_lease_covers_four_intervals_and_at_least_a_sixty_fourth_of_what_is_left() {
        let mut rows = Vec::new();
        assert_eq!(report(&mut rows, 1, heard(1, 5, 0), 10_000), 156);
        assert_eq!(report(&mut rows, 1, heard(2, 100, 0), 10_000), 400);
        assert_eq!(rows[0], Row { told: 505, held: 505, told_seq: 2, turn: 1, spent: 105, ..rows[0].clone() });
    }

    #[test]
    fn nobody_is_leased_more_than_their_part_nor_what_others_hold() {
        let mut rows = Vec::new();
        // Its starter counts as held until it has heard of the lease.
        assert_eq!(report(&mut rows, 1, heard(1, 100, 0), 1_000), 400);
        assert_eq!(report(&mut rows, 2, heard(1, 100, 0), 1_000), 150);
        assert_eq!(report(&mut rows, 3, heard(1, 100, 0), 1_000), 75);
        assert_eq!(report(&mut rows, 4, heard(1, 100, 0), 100), 0);
        assert!(leased(&rows, NOW + 250) <= 1_000);
    }

    #[test]
    fn what_a_quiet_envoy_held_is_free_once_it_has_confirmed() {
        let mut rows = Vec::new();
        let heard = |seq, spent, refused| at(1_000, seq, spent, refused);
        assert_eq!(report(&mut rows, 1, heard(1, 100, 0), 1_000), 400);
        // It keeps it for longer than a client that was refused is told to wait.
        assert_eq!(report(&mut rows, 1, heard(2, 0, 0), 1_000), 400);
        assert_eq!(report(&mut rows, 1, heard(3, 0, 0), 1_000), 400);
        // It may begin again with its starter, as far as there is as much, which nobody is leased less for.
        assert_eq!(report(&mut rows, 1, heard(4, 0, 0), 1_000), 10);
        assert_eq!(leased(&rows, NOW), 400);
        assert_eq!(report(&mut rows, 1, heard(5, 0, 0), 7), 7);
        assert_eq!(leased(&rows, NOW), 0);
        assert_eq!(report(&mut rows, 1, heard(6, 0, 0), 0), 0);
    }

    #[test]
    fn what_a_lost_envoy_held_is_free_after_a_minute() {
        let mut rows = Vec::new();
        assert_eq!(report(&mut rows, 1, heard(1, 100, 0), 1_000), 400);
        assert_eq!(leased(&rows, NOW + CUT_OFF_MS), 400);
        assert_eq!(leased(&rows, NOW + 250 + CUT_OFF_MS), 0);
    }

    #[test]
    fn the_last_of_a_stock_is_leased_one_by_one_and_nothing_of_an_empty_one() {
        let mut rows = Vec::new();
        report(&mut rows, 1, heard(1, 100, 0), 1_000);
        report(&mut rows, 1, heard(2, 400, 0), 3);
        assert_eq!(report(&mut rows, 1, heard(3, 1, 9), 2), 1);
        assert_eq!(report(&mut rows, 1, heard(4, 1, 9), 1), 1);
        assert_eq!(report(&mut rows, 1, heard(5, 1, 9), 0), 0);
        assert_eq!(report(&mut rows, 1, heard(6, 0, 9), -5), 0);
    }

    #[test]
    fn who_cannot_pay_for_a_single_request_is_leased_more_until_it_can() {
        let mut rows = Vec::new();
        let leases: Vec<u64> = (1..8).map(|seq| report(&mut rows, 1, heard(seq, 0, 1), 100)).collect();
        assert_eq!(leases, [1, 2, 4, 8, 16, 32, 64]);
    }

    #[test]
    fn of_two_that_hold_what_neither_can_use_one_has_it_all_in_the_end() {
        let mut rows = Vec::new();
        let (mut last, mut most) = ([0; 2], 0);
        for seq in 1..40 {
            for envoy in 0..2 {
                last[envoy] = report(&mut rows, envoy as u128 + 1, heard(seq, 0, 1), 60);
                most = most.max(last[0]);
            }
        }
        assert_eq!(most, 60);
    }

    #[test]
    fn the_starter_of_a_new_turn_counts_as_held_until_an_answer_of_that_turn_is_heard() {
        let mut row = Row { told: 50, held: 50, spent: 50, turn: 1, told_seq: 3, ..Row::new(Uuid::nil()) };
        let budget = Budget { starter: 30, turn: 2, resets_at_s: None };
        spend(&mut row, &heard(4, 20, 0), &budget);
        assert_eq!((row.spent, row.held, row.told), (70, 100, 70));
        row.tell(75, 4, 2);
        assert_eq!((row.held, row.told, row.turn), (100, 75, 2));
        spend(&mut row, &heard(5, 1, 0), &budget);
        assert_eq!((row.spent, row.held), (71, 75));
    }
}
