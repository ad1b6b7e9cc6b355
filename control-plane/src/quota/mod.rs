//! Quotas: requests of a key, or of all keys of a user that have a plan, in a window of time. [`Use`] decides whether a quota is used up and until when; `store` keeps
//! its windows in PostgreSQL. Calendar windows are those of [`crate::domain::calendar`], rolling windows are computed here.

mod applied;
mod store;

use time::{Duration, OffsetDateTime};

use crate::domain::{Period, Quota, Window, round_up_to_second};

pub use applied::{Whose, apply_quotas};
pub use store::{QuotaId, View, count, present_use, reconsider, reopen, reset, shut, view};

/// Slots of a rolling window.
pub const SLOTS: usize = 60;

/// Requests counted against a quota in one window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// When the window began.
    pub window_start: OffsetDateTime,
    /// When it ends; of a rolling window, when its last slot ends.
    pub window_end: OffsetDateTime,
    /// Allowed requests.
    pub used: i64,
    /// Rolling windows only: allowed requests in each slot, the oldest first.
    pub slots: Vec<i64>,
}

impl Use {
    /// The window of a quota that contains `now`, with nothing used.
    #[must_use]
    pub fn none(quota: &Quota, now: OffsetDateTime) -> Self {
        match quota.period.calendar() {
            Some(every) => {
                let Window { start, end } = Window::anchored(now, every, quota.anchor_day(), quota.zone());
                Self { window_start: start, window_end: end, used: 0, slots: Vec::new() }
            }
            None => Self::rolling(quota.window_s(), now),
        }
    }

    /// What is used of a quota now, and whether that is in another window than the stored one. `kind` is that of the stored
    /// window: windows of another kind do not count.
    #[must_use]
    pub fn current(mut self, kind: &str, quota: &Quota, now: OffsetDateTime) -> (Self, bool) {
        if kind != quota.kind() {
            return (Self::none(quota, now), true);
        }
        match quota.period {
            Period::Rolling => {
                let rolled = self.roll(quota.window_s(), now);
                (self, rolled)
            }
            Period::Day | Period::Week | Period::Month if now < self.window_end => (self, false),
            Period::Day | Period::Week | Period::Month => (Self::none(quota, now), true),
        }
    }

    /// A rolling window that begins now, with nothing used.
    #[must_use]
    pub fn rolling(window_s: i64, now: OffsetDateTime) -> Self {
        let slot = slot(window_s);
        let window_end = now + slot;
        Self { window_start: window_end - slot * 60, window_end, used: 0, slots: vec![0; SLOTS] }
    }

    /// Moves a rolling window on to `now`. Returns whether it moved.
    pub fn roll(&mut self, window_s: i64, now: OffsetDateTime) -> bool {
        if now < self.window_end {
            return false;
        }
        let slot = slot(window_s);
        let late = (now - self.window_end).whole_microseconds() / slot.whole_microseconds().max(1);
        let past = usize::try_from(late).unwrap_or(SLOTS).saturating_add(1);
        if past >= SLOTS {
            *self = Self::rolling(window_s, now);
            return true;
        }
        self.slots.resize(SLOTS, 0);
        self.slots.drain(..past);
        self.slots.resize(SLOTS, 0);
        self.used = self.slots.iter().fold(0, |sum, used| sum.saturating_add(*used));
        let on = slot * i32::try_from(past).unwrap_or(i32::MAX);
        (self.window_start, self.window_end) = (self.window_start + on, self.window_end + on);
        true
    }

    /// Counts requests. Those of late reports count in the present window.
    pub fn add(&mut self, requests: i64) {
        self.used = self.used.saturating_add(requests);
        if let Some(running) = self.slots.last_mut() {
            *running = running.saturating_add(requests);
        }
    }

    /// Whether the quota is used up.
    #[must_use]
    pub const fn exceeds(&self, quota: &Quota) -> bool {
        self.used >= quota.requests
    }

