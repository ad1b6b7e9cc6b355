//! Which VM speaks with the control plane and writes the store: the one that holds the lease, a cell with its holder and
//! its end. The holder renews it on every tick; whoever finds it ended takes it.
//!
//! A holder that was held up may still believe in its lease. That is why each of its writes to the store first checks
//! for its [`lead`] and then insists on the version of the cell that it read before the check: whoever takes the lease
//! writes it before anything else, so the late holder either sees that or loses the race for the cell. It loses it only if
//! the cell is written, so whoever leads after a lease was taken writes cells also where nothing changes.
//!
//! ```text
//! lease: holder (8 bytes) │ its end in milliseconds of Unix time (8 bytes) │ 1 if it was ever taken    little-endian
//! ```

use crate::cells::{Cells, Names};

/// How long a lease lasts unless it is renewed.
pub const LEASE_MS: u64 = 3_000;

/// A VM, by a random number that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder(pub u64);

const NOBODY: Holder = Holder(0);

/// Who else may be about to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lead {
    /// Nobody: no lease was ever taken from a VM in this process.
    Alone,
    /// A VM whose lease ended before it gave it back. Nobody knows when it goes on, so this lasts as long as the process.
    Taken,
}

/// Takes or renews the lease if it is free, ended or ours. Returns whether we hold it now.
pub fn hold(cells: &impl Cells, names: &Names, me: Holder, now_ms: u64) -> bool {
    let cell = cells.get(&names.lease());
    let seen = cell.as_ref().map(|cell| cell.version);
    let lease = cell.and_then(|cell| read(&cell.value));
    let others = lease.filter(|(holder, ..)| *holder != me && *holder != NOBODY);
    if others.is_some_and(|(_, end_ms, _)| is_running(end_ms, now_ms)) {
        return false;
    }
    let lead = if others.is_some() { Lead::Taken } else { lease.map_or(Lead::Alone, |(.., lead)| lead) };
    cells.put(&names.lease(), &write(me, now_ms.saturating_add(LEASE_MS), lead), seen).is_ok()
}

/// How `me` leads, unless the lease was taken from it; whatever the time is.
pub fn lead(cells: &impl Cells, names: &Names, me: Holder) -> Option<Lead> {
    let (holder, _, lead) = cells.get(&names.lease()).and_then(|cell| read(&cell.value))?;
    (holder == me).then_some(lead)
}

/// Gives the lease back, if it is ours, so that the next VM need not wait for its end.
pub fn release(cells: &impl Cells, names: &Names, me: Holder) {
    let Some(cell) = cells.get(&names.lease()) else { return };
    if let Some((holder, _, lead)) = read(&cell.value)
        && holder == me
    {
        // Whoever came in between holds the lease now, and that is as good.
        let _ = cells.put(&names.lease(), &write(NOBODY, 0, lead), Some(cell.version));
    }
}

/// An end further away than a whole lease was written before the clock stepped back: it does not count.
const fn is_running(end_ms: u64, now_ms: u64) -> bool {
    end_ms > now_ms && end_ms.saturating_sub(now_ms) <= LEASE_MS
}

fn write(holder: Holder, end_ms: u64, lead: Lead) -> Vec<u8> {
    let taken = [u8::from(lead == Lead::Taken)];
    holder.0.to_le_bytes().into_iter().chain(end_ms.to_le_bytes()).chain(taken).collect()
}

fn read(bytes: &[u8]) -> Option<(Holder, u64, Lead)> {
    let (holder, rest) = bytes.split_first_chunk::<8>()?;
    let (end_ms, rest) = rest.split_first_chunk::<8>()?;
    let lead = if rest == [0] { Lead::Alone } else { Lead::Taken };
    Some((Holder(u64::from_le_bytes(*holder)), u64::from_le_bytes(*end_ms), lead))
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
        assert_eq!((lead(&cells, &names(), A), lead(&cells, &names(), B)), (None, Some(Lead::Taken)));
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
        assert_eq!(lead(&cells, &names(), A), Some(Lead::Alone));
        release(&cells, &names(), A);
        assert!(hold(&cells, &names(), B, 1));
        assert_eq!(lead(&cells, &names(), B), Some(Lead::Alone));
    }

    #[test]
    fn whoever_leads_after_a_lease_was_taken_knows_it() {
        let cells = MemoryCells::default();
        assert!(hold(&cells, &names(), A, 0) && hold(&cells, &names(), B, LEASE_MS));
        assert!(hold(&cells, &names(), B, LEASE_MS + 1));
        release(&cells, &names(), B);
        assert!(hold(&cells, &names(), Holder(3), LEASE_MS + 2));
        assert_eq!(lead(&cells, &names(), Holder(3)), Some(Lead::Taken));
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
