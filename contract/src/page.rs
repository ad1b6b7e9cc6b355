//! A page of the store: what the control plane sends to a filter in answer to one poll.
//!
//! A page is either part of a **snapshot**, whole buckets in ascending order, or the **changes** after a revision: the
//! state that each changed key has now, so that applying a change twice, or late in a snapshot, does no harm.
//!
//! ```text
//! seal │ header (byte string, may grow) │ entries (byte string)
//! entries: length │ kind │ hash (32 bytes) │ record (may grow)      repeated
//!          length │ kind │ number (4 bytes, little-endian) │ definition (may grow)
//! ```
//! The first page of a snapshot holds every definition that there is, before its records.
//! A reader steps over kinds of entry that it does not know.

extern crate alloc;

use alloc::boxed::Box;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::codec::{self, Bytes, DecodeError, PAGE};
use crate::definition::Definition;
use crate::hash::{BUCKETS, KeyHash};
use crate::id::Epoch;
use crate::record::Record;

/// A writer closes a page before it grows past this many bytes, but never within a bucket or a revision. A filter applies
/// a page in one piece, some milliseconds in which its thread does nothing else.
pub const PAGE_BYTES: usize = 1 << 15;

/// A revision that takes more than this is told as a snapshot.
pub const REVISION_BYTES: usize = 1 << 20;

/// What a page is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The life of the database that the revision belongs to.
    pub epoch: Epoch,
    /// Snapshot: the writer has seen every change up to this revision. Changes: the reader has, once it applied the page.
    pub revision: u64,
    /// Keys in the whole store at that revision.
    pub total_keys: u64,
    /// Which part of the store the page carries.
    pub part: Part,
    /// How many Envoys sync at present, as far as the writer knows; 0 if it does not say. An Envoy that was leased no share
    /// of a limit yet judges this part of it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub filters: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Header {
    /// Without `filters` it is written as the first version wrote it.
    fn to_bytes(self) -> Result<Vec<u8>, DecodeError> {
        let Self { epoch, revision, total_keys, part, filters } = self;
        let first = (epoch, revision, total_keys, part);
        if filters == 0 { codec::grown(&first) } else { codec::grown(&(first, filters)) }
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let ((epoch, revision, total_keys, part), rest) = codec::part_of(bytes)?;
        let filters = if rest.is_empty() { 0 } else { codec::part(rest)? };
        Ok(Self { epoch, revision, total_keys, part, filters })
    }
}

/// Which part of the store a page carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The whole content of the buckets `from..to`; the snapshot is complete when `to` is [`BUCKETS`].
    Snapshot {
        /// First bucket of the page.
        from: u32,
        /// First bucket that the page does not hold.
        to: u32,
    },
    /// All changes after this revision, up to the header's.
    Changes {
        /// The revision that the reader must have.
        after: u64,
    },
}

/// One entry of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// The key exists and has this record, in binary form.
    Put {
        /// Which key.
        hash: KeyHash,
        /// [`Record::from_bytes`] reads it.
        record: &'a [u8],
    },
    /// The key is not to be known any longer.
    Remove {
        /// Which key.
        hash: KeyHash,
    },
    /// Records refer to this by its number.
    Define {
        /// Its number.
        number: u32,
        /// [`Definition::from_bytes`] reads it.
        definition: &'a [u8],
    },
    /// No record refers to this number any longer.
    Undefine {
        /// Its number.
        number: u32,
    },
    /// Of a kind that a newer version brought. Step over it.
    Newer,
}

const PUT: u8 = 0;
const REMOVE: u8 = 1;
const DEFINE: u8 = 2;
const UNDEFINE: u8 = 3;
const ENTRY_OVERHEAD: usize = 1 + 32;

/// A page being written.
#[derive(Debug)]
pub struct PageWriter {
    entries: Vec<u8>,
}

impl PageWriter {
    /// An empty page.
    #[must_use]
    pub const fn new() -> Self {
        Self { entries: Vec::new() }
    }

    /// Appends a key and its record in binary form.
    pub fn put(&mut self, hash: &KeyHash, record: &[u8]) {
        self.entry(PUT, &hash.0, record);
    }

    /// Appends the removal of a key.
    pub fn remove(&mut self, hash: &KeyHash) {
        self.entry(REMOVE, &hash.0, &[]);
    }

    /// Appends a definition in binary form.
    pub fn define(&mut self, number: u32, definition: &[u8]) {
        self.entry(DEFINE, &number.to_le_bytes(), definition);
    }

    /// Appends the removal of a definition.
    pub fn undefine(&mut self, number: u32) {
        self.entry(UNDEFINE, &number.to_le_bytes(), &[]);
    }

    /// Bytes that the entries take so far, and would take with one more record of `record_bytes`.
    #[must_use]
    pub const fn bytes_with(&self, record_bytes: usize) -> usize {
        self.entries.len().saturating_add(ENTRY_OVERHEAD).saturating_add(3).saturating_add(record_bytes)
    }

