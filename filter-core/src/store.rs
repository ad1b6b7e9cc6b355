//! The key store: one copy per Envoy process, in 32,768 cells of shared data, each with two of the 65,536 buckets. Pages come
//! in from the leader, records go out to every request.
//!
//! ```text
//! cell: hash from its second byte on (31 bytes) │ length (2 bytes, little-endian) │ record      repeated
//! ```
//! Each cell is written in one piece, so a reader sees either all of a change to a key or nothing of it. Each write
//! insists on the version that was read before the lease was checked, so that a leader that was held up for longer than
//! its lease cannot put old records over new ones (see [`crate::lease`]). One look at the lease serves several cells,
//! all of which were read before it.
//!
//! Envoy keeps cells in a hash table that doubles when it is full, with its 25,718th cell and again with its 51,438th, and holds
//! up all VMs and the leader's thread until each cell has its new place. With a bucket in each cell, the store alone would
//! come to the second, which takes twice as long; so do limits and stocks of some 20,000 keys, whose cells lie there too.

use contract::hash::{BUCKETS, KeyHash};
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

/// Buckets whose records share a cell.
const BUCKETS_OF_A_CELL: u16 = 2;

/// Bytes of a hash that tell a key from the others of its cell.
const SUFFIX_BYTES: usize = 31;
type Suffix = [u8; SUFFIX_BYTES];

const fn cell_of(bucket: u16) -> u16 {
    bucket / BUCKETS_OF_A_CELL
}

const fn suffix(hash: &KeyHash) -> &Suffix {
    let [_, suffix @ ..] = &hash.0;
    suffix
}

/// The bucket of a record of a cell: the first 16 bits of its hash.
const fn bucket_of(cell: u16, suffix: &Suffix) -> u16 {
    let [first, _] = cell.wrapping_mul(BUCKETS_OF_A_CELL).to_be_bytes();
    let [second, ..] = *suffix;
    u16::from_be_bytes([first, second])
}

