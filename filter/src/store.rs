//! The key store: one copy per Envoy process, in 65,536 buckets of shared data. Pages come in from the leader, records go
//! out to every request.
//!
//! ```text
//! bucket: hash from its third byte on (30 bytes) │ length (2 bytes, little-endian) │ record      repeated
//! ```
//! Each bucket is written in one piece, so a reader sees either all of a change to a key or nothing of it. Each write
//! insists on the version that was read before the lease was checked, so that a leader that was held up for longer than
//! its lease cannot put old records over new ones (see [`crate::lease`]). One look at the lease serves several buckets,
//! all of which were read before it.

use contract::hash::{BUCKETS, KeyHash, SUFFIX_BYTES};
use contract::id::Epoch;
use contract::page::{Entry, Page, Part};
use contract::rate::WHOLE;
use contract::record::Record;
use serde::{Deserialize, Serialize};

use crate::cells::{Cell, Cells, Names};
use crate::definitions;
use crate::lease::{Holder, Lead, lead};
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
/// A snapshot leaves buckets alone that are as they should be. Not so if the lease was taken from a VM that may still be about
/// to write one of them: it is written all the same, so that the other loses the race for it.
///
/// # Errors
/// [`Deposed`]: some of the page may be written, and whoever leads now will write it all.
pub fn apply(cells: &impl Cells, names: &Names, me: Holder, page: &Page<'_>) -> Result<(), Deposed> {
    definitions::apply(cells, names, me, page)?;
    let mut entries: Vec<(u16, Entry<'_>)> = page
        .entries()
        .filter_map(|entry| match entry {
            Entry::Put { hash, .. } | Entry::Remove { hash } => Some((hash.bucket(), entry)),
            Entry::Define { .. } | Entry::Undefine { .. } | Entry::Newer => None,
        })
        .collect();
    // A later word on a key stays behind an earlier one. A snapshot comes in this order.
    entries.sort_by_key(|(bucket, _)| *bucket);
    let of = |bucket: u16| {
        let start = entries.partition_point(|(other, _)| *other < bucket);
        let end = entries.partition_point(|(other, _)| *other <= bucket);
        entries.get(start..end).unwrap_or_default()
    };
    match page.header.part {
        Part::Changes { .. } => {
            let mut buckets: Vec<u16> = entries.iter().map(|(bucket, _)| *bucket).collect();
            buckets.dedup();
            write_buckets(cells, names, me, &buckets, &|bucket, old, _| Some(merged(old, of(bucket))))
        }
        Part::Snapshot { from, to } => {
            let buckets: Vec<u16> = (from..to.min(BUCKETS)).filter_map(|bucket| u16::try_from(bucket).ok()).collect();
            write_buckets(cells, names, me, &buckets, &|bucket, old, lead| {
                let new = merged(&[], of(bucket));
                (lead == Lead::Taken || old != new).then_some(new)
            })
        }
    }
}

/// Buckets that are written after one look at the lease.
const AT_ONCE: usize = 64;

/// What becomes of a bucket, by what it holds and who else may write it; `None` leaves it alone.
type Change<'a> = &'a dyn Fn(u16, &[u8], Lead) -> Option<Vec<u8>>;

/// Reads some buckets, checks the lease, writes what `change` makes of each, or nothing where it makes nothing of it; then
/// the next.
fn write_buckets(
    cells: &impl Cells,
    names: &Names,
    me: Holder,
    buckets: &[u16],
    change: Change<'_>,
) -> Result<(), Deposed> {
    for some in buckets.chunks(AT_ONCE) {
        let found: Vec<_> = some
            .iter()
            .map(|bucket| {
                let name = names.bucket(*bucket);
                let (old, seen) = read(cells, &name);
                (*bucket, name, old, seen)
            })
            .collect();
        let lead = lead(cells, names, me).ok_or(Deposed)?;
        for (bucket, name, old, seen) in found {
            let Some(new) = change(bucket, &old, lead) else { continue };
            if cells.put(&name, &new, seen).is_err() {
                write(cells, names, me, &name, &|old| change(bucket, old, Lead::Taken))?;
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
        let (old, seen) = read(cells, name);
        let Some(new) = change(&old) else { return Ok(()) };
        lead(cells, names, me).ok_or(Deposed)?;
        // Only leaders write these cells: whoever came in between led a moment ago or leads now. Look again.
        if cells.put(name, &new, seen) == Ok(()) {
            return Ok(());
        }
    }
}

/// A cell's bytes, none if it was never written, and its version.
fn read(cells: &impl Cells, name: &str) -> (Vec<u8>, Option<u32>) {
    cells.get(name).map_or((Vec::new(), None), |Cell { value, version }| (value, Some(version)))
}

fn merged(old: &[u8], entries: &[(u16, Entry<'_>)]) -> Vec<u8> {
    let mut new = Vec::with_capacity(old.len().saturating_add(entries.len().saturating_mul(80)));
    let names = |suffix: &[u8; SUFFIX_BYTES]| {
        entries.iter().any(
            |(_, entry)| matches!(entry, Entry::Put { hash, .. } | Entry::Remove { hash } if hash.suffix() == suffix),
        )
    };
    for (suffix, record) in Bucket(old).filter(|(suffix, _)| !names(suffix)) {
        push(&mut new, suffix, record);
    }
    for (place, (_, entry)) in entries.iter().enumerate() {
        let Entry::Put { hash, record } = entry else { continue };
        // The last word on a key counts, should a page ever name one twice.
        let superseded = entries.iter().skip(place.saturating_add(1)).any(
            |(_, later)| matches!(later, Entry::Put { hash: other, .. } | Entry::Remove { hash: other } if other == hash),
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
    use contract::page::{Header, PageWriter};
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
        cells.before_put_of(&names().bucket(5), move |cells| {
            assert!(hold(cells, &names(), Holder(2), LEASE_MS));
            apply(cells, &names(), Holder(2), &Page::read(&newer).unwrap()).unwrap();
        });
        assert_eq!(apply_bytes(&cells, &page(CHANGES, &[(key, record(1))], &[])), Err(Deposed));
        assert_eq!(find(&cells, &names(), &key), Some(revoked));
    }

    #[test]
    fn a_leader_that_is_deposed_during_its_write_cannot_bring_back_what_a_snapshot_leaves_out() {
        let cells = leading();
        let gone = hash(5, 1);
        // Another VM takes the lease between the late leader's check and its write. As it sees the store, the key is gone, and
        // its bucket is as empty as it was before.
        let newer = page(Part::Snapshot { from: 0, to: 20 }, &[], &[]);
        cells.before_put_of(&names().bucket(5), move |cells| {
            assert!(hold(cells, &names(), Holder(2), LEASE_MS));
            apply(cells, &names(), Holder(2), &Page::read(&newer).unwrap()).unwrap();
        });
        let older = page(Part::Snapshot { from: 0, to: 20 }, &[(gone, record(1))], &[]);
        assert_eq!(apply_bytes(&cells, &older), Err(Deposed));
        assert_eq!(find(&cells, &names(), &gone), None);
    }

    #[test]
    fn one_look_at_the_lease_serves_many_buckets() {
        let cells = leading();
        let keys: Vec<(KeyHash, Record)> = (0..AT_ONCE as u16 * 2).map(|bucket| (hash(bucket, 1), record(1))).collect();
        let bytes = page(CHANGES, &keys, &[]);
        let before = cells.reads.get();
        apply_bytes(&cells, &bytes).unwrap();
        assert_eq!(cells.reads.get() - before, keys.len() as u32 + 2);
        assert!(keys.iter().all(|(key, known)| find(&cells, &names(), key).as_ref() == Some(known)));
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
