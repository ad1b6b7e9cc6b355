//! The key store: one copy per Envoy process, in 65,536 buckets of shared data. Pages come in from the leader, records go
//! out to every request.
//!
//! ```text
//! bucket: hash from its third byte on (30 bytes) │ length (2 bytes, little-endian) │ record      repeated
//! ```
//! Each bucket is written in one piece, so a reader sees either all of a change to a key or nothing of it. Each write
//! insists on the version that was read before the lease was checked, so that a leader that was held up for longer than
//! its lease cannot put old records over new ones (see [`crate::lease`]).

use std::collections::HashMap;

use contract::hash::{BUCKETS, KeyHash, SUFFIX_BYTES};
use contract::id::Epoch;
use contract::page::{Entry, Header, Page, Part};
use contract::rate::WHOLE;
use contract::record::Record;
use serde::{Deserialize, Serialize};

use crate::cells::{Cell, Cells, Names};
use crate::definitions;
use crate::lease::{Holder, is_held_by};
use crate::recent::Writes;

/// How far the store is. Kept in a cell of its own, written after the buckets: what it says is there, is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The life of the database that the store mirrors.
    pub epoch: Epoch,
    /// Every change up to this revision is in the buckets.
    pub revision: u64,
    /// Keys in the store, as the control plane counts them.
    pub keys: u64,
    /// When the control plane last confirmed that this is the newest, in milliseconds of Unix time.
    pub synced_ms: u64,
    /// How many Envoys sync, as the control plane counts them; 0 if it does not say.
    pub filters: u32,
}

impl State {
    /// What an Envoy judges of a shared limit of which it was granted nothing yet, in parts per million.
    #[must_use]
    pub fn default_share(&self) -> u32 {
        WHOLE.checked_div(self.filters).unwrap_or(WHOLE).max(1)
    }
}

/// Another VM has taken the lease: this one must stop writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another VM leads now")]
pub struct Deposed;

/// Looks a key up. `None`: no such key, or nothing loaded yet; [`state`] tells which.
pub fn find(cells: &impl Cells, names: &Names, hash: &KeyHash) -> Option<Record> {
    let bucket = cells.get(&names.bucket(hash.bucket()))?.value;
    let record = Bucket(&bucket).find(|(suffix, _)| *suffix == hash.suffix()).map(|(_, record)| record)?;
    // Only pages that were checked get into buckets, so a record that does not decode is not to be expected.
    Record::from_bytes(record).ok()
}

/// How far the store is; `None` until it was loaded for the first time.
pub fn state(cells: &impl Cells, names: &Names) -> Option<State> {
    postcard::from_bytes(&cells.get(&names.state())?.value).ok()
}

/// Notes how far the store is.
///
/// # Errors
/// [`Deposed`].
pub fn set_state(cells: &impl Cells, names: &Names, me: Holder, state: &State) -> Result<(), Deposed> {
    let bytes = postcard::to_allocvec(state).unwrap_or_default();
    write(cells, names, me, &names.state(), &|_| Some(bytes.clone())).map(|_| ())
}

/// Writes what a page says: definitions first, so that no record refers to one that is not there, then the buckets.
///
/// # Errors
/// [`Deposed`]: some of the page may be written, and whoever leads now will write it all.
pub fn apply(cells: &impl Cells, names: &Names, me: Holder, page: &Page<'_>) -> Result<(), Deposed> {
    definitions::apply(cells, names, me, page)?;
    let mut changed: HashMap<u16, Vec<Entry<'_>>> = HashMap::new();
    for entry in page.entries() {
        let (Entry::Put { hash, .. } | Entry::Remove { hash }) = entry else { continue };
        changed.entry(hash.bucket()).or_default().push(entry);
    }
    match page.header {
        Header { part: Part::Changes { .. }, .. } => {
            for (bucket, entries) in changed {
                write(cells, names, me, &names.bucket(bucket), &|old| Some(merged(old, &entries)))?;
            }
        }
        Header { part: Part::Snapshot { from, to }, .. } => {
            for bucket in (from..to.min(BUCKETS)).filter_map(|bucket| u16::try_from(bucket).ok()) {
                let entries = changed.remove(&bucket).unwrap_or_default();
                let new = merged(&[], &entries);
                write(cells, names, me, &names.bucket(bucket), &|old| (old != new).then(|| new.clone()))?;
            }
        }
    }
    Ok(())
}

/// The same, after which the number of `writes` is raised: whoever reads it from now on and remembers what it found before
/// looks again. A page counts as applied when this returns, and not before.
///
/// # Errors
/// [`Deposed`], as [`apply`]. What was written by then is seen all the same.
pub fn publish(
    cells: &impl Cells,
    names: &Names,
    me: Holder,
    page: &Page<'_>,
    writes: &impl Writes,
) -> Result<(), Deposed> {
    let applied = apply(cells, names, me, page);
    writes.raise();
    applied
}

