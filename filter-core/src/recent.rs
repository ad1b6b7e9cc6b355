//! What a VM remembers of keys that it saw lately: the hash of a key comes in, what is known of it goes out, from the VM's
//! own memory as long as nobody has written the store since.
//!
//! Whoever writes the store raises a number that all VMs of the process read ([`Writes`]) after its writes and before it
//! says that they are done. A VM reads that number first and the store after it, and keeps what it found under the number;
//! what was kept counts only as long as the number is the same. So once the leader has said that a change is done, every
//! look-up that begins sees another number than any look-up before the change did, and reads the store.
//!
//! Only keys that the store holds are remembered, [`REMEMBERED`] of them, so that nobody fills the memory with made-up
//! keys. Where that many are not enough, one newcomer in several takes the place of an older one: were it each, keys
//! that come in turn, more than fit, would all be forgotten before they come again.

use std::cell::RefCell;
use std::num::NonZeroU64;
use std::rc::Rc;

use contract::definition::Definitions;
use contract::hash::KeyHash;
use contract::pepper::{Pepper, hashes};
use contract::record::Record;

use crate::cells::{Cells, Names};
use crate::definitions::Cached;
use crate::store;

/// Most keys that a VM remembers.
pub const REMEMBERED: usize = SETS * WAYS;

/// Most bytes of scopes, as text, of a key that is remembered. So all of them take some 20 MiB at the most, and 3 MiB if they
/// are plain. Keys with more are looked up each time.
const SCOPES_BYTES: usize = 1_024;

const SETS: usize = 1_024;
const WAYS: usize = 4;

/// In a full set so many newcomers come until one of them stays. Odd, so that of two that come in turn each has its chance.
const STAY: usize = 7;

/// A number that is raised whenever the store was written, and seen by all VMs of the process.
pub trait Writes {
    /// The number; `None` if it cannot be told, or was never raised.
    fn number(&self) -> Option<NonZeroU64>;

    /// Raises it to one that it never was before.
    fn raise(&self);
}

/// What is known of a key, in the form in which it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its record.
    pub record: Record,
    /// What the record refers to.
    pub definitions: Rc<Definitions>,
    /// The owner's id.
    pub owner: Box<str>,
    /// The key's id.
    pub key: Box<str>,
    /// All its scopes, separated by spaces; `None` if there are none.
    pub scopes: Option<Box<str>>,
}

impl Known {
    fn new(record: Record, definitions: Rc<Definitions>) -> Self {
        let scopes = definitions.scopes(&record).join(" ");
        let scopes = (!scopes.is_empty()).then(|| scopes.into_boxed_str());
        let (owner, key) = (record.owner_id.to_string().into(), record.key_id.to_string().into());
        Self { record, definitions, owner, key, scopes }
    }
}

/// One VM's memory of a store.
#[derive(Debug, Default)]
pub struct Recent {
    definitions: Cached,
    /// The definitions that entries hold, as long as there are such entries.
    held: RefCell<Rc<Definitions>>,
    sets: RefCell<Vec<Set>>,
}

#[derive(Clone, Debug, Default)]
struct Set {
    entries: [Option<Entry>; WAYS],
    /// Newcomers that found the set full.
    came: usize,
}

#[derive(Clone, Debug)]
struct Entry {
    hash: KeyHash,
    number: NonZeroU64,
    known: Rc<Known>,
}

impl Recent {
    /// Looks a key up by its SHA-256, and by what an imported key is stored under where there is a pepper. `number` is that
    /// of [`Writes`], read before this; without one, nothing is remembered.
    pub fn find(
        &self,
        cells: &impl Cells,
        names: &Names,
        number: Option<NonZeroU64>,
        hash: &KeyHash,
        pepper: Option<&Pepper>,
    ) -> Option<Rc<Known>> {
        let Some(number) = number else { return self.read(cells, names, hash, pepper) };
        if let Some(known) = self.remembered(number, hash) {
            return Some(known);
        }
        let known = self.read(cells, names, hash, pepper)?;
        if known.scopes.as_ref().is_none_or(|scopes| scopes.len() <= SCOPES_BYTES) {
            self.remember(Entry { hash: *hash, number, known: Rc::clone(&known) });
        }
        Some(known)
    }

    fn read(&self, cells: &impl Cells, names: &Names, hash: &KeyHash, pepper: Option<&Pepper>) -> Option<Rc<Known>> {
        let record = hashes(*hash, pepper).find_map(|hash| store::find(cells, names, &hash))?;
        let definitions = self.definitions.for_record(cells, names, &record);
        // Entries do not count any longer, but would keep older definitions, and might be many.
        if !definitions.0.is_empty() && !Rc::ptr_eq(&definitions, &self.held.borrow()) {
            self.sets.borrow_mut().clear();
            *self.held.borrow_mut() = Rc::clone(&definitions);
        }
        Some(Rc::new(Known::new(record, definitions)))
    }

    fn remembered(&self, number: NonZeroU64, hash: &KeyHash) -> Option<Rc<Known>> {
        let sets = self.sets.borrow();
        let entries = sets.get(set_of(hash))?.entries.iter().flatten();
        let mut same = entries.filter(|entry| entry.hash == *hash && entry.number == number);
        same.next().map(|entry| Rc::clone(&entry.known))
    }

    fn remember(&self, new: Entry) {
        let mut sets = self.sets.borrow_mut();
        // Where no request comes, as on Envoy's main thread, nothing is set aside.
        if sets.is_empty() {
            sets.resize(SETS, Set::default());
        }
        let Some(set) = sets.get_mut(set_of(&new.hash)) else { return };
        let gives_way = |entry: &Option<Entry>| {
            entry.as_ref().is_none_or(|entry| entry.hash == new.hash || entry.number != new.number)
        };
        let place = set.entries.iter().position(gives_way).or_else(|| {
            set.came = set.came.wrapping_add(1);
            let stays = set.came.checked_rem(STAY) == Some(0);
            stays.then(|| set.came.checked_div(STAY).and_then(|turn| turn.checked_rem(WAYS)).unwrap_or_default())
        });
        if let Some(entry) = place.and_then(|place| set.entries.get_mut(place)) {
            *entry = Some(new);
        }
    }
}

/// By bytes that do not name the bucket.
fn set_of(hash: &KeyHash) -> usize {
    let [_, _, high, low, ..] = hash.0;
    usize::from(u16::from_be_bytes([high, low])).checked_rem(SETS).unwrap_or_default()
}

#[cfg(test)]
mod tests;
