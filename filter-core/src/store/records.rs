//! The records of keys: one copy for each Envoy process, in 32,768 cells with two of the 65,536 buckets each.
//!
//! ```text
//! cell: hash without its first byte (31 bytes) │ length (2 bytes, little-endian) │ record      repeated
//! ```
//! A cell is written in one piece, so a reader sees all of a change to a key or nothing of it. Writes are fenced.
//!
//! Envoy keeps cells in a hash table that doubles when it is full: with its 25,718th cell, and again with its 51,438th. While
//! it moves the cells, all VMs and the leader's thread wait. One bucket in each cell would make the store alone reach the
//! second step, which takes twice as long. Limits of some 20,000 keys reach it too, since their cells are in the same table.

use contract::hash::{BUCKETS, KeyHash};
use contract::record::Record;
use contract::update::{EncodedEntry, Entry, Part, Update};

use crate::shared::election::{Fencing, NodeId};
use crate::shared::fenced::{NotLeader, write_records};
use crate::shared::{CellKey, Cells, SharedData};

/// Buckets whose records share a cell.
const BUCKETS_OF_A_CELL: u16 = 2;

/// Bytes of a hash that distinguish the keys of a cell.
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

/// Finds the record of a key. `None`: the store has no such key, or is not loaded yet.
pub fn find(data: &SharedData<impl Cells>, hash: &KeyHash) -> Option<Record> {
    let cell = data.get(CellKey::Records(cell_of(hash.bucket())))?.value;
    let record = Records(&cell).find(|(of, _)| *of == suffix(hash)).map(|(_, record)| record)?;
    // Updates are checked before they are applied, so every record decodes.
    Record::from_bytes(record).ok()
}