    /// Bytes that the entries take so far.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.entries.len()
    }

    /// Seals the page.
    ///
    /// # Errors
    /// None in practice: see [`codec::seal`].
    pub fn finish(&self, header: &Header) -> Result<Vec<u8>, DecodeError> {
        let header = header.to_bytes()?;
        codec::seal(PAGE, &Body { header: Bytes(&header), entries: Bytes(&self.entries) })
    }

    fn entry(&mut self, kind: u8, name: &[u8], value: &[u8]) {
        let mut length = name.len().saturating_add(value.len()).saturating_add(1);
        // The length as postcard writes it: seven bits a byte, the lowest first.
        while length > 0x7f {
            self.entries.push(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
            length >>= 7;
        }
        self.entries.push(u8::try_from(length).unwrap_or_default());
        self.entries.push(kind);
        self.entries.extend_from_slice(name);
        self.entries.extend_from_slice(value);
    }
}

impl Default for PageWriter {
    fn default() -> Self {
        Self::new()
    }
}

/// A page that was read: sealed well, every entry and every record of a known kind in order.
#[derive(Clone, Debug)]
pub struct Page<'a> {
    /// What the page is about.
    pub header: Header,
    entries: &'a [u8],
}

impl<'a> Page<'a> {
    /// Reads a page and checks all of it, so that whoever applies it need not stop half-way.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`]; a snapshot whose entries lie outside its buckets is malformed too.
    pub fn read(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let body: Body<'a> = codec::open(PAGE, bytes)?;
        let header = Header::from_bytes(body.header.0)?;
        let page = Self { header, entries: body.entries.0 };
        if let Part::Snapshot { from, to } = header.part
            && (from >= to || to > BUCKETS)
        {
            return Err(DecodeError::Malformed);
        }
        let mut last_bucket = 0;
        for entry in (Entries { rest: page.entries }) {
            let hash = match entry? {
                Entry::Put { hash, record } => {
                    Record::from_bytes(record)?;
                    hash
                }
                Entry::Remove { hash } => hash,
                Entry::Define { definition, .. } => {
                    Definition::from_bytes(definition)?;
                    continue;
                }
                Entry::Undefine { .. } | Entry::Newer => continue,
            };
            if let Part::Snapshot { from, to } = header.part {
                let bucket = u32::from(hash.bucket());
                if bucket < from || bucket >= to || bucket < last_bucket {
                    return Err(DecodeError::Malformed);
                }
                last_bucket = bucket;
            }
        }
        Ok(page)
    }

    /// The entries, in the order in which they were written.
    pub fn entries(&self) -> impl Iterator<Item = Entry<'a>> + use<'a> {
        Entries { rest: self.entries }.map_while(Result::ok)
    }
}

struct Entries<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let Ok((entry, rest)) = postcard::take_from_bytes::<Bytes<'a>>(self.rest) else {
            self.rest = &[];
            return Some(Err(DecodeError::Malformed));
        };
        self.rest = rest;
        Some(read_entry(entry.0))
    }
}

fn read_entry(bytes: &[u8]) -> Result<Entry<'_>, DecodeError> {
    let (kind, rest) = bytes.split_first().ok_or(DecodeError::Malformed)?;
    match *kind {
        PUT | REMOVE => {
            let (hash, record) = rest.split_first_chunk::<32>().ok_or(DecodeError::Malformed)?;
            let hash = KeyHash(*hash);
            Ok(if *kind == PUT { Entry::Put { hash, record } } else { Entry::Remove { hash } })
        }
        DEFINE | UNDEFINE => {
            let (number, definition) = rest.split_first_chunk::<4>().ok_or(DecodeError::Malformed)?;
            let number = u32::from_le_bytes(*number);
            Ok(if *kind == DEFINE { Entry::Define { number, definition } } else { Entry::Undefine { number } })
        }
        _ => Ok(Entry::Newer),
    }
}

#[derive(Serialize, Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    header: Bytes<'a>,
    #[serde(borrow)]
    entries: Bytes<'a>,
}

/// The same page in a form for people: what `Accept: application/json` gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageView {
    /// What the page is about.
    #[serde(flatten)]
    pub header: Header,
    /// Its entries.
    pub entries: Vec<EntryView>,
}

/// One entry of a [`PageView`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryView {
    /// See [`Entry::Put`].
    Put {
        /// Which key.
        hash: KeyHash,
        /// What is known of it.
        record: Box<Record>,
    },
    /// See [`Entry::Remove`].
    Remove {
        /// Which key.
        hash: KeyHash,
    },
    /// See [`Entry::Define`].
    Define {
        /// Its number.
        number: u32,
        /// What it is.
        definition: Definition,
    },
    /// See [`Entry::Undefine`].
    Undefine {
        /// Its number.
        number: u32,
    },
}

impl PageView {
    /// Spells out a page.
    ///
    /// # Errors
    /// [`DecodeError::Malformed`] for a record or a definition that does not decode; [`Page::read`] has excluded that.
    pub fn of(page: &Page<'_>) -> Result<Self, DecodeError> {
        let entries = page
            .entries()
            .filter_map(|entry| match entry {
                Entry::Put { hash, record } => {
                    Some(Record::from_bytes(record).map(|record| EntryView::Put { hash, record: Box::new(record) }))
                }
                Entry::Remove { hash } => Some(Ok(EntryView::Remove { hash })),
                Entry::Define { number, definition } => {
                    Some(Definition::from_bytes(definition).map(|definition| EntryView::Define { number, definition }))
                }
                Entry::Undefine { number } => Some(Ok(EntryView::Undefine { number })),
                Entry::Newer => None,
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { header: page.header, entries })
    }
}
