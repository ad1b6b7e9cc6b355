//! A VM's cache of keys that it looked up lately.
//!
//! It holds keys of the store only, so a client cannot fill it with made-up keys. It has [`CACHED_KEYS`] places in sets of
//! four. When a set is full, only every seventh new key evicts an entry: a cyclic access pattern larger than the cache would
//! otherwise evict every entry before it is used again.

use std::cell::RefCell;
use std::num::NonZeroU64;
use std::sync::Arc;

use contract::definition::Definitions;
use contract::hash::KeyHash;

use crate::keys::StoredKey;

/// Most keys that a VM caches.
pub const CACHED_KEYS: usize = SETS * WAYS;

/// Keys whose scopes and attributes, as text, take more bytes are not cached. So the cache takes 20 MiB at most, and 3 MiB with
/// plain keys.
const TEXT_BYTES: usize = 1_024;

const SETS: usize = 1_024;
pub(crate) const WAYS: usize = 4;

/// One in this many new keys evicts an entry of a full set. Odd, so that two alternating keys both get in.
pub(crate) const EVICTION: usize = 7;

/// The cache.
#[derive(Debug, Default)]
pub struct KeyCache {
    /// The definitions that the cached keys share.
    definitions: RefCell<Arc<Definitions>>,
    sets: RefCell<Vec<Set>>,
}

#[derive(Clone, Debug, Default)]
struct Set {
    slots: [Option<Slot>; WAYS],
    /// New keys that found the set full.
    rejections: usize,
}

#[derive(Clone, Debug)]
struct Slot {
    hash: KeyHash,
    generation: NonZeroU64,
    key: Arc<StoredKey>,
}

impl KeyCache {
    /// The key of this hash, if it was inserted in this generation of the store.
    pub fn get(&self, generation: NonZeroU64, hash: &KeyHash) -> Option<Arc<StoredKey>> {
        let sets = self.sets.borrow();
        let mut slots = sets.get(set_of(hash))?.slots.iter().flatten();
        let slot = slots.find(|slot| slot.hash == *hash && slot.generation == generation)?;
        Some(Arc::clone(&slot.key))
    }

    /// Inserts a key that was looked up in this generation of the store.
    pub fn insert(&self, generation: NonZeroU64, hash: KeyHash, key: &Arc<StoredKey>) {
        let scopes = key.scopes.as_ref().map_or(0, |scopes| scopes.len());
        let attributes =
            key.record.attributes.iter().map(|attribute| attribute.name.len().saturating_add(attribute.value.len()));
        if attributes.fold(scopes, usize::saturating_add) > TEXT_BYTES {
            return;
        }
        let mut sets = self.sets.borrow_mut();
        // VMs without requests, such as that of Envoy's main thread, allocate nothing.
        if sets.is_empty() {
            sets.resize(SETS, Set::default());
        }
        let Some(set) = sets.get_mut(set_of(&hash)) else { return };
        let is_free =
            |slot: &Option<Slot>| slot.as_ref().is_none_or(|slot| slot.hash == hash || slot.generation != generation);
        let place = set.slots.iter().position(is_free).or_else(|| {
            set.rejections = set.rejections.wrapping_add(1);
            (set.rejections % EVICTION == 0).then_some(set.rejections / EVICTION % WAYS)
        });
        if let Some(slot) = place.and_then(|place| set.slots.get_mut(place)) {
            *slot = Some(Slot { hash, generation, key: Arc::clone(key) });
        }
    }

    /// Empties the cache if its keys share other definitions than these. Their entries are outdated and would keep the old
    /// definitions in memory.
    pub fn keep_only(&self, definitions: &Arc<Definitions>) {
        if !definitions.by_number().is_empty() && !Arc::ptr_eq(definitions, &self.definitions.borrow()) {
            self.sets.borrow_mut().clear();
            *self.definitions.borrow_mut() = Arc::clone(definitions);
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.sets.borrow().iter().flat_map(|set| set.slots.iter().flatten()).count()
    }
}

/// The set of a hash, by bytes that do not choose its cell.
fn set_of(hash: &KeyHash) -> usize {
    let [_, _, high, low, ..] = hash.0;
    usize::from(u16::from_be_bytes([high, low])) % SETS
}