/// Reads a cell, checks the lease, writes what `change` makes of the cell, or nothing if it makes nothing of it.
pub(crate) fn write(
    cells: &impl Cells,
    names: &Names,
    me: Holder,
    name: &str,
    change: &dyn Fn(&[u8]) -> Option<Vec<u8>>,
) -> Result<(), Deposed> {
    loop {
        let cell = cells.get(name);
        let (old, seen) = cell.map_or((Vec::new(), None), |Cell { value, version }| (value, Some(version)));
        let Some(new) = change(&old) else { return Ok(()) };
        if !is_held_by(cells, names, me) {
            return Err(Deposed);
        }
        // Only leaders write these cells: whoever came in between led a moment ago or leads now. Look again.
        if cells.put(name, &new, seen) == Ok(()) {
            return Ok(());
        }
    }
}

fn merged(old: &[u8], entries: &[Entry<'_>]) -> Vec<u8> {
    let mut new = Vec::with_capacity(old.len().saturating_add(entries.len().saturating_mul(80)));
    let names = |suffix: &[u8; SUFFIX_BYTES]| {
        entries
            .iter()
            .any(|entry| matches!(entry, Entry::Put { hash, .. } | Entry::Remove { hash } if hash.suffix() == suffix))
    };
    for (suffix, record) in Bucket(old).filter(|(suffix, _)| !names(suffix)) {
        push(&mut new, suffix, record);
    }
    for (place, entry) in entries.iter().enumerate() {
        let Entry::Put { hash, record } = entry else { continue };
        // The last word on a key counts, should a page ever name one twice.
        let superseded = entries.iter().skip(place.saturating_add(1)).any(
            |later| matches!(later, Entry::Put { hash: other, .. } | Entry::Remove { hash: other } if other == hash),
        );
        if !superseded {
            push(&mut new, hash.suffix(), record);
        }
    }
    new
}

fn push(bucket: &mut Vec<u8>, suffix: &[u8; SUFFIX_BYTES], record: &[u8]) {
    // The control plane bounds scopes and limits of a key; a record that is longer all the same is left out, which
    // refuses the key.
    let Ok(length) = u16::try_from(record.len()) else { return };
    bucket.extend_from_slice(suffix);
    bucket.extend_from_slice(&length.to_le_bytes());
    bucket.extend_from_slice(record);
}

/// The records of a bucket.
struct Bucket<'a>(&'a [u8]);

impl<'a> Iterator for Bucket<'a> {
    type Item = (&'a [u8; SUFFIX_BYTES], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (suffix, rest) = self.0.split_first_chunk::<SUFFIX_BYTES>()?;
        let (length, rest) = rest.split_first_chunk::<2>()?;
        let (record, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
        self.0 = rest;
        Some((suffix, record))
    }
}

#[cfg(test)]
mod tests {
    use contract::id::{KeyId, OwnerId};
    use contract::page::PageWriter;
    use contract::record::Flags;

    use super::*;
    use crate::cells::memory::MemoryCells;
    use crate::lease::{LEASE_MS, hold};

    const ME: Holder = Holder(1);
    const EPOCH: Epoch = Epoch([9; 16]);

    fn names() -> Names {
        Names::of("cluster", "default")
    }

    fn leading() -> MemoryCells {
        let cells = MemoryCells::default();
        assert!(hold(&cells, &names(), ME, 0));
        cells
    }

    fn hash(bucket: u16, tail: u8) -> KeyHash {
        let mut bytes = [tail; 32];
        bytes[..2].copy_from_slice(&bucket.to_be_bytes());
        KeyHash(bytes)
    }

    fn record(number: u8) -> Record {
        Record::plain(KeyId([number; 16]), OwnerId([0; 16]))
    }

    fn page(part: Part, puts: &[(KeyHash, Record)], removals: &[KeyHash]) -> Vec<u8> {
        let mut writer = PageWriter::new();
        for (hash, record) in puts {
            writer.put(hash, &record.to_bytes().unwrap());
        }
        for hash in removals {
            writer.remove(hash);
        }
        writer.finish(&Header { epoch: EPOCH, revision: 1, total_keys: 1, part, filters: 0 }).unwrap()
    }

    fn apply_bytes(cells: &MemoryCells, bytes: &[u8]) -> Result<(), Deposed> {
        apply(cells, &names(), ME, &Page::read(bytes).unwrap())
    }

    const CHANGES: Part = Part::Changes { after: 0 };

