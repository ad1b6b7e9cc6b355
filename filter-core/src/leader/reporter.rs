//! The state machine that decides when usage is reported. It has no input or output: the leader tells it the events and asks
//! it for the next step.
//!
//! One report is in flight at a time. After a failure it pauses, twice as long each time up to
//! [`super::backoff::MAX_PAUSE_MS`].

use super::backoff::Backoff;

/// The time-out of a report.
pub const REPORT_TIMEOUT_MS: u64 = 10_000;

/// A report without response is given up after this time: the context that should get the response is gone.
const LOST_AFTER_MS: u64 = 2 * REPORT_TIMEOUT_MS;

/// The first pause.
const MIN_PAUSE_MS: u64 = 250;

/// The state machine.
#[derive(Clone, Debug, Default)]
pub struct Reporter {
    in_flight: Option<InFlight>,
    backoff: Backoff,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    token: u32,
    since_ms: u64,
}

impl Reporter {
    /// Whether to send a report now; not while one is in flight or a pause lasts.
    #[must_use]
    pub fn is_due(&self, now_ms: u64) -> bool {
        let is_in_flight = self.in_flight.is_some_and(|report| now_ms.abs_diff(report.since_ms) < LOST_AFTER_MS);
        !is_in_flight && !self.backoff.is_pausing(now_ms)
    }

    /// A report was sent, with this token.
    pub const fn sent(&mut self, token: u32, now_ms: u64) {
        self.in_flight = Some(InFlight { token, since_ms: now_ms });
    }

    /// Whether this token is that of the report in flight, which is no longer in flight then.
    pub fn take_response(&mut self, token: u32) -> bool {
        self.in_flight.take_if(|report| report.token == token).is_some()
    }

    /// The report was acknowledged.
    pub const fn on_acknowledged(&mut self) {
        self.backoff.reset();
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

    #[test]
    fn one_report_is_in_flight_at_a_time_and_only_its_response_counts() {
        let mut reporter = Reporter::default();
        assert!(reporter.is_due(NOW));
        reporter.sent(7, NOW);
        assert_eq!((reporter.is_due(NOW + 19_999), reporter.is_due(NOW + 20_000)), (false, true));
        assert_eq!([6, 7, 7].map(|token| reporter.take_response(token)), [false, true, false]);
        assert!(reporter.is_due(NOW));
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_end_after_a_success_or_a_step_of_the_clock() {
        let mut reporter = Reporter::default();
        let pauses: Vec<u64> = (0..7).map(|_| reporter.on_failure(NOW)).collect();
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 4_000, 5_000, 5_000]);
        assert!(!reporter.is_due(NOW + 4_999));
        assert!(reporter.is_due(NOW + 5_000) && reporter.is_due(NOW - 10_000));
        reporter.sent(1, NOW);
        assert!(reporter.take_response(1));
        reporter.on_acknowledged();
        assert!(reporter.is_due(NOW));
        assert_eq!(reporter.on_failure(NOW), 250);
    }
}
