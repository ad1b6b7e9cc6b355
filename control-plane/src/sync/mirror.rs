//! The key store in memory, as filters are to have it: rows of the change feed come in, pages go out. Nothing here waits
//! for the database, so that Envoys are answered while it is down.
//!
//! Of each key the mirror holds its present record, in the binary form of the pages, and the revision of its last change.
//! Changes are found through an index by revision; a key that was withdrawn stays in it as a tombstone for a while.

use std::collections::BTreeSet;

use bytes::Bytes;
use contract::codec::DecodeError;
use contract::hash::{BUCKETS, KeyHash};
use contract::id::Epoch;
use contract::page::{Header, PAGE_BYTES, PageWriter, Part};

/// Most tombstones that are kept. Beyond, the oldest go, and filters that are further behind get a snapshot.
const TOMBSTONES: usize = 100_000;

/// One key as the feed reads it.
#[derive(Clone, Debug)]
pub struct Row {
    /// Which key.
    pub hash: KeyHash,
    /// The revision of its last change.
    pub revision: u64,
    /// Its record in binary form; `None` if filters are to forget the key.
    pub record: Option<Box<[u8]>>,
}

/// What a reader asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A snapshot, from this bucket on.
    Snapshot(u32),
    /// The changes after this revision.
    Changes(u64),
}

/// The store at one revision.
#[derive(Debug)]
pub struct Mirror {
    epoch: Epoch,
    revision: u64,
    horizon: u64,
    keys: u64,
    tombstones: BTreeSet<(u64, KeyHash)>,
    buckets: Vec<Vec<Row>>,
    by_revision: BTreeSet<(u64, KeyHash)>,
}

impl Mirror {
    /// An empty store. A reader behind `horizon` cannot be told all changes and gets a snapshot.
    #[must_use]
    pub fn new(epoch: Epoch, horizon: u64) -> Self {
        let buckets = (0..BUCKETS).map(|_| Vec::new()).collect();
        Self {
            epoch,
            revision: 0,
            horizon,
            keys: 0,
            tombstones: BTreeSet::new(),
            buckets,
            by_revision: BTreeSet::new(),
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
    pub fn apply(&mut self, rows: impl IntoIterator<Item = Row>, revision: u64) {
        for row in rows {
            self.put(row);
        }
        self.revision = revision;
        while self.tombstones.len() > TOMBSTONES {
            self.forget_a_tombstone();
        }
    }

    /// Finds a key's record.
    #[must_use]
    pub fn find(&self, hash: &KeyHash) -> Option<&[u8]> {
        let bucket = self.buckets.get(usize::from(hash.bucket()))?;
        let place = bucket.binary_search_by_key(hash, |row| row.hash).ok()?;
        bucket.get(place)?.record.as_deref()
    }

    /// Whether changes after this revision can be told.
    #[must_use]
    pub const fn reaches_back_to(&self, revision: u64) -> bool {
        revision >= self.horizon && revision <= self.revision
    }

    /// Writes the page that a reader gets. Changes that cannot be told become a snapshot.
    ///
    /// # Errors
    /// None in practice: see [`contract::codec::seal`].
    pub fn page(&self, wanted: Wanted) -> Result<Bytes, DecodeError> {
        match wanted {
            Wanted::Changes(after) if self.reaches_back_to(after) => self.changes(after),
            Wanted::Changes(_) => self.snapshot(0),
            Wanted::Snapshot(from) => self.snapshot(from),
        }
    }

    fn put(&mut self, row: Row) {
        let Some(bucket) = self.buckets.get_mut(usize::from(row.hash.bucket())) else { return };
        let (hash, revision, alive) = (row.hash, row.revision, row.record.is_some());
        let was_alive = match bucket.binary_search_by_key(&hash, |row| row.hash) {
            Ok(place) => {
                let old = std::mem::replace(&mut bucket[place], row);
                self.by_revision.remove(&(old.revision, hash));
                self.tombstones.remove(&(old.revision, hash));
                old.record.is_some()
            }
            Err(place) => {
                bucket.insert(place, row);
                false
            }
        };
        self.by_revision.insert((revision, hash));
        if !alive {
            self.tombstones.insert((revision, hash));
        }
        self.keys = self.keys + u64::from(alive) - u64::from(was_alive);
    }

    fn forget_a_tombstone(&mut self) {
        let Some((revision, hash)) = self.tombstones.pop_first() else { return };
        self.by_revision.remove(&(revision, hash));
        self.buckets[usize::from(hash.bucket())].retain(|row| row.hash != hash);
        self.horizon = self.horizon.max(revision);
    }

    fn header(&self, revision: u64, part: Part) -> Header {
        Header { epoch: self.epoch, revision, total_keys: self.keys, part }
    }

    fn snapshot(&self, from: u32) -> Result<Bytes, DecodeError> {
        let mut page = PageWriter::new();
        let mut to = BUCKETS;
        for (bucket, rows) in (0..BUCKETS).zip(&self.buckets).skip(from as usize) {
            let bytes: usize = rows.iter().filter_map(|row| row.record.as_ref()).map(|record| record.len() + 40).sum();
            if bucket > from && page.bytes() + bytes > PAGE_BYTES {
                to = bucket;
                break;
            }
            for row in rows {
                if let Some(record) = &row.record {
                    page.put(&row.hash, record);
                }
            }
        }
        page.finish(&self.header(self.revision, Part::Snapshot { from, to })).map(Bytes::from)
    }

    fn changes(&self, after: u64) -> Result<Bytes, DecodeError> {
        let mut page = PageWriter::new();
        let mut complete = after;
        let mut revision = self.revision;
        let first = (after + 1, KeyHash([0; 32]));
        for (changed, hash) in self.by_revision.range(first..) {
            if *changed > complete {
                // A page ends between two revisions, never within one.
                if page.bytes() > PAGE_BYTES {
                    revision = complete;
                    break;
                }
                complete = *changed;
            }
            match self.find(hash) {
                Some(record) => page.put(hash, record),
                None => page.remove(hash),
            }
        }
        page.finish(&self.header(revision, Part::Changes { after })).map(Bytes::from)
    }
}
