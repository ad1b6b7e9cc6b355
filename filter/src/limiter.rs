//! Rate limits: how often a key was used comes in, whether it may be used once more goes out.
//!
//! The algorithm is GCRA (ITU-T I.371): of each key and limit one time is remembered, the *theoretical arrival time* of the
//! next request. A request moves it on by the interval between two requests; it is refused if that would move it further
//! ahead of now than the burst allows.
//!
//! The times live in cells that all VMs share and each change of a cell insists on the version that it read, so limits are
//! exact for an Envoy process. There are at most [`LIMITER_CELLS`] cells; a cell forgets times that have passed whenever
//! it is written, so it holds about as many as keys were used lately. Only known keys get here.

use contract::id::KeyId;

use crate::cells::{Cells, Names, update};

/// Cells of the limiter: the last 16 bits of the key's id name one.
pub const LIMITER_CELLS: u32 = 65_536;

const SECOND_NS: u64 = 1_000_000_000;

/// One limit, as the algorithm needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Its name in replies.
    pub name: String,
    /// Requests in each window.
    pub requests: u32,
    /// The window, in seconds.
    pub window_s: u32,
    /// Requests that may come at once after a pause; at least 1.
    pub burst: u32,
}

impl Limit {
    /// Between two requests of a steady stream, in nanoseconds.
    fn interval_ns(&self) -> u64 {
        let window_ns = u64::from(self.window_s.max(1)).saturating_mul(SECOND_NS);
        window_ns.checked_div(u64::from(self.requests)).unwrap_or(window_ns).max(1)
    }

    fn tolerance_ns(&self) -> u64 {
        self.interval_ns().saturating_mul(u64::from(self.burst.max(1)))
    }
}

impl From<&contract::record::RateLimit> for Limit {
    fn from(limit: &contract::record::RateLimit) -> Self {
        Self { name: limit.name.clone(), requests: limit.requests, window_s: limit.window_s, burst: limit.burst }
    }
}

/// A limit that refused a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Which of the limits, by place.
    pub limit: usize,
    /// After how many seconds, rounded up, a request will be admitted if none comes before.
    pub retry_after_s: u64,
}

/// Takes one request from each of a key's limits, or from none of them if one refuses: the one with the longest wait.
///
/// # Errors
/// [`Refused`].
pub fn take(cells: &impl Cells, names: &Names, key: KeyId, limits: &[Limit], now_ns: u64) -> Result<(), Refused> {
    let [.., high, low] = key.0;
    let name = names.limiter(u16::from_be_bytes([high, low]));
    let taken = update(cells, &name, |cell| {
        let mut times = Times::read(cell);
        match times.take(key, limits, now_ns) {
            Ok(()) => Ok((times.write(now_ns), Ok(()))),
            Err(refused) if times.settle(key, limits, now_ns) => Ok((times.write(now_ns), Err(refused))),
            Err(refused) => Err(Err(refused)),
        }
    });
    // Nobody gets through to the cell: as good as used up.
    taken.unwrap_or(Err(Refused { limit: 0, retry_after_s: 1 }))
}

/// What a cell holds: `key id (16 bytes) │ place of the limit (1 byte) │ time (8 bytes)`, repeated.
struct Times(Vec<Time>);

#[derive(Clone, Copy)]
struct Time {
    key: KeyId,
    limit: u8,
    arrival_ns: u64,
}

const TIME_BYTES: usize = 25;

impl Times {
    fn read(bytes: &[u8]) -> Self {
        let time = |bytes: &[u8]| {
            let (key, rest) = bytes.split_first_chunk::<16>()?;
            let (limit, rest) = rest.split_first()?;
            let (arrival_ns, _) = rest.split_first_chunk::<8>()?;
            Some(Time { key: KeyId(*key), limit: *limit, arrival_ns: u64::from_le_bytes(*arrival_ns) })
        };
        Self(bytes.chunks_exact(TIME_BYTES).filter_map(time).collect())
    }

