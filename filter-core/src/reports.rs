//! When usage is reported, as a state machine without input or output: the host tells it what happened and asks it what to
//! freeze and send next.
//!
//! One report is under way at a time. After a failure it pauses, twice as long each time up to [`MAX_PAUSE_MS`]. An Envoy
//! that was leased something and then has nothing to report sends up to [`EMPTY_REPORTS`] more reports without counts: so
//! the control plane hears that what it told was heard, and may lease to others what this Envoy no longer needs.

use crate::usage::Freeze;

/// How long a report may take.
pub const REPORT_TIMEOUT_MS: u64 = 10_000;
/// The longest pause between two tries.
pub const MAX_PAUSE_MS: u64 = 5_000;
/// How many reports without counts follow the last with some: a lease is kept for three seconds, and what is told then has to
/// be heard.
pub const EMPTY_REPORTS: u8 = 4;
/// How long after the answer to the one before each of them is sent.
pub const EMPTY_AFTER_MS: u64 = 1_000;

const MIN_PAUSE_MS: u64 = 250;

/// The machine.
#[derive(Clone, Debug, Default)]
pub struct Reports {
    under_way: Option<UnderWay>,
    failures: u32,
    next_at_ms: u64,
    /// Whether this Envoy was leased something since it last fell quiet.
    holds: bool,
    empty_left: u8,
    empty_at_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct UnderWay {
    token: u32,
    since_ms: u64,
    empty: bool,
}

impl Reports {
    /// Those of a VM that takes over from another, which may have been leased something and not have told that it was heard.
    #[must_use]
    pub fn taken_over() -> Self {
        Self { holds: true, empty_left: EMPTY_REPORTS, ..Self::default() }
    }

    /// What to freeze and send now; `None` while a report is under way or a pause has not ended.
    #[must_use]
    pub fn due(&self, now_ms: u64) -> Option<Freeze> {
        let lost_after_ms = REPORT_TIMEOUT_MS.saturating_mul(2);
        let under_way = self.under_way.is_some_and(|report| now_ms.abs_diff(report.since_ms) < lost_after_ms);
        if under_way || is_ahead(self.next_at_ms, now_ms, MAX_PAUSE_MS) {
            return None;
        }
        let quiet = self.empty_left > 0 && !is_ahead(self.empty_at_ms, now_ms, EMPTY_AFTER_MS);
        Some(if quiet { Freeze::EvenNothing } else { Freeze::Pending })
    }

    /// A report is on its way, under this token, `empty` if it has no counts.
    pub const fn sent(&mut self, token: u32, empty: bool, now_ms: u64) {
        self.under_way = Some(UnderWay { token, since_ms: now_ms, empty });
    }

    /// Whether an answer with this token is the one that is waited for, and if so, whether it is about an empty report.
    pub fn answered(&mut self, token: u32) -> Option<bool> {
        self.under_way.take_if(|report| report.token == token).map(|report| report.empty)
    }

    /// The report was acknowledged, with grants or without.
    pub fn acknowledged(&mut self, empty: bool, granted: bool, now_ms: u64) {
        self.failures = 0;
        self.next_at_ms = 0;
        self.holds |= granted;
        self.empty_at_ms = now_ms.saturating_add(EMPTY_AFTER_MS);
        if empty {
            self.empty_left = self.empty_left.saturating_sub(1);
            self.holds &= self.empty_left > 0 || granted;
        } else if self.holds {
            self.empty_left = EMPTY_REPORTS;
        }
    }

