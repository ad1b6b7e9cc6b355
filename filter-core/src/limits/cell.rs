//! The cells in which an Envoy stores the state of limits. All VMs share them. Each write is a compare-and-swap with the
//! version that was read, so the counts are exact for an Envoy process.
//!
//! ```text
//! cell: entries, one after the other
//! entry: subject (16 bytes) │ kind (1) │ tag (8) │ value
//! value: of a limit of this Envoy alone: the theoretical arrival time (8); of a shared one: its holding (168)
//! ```
//!
//! A write drops arrival times that have passed; a holding is dropped once it is settled. Only known keys and users have
//! entries. Any client can cause entries for addresses, so these have cells of their own, which are bounded.

use contract::hash::KeyHash;
use limits::holding::{Holding, WORDS};
use limits::pool::{Kind, PoolId, Subject};

use crate::address::Client;
use crate::shared::CellKey;

/// Cells for keys and users: the last 16 bits of the id name one.
pub const SUBJECT_CELLS: u32 = 65_536;

/// Cells for client addresses.
pub const ADDRESS_CELLS: u16 = 4_096;

/// Most entries of a cell for addresses, 33 bytes each, so that all of them take 70 MB at the most. Beyond it, the cell drops
/// the address with the earliest arrival time, which then has its whole burst again.
pub const ADDRESS_ENTRIES: usize = 512;

/// The kind of limits that are local to each Envoy. Shared ones have the code of their [`Kind`].
const LOCAL: u8 = 255;

const HEAD_BYTES: usize = 25;
const WORD_BYTES: usize = 8;
const HOLDING_BYTES: usize = WORDS * WORD_BYTES;

/// The cell of a key or a user.
#[must_use]
pub const fn cell_of(subject: Subject) -> CellKey {
    let [.., high, low] = subject.0;
    CellKey::Limits(u16::from_be_bytes([high, low]))
}

/// The cell of a client address. Clients choose their addresses: the hash spreads them.
#[must_use]
pub fn cell_of_client(client: Client) -> CellKey {
    CellKey::ClientLimits(KeyHash::of(&client.0).bucket() % ADDRESS_CELLS)
}

/// The content of a cell.
#[derive(Debug, Default)]
pub struct Entries(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    subject: [u8; 16],
    tag: u64,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Local(u64),
    Shared(Kind, Holding),
}

impl Entries {
    /// Reads a cell. What another version of the filter wrote is left out; the layout is part of the cell's name.
    #[must_use]
    pub fn read(mut bytes: &[u8]) -> Self {
        let mut entries = Vec::new();
        while let Some((entry, rest)) = Entry::read(bytes) {
            entries.push(entry);
            bytes = rest;
        }
        Self(entries)
    }

    /// The bytes of the cell, without arrival times that have passed.
    #[must_use]
    pub fn write(&self, now_ns: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len().saturating_mul(HEAD_BYTES.saturating_add(HOLDING_BYTES)));
        for entry in &self.0 {
            match &entry.value {
                Value::Local(arrival_ns) if *arrival_ns <= now_ns => {}
                Value::Local(arrival_ns) => entry.append(LOCAL, &[*arrival_ns], &mut bytes),
                Value::Shared(kind, holding) => entry.append(kind.code(), &holding.words(), &mut bytes),
            }
        }
        bytes
    }

    /// Drops the addresses with the earliest arrival times until the bound holds.
    pub fn bound(&mut self) {
        while self.0.len() > ADDRESS_ENTRIES {
            let arrival =
                |entry: &Entry| if let Value::Local(arrival_ns) = entry.value { arrival_ns } else { u64::MAX };
            let nearest = self.0.iter().enumerate().min_by_key(|(_, entry)| arrival(entry)).map(|(place, _)| place);
            self.0.swap_remove(nearest.unwrap_or_default());
        }
    }

    /// The theoretical arrival time of a limit that is local to this Envoy.
    #[must_use]
    pub fn arrival(&self, subject: [u8; 16], tag: u64) -> Option<u64> {
        self.0.iter().find_map(|entry| match entry.value {
            Value::Local(arrival_ns) if entry.subject == subject && entry.tag == tag => Some(arrival_ns),
            _ => None,
        })
    }

    /// Sets the theoretical arrival time of such a limit.
    pub fn set_arrival(&mut self, subject: [u8; 16], tag: u64, arrival_ns: u64) {
        let is_it =
            |entry: &&mut Entry| entry.subject == subject && entry.tag == tag && matches!(entry.value, Value::Local(_));
        match self.0.iter_mut().find(is_it) {
            Some(entry) => entry.value = Value::Local(arrival_ns),
            None => self.0.push(Entry { subject, tag, value: Value::Local(arrival_ns) }),
        }
    }

    /// What this Envoy holds of a pool, nothing if there is no entry.
    #[must_use]
    pub fn holding(&self, pool: &PoolId) -> Holding {
        self.0.iter().find_map(|entry| entry.holding_of(pool)).unwrap_or_default()
    }

    /// Sets what this Envoy holds of a pool.
    pub fn set_holding(&mut self, pool: &PoolId, holding: Holding) {
        match self.0.iter_mut().find(|entry| entry.holding_of(pool).is_some()) {
            Some(entry) => entry.value = Value::Shared(pool.kind, holding),
            None => {
                let value = Value::Shared(pool.kind, holding);
                self.0.push(Entry { subject: pool.subject.0, tag: pool.tag, value });
            }
        }
    }

    /// Removes a holding.
    pub fn remove(&mut self, pool: &PoolId) {
        self.0.retain(|entry| entry.holding_of(pool).is_none());
    }
}

impl Entry {
    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (subject, rest) = bytes.split_first_chunk::<16>()?;
        let ([kind], rest) = rest.split_first_chunk()?;
        let (tag, rest) = rest.split_first_chunk()?;
        let (value, rest) = if *kind == LOCAL {
            let (arrival_ns, rest) = rest.split_first_chunk()?;
            (Value::Local(u64::from_le_bytes(*arrival_ns)), rest)
        } else {
            let (words, rest) = rest.split_first_chunk::<HOLDING_BYTES>()?;
            let (words, _) = words.as_chunks::<WORD_BYTES>();
            let words: [[u8; WORD_BYTES]; WORDS] = words.try_into().ok()?;
            (Value::Shared(Kind::from_code(*kind)?, Holding::from_words(words.map(u64::from_le_bytes))), rest)
        };
        Some((Self { subject: *subject, tag: u64::from_le_bytes(*tag), value }, rest))
    }

    fn append(&self, kind: u8, words: &[u64], to: &mut Vec<u8>) {
        to.extend_from_slice(&self.subject);
        to.push(kind);
        to.extend_from_slice(&self.tag.to_le_bytes());
        for word in words {
            to.extend_from_slice(&word.to_le_bytes());
        }
    }

    fn holding_of(&self, pool: &PoolId) -> Option<Holding> {
        match self.value {
            Value::Shared(kind, holding)
                if kind == pool.kind && self.subject == pool.subject.0 && self.tag == pool.tag =>
            {
                Some(holding)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
