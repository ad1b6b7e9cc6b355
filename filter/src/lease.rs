//! Which VM speaks with the control plane and writes the store: the one that holds the lease, a cell with its holder and
//! its end. The holder renews it on every tick; whoever finds it ended takes it.
//!
//! A holder that was held up may still believe in its lease. That is why each of its writes to the store first checks
//! [`is_held_by`] and then insists on the version of the cell that it read before the check: whoever takes the lease
//! writes it before anything else, so the late holder either sees that or loses the race for the cell.

use crate::cells::{Cells, Names};

/// How long a lease lasts unless it is renewed.
pub const LEASE_MS: u64 = 3_000;

/// A VM, by a random number that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder(pub u64);

const NOBODY: Holder = Holder(0);

/// Takes or renews the lease if it is free, ended or ours. Returns whether we hold it now.
pub fn hold(cells: &impl Cells, names: &Names, me: Holder, now_ms: u64) -> bool {
    let cell = cells.get(&names.lease());
    let seen = cell.as_ref().map(|cell| cell.version);
    let lease = cell.and_then(|cell| read(&cell.value));
    if lease.is_some_and(|(holder, end_ms)| holder != me && holder != NOBODY && is_running(end_ms, now_ms)) {
        return false;
    }
    cells.put(&names.lease(), &write(me, now_ms.saturating_add(LEASE_MS)), seen).is_ok()
}

/// Whether nobody has taken the lease from `me`, whatever the time is.
pub fn is_held_by(cells: &impl Cells, names: &Names, me: Holder) -> bool {
    cells.get(&names.lease()).and_then(|cell| read(&cell.value)).is_some_and(|(holder, _)| holder == me)
}

/// Gives the lease back, if it is ours, so that the next VM need not wait for its end.
pub fn release(cells: &impl Cells, names: &Names, me: Holder) {
    let Some(cell) = cells.get(&names.lease()) else { return };
    if read(&cell.value).is_some_and(|(holder, _)| holder == me) {
        // Whoever came in between holds the lease now, and that is as good.
        let _ = cells.put(&names.lease(), &write(NOBODY, 0), Some(cell.version));
    }
}

/// An end further away than a whole lease was written before the clock stepped back: it does not count.
const fn is_running(end_ms: u64, now_ms: u64) -> bool {
    end_ms > now_ms && end_ms.saturating_sub(now_ms) <= LEASE_MS
}

fn write(holder: Holder, end_ms: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(holder.0.to_le_bytes().into_iter().chain(end_ms.to_le_bytes())) {
        *to = from;
    }
    bytes
}

fn read(bytes: &[u8]) -> Option<(Holder, u64)> {
    let (holder, rest) = bytes.split_first_chunk::<8>()?;
    let (end_ms, _) = rest.split_first_chunk::<8>()?;
    Some((Holder(u64::from_le_bytes(*holder)), u64::from_le_bytes(*end_ms)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cells::memory::MemoryCells;

    const A: Holder = Holder(1);
    const B: Holder = Holder(2);

    fn names() -> Names {
        Names::of("cluster", "default")
    }

    #[test]
    fn the_first_to_ask_holds_the_lease_until_it_ends() {
        let cells = MemoryCells::default();
        assert!(hold(&cells, &names(), A, 1_000));
        assert!(!hold(&cells, &names(), B, 1_000 + LEASE_MS - 1));
        assert!(hold(&cells, &names(), B, 1_000 + LEASE_MS));
        assert!(!hold(&cells, &names(), A, 1_000 + LEASE_MS));
        assert!(is_held_by(&cells, &names(), B) && !is_held_by(&cells, &names(), A));
    }

    #[test]
    fn a_renewed_lease_does_not_end() {
        let cells = MemoryCells::default();
        for now in (0..10_000).step_by(250) {
            assert!(hold(&cells, &names(), A, now));
            assert!(!hold(&cells, &names(), B, now + 100));
        }
    }

    #[test]
    fn a_released_lease_is_free_at_once_and_only_its_holder_releases_it() {
        let cells = MemoryCells::default();
        assert!(hold(&cells, &names(), A, 0));
        release(&cells, &names(), B);
        assert!(is_held_by(&cells, &names(), A));
        release(&cells, &names(), A);
        assert!(hold(&cells, &names(), B, 1));
    }

    #[test]
    fn a_clock_that_steps_back_does_not_leave_everybody_waiting() {
        let cells = MemoryCells::default();
        assert!(hold(&cells, &names(), A, 1_000_000));
        assert!(hold(&cells, &names(), B, 500_000));
    }

    #[test]
    fn of_two_that_find_it_ended_one_gets_it() {
        let cells = MemoryCells::default();
        assert!(hold(&cells, &names(), A, 0));
        cells.before_next_put(|cells| assert!(hold(cells, &names(), Holder(3), LEASE_MS)));
        assert!(!hold(&cells, &names(), B, LEASE_MS));
    }
}
