//! Rate limits: whether a key may be used now, from the time that is remembered of its earlier use.
//!
//! The algorithm is GCRA (ITU-T I.371): of each key and limit one time is remembered, the *theoretical arrival time* of the
//! next request. A request moves it on by the interval between two requests; it is refused if that would move it further
//! ahead of now than the burst allows.
//!
//! Of a limit that several Envoys share, each judges its share: rate and burst in that proportion. How far ahead of now the
//! remembered time is says which *part* of the burst is used, whatever the share: all of it, if it is ahead by the time that
//! the burst takes. So a share that becomes smaller is used to the same part, and what is added to a share brings with it
//! the part that all Envoys together have used of the limit ([`merged_ns`]).

use crate::record::RateLimit;
use crate::time::NS_PER_S;

/// A whole limit, in the unit of shares: parts per million.
pub const WHOLE: u32 = 1_000_000;

/// The number by which a limit of a key is known where it is remembered, from its name: 56 bits of FNV-1a, the rest zero.
#[must_use]
pub fn tag(name: &str) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    hash >> 8
}

/// How far ahead a limit is used once a share of it has grown: what it had is used as before, what came is used as much as
/// the whole limit is over all Envoys, by `all_ns`.
#[must_use]
pub fn merged_ns(own_ns: u64, share: u32, all_ns: u64, grown: u32) -> u64 {
    let (share, grown) = (u128::from(share), u128::from(grown.max(1)));
    let came = grown.saturating_sub(share);
    let kept = grown.saturating_sub(came);
    let sum = u128::from(own_ns).saturating_mul(kept).saturating_add(u128::from(all_ns).saturating_mul(came));
    sum.checked_div(grown).and_then(|ns| u64::try_from(ns).ok()).unwrap_or(u64::MAX)
}

/// A limit as one Envoy judges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    interval_ns: u64,
    tolerance_ns: u64,
}

impl Rate {
    /// A share of a limit, in parts per million. However small the share, one request may come at once.
    #[must_use]
    pub fn of(limit: &RateLimit, share: u32) -> Self {
        let share = u64::from(share.clamp(1, WHOLE));
        let window_ns = u64::from(limit.window_s.max(1)).saturating_mul(NS_PER_S);
        let requests = u64::from(limit.requests.max(1)).saturating_mul(share);
        let interval_ns = match window_ns.checked_mul(WHOLE.into()) {
            Some(whole_ns) => whole_ns.checked_div(requests),
            // A window of more than five hours.
            None => u128::from(window_ns)
                .saturating_mul(u128::from(WHOLE))
                .checked_div(requests.into())
                .and_then(|ns| u64::try_from(ns).ok()),
        };
        let interval_ns = interval_ns.unwrap_or(u64::MAX).max(1);
        let burst = u64::from(limit.burst).saturating_mul(share).checked_div(u64::from(WHOLE)).unwrap_or(1).max(1);
        Self { interval_ns, tolerance_ns: interval_ns.saturating_mul(burst) }
    }

    /// Takes one request: from the time that is remembered, to the time to remember instead.
    ///
    /// # Errors
    /// How long to wait, in nanoseconds; nothing is taken then.
    pub fn take(&self, arrival_ns: Option<u64>, now_ns: u64) -> Result<u64, u64> {
        self.take_ahead(1, arrival_ns, now_ns)
    }

    /// The same for several requests, of which the last may come later: all of them or none.
    ///
    /// # Errors
    /// How long to wait for all of them, in nanoseconds; nothing is taken then.
    pub fn take_ahead(&self, requests: u32, arrival_ns: Option<u64>, now_ns: u64) -> Result<u64, u64> {
        let taken_ns = self.interval_ns.saturating_mul(requests.into());
        let next_ns = self.within_reach(arrival_ns.unwrap_or(now_ns), now_ns).saturating_add(taken_ns);
        match next_ns.saturating_sub(now_ns.saturating_add(self.tolerance_ns)) {
            0 => Ok(next_ns),
            wait_ns => Err(wait_ns),
        }
    }

    /// Counts requests that were admitted already, wherever: from the time that is remembered, to the time to remember
    /// instead.
    #[must_use]
    pub fn count(&self, arrival_ns: Option<u64>, requests: u64, now_ns: u64) -> u64 {
        let used_ns = self.interval_ns.saturating_mul(requests);
        let next_ns = self.within_reach(arrival_ns.unwrap_or(now_ns), now_ns).saturating_add(used_ns);
        self.within_reach(next_ns, now_ns)
    }