/// Writes the records of an update.
///
/// A snapshot leaves cells alone that do not change, unless the [`Fencing`] says that they must be written.
///
/// # Errors
/// [`NotLeader`]; part of the update may be written then.
pub fn apply(data: &SharedData<impl Cells>, me: NodeId, update: &Update<'_>) -> Result<(), NotLeader> {
    let mut entries: Vec<(u16, EncodedEntry<'_>)> = update
        .entries()
        .filter_map(|entry| match entry {
            Entry::Put { hash, .. } | Entry::Remove { hash } => Some((cell_of(hash.bucket()), entry)),
            Entry::Define { .. } | Entry::Undefine { .. } => None,
        })
        .collect();
    // The sort is stable: entries of one key keep their order. A snapshot is sorted already.
    entries.sort_by_key(|(cell, _)| *cell);
    let of = |cell: u16| {
        let start = entries.partition_point(|(other, _)| *other < cell);
        let end = entries.partition_point(|(other, _)| *other <= cell);
        entries.get(start..end).unwrap_or_default()
    };
    match update.header.part {
        Part::Changes { .. } => {
            let mut changed: Vec<u16> = entries.iter().map(|(cell, _)| *cell).collect();
            changed.dedup();
            write_records(data, me, &changed, &|cell, old, _| Some(merge(old, of(cell), |_| false)))
        }
        Part::Snapshot { from, to } => {
            let buckets = (from..to.min(BUCKETS)).filter_map(|bucket| u16::try_from(bucket).ok());
            let mut whole: Vec<u16> = buckets.map(cell_of).collect();
            whole.dedup();
            write_records(data, me, &whole, &|cell, old, fencing| {
                // The first and the last cell may have a bucket that belongs to another update.
                let is_replaced = |of: &Suffix| (from..to).contains(&u32::from(bucket_of(cell, of)));
                let new = merge(old, of(cell), is_replaced);
                (fencing == Fencing::EveryCell || old != new).then_some(new)
            })
        }
    }
}

/// The new content of a cell, in the order of hashes: its old records without those that the update replaces, and the entries of
/// the update.
fn merge<'a>(old: &'a [u8], entries: &'a [(u16, EncodedEntry<'a>)], is_replaced: impl Fn(&Suffix) -> bool) -> Vec<u8> {
    let mut records: Vec<(&Suffix, &[u8])> = Records(old).filter(|(of, _)| !is_replaced(of)).collect();
    for (_, entry) in entries {
        let (Entry::Put { hash, .. } | Entry::Remove { hash }) = entry else { continue };
        let place = records.binary_search_by_key(&suffix(hash), |(of, _)| *of);
        // If an update has two entries of a key, the last one counts.
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
    // The control plane bounds the scopes and limits of a key. A record that is too long all the same is left out, so the
    // key is refused.
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
    use contract::id::{Epoch, KeyId, OwnerId};
    use contract::record::Flags;
    use contract::update::{Header, UpdateWriter};

    use super::*;
    use crate::mock::{TestData, new_data};
    use crate::shared::election::{TERM_MS, acquire};
    use crate::shared::fenced::BATCH;
    use crate::store::write;

    const ME: NodeId = NodeId(1);
    const EPOCH: Epoch = Epoch([9; 16]);

    fn leading() -> TestData {
        let data = new_data();
        assert!(acquire(&data, ME, 0));
        data
    }

    fn hash(bucket: u16, tail: u8) -> KeyHash {
        let mut bytes = [tail; 32];
        bytes[..2].copy_from_slice(&bucket.to_be_bytes());
        KeyHash(bytes)
    }

    fn record(number: u8) -> Record {
        Record::plain(KeyId([number; 16]), OwnerId([0; 16]))
    }

    fn update(part: Part, puts: &[(KeyHash, Record)], removals: &[KeyHash]) -> Vec<u8> {
        let mut writer = UpdateWriter::default();
        for (hash, record) in puts {
            writer.put(hash, &record.to_bytes().unwrap());
        }
        for hash in removals {
            writer.remove(hash);
        }
        writer.finish(&Header { epoch: EPOCH, revision: 1, total_keys: 1, part }).unwrap()
    }

    fn apply_bytes(data: &TestData, bytes: &[u8]) -> Result<(), NotLeader> {
        write(data, ME, &Update::read(bytes).unwrap())
    }

    const CHANGES: Part = Part::Changes { after: 0 };

    #[test]
    fn keys_of_one_bucket_are_found_changed_and_removed_one_by_one() {
        let data = leading();
        let (a, b, c) = (hash(5, 1), hash(5, 2), hash(5, 3));
        apply_bytes(&data, &update(CHANGES, &[(a, record(1)), (b, record(2))], &[])).unwrap();
        assert_eq!(find(&data, &a), Some(record(1)));
        assert_eq!(find(&data, &b), Some(record(2)));
        assert_eq!(find(&data, &c), None);

        let mut revoked = record(1);
        revoked.flags = Flags::REVOKED;
        apply_bytes(&data, &update(CHANGES, &[(a, revoked.clone()), (c, record(3))], &[b])).unwrap();
        assert_eq!(find(&data, &a), Some(revoked));
        assert_eq!(find(&data, &b), None);
        assert_eq!(find(&data, &c), Some(record(3)));
    }

    #[test]
    fn a_part_of_a_snapshot_replaces_its_buckets_and_no_others() {
        let data = leading();
        let (inside, outside, new) = (hash(10, 1), hash(20, 1), hash(10, 2));
        apply_bytes(&data, &update(CHANGES, &[(inside, record(1)), (outside, record(2))], &[])).unwrap();
        apply_bytes(&data, &update(Part::Snapshot { from: 0, to: 20 }, &[(new, record(3))], &[])).unwrap();
        assert_eq!(find(&data, &inside), None);
        assert_eq!(find(&data, &new), Some(record(3)));
        assert_eq!(find(&data, &outside), Some(record(2)));
    }

    #[test]
    fn a_snapshot_that_is_cut_between_two_buckets_of_a_cell_keeps_both() {
        let data = leading();
        let all =
            [(hash(8, 1), record(1)), (hash(9, 1), record(2)), (hash(10, 1), record(3)), (hash(0xffff, 1), record(4))];
        let [first, second, third, last] = &all;
        let updates = [
            update(Part::Snapshot { from: 0, to: 9 }, std::slice::from_ref(first), &[]),
            update(Part::Snapshot { from: 9, to: 10 }, std::slice::from_ref(second), &[]),
            update(Part::Snapshot { from: 10, to: 11 }, std::slice::from_ref(third), &[]),
            update(Part::Snapshot { from: 11, to: BUCKETS }, std::slice::from_ref(last), &[]),
        ];
        for bytes in &updates {
            apply_bytes(&data, bytes).unwrap();
        }
        let found = |(hash, _): &(KeyHash, Record)| find(&data, hash);
        assert!(all.iter().all(|one| found(one).as_ref() == Some(&one.1)));

        // The same again, and in one update, writes the definitions and their version at each beginning, and no records.
        let whole = update(Part::Snapshot { from: 0, to: BUCKETS }, &all, &[]);
        let writes = updates.iter().chain([&whole]).map(|bytes| {
            let before = data.host().writes();
            apply_bytes(&data, bytes).unwrap();
            data.host().writes() - before
        });
        assert_eq!(writes.collect::<Vec<_>>(), [2, 0, 0, 0, 2]);

        // Either bucket can be emptied without the other.
        apply_bytes(&data, &update(Part::Snapshot { from: 0, to: 9 }, &[], &[])).unwrap();
        assert_eq!((found(first), found(second)), (None, Some(record(2))));
        apply_bytes(&data, &update(Part::Snapshot { from: 9, to: 10 }, &[], &[])).unwrap();
        assert_eq!((found(first), found(second), found(third)), (None, None, Some(record(3))));
    }

    #[test]
    fn the_bucket_follows_from_the_cell_and_the_suffix_of_the_hash() {
        for bucket in [0, 1, 0x00ff, 0x0100, 0x7fff, 0x8000, 0xba78, 0xffff] {
            assert_eq!(bucket_of(cell_of(bucket), suffix(&hash(bucket, 3))), bucket);
        }
    }

    #[test]
    fn a_snapshot_writes_only_cells_that_change() {
        let data = leading();
        let bytes = update(Part::Snapshot { from: 0, to: BUCKETS }, &[(hash(0xffff, 1), record(1))], &[]);
        // The definitions and their version are written each time: two writes.
        let before = data.host().writes();
        apply_bytes(&data, &bytes).unwrap();
        assert_eq!(data.host().writes() - before, 3);
        apply_bytes(&data, &bytes).unwrap();
        assert_eq!(data.host().writes() - before, 5);
        assert_eq!(data.host().cell_names().iter().filter(|name| name.contains(":b")).count(), 1);
    }

    #[test]
    fn a_leader_that_lost_its_term_writes_nothing() {
        let data = leading();
        let (key, mut revoked) = (hash(5, 1), record(1));
        revoked.flags = Flags::REVOKED;
        assert!(acquire(&data, NodeId(2), TERM_MS));
        assert_eq!(apply_bytes(&data, &update(CHANGES, &[(key, record(1))], &[])), Err(NotLeader));
        assert_eq!(find(&data, &key), None);
    }

    #[test]
    fn a_leader_that_loses_its_term_during_a_write_cannot_undo_a_revocation() {
        let data = leading();
        let (key, mut revoked) = (hash(5, 1), record(1));
        revoked.flags = Flags::REVOKED;
        let newer = update(CHANGES, &[(key, revoked.clone())], &[]);
        // Between the late leader's check of its lease and its write, another VM takes the lease and revokes the key.
        let other = data.clone();
        data.host().before_put_of(":b0002", move || {
            assert!(acquire(&other, NodeId(2), TERM_MS));
            write(&other, NodeId(2), &Update::read(&newer).unwrap()).unwrap();
        });
        assert_eq!(apply_bytes(&data, &update(CHANGES, &[(key, record(1))], &[])), Err(NotLeader));
        assert_eq!(find(&data, &key), Some(revoked));
    }

    #[test]
    fn a_leader_that_loses_its_term_during_a_write_cannot_bring_back_a_key_that_a_snapshot_removed() {
        let data = leading();
        let gone = hash(5, 1);
        // Another VM takes the lease between the late leader's check and its write. As it sees the store, the key is gone, and
        // its bucket is as empty as it was before.
        let newer = update(Part::Snapshot { from: 0, to: 20 }, &[], &[]);
        let other = data.clone();
        data.host().before_put_of(":b0002", move || {
            assert!(acquire(&other, NodeId(2), TERM_MS));
            write(&other, NodeId(2), &Update::read(&newer).unwrap()).unwrap();
        });
        let older = update(Part::Snapshot { from: 0, to: 20 }, &[(gone, record(1))], &[]);
        assert_eq!(apply_bytes(&data, &older), Err(NotLeader));
        assert_eq!(find(&data, &gone), None);
    }

    #[test]
    fn one_check_of_the_leadership_serves_many_cells() {
        let data = leading();
        let buckets = (0..BATCH as u16 * 2).map(|cell| cell * BUCKETS_OF_A_CELL);
        let keys: Vec<(KeyHash, Record)> = buckets.map(|bucket| (hash(bucket, 1), record(1))).collect();
        let bytes = update(CHANGES, &keys, &[]);
        let before = data.host().reads();
        apply_bytes(&data, &bytes).unwrap();
        assert_eq!(data.host().reads() - before, keys.len() as u32 + 2);
        assert!(keys.iter().all(|(key, known)| find(&data, key).as_ref() == Some(known)));
    }

    #[test]
    fn a_truncated_cell_yields_no_partial_record() {
        let mut cell = Vec::new();
        push(&mut cell, &[1; SUFFIX_BYTES], &[1, 2, 3]);
        for length in 0..cell.len() {
            assert_eq!(Records(&cell[..length]).count(), 0);
        }
        assert_eq!(Records(&cell).count(), 1);
    }
}
