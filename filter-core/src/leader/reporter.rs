//! The state machine that decides when usage is reported. It has no input or output: the leader tells it the events and asks
//! it for the next step.
//!
//! One report is in flight at a time. After a failure it pauses, twice as long each time up to
//! [`super::backoff::MAX_PAUSE_MS`]. An Envoy that was granted leases and then has no usage sends up to [`EMPTY_REPORTS`] more
//! reports without counts. They acknowledge the grants, and let the control plane lease to other Envoys what this one no
//! longer needs.

use super::backoff::Backoff;
use crate::time::is_ahead;
use crate::usage::outbox::Freeze;

/// The time-out of a report.
pub const REPORT_TIMEOUT_MS: u64 = 10_000;

/// A report without response is given up after this time: the context that should get the response is gone.
const LOST_AFTER_MS: u64 = 2 * REPORT_TIMEOUT_MS;

/// How many reports without counts follow the last one with counts. A lease lasts three seconds, and the Envoy must
/// acknowledge what the control plane decides at its end.
pub const EMPTY_REPORTS: u8 = 4;

/// The time between an acknowledgement and the next report without counts.
pub const EMPTY_AFTER_MS: u64 = 1_000;

/// The first pause.
const MIN_PAUSE_MS: u64 = 250;

/// The state machine.
#[derive(Clone, Debug, Default)]
pub struct Reporter {
    in_flight: Option<InFlight>,
    backoff: Backoff,
    /// Whether this Envoy was granted leases since it was last idle.
    has_leases: bool,
    empty_left: u8,
    empty_at_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    token: u32,
    since_ms: u64,
    is_empty: bool,
}

impl Reporter {
    /// The reporter of a VM that takes over from another leader, which may not have acknowledged its grants.
    #[must_use]
    pub fn successor() -> Self {
        Self { has_leases: true, empty_left: EMPTY_REPORTS, ..Self::default() }
    }

    /// What to freeze and send now; `None` while a report is in flight or a pause lasts.
    #[must_use]
    pub fn due(&self, now_ms: u64) -> Option<Freeze> {
        let is_in_flight = self.in_flight.is_some_and(|report| now_ms.abs_diff(report.since_ms) < LOST_AFTER_MS);
        if is_in_flight || self.backoff.is_pausing(now_ms) {
            return None;
        }
        let empty_is_due = self.empty_left > 0 && !is_ahead(self.empty_at_ms, now_ms, EMPTY_AFTER_MS);
        Some(if empty_is_due { Freeze::EvenNothing } else { Freeze::Pending })
    }

    /// A report was sent, with this token. `is_empty`: it has no counts.
    pub const fn sent(&mut self, token: u32, is_empty: bool, now_ms: u64) {
        self.in_flight = Some(InFlight { token, since_ms: now_ms, is_empty });
    }

    /// If this token is that of the report in flight: the report is no longer in flight; returns whether it has no counts.
    pub fn take_response(&mut self, token: u32) -> Option<bool> {
        self.in_flight.take_if(|report| report.token == token).map(|report| report.is_empty)
    }

    /// The report was acknowledged. `was_empty`: it had no counts; `granted`: the acknowledgement has grants.
    pub fn on_acknowledged(&mut self, was_empty: bool, granted: bool, now_ms: u64) {
        self.backoff.reset();
        self.has_leases |= granted;
        self.empty_at_ms = now_ms.saturating_add(EMPTY_AFTER_MS);
        if was_empty {
            self.empty_left = self.empty_left.saturating_sub(1);
            self.has_leases &= self.empty_left > 0 || granted;
        } else if self.has_leases {
            self.empty_left = EMPTY_REPORTS;
        }
    }

