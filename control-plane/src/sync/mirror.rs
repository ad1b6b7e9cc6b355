//! The key store in memory. The change feed writes it, and filters read updates from it, also while the database is down.
//!
//! The mirror has the record of each secret, encoded as in updates, and the revision of its last change. Records are
//! sorted by hash, which is the order of a snapshot. An index by revision finds changes. A withdrawn secret leaves a
//! *tombstone*, an entry without a record, so that filters that are behind remove the secret.
//!
//! It consists of trees and not of one large table: after a restore of the database a second mirror is built while the first
//! serves, and the allocator would keep the memory of large blocks for each thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use contract::codec::DecodeError;
use contract::definition::{Definition, Definitions};
use contract::hash::{BUCKETS, KeyHash};
use contract::id::Epoch;
use contract::update::{Header, Part, REVISION_BYTES, UPDATE_BYTES, UpdateWriter};

/// Most tombstones. Beyond, the oldest are dropped, and filters that are further behind get a snapshot.
const TOMBSTONES: usize = 100_000;

/// Most bytes of an entry beside its record: kind, hash and length.
const ENTRY_BYTES: usize = 40;

/// One key as the feed reads it.
#[derive(Clone, Debug)]
pub struct KeyRow {
    /// Which key.
    pub hash: KeyHash,
    /// The revision of its last change.
    pub revision: u64,
    /// Its record in binary form; `None` if filters are to forget the key.
    pub record: Option<Box<[u8]>>,
}

/// One role, plan or policy as the feed reads it.
#[derive(Clone, Debug)]
pub struct DefinitionRow {
    /// What records call it.
    pub number: u32,
    /// The revision of its last change.
    pub revision: u64,
    /// What it is; `None` if it was removed.
    pub definition: Option<Definition>,
}

/// What is held of one key.
#[derive(Debug)]
struct MirroredKey {
    revision: u64,
    record: Option<Box<[u8]>>,
}

/// What a reader asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateRequest {
    /// A snapshot, from this bucket on.
    Snapshot(u32),
    /// The changes after this revision.
    Changes(u64),
}

/// An update before its header: what it holds, up to which revision, and which part of the store that is.
type Written = (UpdateWriter, u64, Part);

/// The store at one revision.
#[derive(Debug)]
pub struct Mirror {
    epoch: Epoch,
    revision: u64,
    horizon: u64,
    keys: u64,
    tombstones: BTreeSet<(u64, KeyHash)>,
    held: BTreeMap<KeyHash, MirroredKey>,
    by_revision: BTreeSet<(u64, KeyHash)>,
    /// Few: the REST API bounds them. Deleted ones stay, so that every reader learns of it.
    defined: BTreeMap<u32, DefinitionRow>,
    definitions: Arc<Definitions>,
}

impl Mirror {
    /// An empty store. A reader behind `horizon` gets a snapshot, since not all changes after it are known.
    #[must_use]
    pub fn new(epoch: Epoch, horizon: u64) -> Self {
        Self {
            epoch,
            revision: 0,
            horizon,
            keys: 0,
            tombstones: BTreeSet::new(),
            held: BTreeMap::new(),
            by_revision: BTreeSet::new(),
            defined: BTreeMap::new(),
            definitions: Arc::default(),
        }
    }

    /// The life of the database that is mirrored.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Every change up to this revision is in the mirror.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Keys that filters know.
    #[must_use]
    pub const fn keys(&self) -> u64 {
        self.keys
    }

    /// Takes over what changed, all of it up to `revision`.
    pub fn apply(&mut self, rows: impl IntoIterator<Item = KeyRow>, revision: u64) {
        for row in rows {
            self.put(row);
        }
        self.revision = revision;
        while self.tombstones.len() > TOMBSTONES {
            self.forget_a_tombstone();
        }
    }

    /// Takes over roles, plans and policies that changed.
    pub fn define(&mut self, changed: Vec<DefinitionRow>) {
        if changed.is_empty() {
            return;
        }
        self.defined.extend(changed.into_iter().map(|defined| (defined.number, defined)));
        let live = self.defined.values().filter_map(|row| Some((row.number, row.definition.clone()?)));
        self.definitions = Arc::new(Definitions::new(live.collect()));
    }

    /// All roles, plans and policies.
    #[must_use]
    pub fn definitions(&self) -> Arc<Definitions> {
        Arc::clone(&self.definitions)
    }