    /// The report was not acknowledged: it is sent again after this pause, in milliseconds.
    pub fn failed(&mut self, now_ms: u64) -> u64 {
        let pause_ms = MIN_PAUSE_MS.checked_shl(self.failures).unwrap_or(MAX_PAUSE_MS).min(MAX_PAUSE_MS);
        self.failures = self.failures.saturating_add(1).min(16);
        self.next_at_ms = now_ms.saturating_add(pause_ms);
        pause_ms
    }
}

/// Whether a time is still to come. One that is further ahead than it was ever set was set before the clock stepped back.
const fn is_ahead(at_ms: u64, now_ms: u64, most_ms: u64) -> bool {
    at_ms > now_ms && at_ms.saturating_sub(now_ms) <= most_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn acknowledged(reports: &mut Reports, empty: bool, granted: bool, now_ms: u64) {
        reports.sent(1, empty, now_ms);
        assert_eq!(reports.answered(1), Some(empty));
        reports.acknowledged(empty, granted, now_ms);
    }

    #[test]
    fn one_report_is_under_way_at_a_time_and_only_its_answer_counts() {
        let mut reports = Reports::default();
        assert_eq!(reports.due(NOW), Some(Freeze::Pending));
        reports.sent(7, false, NOW);
        assert_eq!(reports.due(NOW + 19_999), None);
        assert_eq!(reports.due(NOW + 20_000), Some(Freeze::Pending));
        assert_eq!((reports.answered(6), reports.answered(7), reports.answered(7)), (None, Some(false), None));
        assert_eq!(reports.due(NOW), Some(Freeze::Pending));
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_end_with_success_or_a_step_of_the_clock() {
        let mut reports = Reports::default();
        let pauses: Vec<u64> = (0..7).map(|_| reports.failed(NOW)).collect();
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 4_000, 5_000, 5_000]);
        assert_eq!(reports.due(NOW + 4_999), None);
        assert!(reports.due(NOW + 5_000).is_some() && reports.due(NOW - 10_000).is_some());
        acknowledged(&mut reports, false, false, NOW);
        assert_eq!((reports.due(NOW), reports.failed(NOW)), (Some(Freeze::Pending), 250));
    }

    #[test]
    fn an_envoy_that_was_leased_something_sends_empty_reports_when_it_falls_quiet() {
        let mut reports = Reports::default();
        acknowledged(&mut reports, false, true, NOW);
        // Nothing granted with the last report: what was granted before is held all the same.
        acknowledged(&mut reports, false, false, NOW);
        for number in 1..=u64::from(EMPTY_REPORTS) {
            let at_ms = NOW + number * EMPTY_AFTER_MS;
            assert_eq!(reports.due(at_ms - 1), Some(Freeze::Pending));
            assert_eq!(reports.due(at_ms), Some(Freeze::EvenNothing));
            acknowledged(&mut reports, true, number == 1, at_ms);
        }
        assert_eq!(reports.due(NOW + 60_000), Some(Freeze::Pending));
        // Nothing is held any longer.
        acknowledged(&mut reports, false, false, NOW + 60_000);
        assert_eq!(reports.due(NOW + 70_000), Some(Freeze::Pending));
    }

    #[test]
    fn who_takes_over_sends_the_empty_reports_that_another_may_owe() {
        let mut reports = Reports::taken_over();
        for number in 0..u64::from(EMPTY_REPORTS) {
            let at_ms = NOW + number * EMPTY_AFTER_MS;
            assert_eq!(reports.due(at_ms), Some(Freeze::EvenNothing));
            acknowledged(&mut reports, true, false, at_ms);
        }
        assert_eq!(reports.due(NOW + 60_000), Some(Freeze::Pending));
    }

    #[test]
    fn an_envoy_that_was_never_leased_anything_sends_no_empty_report() {
        let mut reports = Reports::default();
        acknowledged(&mut reports, false, false, NOW);
        assert_eq!(reports.due(NOW + 10_000), Some(Freeze::Pending));
    }

    #[test]
    fn what_comes_after_a_pause_starts_the_empty_reports_over() {
        let mut reports = Reports::default();
        acknowledged(&mut reports, false, true, NOW);
        acknowledged(&mut reports, true, false, NOW + 1_000);
        acknowledged(&mut reports, false, false, NOW + 1_500);
        acknowledged(&mut reports, true, false, NOW + 2_500);
        assert_eq!(reports.due(NOW + 3_500), Some(Freeze::EvenNothing));
    }
}
