//! Model of one Envoy: the disruptions that delay changes, and the deadlines that follow from them;
//! the skew of its clock; its recent decisions.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Time limit for every Envoy to obey a change without a disruption. It takes some milliseconds; the rest allows for a machine
/// that is busy with the whole stack and its load.
pub const BOUND: Duration = Duration::from_secs(2);

/// How long single decisions are remembered.
const LATELY: Duration = Duration::from_secs(20);

/// A span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) from: Instant,
    pub(crate) to: Instant,
}

impl Span {
    pub(crate) fn meets(&self, other: Self) -> bool {
        self.from <= other.to && other.from <= self.to
    }
}

/// An interval in which something is broken, with the time that recovery takes after its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disruption {
    pub(crate) start: Instant,
    pub(crate) end: Option<Instant>,
    pub(crate) after: Duration,
}

impl Disruption {
    /// Whether it overlaps the time from `from` until now.
    pub(crate) fn meets(&self, from: Instant) -> bool {
        self.end.is_none_or(|end| from <= end + self.after)
    }

    fn meets_span(&self, time: Span) -> bool {
        self.start <= time.to && self.meets(time.from)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hinders {
    /// An Envoy receives changes late.
    Changes,
    /// Requests to an Envoy may get no response, or one that is not from the filter.
    Requests,
    /// An Envoy gets no answer when it asks for tokens of shared limits.
    Allowances,
}

#[derive(Debug, Default)]
pub(crate) struct EnvoyModel {
    pub(crate) changes: Vec<Disruption>,
    pub(crate) requests: Vec<Disruption>,
    pub(crate) allowances: Vec<Disruption>,
    /// What it admitted in these spells may be lost with its counts.
    pub(crate) uncounted: Vec<Span>,
    /// A process of it that was killed holds tokens in these spells.
    pub(crate) holds: Vec<Span>,
    /// Since when it has answered `limits_unavailable` outside of disruptions.
    pub(crate) unavailable_since: Option<Instant>,
    /// The time of its first response other than `not_ready`.
    pub(crate) ready: Option<Instant>,
    pub(crate) behind: Duration,
    pub(crate) ahead: Duration,
    pub(crate) decided: VecDeque<Instant>,
    pub(crate) last_admitted: Option<Instant>,
    pub(crate) longest_gap: Duration,
}

impl EnvoyModel {
    /// Its disruptions of a kind.
    pub(crate) fn disruptions(&mut self, hinders: Hinders) -> &mut Vec<Disruption> {
        match hinders {
            Hinders::Changes => &mut self.changes,
            Hinders::Requests => &mut self.requests,
            Hinders::Allowances => &mut self.allowances,
        }
    }

    /// The deadline to obey a change of the time `since`. None while a disruption lasts.
    pub(crate) fn deadline(&self, since: Instant) -> Option<Instant> {
        let mut deadline = since + BOUND;
        // In the order of their starts.
        for disruption in &self.changes {
            if disruption.start <= deadline && disruption.end.is_none_or(|end| end + disruption.after >= since) {
                deadline = deadline.max(disruption.end? + disruption.after + BOUND);
            }
        }
        Some(deadline)
    }

    /// Whether it may have had no answer to a call for tokens in this time.
    pub(crate) fn is_cut_off(&self, time: Span) -> bool {
        self.allowances.iter().any(|disruption| disruption.meets_span(time))
    }

    /// Whether a busy machine may explain that a control plane is late, which is excused for at most [`BOUND`].
    pub(crate) fn may_stall(&mut self, sent: Instant) -> bool {
        sent <= *self.unavailable_since.get_or_insert(sent) + BOUND
    }

    /// Since when usage may be unreported: the usual delay, or the start of a disruption.
    pub(crate) fn unreported_since(&self, time: Instant, usual: Duration) -> Instant {
        let mut since = time.checked_sub(usual).unwrap_or(time);
        // In the order of their starts.
        for disruption in self.changes.iter().rev() {
            if disruption.start < since && disruption.meets(since) {
                since = disruption.start;
            }
        }
        since
    }

    pub(crate) fn decided(&mut self, now: Instant) {
        self.decided.push_back(now);
        while self.decided.front().is_some_and(|at| now.saturating_duration_since(*at) > LATELY) {
            self.decided.pop_front();
        }
    }

    /// The number of requests that it decided lately.
    pub(crate) fn decided_within(&self, lately: Duration, now: Instant) -> u64 {
        let recent = self.decided.iter().filter(|at| now.saturating_duration_since(**at) <= lately).count();
        recent.try_into().unwrap_or(u64::MAX)
    }

    pub(crate) fn admitted(&mut self, now: Instant) {
        gap(&mut self.last_admitted, &mut self.longest_gap, now);
    }

    /// Ends the measurement of gaps, which began at `start`.
    pub(crate) fn close(&mut self, start: Instant, now: Instant) {
        close(self.last_admitted, &mut self.longest_gap, start, now);
    }
}

/// Records an event, and the time since the last one if that is the longest.
pub(crate) fn gap(last: &mut Option<Instant>, longest: &mut Duration, now: Instant) {
    if let Some(last) = *last {
        *longest = (*longest).max(now.saturating_duration_since(last));
    }
    *last = Some(now);
}

/// Records the time from the last event, or from the start, until now.
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
        // One ended long before, one begins later.
        assert_eq!(deadline(&[(0, Some(100), 50)], 500), Some(2_500));
        assert_eq!(deadline(&[(2_501, Some(9_000), 0)], 500), Some(2_500));
    }

    #[test]
    fn a_fault_puts_the_deadline_off_until_it_is_over_and_recovered_from() {
        assert_eq!(deadline(&[(1_000, Some(4_000), 700)], 500), Some(6_700));
        // Recovery from a disruption that ended before.
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
        // Without any admitted request.
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