    /// Finds a key's record.
    #[must_use]
    pub fn find(&self, hash: &KeyHash) -> Option<&[u8]> {
        self.held.get(hash)?.record.as_deref()
    }

    /// Whether all changes after this revision are known.
    #[must_use]
    pub const fn reaches_back_to(&self, revision: u64) -> bool {
        revision >= self.horizon && revision <= self.revision
    }

    /// Encodes the update that a reader gets. A reader that is behind the known changes gets a snapshot.
    ///
    /// # Errors
    /// None in practice: see [`contract::codec::encode`].
    pub fn write_update(&self, wanted: UpdateRequest) -> Result<Bytes, DecodeError> {
        let (update, revision, part) = match wanted {
            UpdateRequest::Changes(after) if self.reaches_back_to(after) => self.changes(after)?,
            UpdateRequest::Changes(_) => self.snapshot(0)?,
            UpdateRequest::Snapshot(from) => self.snapshot(from)?,
        };
        let header = Header { epoch: self.epoch, revision, total_keys: self.keys, part };
        update.finish(&header).map(Bytes::from)
    }

    fn put(&mut self, row: KeyRow) {
        let KeyRow { hash, revision, record } = row;
        let alive = record.is_some();
        let mut was_alive = false;
        if let Some(old) = self.held.insert(hash, MirroredKey { revision, record }) {
            self.by_revision.remove(&(old.revision, hash));
            self.tombstones.remove(&(old.revision, hash));
            was_alive = old.record.is_some();
        }
        self.by_revision.insert((revision, hash));
        if !alive {
            self.tombstones.insert((revision, hash));
        }
        self.keys = self.keys + u64::from(alive) - u64::from(was_alive);
    }

    fn forget_a_tombstone(&mut self) {
        let Some((revision, hash)) = self.tombstones.pop_first() else { return };
        self.by_revision.remove(&(revision, hash));
        self.held.remove(&hash);
        self.horizon = self.horizon.max(revision);
    }

    fn snapshot(&self, from: u32) -> Result<Written, DecodeError> {
        let mut update = UpdateWriter::default();
        if from == 0 {
            for (number, definition) in self.definitions.by_number() {
                update.define(*number, &definition.to_bytes()?);
            }
        }
        let mut to = BUCKETS;
        let living = self.held.range(first_of(from)..).filter_map(|(hash, held)| Some((hash, held.record.as_deref()?)));
        let (mut living, mut whole) = (living.peekable(), Vec::new());
        while let Some(bucket) = living.peek().map(|(hash, _)| hash.bucket()) {
            whole.clear();
            whole.extend(std::iter::from_fn(|| living.next_if(|(hash, _)| hash.bucket() == bucket)));
            let bytes: usize = whole.iter().map(|(_, record)| record.len() + ENTRY_BYTES).sum();
            if u32::from(bucket) > from && update.bytes() + bytes > UPDATE_BYTES {
                to = bucket.into();
                break;
            }
            for (hash, record) in &whole {
                update.put(hash, record);
            }
        }
        Ok((update, self.revision, Part::Snapshot { from, to }))
    }

    fn changes(&self, after: u64) -> Result<Written, DecodeError> {
        let first = (after + 1, KeyHash([0; 32]));
        let Some(to) = self.fitting(first) else { return self.snapshot(0) };
        let mut update = UpdateWriter::default();
        for row in self.defined.values().filter(|row| row.revision > after && row.revision <= to) {
            match &row.definition {
                Some(definition) => update.define(row.number, &definition.to_bytes()?),
                None => update.undefine(row.number),
            }
        }
        for (_, hash) in self.by_revision.range(first..).take_while(|(changed, _)| *changed <= to) {
            match self.find(hash) {
                Some(record) => update.put(hash, record),
                None => update.remove(hash),
            }
        }
        Ok((update, to, Part::Changes { after }))
    }

    /// Up to which revision the changes from `first` on fit one update, which ends between two revisions and never within
    /// one. `None` if one revision alone is too large, as after a bulk insert: its keys travel as a snapshot, whose updates
    /// are bounded.
    fn fitting(&self, first: (u64, KeyHash)) -> Option<u64> {
        let mut bytes = 0;
        let (mut complete, mut current) = (None, None);
        for (changed, hash) in self.by_revision.range(first..) {
            if current != Some(*changed) {
                complete = current.replace(*changed);
            }
            bytes += ENTRY_BYTES + self.find(hash).map_or(0, <[u8]>::len);
            if bytes > REVISION_BYTES || (bytes > UPDATE_BYTES && complete.is_some()) {
                return complete;
            }
        }
        Some(self.revision)
    }
}