    fn write(&self, now_ns: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len().saturating_mul(TIME_BYTES));
        for time in self.0.iter().filter(|time| time.arrival_ns > now_ns) {
            bytes.extend_from_slice(&time.key.0);
            bytes.push(time.limit);
            bytes.extend_from_slice(&time.arrival_ns.to_le_bytes());
        }
        bytes
    }

    fn take(&mut self, key: KeyId, limits: &[Limit], now_ns: u64) -> Result<(), Refused> {
        let mut worst: Option<Refused> = None;
        for (place, limit) in limits.iter().enumerate() {
            let next_ns = self.next(key, place, limit, now_ns);
            let wait_ns = next_ns.saturating_sub(now_ns.saturating_add(limit.tolerance_ns()));
            let retry_after_s = wait_ns.div_ceil(SECOND_NS);
            if wait_ns > 0 && worst.is_none_or(|worst| retry_after_s > worst.retry_after_s) {
                worst = Some(Refused { limit: place, retry_after_s });
            }
        }
        if let Some(refused) = worst {
            return Err(refused);
        }
        for (place, limit) in limits.iter().enumerate() {
            let arrival_ns = self.next(key, place, limit, now_ns);
            let number = u8::try_from(place).unwrap_or(u8::MAX);
            match self.0.iter_mut().find(|time| time.key == key && time.limit == number) {
                Some(time) => time.arrival_ns = arrival_ns,
                None => self.0.push(Time { key, limit: number, arrival_ns }),
            }
        }
        Ok(())
    }

    /// Brings times that were set before the clock stepped back within reach again, so that a key is not refused until the
    /// clock has caught up. Clocks of workers that differ by a blink are no step. Returns whether anything changed.
    fn settle(&mut self, key: KeyId, limits: &[Limit], now_ns: u64) -> bool {
        let mut changed = false;
        for time in self.0.iter_mut().filter(|time| time.key == key) {
            let Some(limit) = limits.get(usize::from(time.limit)) else { continue };
            let furthest_ns = now_ns.saturating_add(limit.tolerance_ns());
            if time.arrival_ns > furthest_ns.saturating_add(SECOND_NS) {
                time.arrival_ns = furthest_ns;
                changed = true;
            }
        }
        changed
    }

    /// Where one more request would move the theoretical arrival time. A time further ahead than the burst can have moved
    /// it was set before the clock stepped back, or under another limit: it counts as the furthest possible.
    fn next(&self, key: KeyId, place: usize, limit: &Limit, now_ns: u64) -> u64 {
        let arrival_ns = self.0.iter().find(|time| time.key == key && usize::from(time.limit) == place);
        let furthest_ns = now_ns.saturating_add(limit.tolerance_ns());
        let from_ns = arrival_ns.map_or(now_ns, |time| time.arrival_ns.clamp(now_ns, furthest_ns));
        from_ns.saturating_add(limit.interval_ns())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cells::memory::MemoryCells;

    const KEY: KeyId = KeyId([7; 16]);
    const NOW: u64 = 1_800_000_000 * SECOND_NS;
    const MS: u64 = 1_000_000;

    fn names() -> Names {
        Names::of("cluster", "default")
    }

    fn limit(requests: u32, window_s: u32, burst: u32) -> Limit {
        Limit { name: "default".into(), requests, window_s, burst }
    }

    fn admitted(cells: &MemoryCells, limits: &[Limit], at: impl IntoIterator<Item = u64>) -> usize {
        at.into_iter().filter(|now| take(cells, &names(), KEY, limits, *now).is_ok()).count()
    }

    #[test]
    fn a_burst_is_admitted_and_then_the_steady_rate() {
        let cells = MemoryCells::default();
        let limits = [limit(10, 1, 5)];
        assert_eq!(admitted(&cells, &limits, [NOW; 20]), 5);
        // One token each 100 ms; asked every 10 ms for two seconds.
        assert_eq!(admitted(&cells, &limits, (1..=200).map(|tick| NOW + tick * 10 * MS)), 20);
    }

    #[test]
    fn a_refusal_says_when_to_come_back_and_that_is_true() {
        let cells = MemoryCells::default();
        let limits = [limit(1, 10, 1)];
        assert_eq!(take(&cells, &names(), KEY, &limits, NOW), Ok(()));
        let refused = take(&cells, &names(), KEY, &limits, NOW + 500 * MS).unwrap_err();
        assert_eq!(refused, Refused { limit: 0, retry_after_s: 10 });
        assert!(take(&cells, &names(), KEY, &limits, NOW + 9_999 * MS).is_err());
        assert_eq!(take(&cells, &names(), KEY, &limits, NOW + 10_000 * MS), Ok(()));
    }

    #[test]
    fn with_several_limits_all_or_none_are_taken() {
        let cells = MemoryCells::default();
        let limits = [limit(100, 1, 100), limit(2, 3_600, 2)];
        assert_eq!(admitted(&cells, &limits, [NOW; 10]), 2);
        let refused = take(&cells, &names(), KEY, &limits, NOW).unwrap_err();
        assert_eq!(refused, Refused { limit: 1, retry_after_s: 1_800 });
        // The eight refused requests have not touched the first limit.
        assert_eq!(admitted(&cells, &limits[..1], [NOW; 200]), 98);
    }

    #[test]
    fn keys_that_share_a_cell_do_not_share_a_limit() {
        let cells = MemoryCells::default();
        let mut neighbour = KEY;
        neighbour.0[0] = 8;
        let limits = [limit(1, 60, 1)];
        assert_eq!(take(&cells, &names(), KEY, &limits, NOW), Ok(()));
        assert_eq!(take(&cells, &names(), neighbour, &limits, NOW), Ok(()));
        assert!(take(&cells, &names(), KEY, &limits, NOW).is_err());
        assert!(take(&cells, &names(), neighbour, &limits, NOW).is_err());
        assert_eq!(cells.names().len(), 1);
    }

    #[test]
    fn a_cell_forgets_the_keys_that_have_rested() {
        let cells = MemoryCells::default();
        let limits = [limit(1, 1, 1)];
        for number in 0..100 {
            let mut key = KEY;
            key.0[0] = number;
            assert_eq!(take(&cells, &names(), key, &limits, NOW), Ok(()));
        }
        assert_eq!(take(&cells, &names(), KEY, &limits, NOW + 5 * SECOND_NS), Ok(()));
        let cell = cells.get(&names().limiter(0x0707)).unwrap();
        assert_eq!(cell.value.len(), TIME_BYTES);
    }

    #[test]
    fn two_workers_that_meet_take_two_tokens() {
        let cells = MemoryCells::default();
        let limits = [limit(1, 60, 1)];
        let other = limits.clone();
        cells.before_next_put(move |cells| assert_eq!(take(cells, &names(), KEY, &other, NOW), Ok(())));
        assert!(take(&cells, &names(), KEY, &limits, NOW).is_err());
    }

    #[test]
    fn a_clock_that_steps_back_costs_a_burst_at_the_most() {
        let cells = MemoryCells::default();
        let limits = [limit(10, 1, 5)];
        assert_eq!(admitted(&cells, &limits, [NOW; 10]), 5);
        let back = NOW - 3_600 * SECOND_NS;
        assert_eq!(admitted(&cells, &limits, [back; 10]), 0);
        assert_eq!(admitted(&cells, &limits, [back + SECOND_NS; 10]), 5);
    }

    #[test]
    fn a_limit_of_nothing_admits_one_burst_a_window() {
        let cells = MemoryCells::default();
        assert_eq!(admitted(&cells, &[limit(0, 1, 0)], [NOW; 3]), 1);
    }
}
