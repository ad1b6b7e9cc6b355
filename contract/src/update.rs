//! Updates of the key store: what the control plane answers to one poll of a filter.
//!
//! An update is part of a **snapshot**, whole buckets in ascending order, or the **changes** after a revision. An entry has
//! the present state of its key, so it does no harm if it is applied twice, or late in a snapshot. The first update of a
//! snapshot has all definitions, before its records.

use serde::{Deserialize, Serialize};

use crate::codec::{self, Bytes, DecodeError, UPDATE};
use crate::definition::Definition;
use crate::hash::{BUCKETS, KeyHash};
use crate::id::Epoch;
use crate::record::Record;

/// A writer ends an update before it exceeds this many bytes of keys, but never within a bucket or a revision. Definitions, of
/// which the control plane has a few hundred kilobytes at most, come on top in the first update. A filter applies an update in
/// one piece, which blocks its thread for some milliseconds.
pub const UPDATE_BYTES: usize = 1 << 15;

/// A revision that takes more bytes than this is sent as a snapshot.
pub const REVISION_BYTES: usize = 1 << 20;

/// What an update is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The life of the database that the revision belongs to.
    pub epoch: Epoch,
    /// Snapshot: the update has every change up to this revision. Changes: the filter has every change up to it once it
    /// has applied the update.
    pub revision: u64,
    /// Keys in the whole store at that revision.
    pub total_keys: u64,
    /// Which part of the store the update has.
    pub part: Part,
}

/// Which part of the store an update has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// All keys of the buckets `from..to`. The snapshot is complete when `to` is [`BUCKETS`].
    Snapshot {
        /// The first bucket.
        from: u32,
        /// The first bucket after the last one.
        to: u32,
    },
    /// All changes after this revision, up to that of the header.
    Changes {
        /// The revision that the filter must have.
        after: u64,
    },
}

/// The present state of one key or definition.
///
/// `R` is a record and `D` a definition: encoded in an [`Update`], decoded in an [`UpdateView`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry<R, D> {
    /// The key has this record.
    Put {
        /// The hash of the key.
        hash: KeyHash,
        /// The record.
        record: R,
    },
    /// The key does not exist any longer.
    Remove {
        /// The hash of the key.
        hash: KeyHash,
    },
    /// The definition with this number.
    Define {
        /// The number by which records reference it.
        number: u32,
        /// The definition.
        definition: D,
    },
    /// The definition with this number does not exist any longer.
    Undefine {
        /// The number.
        number: u32,
    },
}

/// An entry as updates carry it: [`Record::from_bytes`] and [`Definition::from_bytes`] decode its content.
pub type EncodedEntry<'a> = Entry<Bytes<'a>, Bytes<'a>>;

/// An update. Its entries are encoded one after the other into one byte string.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update<'a> {
    /// What the update is about.
    pub header: Header,
    #[serde(borrow)]
    entries: Bytes<'a>,
}

impl<'a> Update<'a> {
    /// Decodes an update and checks all of it, down to the last record, so that a filter never stops half-way through it.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`]. A snapshot with keys outside of its buckets, or not in the order of buckets, is
    /// malformed.
    pub fn read(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let update: Self = codec::decode(UPDATE, bytes)?;
        let part = update.header.part;
        if let Part::Snapshot { from, to } = part
            && (from >= to || to > BUCKETS)
        {
            return Err(DecodeError::Malformed);
        }
        let mut last_bucket = 0;
        for entry in (Entries { rest: update.entries.0 }) {
            let entry = entry?;
            match entry {
                Entry::Put { record, .. } => drop(Record::from_bytes(&record)?),
                Entry::Define { definition, .. } => drop(Definition::from_bytes(&definition)?),
                Entry::Remove { .. } | Entry::Undefine { .. } => {}
            }
            if let (Entry::Put { hash, .. } | Entry::Remove { hash }, Part::Snapshot { from, to }) = (entry, part) {
                let bucket = u32::from(hash.bucket());
                if bucket < from || bucket >= to || bucket < last_bucket {
                    return Err(DecodeError::Malformed);
                }
                last_bucket = bucket;
            }
        }
        Ok(update)
    }

    /// The entries, in the order in which they were written.
    pub fn entries(&self) -> impl Iterator<Item = EncodedEntry<'a>> + use<'a> {
        Entries { rest: self.entries.0 }.map_while(Result::ok)
    }

    /// The readable form of the update.
    ///
    /// # Errors
    /// None after [`Update::read`], which decodes every record and definition.
    pub fn view(&self) -> Result<UpdateView, DecodeError> {
        let entries = self.entries().map(|entry| {
            Ok(match entry {
                Entry::Put { hash, record } => Entry::Put { hash, record: Record::from_bytes(&record)?.into() },
                Entry::Remove { hash } => Entry::Remove { hash },
                Entry::Define { number, definition } => {
                    Entry::Define { number, definition: Definition::from_bytes(&definition)? }
                }
                Entry::Undefine { number } => Entry::Undefine { number },
            })
        });
        Ok(UpdateView { header: self.header, entries: entries.collect::<Result<_, _>>()? })
    }
}

struct Entries<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<EncodedEntry<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let entry = codec::decode_prefix(self.rest);
        self.rest = entry.as_ref().map_or(&[], |(_, rest)| *rest);
        Some(entry.map(|(entry, _)| entry))
    }
}

/// Writes the entries of an update, then the update.
#[derive(Debug, Default)]
pub struct UpdateWriter {
    entries: Vec<u8>,
    /// The first entry that could not be encoded. An update must not lack an entry, which may be a revocation.
    failed: Option<DecodeError>,
}

impl UpdateWriter {
    /// Appends a key with its encoded record.
    pub fn put(&mut self, hash: &KeyHash, record: &[u8]) {
        self.push(&Entry::Put { hash: *hash, record: Bytes(record) });
    }

    /// Appends the removal of a key.
    pub fn remove(&mut self, hash: &KeyHash) {
        self.push(&Entry::Remove { hash: *hash });
    }

    /// Appends an encoded definition.
    pub fn define(&mut self, number: u32, definition: &[u8]) {
        self.push(&Entry::Define { number, definition: Bytes(definition) });
    }

    /// Appends the removal of a definition.
    pub fn undefine(&mut self, number: u32) {
        self.push(&Entry::Undefine { number });
    }

    fn push(&mut self, entry: &EncodedEntry<'_>) {
        match codec::append(entry, std::mem::take(&mut self.entries)) {
            Ok(entries) => self.entries = entries,
            Err(error) => self.failed = self.failed.or(Some(error)),
        }
    }

    /// Bytes of all entries so far.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.entries.len()
    }

    /// Encodes the update.
    ///
    /// # Errors
    /// The error of an entry that could not be encoded; none in practice, see [`codec::encode`].
    pub fn finish(&self, header: &Header) -> Result<Vec<u8>, DecodeError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        codec::encode(UPDATE, &Update { header: *header, entries: Bytes(&self.entries) })
    }
}

/// The readable form of an update, as a client gets it that accepts `application/json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateView {
    /// What the update is about.
    #[serde(flatten)]
    pub header: Header,
    /// All entries.
    pub entries: Vec<Entry<Box<Record>, Definition>>,
}
