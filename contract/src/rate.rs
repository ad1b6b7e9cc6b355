//! Rate limits: whether a key may be used now, from the time that is remembered of its earlier use.
//!
//! The algorithm is GCRA (ITU-T I.371): of each key and limit one time is remembered, the *theoretical arrival time* of the
//! next request. A request moves it on by the interval between two requests; it is refused if that would move it further
//! ahead of now than the burst allows.

use crate::record::RateLimit;
use crate::time::NS_PER_S;

/// The number by which a limit of a key is known where it is remembered, from its name: 56 bits of FNV-1a, the rest zero.
#[must_use]
pub fn tag(name: &str) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    hash >> 8
}

/// A rate limit as it is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    interval_ns: u64,
    tolerance_ns: u64,
}

impl Rate {
    /// The rate of a limit.
    #[must_use]
    pub fn of(limit: &RateLimit) -> Self {
        let window_ns = u64::from(limit.window_s.max(1)).saturating_mul(NS_PER_S);
        let interval_ns = window_ns.checked_div(limit.requests.max(1).into()).unwrap_or(u64::MAX).max(1);
        Self { interval_ns, tolerance_ns: interval_ns.saturating_mul(limit.burst.max(1).into()) }
    }

    /// Takes one request: from the time that is remembered, to the time to remember instead.
    ///
    /// # Errors
    /// How long to wait, in nanoseconds; nothing is taken then.
    pub fn take(&self, arrival_ns: Option<u64>, now_ns: u64) -> Result<u64, u64> {
        let next_ns = self.within_reach(arrival_ns.unwrap_or(now_ns), now_ns).saturating_add(self.interval_ns);
        match next_ns.saturating_sub(now_ns.saturating_add(self.tolerance_ns)) {
            0 => Ok(next_ns),
            wait_ns => Err(wait_ns),
        }
    }

    /// The limit at an equal part of its rate, for `envoys` Envoys that cannot reach the control plane. However many they
    /// are, one request may come at once.
    #[must_use]
    pub fn slowed(&self, envoys: u32) -> Self {
        let interval_ns = self.interval_ns.saturating_mul(envoys.max(1).into());
        Self { interval_ns, tolerance_ns: self.tolerance_ns.max(interval_ns) }
    }

    /// How many requests may come now.
    #[must_use]
    pub fn room(&self, arrival_ns: u64, now_ns: u64) -> u64 {
        let free_ns = now_ns.saturating_add(self.tolerance_ns).saturating_sub(arrival_ns.max(now_ns));
        free_ns.checked_div(self.interval_ns).unwrap_or_default()
    }

    /// In how many nanoseconds so many requests may come; more than the burst is counted as the burst.
    #[must_use]
    pub fn wait_ns(&self, arrival_ns: u64, requests: u64, now_ns: u64) -> u64 {
        let needed_ns = self.interval_ns.saturating_mul(requests).min(self.tolerance_ns);
        arrival_ns.max(now_ns).saturating_add(needed_ns).saturating_sub(now_ns.saturating_add(self.tolerance_ns))
    }

    /// How many requests may come at once.
    #[must_use]
    pub fn burst(&self) -> u64 {
        self.tolerance_ns.checked_div(self.interval_ns).unwrap_or(1)
    }

    /// The time between two requests.
    #[must_use]
    pub const fn interval_ns(&self) -> u64 {
        self.interval_ns
    }

    /// The time that the burst takes.
    #[must_use]
    pub const fn tolerance_ns(&self) -> u64 {
        self.tolerance_ns
    }

    /// A time that was set before the clock stepped back, or under a larger limit, brought within reach, so that a key is not
    /// refused until the clock has caught up. Clocks of workers that differ by less than a second are no step.
    #[must_use]
    pub fn after_clock_step(&self, arrival_ns: u64, now_ns: u64) -> u64 {
        let reach_ns = self.within_reach(arrival_ns, now_ns);
        if arrival_ns > reach_ns.saturating_add(NS_PER_S) { reach_ns } else { arrival_ns }
    }

    /// A time further ahead than the burst can have moved it was set before the clock stepped back, or under another limit:
    /// it counts as the furthest possible. One that has passed counts as now.
    #[must_use]
    pub fn within_reach(&self, arrival_ns: u64, now_ns: u64) -> u64 {
        arrival_ns.clamp(now_ns, now_ns.saturating_add(self.tolerance_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Per;

    const NOW: u64 = 1_800_000_000 * NS_PER_S;

    fn rate(requests: u32, window_s: u32, burst: u32) -> Rate {
        Rate::of(&RateLimit { name: "a".into(), requests, window_s, burst, shared: true, per: Per::Key })
    }

    fn admitted(rate: Rate, at: impl IntoIterator<Item = u64>) -> usize {
        let mut arrival = None;
        let mut admit = |now| rate.take(arrival, now).map(|next| arrival = Some(next)).is_ok();
        at.into_iter().filter(|now| admit(*now)).count()
    }

    #[test]
    fn a_burst_is_admitted_and_then_the_steady_rate() {
        assert_eq!(admitted(rate(10, 1, 5), [NOW; 20]), 5);
        let ten_seconds = (0..1_000).map(|tick| NOW + tick * 10_000_000);
        // The burst, and one each 100 ms.
        assert_eq!(admitted(rate(10, 1, 5), ten_seconds), 5 + 99);
    }

    #[test]
    fn the_room_and_the_wait_agree_with_what_is_admitted() {
        let rate = rate(10, 1, 5);
        assert_eq!((rate.burst(), rate.room(0, NOW), rate.wait_ns(0, 5, NOW)), (5, 5, 0));
        let next = rate.take(None, NOW).unwrap();
        assert_eq!((rate.room(next, NOW), rate.wait_ns(next, 4, NOW), rate.wait_ns(next, 5, NOW)), (4, 0, 100_000_000));
        assert_eq!(rate.room(next, NOW + 100_000_000), 5);
        // More than the burst never comes at once.
        assert_eq!(rate.wait_ns(next, 50, NOW), 100_000_000);
    }

    #[test]
    fn the_safe_rate_of_many_envoys_adds_up_to_the_limit_and_admits_one_request_at_least() {
        let minute = || (0..6_000).map(|tick| NOW + tick * 10_000_000);
        let one = admitted(rate(100, 1, 1).slowed(4), minute());
        assert!((1_500..=1_501).contains(&one), "{one}");
        let slowest = rate(1, 1, 1).slowed(u32::MAX);
        assert_eq!(admitted(slowest, [NOW; 5]), 1);
    }

    #[test]
    fn names_have_tags_of_their_own() {
        let names = ["", "a", "b", "ab", "ba", "hour", "second", "default"];
        let tags: std::collections::BTreeSet<u64> = names.iter().map(|name| tag(name)).collect();
        assert_eq!(tags.len(), names.len());
        assert!(tags.iter().all(|tag| tag >> 56 == 0));
        // They stand in the database.
        assert_eq!(tag("hour"), 0x407efecc7eb576);
    }

    #[test]
    fn a_time_out_of_reach_is_brought_within_reach() {
        let rate = rate(10, 1, 5);
        assert_eq!(rate.take(Some(u64::MAX), NOW), Err(100_000_000));
        assert_eq!(rate.within_reach(0, NOW), NOW);
        let reach_ns = NOW + 500_000_000;
        assert_eq!(rate.after_clock_step(reach_ns + NS_PER_S, NOW), reach_ns + NS_PER_S);
        assert_eq!(rate.after_clock_step(reach_ns + NS_PER_S + 1, NOW), reach_ns);
        assert_eq!(rate.after_clock_step(0, NOW), 0);
    }
}
