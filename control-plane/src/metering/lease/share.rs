//! Dividing a rate limit: what each Envoy holds and how much it is used there comes in, the share of one of them goes out.
//!
//! Shares follow recent demand. An Envoy's share rises only into what nobody else may believe to hold, so that all that
//! is held is never more than the whole. It falls when another needs it, or when the Envoy has gone quiet: small
//! differences of demand do not move shares about.

use contract::rate::WHOLE;

use super::{Heard, Row};

/// The least that an Envoy with any demand is to have, in parts per million, if there are not too many for it.
const LEAST: u64 = 10_000;

/// By which part of its target an Envoy must be short of it before others give something up.
const SLACK: u64 = 32;

/// Answers a report of the Envoy in place `me`: the share that it is told. Its row is up to date then.
pub fn answer(rows: &mut [Row], me: usize, report: &Heard) -> u64 {
    if let Some(row) = rows.get_mut(me) {
        row.hear(report);
    }
    let share = share(rows, me, report.now_ms);
    if let Some(row) = rows.get_mut(me) {
        if !row.is_active(report.now_ms) {
            row.demand = 0.0;
        }
        row.tell(share, report.seq, 0);
    }
    share
}

/// The share to tell the Envoy in place `me`.
#[must_use]
pub fn share(rows: &[Row], me: usize, now_ms: i64) -> u64 {
    let Some(own) = rows.get(me) else { return 0 };
    let others = || rows.iter().zip(0..).filter(|(_, place)| *place != me).map(|(row, _)| row);
    let held = others().filter(|row| row.is_live(now_ms)).fold(0_u64, |sum, row| sum.saturating_add(row.held));
    let free = u64::from(WHOLE).saturating_sub(held);
    let targets = Targets::of(rows, now_ms);
    let target = targets.target(own, now_ms);
    let short = |row: &Row| {
        let target = targets.target(row, now_ms);
        target > row.held.saturating_add(target / SLACK)
    };
    if target > 0 && target < own.told && !others().any(short) {
        return own.told.min(free);
    }
    target.min(free)
}

/// What each Envoy should have, by its demand.
struct Targets {
    /// What those with little demand have.
    least: u64,
    /// Below this demand it is little.
    little: f64,
    /// Demand of the others.
    large: f64,
    /// Parts per million for the others.
    rest: f64,
}

impl Targets {
    fn of(rows: &[Row], now_ms: i64) -> Self {
        let demands = || rows.iter().filter(|row| row.is_active(now_ms) && row.demand > 0.0).map(|row| row.demand);
        let (count, total) = (demands().count() as u64, demands().sum::<f64>());
        let whole = u64::from(WHOLE);
        let least = LEAST.min(whole / count.saturating_mul(2).max(1));
        let little = total * least as f64 / f64::from(WHOLE);
        let small = demands().filter(|demand| *demand < little).count() as u64;
        let large: f64 = demands().filter(|demand| *demand >= little).sum();
        let rest = whole.saturating_sub(small.saturating_mul(least));
        Self { least, little, large, rest: rest as f64 }
    }