    /// When an exhausted quota admits requests again: with the next window; a rolling one as soon as one request fits. Filters
    /// use whole seconds.
    #[must_use]
    pub fn opens_at(&self, quota: &Quota) -> OffsetDateTime {
        round_up_to_second(self.frees_at(quota))
    }

    /// When more is left of the quota than now, if nothing is used until then.
    #[must_use]
    pub fn frees_at(&self, quota: &Quota) -> OffsetDateTime {
        if quota.period != Period::Rolling {
            return self.window_end;
        }
        let counts = self.used.min(quota.requests);
        let slot = slot(quota.window_s());
        let (mut left, mut at) = (self.used, self.window_end);
        for used in &self.slots {
            left = left.saturating_sub(*used);
            if left < counts {
                break;
            }
            at += slot;
        }
        at
    }
}

fn slot(window_s: i64) -> Duration {
    Duration::microseconds(window_s.saturating_mul(1_000_000) / 60)
}

#[cfg(test)]
mod tests {
    use contract::record::Per;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-01-01 00:00:00 UTC);

    fn hour(requests: i64) -> Quota {
        Quota {
            requests,
            period: Period::Rolling,
            time_zone: None,
            anchor_day: None,
            window_s: Some(3_600),
            per: Per::Key,
        }
    }

    #[test]
    fn what_was_used_leaves_a_rolling_window_slot_by_slot() {
        let mut used = Use::rolling(3_600, NOW);
        for minute in 0..60 {
            used.roll(3_600, NOW + Duration::minutes(minute));
            used.add(1);
        }
        assert_eq!(used.used, 60);
        assert!(!used.roll(3_600, NOW + Duration::seconds(59 * 60 + 59)));
        assert!(used.roll(3_600, NOW + Duration::minutes(60)));
        assert_eq!((used.used, used.slots.len()), (59, SLOTS));
        used.roll(3_600, NOW + Duration::minutes(89));
        assert_eq!(used.used, 30);
        used.roll(3_600, NOW + Duration::hours(9));
        assert_eq!(used, Use::rolling(3_600, NOW + Duration::hours(9)));
    }

    #[test]
    fn a_rolling_quota_opens_as_soon_as_one_request_fits() {
        let mut used = Use::rolling(3_600, NOW);
        used.add(8);
        used.roll(3_600, NOW + Duration::minutes(10));
        used.add(8);
        assert!(used.exceeds(&hour(16)));
        // The first eight leave with their slot, an hour after its end.
        assert_eq!(used.opens_at(&hour(16)), NOW + Duration::minutes(60));
        // Of a quota that was lowered more must leave; of one that is not used up, the next slot counts.
        assert_eq!(used.opens_at(&hour(8)), NOW + Duration::minutes(70));
        assert_eq!(used.frees_at(&hour(100)), NOW + Duration::minutes(60));
        let mut then = used.clone();
        then.roll(3_600, used.opens_at(&hour(16)));
        assert_eq!(then.used, 8);
    }

    #[test]
    fn a_calendar_quota_opens_with_the_next_window() {
        let quota = Quota {
            requests: 1,
            period: Period::Day,
            time_zone: None,
            anchor_day: None,
            window_s: None,
            per: Per::Key,
        };
        let used = Use { window_start: NOW, window_end: NOW + Duration::days(1), used: 1, slots: Vec::new() };
        assert!(used.exceeds(&quota));
        assert_eq!(used.opens_at(&quota), NOW + Duration::days(1));
        assert_eq!((quota.kind(), hour(1).kind()), ("day/UTC".into(), "rolling/3600".into()));
        let next =
            Use { window_start: used.window_end, window_end: NOW + Duration::days(2), used: 0, slots: Vec::new() };
        assert_eq!(used.clone().current("day/UTC", &quota, NOW + Duration::hours(23)), (used.clone(), false));
        assert_eq!(used.clone().current("day/UTC", &quota, used.window_end), (next, true));
        assert_eq!(used.clone().current("week/UTC", &quota, NOW), (Use { used: 0, ..used }, true));
    }
}
