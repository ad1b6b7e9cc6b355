//! The counts of one VM, and the cells that it publishes them to.

use std::collections::HashMap;

use contract::outcome::Outcome;
use contract::usage::{Count, KeyRef, SHADOW, Subject};
use rustc_hash::FxBuildHasher;

use super::codec;
use crate::shared::{CellKey, Cells, SharedData};
use crate::time::MS_PER_HOUR;

/// Cells that VMs publish to. VMs take them in turn; more VMs than cells share them.
pub const SLOTS: u16 = 64;

/// Requests that one VM counted since it last published.
#[derive(Debug, Default)]
pub struct Counts {
    pub(super) counts: BySubject,
}

/// Counts by subject, in no order. The control plane draws the ids of keys at random, so clients cannot make them collide, and a
/// fast hash is enough.
pub(super) type BySubject = HashMap<Subject, Count, FxBuildHasher>;

impl Counts {
    /// Counts one decided request. `shadowed`: it should have been refused and was not; `cost`: the credits of the key's owner
    /// that it costs if it is allowed.
    pub fn add(&mut self, key: Option<KeyRef>, outcome: Outcome, shadowed: bool, cost: u32, now_ms: u64) {
        let hour = u32::try_from(now_ms / MS_PER_HOUR).unwrap_or(u32::MAX);
        let code = outcome.code() | if shadowed { SHADOW } else { 0 };
        let of = Subject { key, outcome: code, hour };
        let cost = if outcome == Outcome::Allowed { cost.into() } else { 0 };
        let one = Count { of, requests: 1, cost, last_ms: now_ms };
        self.counts.entry(of).and_modify(|count| count.add(&one)).or_insert(one);
    }

    /// Moves all counts into the usage cell of a slot. If the cell cannot be written, they stay for the next time.
    pub fn publish(&mut self, data: &SharedData<impl Cells>, slot: u16) {
        if self.counts.is_empty() {
            return;
        }
        let published = data.update(CellKey::Usage(slot), |old| {
            if old.is_empty() {
                // The usual case: the leader has collected the previous counts.
                return Ok::<_, ()>((codec::write_counts(self.counts.values()), ()));
            }
            let mut sums = BySubject::default();
            add_to(&mut sums, &codec::read_counts(old));
            add_to(&mut sums, self.counts.values());
            Ok((codec::write_counts(sums.values()), ()))
        });
        if published == Ok(()) {
            self.counts.clear();
        }
    }
}

/// Takes the next usage slot for a VM that starts.
pub fn take_slot(data: &SharedData<impl Cells>) -> u16 {
    let slot = data.update(CellKey::UsageSlots, |cell| {
        let slot = cell.first_chunk::<2>().map_or(0, |bytes| u16::from_le_bytes(*bytes));
        let next = slot.saturating_add(1) % SLOTS;
        Ok::<_, u16>((next.to_le_bytes().to_vec(), slot))
    });
    slot.unwrap_or_default()
}

/// Adds counts to sums.
pub(super) fn add_to<'a>(sums: &mut BySubject, counts: impl IntoIterator<Item = &'a Count>) {
    for count in counts {
        sums.entry(count.of).and_modify(|sum| sum.add(count)).or_insert(*count);
    }
}