    fn target(&self, row: &Row, now_ms: i64) -> u64 {
        if !row.is_active(now_ms) || row.demand <= 0.0 {
            return 0;
        }
        if row.demand < self.little {
            return self.least;
        }
        // Rounded down, so that all targets together are no more than the whole. Divided first, so that a single Envoy gets all.
        ((row.demand / self.large * self.rest) as u64).clamp(1, WHOLE.into())
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::metering::lease::{CUT_OFF_MS, place};

    const NOW: i64 = 1_800_000_000_000;

    fn heard(seq: u64, requests: u64, at_ms: i64) -> Heard {
        let now_ms = NOW + at_ms;
        Heard { seq, now_ms, elapsed_s: 0.25, quiet: requests == 0, spent: requests, refused: 0, price: 1 }
    }

    /// Rounds in which each Envoy reports so many requests; what each is told last.
    fn rounds(rows: &mut Vec<Row>, rounds: std::ops::Range<u64>, requests: &[u64]) -> Vec<u64> {
        let mut told = Vec::new();
        for round in rounds {
            told.clear();
            for (number, requests) in requests.iter().enumerate() {
                let me = place(rows, Uuid::from_u128(number as u128 + 1));
                told.push(answer(rows, me, &heard(round, *requests, round as i64 * 250)));
                assert!(rows.iter().map(|row| row.held).sum::<u64>() <= u64::from(WHOLE));
            }
        }
        told
    }

    #[test]
    fn one_envoy_alone_has_the_whole_limit_at_once() {
        assert_eq!(rounds(&mut Vec::new(), 1..2, &[10]), [u64::from(WHOLE)]);
    }

    #[test]
    fn even_demand_gives_each_the_same_within_a_few_rounds() {
        for envoys in [2, 3, 10] {
            let told = rounds(&mut Vec::new(), 1..12, &vec![25; envoys]);
            let even = u64::from(WHOLE) / envoys as u64;
            assert!(told.iter().all(|told| told.abs_diff(even) <= 10_000), "{told:?}");
        }
    }

    #[test]
    fn shares_follow_demand_and_little_demand_has_the_least() {
        let told = rounds(&mut Vec::new(), 1..30, &[900, 99, 1]);
        assert!(told[0].abs_diff(891_000) <= 30_000 && told[1].abs_diff(98_000) <= 10_000, "{told:?}");
        assert_eq!(told[2], LEAST);
    }

    #[test]
    fn who_is_left_alone_has_nearly_all_two_rounds_after_the_others_went_quiet() {
        let mut rows = Vec::new();
        rounds(&mut rows, 1..20, &[25, 25, 25]);
        // Two empty reports each, as filters send them.
        for seq in [20, 21] {
            rounds(&mut rows, seq..seq + 1, &[25, 0, 0]);
        }
        let told = rounds(&mut rows, 22..24, &[25]);
        assert!(told[0] >= 950_000, "{told:?}");
    }

    #[test]
    fn what_one_gives_up_is_given_to_another_once_it_has_confirmed() {
        let mut rows = Vec::new();
        rounds(&mut rows, 1..10, &[25]);
        let other = place(&mut rows, Uuid::from_u128(2));
        assert_eq!(answer(&mut rows, other, &heard(1, 25, 2_500)), 0);
        let half = answer(&mut rows, 0, &heard(10, 25, 2_500));
        assert!(half.abs_diff(500_000) < 100_000, "{half}");
        assert_eq!(answer(&mut rows, other, &heard(2, 25, 2_750)), 0);
        answer(&mut rows, 0, &heard(11, 25, 2_750));
        assert!(answer(&mut rows, other, &heard(3, 25, 3_000)) >= 400_000);
    }

    #[test]
    fn what_a_lost_envoy_holds_is_kept_for_it_for_a_minute() {
        let mut rows = Vec::new();
        rounds(&mut rows, 1..20, &[25, 25]);
        let alone = |rows: &mut Vec<Row>, at_ms| answer(rows, 0, &heard(1_000, 25, 5_000 + at_ms));
        assert!(alone(&mut rows, CUT_OFF_MS - 2_000) <= 510_000);
        assert_eq!(alone(&mut rows, CUT_OFF_MS), u64::from(WHOLE));
    }

    #[test]
    fn small_differences_of_demand_move_nothing() {
        let mut rows = Vec::new();
        rounds(&mut rows, 1..20, &[100, 100, 100]);
        let before = rounds(&mut rows, 20..21, &[100, 100, 100]);
        let after = rounds(&mut rows, 21..40, &[101, 100, 99]);
        assert!(before.iter().zip(&after).all(|(before, after)| before.abs_diff(*after) <= 2), "{before:?} {after:?}");
    }
}