    /// The report was not acknowledged. Returns the pause before it is sent again, in milliseconds.
    pub fn on_failure(&mut self, now_ms: u64) -> u64 {
        let pause_ms = self.backoff.next_pause_ms(MIN_PAUSE_MS);
        self.backoff.pause(pause_ms, now_ms);
        pause_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn acknowledged(reporter: &mut Reporter, empty: bool, granted: bool, now_ms: u64) {
        reporter.sent(1, empty, now_ms);
        assert_eq!(reporter.take_response(1), Some(empty));
        reporter.on_acknowledged(empty, granted, now_ms);
    }

    #[test]
    fn one_report_is_in_flight_at_a_time_and_only_its_response_counts() {
        let mut reporter = Reporter::default();
        assert_eq!(reporter.due(NOW), Some(Freeze::Pending));
        reporter.sent(7, false, NOW);
        assert_eq!(reporter.due(NOW + 19_999), None);
        assert_eq!(reporter.due(NOW + 20_000), Some(Freeze::Pending));
        assert_eq!(
            (reporter.take_response(6), reporter.take_response(7), reporter.take_response(7)),
            (None, Some(false), None)
        );
        assert_eq!(reporter.due(NOW), Some(Freeze::Pending));
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_end_after_a_success_or_a_step_of_the_clock() {
        let mut reporter = Reporter::default();
        let pauses: Vec<u64> = (0..7).map(|_| reporter.on_failure(NOW)).collect();
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 4_000, 5_000, 5_000]);
        assert_eq!(reporter.due(NOW + 4_999), None);
        assert!(reporter.due(NOW + 5_000).is_some() && reporter.due(NOW - 10_000).is_some());
        acknowledged(&mut reporter, false, false, NOW);
        assert_eq!((reporter.due(NOW), reporter.on_failure(NOW)), (Some(Freeze::Pending), 250));
    }

    #[test]
    fn an_envoy_with_leases_sends_reports_without_counts_when_it_is_idle() {
        let mut reporter = Reporter::default();
        acknowledged(&mut reporter, false, true, NOW);
        // Nothing granted with the last report: what was granted before is held all the same.
        acknowledged(&mut reporter, false, false, NOW);
        for number in 1..=u64::from(EMPTY_REPORTS) {
            let at_ms = NOW + number * EMPTY_AFTER_MS;
            assert_eq!(reporter.due(at_ms - 1), Some(Freeze::Pending));
            assert_eq!(reporter.due(at_ms), Some(Freeze::EvenNothing));
            acknowledged(&mut reporter, true, number == 1, at_ms);
        }
        assert_eq!(reporter.due(NOW + 60_000), Some(Freeze::Pending));
        // Nothing is held any longer.
        acknowledged(&mut reporter, false, false, NOW + 60_000);
        assert_eq!(reporter.due(NOW + 70_000), Some(Freeze::Pending));
    }

    #[test]
    fn a_successor_sends_the_reports_without_counts_of_its_predecessor() {
        let mut reporter = Reporter::successor();
        for number in 0..u64::from(EMPTY_REPORTS) {
            let at_ms = NOW + number * EMPTY_AFTER_MS;
            assert_eq!(reporter.due(at_ms), Some(Freeze::EvenNothing));
            acknowledged(&mut reporter, true, false, at_ms);
        }
        assert_eq!(reporter.due(NOW + 60_000), Some(Freeze::Pending));
    }

    #[test]
    fn an_envoy_without_leases_sends_no_report_without_counts() {
        let mut reporter = Reporter::default();
        acknowledged(&mut reporter, false, false, NOW);
        assert_eq!(reporter.due(NOW + 10_000), Some(Freeze::Pending));
    }

    #[test]
    fn usage_after_an_idle_period_starts_the_reports_without_counts_over() {
        let mut reporter = Reporter::default();
        acknowledged(&mut reporter, false, true, NOW);
        acknowledged(&mut reporter, true, false, NOW + 1_000);
        acknowledged(&mut reporter, false, false, NOW + 1_500);
        acknowledged(&mut reporter, true, false, NOW + 2_500);
        assert_eq!(reporter.due(NOW + 3_500), Some(Freeze::EvenNothing));
    }
}