/// Looks a key up. `None`: no such key, or nothing loaded yet; [`state`] tells which.
pub fn find(cells: &impl Cells, names: &Names, hash: &KeyHash) -> Option<Record> {
    let cell = cells.get(&names.records(cell_of(hash.bucket())))?.value;
    let record = Records(&cell).find(|(of, _)| *of == suffix(hash)).map(|(_, record)| record)?;
    // Only pages that were checked get into cells, so a record that does not decode is not to be expected.
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

/// Writes what a page says: definitions first, so that no record refers to one that is not there, then the records.
///
/// A snapshot leaves cells alone that are as they should be. Not so if the lease was taken from a VM that may still be about
/// to write one of them: it is written all the same, so that the other loses the race for it.
///
/// # Errors
/// [`Deposed`]: some of the page may be written, and whoever leads now will write it all.
pub fn apply(cells: &impl Cells, names: &Names, me: Holder, page: &Page<'_>) -> Result<(), Deposed> {
    definitions::apply(cells, names, me, page)?;
    let mut entries: Vec<(u16, Entry<'_>)> = page
        .entries()
        .filter_map(|entry| match entry {
            Entry::Put { hash, .. } | Entry::Remove { hash } => Some((cell_of(hash.bucket()), entry)),
            Entry::Define { .. } | Entry::Undefine { .. } | Entry::Newer => None,
        })
        .collect();
    // A later word on a key stays behind an earlier one. A snapshot comes in this order.
    entries.sort_by_key(|(cell, _)| *cell);
    let of = |cell: u16| {
        let start = entries.partition_point(|(other, _)| *other < cell);
        let end = entries.partition_point(|(other, _)| *other <= cell);
        entries.get(start..end).unwrap_or_default()
    };
    match page.header.part {
        Part::Changes { .. } => {
            let mut changed: Vec<u16> = entries.iter().map(|(cell, _)| *cell).collect();
            changed.dedup();
            write_cells(cells, names, me, &changed, &|cell, old, _| Some(merged(old, of(cell), |_| false)))
        }
        Part::Snapshot { from, to } => {
            let buckets = (from..to.min(BUCKETS)).filter_map(|bucket| u16::try_from(bucket).ok());
            let mut whole: Vec<u16> = buckets.map(cell_of).collect();
            whole.dedup();
            write_cells(cells, names, me, &whole, &|cell, old, lead| {
                // The first and the last cell may have a bucket that is another page's.
                let is_ours = |of: &Suffix| (from..to).contains(&u32::from(bucket_of(cell, of)));
                let new = merged(old, of(cell), is_ours);
                (lead == Lead::Taken || old != new).then_some(new)
            })
        }
    }
}

/// Cells that are written after one look at the lease.
const AT_ONCE: usize = 64;

/// What becomes of a cell, by what it holds and who else may write it; `None` leaves it alone.
type Change<'a> = &'a dyn Fn(u16, &[u8], Lead) -> Option<Vec<u8>>;

/// Reads some cells, checks the lease, writes what `change` makes of each, or nothing where it makes nothing of it; then
/// the next.
fn write_cells(
    cells: &impl Cells,
    names: &Names,
    me: Holder,
    numbers: &[u16],
    change: Change<'_>,
) -> Result<(), Deposed> {
    for some in numbers.chunks(AT_ONCE) {
        let found: Vec<_> = some
            .iter()
            .map(|number| {
                let name = names.records(*number);
                let (old, seen) = read(cells, &name);
                (*number, name, old, seen)
            })
            .collect();
        let lead = lead(cells, names, me).ok_or(Deposed)?;
        for (number, name, old, seen) in found {
            let Some(new) = change(number, &old, lead) else { continue };
            if cells.put(&name, &new, seen).is_err() {
                write(cells, names, me, &name, &|old| change(number, old, Lead::Taken))?;
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

/// A cell after what a page says of it, in the order of hashes. Records that the page replaces are gone unless it has them.
fn merged<'a>(old: &'a [u8], entries: &'a [(u16, Entry<'a>)], is_replaced: impl Fn(&Suffix) -> bool) -> Vec<u8> {
    let mut records: Vec<(&Suffix, &[u8])> = Records(old).filter(|(of, _)| !is_replaced(of)).collect();
    for (_, entry) in entries {
        let (Entry::Put { hash, .. } | Entry::Remove { hash }) = entry else { continue };
        let place = records.binary_search_by_key(&suffix(hash), |(of, _)| *of);
        // The last word on a key counts, should a page ever name one twice.
        if let Ok(place) = place {
            records.remove(place);
        }
        if let Entry::Put { record, .. } = entry {
            records.insert(place.unwrap_or_else(|place| place), (suffix(hash), record));
        }
    }
    let mut new = Vec::with_capacity(old.len().saturating_add(entries.len().saturating_mul(80)));
    for (of, record) in records {
        push(&mut new, of, record);
    }
    new
}

fn push(cell: &mut Vec<u8>, suffix: &Suffix, record: &[u8]) {
    // The control plane bounds scopes and limits of a key; a record that is longer all the same is left out, which
    // refuses the key.
    let Ok(length) = u16::try_from(record.len()) else { return };
    cell.extend_from_slice(suffix);
    cell.extend_from_slice(&length.to_le_bytes());
    cell.extend_from_slice(record);
}

/// The records of a cell.
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = (&'a Suffix, &'a [u8]);

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
    fn a_snapshot_that_is_cut_between_two_buckets_of_a_cell_keeps_both() {
        let cells = leading();
        let all =
            [(hash(8, 1), record(1)), (hash(9, 1), record(2)), (hash(10, 1), record(3)), (hash(0xffff, 1), record(4))];
        let [first, second, third, last] = &all;
        let pages = [
            page(Part::Snapshot { from: 0, to: 9 }, std::slice::from_ref(first), &[]),
            page(Part::Snapshot { from: 9, to: 10 }, std::slice::from_ref(second), &[]),
            page(Part::Snapshot { from: 10, to: 11 }, std::slice::from_ref(third), &[]),
            page(Part::Snapshot { from: 11, to: BUCKETS }, std::slice::from_ref(last), &[]),
        ];
        for bytes in &pages {
            apply_bytes(&cells, bytes).unwrap();
        }
        let found = |(hash, _): &(KeyHash, Record)| find(&cells, &names(), hash);
        assert!(all.iter().all(|one| found(one).as_ref() == Some(&one.1)));

        // The same again, and in one page, writes the definitions and their version at each beginning, and no records.
        let whole = page(Part::Snapshot { from: 0, to: BUCKETS }, &all, &[]);
        let writes = pages.iter().chain([&whole]).map(|bytes| {
            let before = cells.writes.get();
            apply_bytes(&cells, bytes).unwrap();
            cells.writes.get() - before
        });
        assert_eq!(writes.collect::<Vec<_>>(), [2, 0, 0, 0, 2]);

        // Either bucket can be emptied without the other.
        apply_bytes(&cells, &page(Part::Snapshot { from: 0, to: 9 }, &[], &[])).unwrap();
        assert_eq!((found(first), found(second)), (None, Some(record(2))));
        apply_bytes(&cells, &page(Part::Snapshot { from: 9, to: 10 }, &[], &[])).unwrap();
        assert_eq!((found(first), found(second), found(third)), (None, None, Some(record(3))));
    }

    #[test]
    fn a_bucket_is_told_by_its_cell_and_what_the_cell_keeps_of_the_hash() {
        for bucket in [0, 1, 0x00ff, 0x0100, 0x7fff, 0x8000, 0xba78, 0xffff] {
            assert_eq!(bucket_of(cell_of(bucket), suffix(&hash(bucket, 3))), bucket);
        }
    }

    #[test]
    fn a_snapshot_leaves_empty_cells_unwritten_and_equal_ones_alone() {
        let cells = leading();
        let bytes = page(Part::Snapshot { from: 0, to: BUCKETS }, &[(hash(0xffff, 1), record(1))], &[]);
        // The definitions and their version are written each time, so the cells are told by their names.
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
        cells.before_put_of(&names().records(cell_of(5)), move |cells| {
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
        cells.before_put_of(&names().records(cell_of(5)), move |cells| {
            assert!(hold(cells, &names(), Holder(2), LEASE_MS));
            apply(cells, &names(), Holder(2), &Page::read(&newer).unwrap()).unwrap();
        });
        let older = page(Part::Snapshot { from: 0, to: 20 }, &[(gone, record(1))], &[]);
        assert_eq!(apply_bytes(&cells, &older), Err(Deposed));
        assert_eq!(find(&cells, &names(), &gone), None);
    }

    #[test]
    fn one_look_at_the_lease_serves_many_cells() {
        let cells = leading();
        let buckets = (0..AT_ONCE as u16 * 2).map(|cell| cell * BUCKETS_OF_A_CELL);
        let keys: Vec<(KeyHash, Record)> = buckets.map(|bucket| (hash(bucket, 1), record(1))).collect();
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
    fn a_cell_that_is_cut_short_ends_there() {
        let mut cell = Vec::new();
        push(&mut cell, &[1; SUFFIX_BYTES], &[1, 2, 3]);
        for length in 0..cell.len() {
            assert_eq!(Records(&cell[..length]).count(), 0);
        }
        assert_eq!(Records(&cell).count(), 1);
    }
}