/// The least hash of one of the [`BUCKETS`].
const fn first_of(bucket: u32) -> KeyHash {
    let [_, _, high, low] = bucket.to_be_bytes();
    let mut hash = [0; 32];
    [hash[0], hash[1]] = [high, low];
    KeyHash(hash)
}

#[cfg(test)]
mod tests {
    use contract::id::{KeyId, OwnerId};
    use contract::record::Record;
    use contract::update::Update;

    use super::*;

    /// `keys` keys that changed at one revision.
    fn rows(first: u32, keys: u32, revision: u64) -> Vec<KeyRow> {
        let record = Record::plain(KeyId([1; 16]), OwnerId([2; 16])).to_bytes().unwrap().into_boxed_slice();
        let hash = |number: u32| KeyHash::of(&number.to_be_bytes());
        (first..first + keys)
            .map(|number| KeyRow { hash: hash(number), revision, record: Some(record.clone()) })
            .collect()
    }

    fn mirror(revisions: &[u32]) -> Mirror {
        let mut mirror = Mirror::new(Epoch([7; 16]), 0);
        for (revision, keys) in (1..).zip(revisions) {
            mirror.apply(rows(1_000_000 * u32::try_from(revision).unwrap(), *keys, revision), revision);
        }
        mirror
    }

    fn changes(mirror: &Mirror, after: u64) -> (Header, usize, usize) {
        let bytes = mirror.write_update(UpdateRequest::Changes(after)).unwrap();
        let update = Update::read(&bytes).unwrap();
        (update.header, update.entries().count(), bytes.len())
    }

    #[test]
    fn an_update_of_changes_ends_between_two_revisions_before_it_grows_too_large() {
        let mirror = mirror(&[1, 225, 225, 9_000, 1]);
        let (header, entries, bytes) = changes(&mirror, 0);
        assert_eq!((header.revision, header.part, entries), (2, Part::Changes { after: 0 }, 226));
        assert!(bytes <= UPDATE_BYTES + 100, "{bytes}");
        let (header, entries, _) = changes(&mirror, 2);
        assert_eq!((header.revision, header.part, entries), (3, Part::Changes { after: 2 }, 225));
        // One revision alone may be larger.
        let (header, entries, bytes) = changes(&mirror, 3);
        assert_eq!((header.revision, header.part, entries), (4, Part::Changes { after: 3 }, 9_000));
        assert!(UPDATE_BYTES < bytes && bytes <= REVISION_BYTES + 100, "{bytes}");
        let (header, entries, _) = changes(&mirror, 5);
        assert_eq!((header.revision, header.part, entries), (5, Part::Changes { after: 5 }, 0));
    }

    #[test]
    fn a_revision_too_large_for_an_update_is_sent_as_a_snapshot_in_bounded_updates() {
        let mirror = mirror(&[1, 30_000]);
        let (mut header, mut entries, bytes) = changes(&mirror, 1);
        assert!(
            matches!(header.part, Part::Snapshot { from: 0, .. }) && bytes <= UPDATE_BYTES + 100,
            "{header:?} {bytes}"
        );
        while let Part::Snapshot { to, .. } = header.part
            && to < BUCKETS
        {
            let bytes = mirror.write_update(UpdateRequest::Snapshot(to)).unwrap();
            assert!(bytes.len() <= UPDATE_BYTES + 100, "{}", bytes.len());
            let update = Update::read(&bytes).unwrap();
            (header, entries) = (update.header, entries + update.entries().count());
        }
        assert_eq!((header.revision, entries), (2, 30_001));
    }

    #[test]
    fn a_reader_that_tombstones_no_longer_reach_gets_a_snapshot() {
        let mut mirror = mirror(&[3]);
        let gone =
            |revision: u64, number: u32| KeyRow { hash: KeyHash::of(&number.to_be_bytes()), revision, record: None };
        mirror.apply([gone(2, 1_000_000)], 2);
        assert_eq!((mirror.keys(), changes(&mirror, 1).1), (2, 1));
        let many = u32::try_from(TOMBSTONES).unwrap();
        mirror.apply((0..many).map(|number| gone(3, number)), 3);
        assert!(!mirror.reaches_back_to(1) && mirror.reaches_back_to(2));
        assert!(matches!(changes(&mirror, 1).0.part, Part::Snapshot { from: 0, .. }));
    }
}