    #[test]
    fn keys_of_one_bucket_are_told_apart_changed_and_removed() {
        let cells = leading();
        let (a, b, c) = (hash(5, 1), hash(5, 2), hash(5, 3));
        apply_bytes(&cells, &page(CHANGES, &[(a, record(1)), (b, record(2))], &[])).unwrap();
        assert_eq!(find(&cells, &names(), &a), Some(record(1)));
        assert_eq!(find(&cells, &names(), &b), Some(record(2)));
        assert_eq!(find(&cells, &names(), &c), None);

        let mut revoked = record(1);
        revoked.flags = Flags::REVOKED;
        apply_bytes(&cells, &page(CHANGES, &[(a, revoked.clone()), (c, record(3))], &[b])).unwrap();
        assert_eq!(find(&cells, &names(), &a), Some(revoked));
        assert_eq!(find(&cells, &names(), &b), None);
        assert_eq!(find(&cells, &names(), &c), Some(record(3)));
    }

    #[test]
    fn a_snapshot_replaces_its_buckets_and_no_others() {
        let cells = leading();
        let (inside, outside, new) = (hash(10, 1), hash(20, 1), hash(10, 2));
        apply_bytes(&cells, &page(CHANGES, &[(inside, record(1)), (outside, record(2))], &[])).unwrap();
        apply_bytes(&cells, &page(Part::Snapshot { from: 0, to: 20 }, &[(new, record(3))], &[])).unwrap();
        assert_eq!(find(&cells, &names(), &inside), None);
        assert_eq!(find(&cells, &names(), &new), Some(record(3)));
        assert_eq!(find(&cells, &names(), &outside), Some(record(2)));
    }

    #[test]
    fn a_snapshot_leaves_empty_buckets_unwritten_and_equal_ones_alone() {
        let cells = leading();
        let bytes = page(Part::Snapshot { from: 0, to: BUCKETS }, &[(hash(0xffff, 1), record(1))], &[]);
        // The definitions and their version are written each time, so the buckets are told by their names.
        let before = cells.writes.get();
        apply_bytes(&cells, &bytes).unwrap();
        assert_eq!(cells.writes.get() - before, 3);
        apply_bytes(&cells, &bytes).unwrap();
        assert_eq!(cells.writes.get() - before, 5);
        assert_eq!(cells.names().iter().filter(|name| name.contains(":b")).count(), 1);
    }

    #[test]
    fn a_leader_that_was_deposed_before_its_write_writes_nothing() {
        let cells = leading();
        let (key, mut revoked) = (hash(5, 1), record(1));
        revoked.flags = Flags::REVOKED;
        assert!(hold(&cells, &names(), Holder(2), LEASE_MS));
        assert_eq!(apply_bytes(&cells, &page(CHANGES, &[(key, record(1))], &[])), Err(Deposed));
        assert_eq!(find(&cells, &names(), &key), None);
    }

    #[test]
    fn a_leader_that_is_deposed_during_its_write_cannot_undo_a_revocation() {
        let cells = leading();
        let (key, mut revoked) = (hash(5, 1), record(1));
        revoked.flags = Flags::REVOKED;
        let newer = page(CHANGES, &[(key, revoked.clone())], &[]);
        // Between the late leader's check of its lease and its write, another VM takes the lease and revokes the key.
        cells.before_next_put(move |cells| {
            assert!(hold(cells, &names(), Holder(2), LEASE_MS));
            apply(cells, &names(), Holder(2), &Page::read(&newer).unwrap()).unwrap();
        });
        assert_eq!(apply_bytes(&cells, &page(CHANGES, &[(key, record(1))], &[])), Err(Deposed));
        assert_eq!(find(&cells, &names(), &key), Some(revoked));
    }

    #[test]
    fn the_state_is_there_once_it_was_set() {
        let cells = leading();
        assert_eq!(state(&cells, &names()), None);
        let full = State { epoch: EPOCH, revision: 7, keys: 3, synced_ms: 1_000, filters: 3 };
        set_state(&cells, &names(), ME, &full).unwrap();
        assert_eq!(state(&cells, &names()), Some(full));
        assert_eq!(set_state(&cells, &names(), Holder(2), &full), Err(Deposed));
    }

    #[test]
    fn an_envoy_that_was_granted_nothing_judges_its_part_of_all_envoys() {
        let share = |filters| State { epoch: EPOCH, revision: 7, keys: 3, synced_ms: 0, filters }.default_share();
        assert_eq!([0, 1, 3, 5_000_000].map(share), [WHOLE, WHOLE, 333_333, 1]);
    }

    #[test]
    fn a_bucket_that_is_cut_short_ends_there() {
        let mut bucket = Vec::new();
        push(&mut bucket, &[1; SUFFIX_BYTES], &[1, 2, 3]);
        for length in 0..bucket.len() {
            assert_eq!(Bucket(&bucket[..length]).count(), 0);
        }
        assert_eq!(Bucket(&bucket).count(), 1);
    }
}
