//! Model of one Envoy: the disruptions that delay changes, and the deadlines that follow from them;
//! the skew of its clock; its recent decisions.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long a change takes to be obeyed everywhere when nothing is broken. Measured, it is some milliseconds; this leaves
/// room for a machine that is busy with the whole stack and its load.
pub const BOUND: Duration = Duration::from_secs(2);

/// For how long single answers are remembered, to say how many came lately.
const LATELY: Duration = Duration::from_secs(20);

/// A time in which something is broken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disruption {
    pub(crate) start: Instant,
    pub(crate) end: Option<Instant>,
    pub(crate) after: Duration,
}

impl Disruption {
    /// Whether it falls into the time from `from` until now.
    pub(crate) fn meets(&self, from: Instant) -> bool {
        self.end.is_none_or(|end| from <= end + self.after)
    }
}

/// What a fault hinders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hinders {
    /// An Envoy hears of changes late.
    Changes,
    /// Requests to an Envoy may go unanswered, or get an answer that is not the filter's.
    Requests,
    /// An Envoy is granted no credits, though it hears of changes.
    Leases,
}

/// One Envoy.
#[derive(Debug, Default)]
pub(crate) struct EnvoyModel {
    pub(crate) changes: Vec<Disruption>,
    pub(crate) requests: Vec<Disruption>,
    pub(crate) leases: Vec<Disruption>,
    /// When it first gave an answer other than `not_ready`.
    pub(crate) ready: Option<Instant>,
    pub(crate) behind: Duration,
    pub(crate) ahead: Duration,
    pub(crate) decided: VecDeque<Instant>,
    pub(crate) last_admitted: Option<Instant>,
    pub(crate) longest_gap: Duration,
}

impl EnvoyModel {
    /// The times in which it is hindered.
    pub(crate) fn disruptions(&mut self, hinders: Hinders) -> &mut Vec<Disruption> {
        match hinders {
            Hinders::Changes => &mut self.changes,
            Hinders::Requests => &mut self.requests,
            Hinders::Leases => &mut self.leases,
        }
    }

    /// When a change that was made at a time has to be obeyed; never, while something is broken.
    pub(crate) fn deadline(&self, since: Instant) -> Option<Instant> {
        let mut deadline = since + BOUND;
        // They stand in the order of their starts.
        for disruption in &self.changes {
            if disruption.start <= deadline && disruption.end.is_none_or(|end| end + disruption.after >= since) {
                deadline = deadline.max(disruption.end? + disruption.after + BOUND);
            }
        }
        Some(deadline)
    }

    /// It decided a request.
    pub(crate) fn decided(&mut self, now: Instant) {
        self.decided.push_back(now);
        while self.decided.front().is_some_and(|at| now.saturating_duration_since(*at) > LATELY) {
            self.decided.pop_front();
        }
    }

    /// How many requests it decided in the time before now.
    pub(crate) fn decided_within(&self, lately: Duration, now: Instant) -> u64 {
        let recent = self.decided.iter().filter(|at| now.saturating_duration_since(**at) <= lately).count();
        recent.try_into().unwrap_or(u64::MAX)
    }

    /// It admitted a request.
    pub(crate) fn admitted(&mut self, now: Instant) {
        gap(&mut self.last_admitted, &mut self.longest_gap, now);
    }

    /// The load, which began at a time, is over: what has not ended counts up to now.
    pub(crate) fn close(&mut self, start: Instant, now: Instant) {
        close(self.last_admitted, &mut self.longest_gap, start, now);
    }
}

/// Something happened now: the time since it last did, if that is the longest.
pub(crate) fn gap(last: &mut Option<Instant>, longest: &mut Duration, now: Instant) {
    if let Some(last) = *last {
        *longest = (*longest).max(now.saturating_duration_since(last));
    }
    *last = Some(now);
}

/// Nothing more happens: the time since it last did, or since the start.
pub(crate) fn close(last: Option<Instant>, longest: &mut Duration, start: Instant, now: Instant) {
    gap(&mut Some(last.unwrap_or(start)), longest, now);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn hindered(disruptions: &[(u32, Option<u32>, u32)], zero: Instant) -> EnvoyModel {
        let disruption = |(start, end, after): &(u32, Option<u32>, u32)| Disruption {
            start: zero + MS * *start,
            end: end.map(|end| zero + MS * end),
            after: MS * *after,
        };
        EnvoyModel { changes: disruptions.iter().map(disruption).collect(), ..EnvoyModel::default() }
    }

    /// In milliseconds after zero.
    fn deadline(disruptions: &[(u32, Option<u32>, u32)], since: u32) -> Option<u128> {
        let zero = Instant::now();
        Some((hindered(disruptions, zero).deadline(zero + MS * since)? - zero).as_millis())
    }

    #[test]
    fn a_change_has_to_be_obeyed_within_the_bound_when_nothing_is_broken() {
        assert_eq!(BOUND, MS * 2_000);
        assert_eq!(deadline(&[], 500), Some(2_500));
        // Long over, and not yet begun.
        assert_eq!(deadline(&[(0, Some(100), 50)], 500), Some(2_500));
        assert_eq!(deadline(&[(2_501, Some(9_000), 0)], 500), Some(2_500));
    }

    #[test]
    fn a_fault_puts_the_deadline_off_until_it_is_over_and_recovered_from() {
        assert_eq!(deadline(&[(1_000, Some(4_000), 700)], 500), Some(6_700));
        // The recovery of one that ended before.
        assert_eq!(deadline(&[(0, Some(400), 700)], 500), Some(3_100));
        assert_eq!(deadline(&[(1_000, None, 0)], 500), None);
    }

    #[test]
    fn faults_that_follow_on_each_other_put_it_off_together_and_others_do_not() {
        assert_eq!(deadline(&[(1_000, Some(4_000), 0), (5_900, Some(7_000), 100)], 500), Some(9_100));
        assert_eq!(deadline(&[(1_000, Some(4_000), 0), (6_100, Some(7_000), 100)], 500), Some(6_000));
        assert_eq!(deadline(&[(1_000, Some(4_000), 0), (1_500, Some(2_000), 0)], 500), Some(6_000));
    }

    #[test]
    fn a_gap_that_lasts_to_the_end_is_a_gap() {
        let (mut model, zero) = (EnvoyModel::default(), Instant::now());
        model.admitted(zero + MS * 100);
        model.admitted(zero + MS * 300);
        assert_eq!(model.longest_gap, MS * 200);
        model.close(zero, zero + MS * 900);
        assert_eq!(model.longest_gap, MS * 600);
        // It never admitted anybody.
        let mut model = EnvoyModel::default();
        model.close(zero, zero + MS * 900);
        assert_eq!(model.longest_gap, MS * 900);
    }

    #[test]
    fn what_was_decided_lately_is_counted_and_what_is_long_ago_forgotten() {
        let (mut model, zero) = (EnvoyModel::default(), Instant::now());
        for ms in [0, 100, 200, 30_000] {
            model.decided(zero + MS * ms);
        }
        assert_eq!(model.decided_within(MS * 10, zero + MS * 30_005), 1);
        assert_eq!(model.decided.len(), 1);
    }
}