    /// Gives back requests that were taken and did not come: from the time that is remembered, to the time to remember
    /// instead.
    #[must_use]
    pub const fn give_back(&self, requests: u32, arrival_ns: u64) -> u64 {
        arrival_ns.saturating_sub(self.interval_ns.saturating_mul(requests as u64))
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

    /// A time further ahead than the burst can have moved it was set before the clock stepped back, or under another limit
    /// or share: it counts as the furthest possible. One that has passed counts as now.
    #[must_use]
    pub fn within_reach(&self, arrival_ns: u64, now_ns: u64) -> u64 {
        arrival_ns.clamp(now_ns, now_ns.saturating_add(self.tolerance_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000 * NS_PER_S;

    fn rate(requests: u32, window_s: u32, burst: u32, share: u32) -> Rate {
        Rate::of(&RateLimit { name: "a".into(), requests, window_s, burst, shared: true }, share)
    }

    fn admitted(rate: Rate, at: impl IntoIterator<Item = u64>) -> usize {
        let mut arrival = None;
        let mut admit = |now| rate.take(arrival, now).map(|next| arrival = Some(next)).is_ok();
        at.into_iter().filter(|now| admit(*now)).count()
    }

    #[test]
    fn a_burst_is_admitted_and_then_the_steady_rate() {
        assert_eq!(admitted(rate(10, 1, 5, WHOLE), [NOW; 20]), 5);
        let ten_seconds = (0..1_000).map(|tick| NOW + tick * 10_000_000);
        // The burst, and one each 100 ms.
        assert_eq!(admitted(rate(10, 1, 5, WHOLE), ten_seconds), 5 + 99);
    }

    #[test]
    fn requests_are_taken_ahead_all_or_none_and_those_that_did_not_come_are_given_back() {
        let rate = rate(10, 1, 5, WHOLE);
        assert_eq!(rate.burst(), 5);
        let next = rate.take_ahead(3, None, NOW).unwrap();
        assert_eq!(admitted_after(rate, next), 2);
        assert_eq!(rate.take_ahead(3, Some(next), NOW), Err(100_000_000));
        assert_eq!(admitted_after(rate, rate.give_back(2, next)), 4);
        assert_eq!(rate.give_back(9, 0), 0);
    }

    #[test]
    fn shares_of_a_limit_add_up_to_it() {
        let minute = || (0..6_000).map(|tick| NOW + tick * 10_000_000);
        let whole = admitted(rate(100, 1, 100, WHOLE), minute().flat_map(|now| [now; 4]));
        let thirds: usize =
            (0..3).map(|_| admitted(rate(100, 1, 100, WHOLE / 3), minute().flat_map(|now| [now; 4]))).sum();
        assert!(whole.abs_diff(thirds) <= 6, "{whole} {thirds}");
    }

    #[test]
    fn the_smallest_share_still_admits_one_request_and_says_how_long_to_wait() {
        let rate = rate(100, 1, 100, 0);
        let next = rate.take(None, NOW).unwrap();
        // One in ten thousand seconds.
        assert_eq!(rate.take(Some(next), NOW), Err(10_000 * NS_PER_S));
        assert!(rate.take(Some(next), NOW + 10_000 * NS_PER_S).is_ok());
    }

    #[test]
    fn what_comes_to_a_share_is_used_as_the_whole_limit_is() {
        let half = WHOLE / 2;
        // Nothing came; all of it came; the rest of the limit is fresh; it is used up.
        assert_eq!(merged_ns(100, WHOLE, 900, WHOLE), 100);
        assert_eq!(merged_ns(100, 0, 900, WHOLE), 900);
        assert_eq!(merged_ns(100, half, 0, WHOLE), 50);
        assert_eq!(merged_ns(0, half, 100, WHOLE), 50);
        assert_eq!(merged_ns(u64::MAX, half, u64::MAX, WHOLE), u64::MAX);
        // A share that did not grow keeps what it has.
        assert_eq!(merged_ns(100, WHOLE, 0, half), 100);
    }

    #[test]
    fn requests_that_were_admitted_elsewhere_are_counted_up_to_the_burst() {
        let rate = rate(10, 1, 5, WHOLE);
        let after = rate.count(None, 3, NOW);
        assert_eq!(admitted_after(rate, after), 2);
        assert_eq!(rate.count(Some(after), 100, NOW), NOW + rate.tolerance_ns());
        assert_eq!(rate.count(Some(after), 0, NOW + NS_PER_S), NOW + NS_PER_S);
    }

    fn admitted_after(rate: Rate, arrival: u64) -> usize {
        let mut arrival = Some(arrival);
        (0..9).filter(|_| rate.take(arrival, NOW).map(|next| arrival = Some(next)).is_ok()).count()
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
        let rate = rate(10, 1, 5, WHOLE);
        assert_eq!(rate.take(Some(u64::MAX), NOW), Err(100_000_000));
        assert_eq!(rate.within_reach(0, NOW), NOW);
    }
}
