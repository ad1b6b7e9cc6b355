//! The key store of a process whose VMs share cells of bytes only: records and definitions in shared data, and in each VM a
//! cache of keys.

use std::num::NonZeroU64;
use std::sync::Arc;

use contract::definition::Definitions;
use contract::hash::KeyHash;
use contract::pepper::{Pepper, hashes};
use contract::update::Update;

use crate::host::Host;
use crate::keys::{KeyLookup, KeyStore, StoredKey};
use crate::shared::election::NodeId;
use crate::shared::fenced::NotLeader;
use crate::shared::{Cells, SharedData};

pub mod cache;
pub mod definitions;
pub mod generation;
pub mod records;
pub mod state;

use cache::KeyCache;
use definitions::DefinitionsCopy;
use generation::Generation;

/// One VM's view of the store.
///
/// The leader raises the [`Generation`] after its writes and before it reports that they are done. A look-up reads the
/// generation first and the cells after it, and caches the result under that generation; the cache returns entries of the
/// current generation only. So every look-up that begins after a change is done reads the cells.
#[derive(Debug)]
pub struct CellStore<H> {
    data: SharedData<H>,
    generation: Generation<H>,
    cache: KeyCache,
    definitions: DefinitionsCopy,
}

impl<H: Host> CellStore<H> {
    /// The store in these cells, with an empty cache.
    pub fn new(data: SharedData<H>) -> Self {
        let generation = Generation::define(data.host());
        Self { data, generation, cache: KeyCache::default(), definitions: DefinitionsCopy::default() }
    }

    /// The number of the store's generation; `None` if the host does not keep it, or it was never raised.
    pub fn generation(&self) -> Option<NonZeroU64> {
        self.generation.current()
    }

    /// Finds a key. `generation` was read before. Without one, the cache is not used.
    fn find_as_of(
        &self,
        generation: Option<NonZeroU64>,
        hash: &KeyHash,
        pepper: Option<&Pepper>,
    ) -> Option<Arc<StoredKey>> {
        let Some(generation) = generation else { return self.read(hash, pepper) };
        if let Some(key) = self.cache.get(generation, hash) {
            return Some(key);
        }
        let key = self.read(hash, pepper)?;
        self.cache.insert(generation, *hash, &key);
        Some(key)
    }

    fn read(&self, hash: &KeyHash, pepper: Option<&Pepper>) -> Option<Arc<StoredKey>> {
        let record = hashes(*hash, pepper).find_map(|hash| records::find(&self.data, &hash))?;
        let definitions = self.definitions.for_record(&self.data, &record);
        self.cache.keep_only(&definitions);
        Some(Arc::new(StoredKey::new(record, definitions)))
    }
}

impl<H: Host> KeyLookup for CellStore<H> {
    fn definitions(&self) -> Arc<Definitions> {
        self.definitions.in_generation(&self.data, self.generation.current())
    }

    fn find(&self, hash: &KeyHash, pepper: Option<&Pepper>) -> Option<Arc<StoredKey>> {
        self.find_as_of(self.generation.current(), hash, pepper)
    }
}

impl<H: Host> KeyStore for CellStore<H> {
    fn apply(&self, me: NodeId, update: &Update<'_>) -> Result<(), NotLeader> {
        let applied = write(&self.data, me, update);
        // Also after a failure: what was written by then is visible.
        self.generation.raise();
        applied
    }
}

/// Writes an update into the cells: definitions first, so that no record references a missing one.
///
/// # Errors
/// [`NotLeader`]; part of the update may be written then.
pub fn write(data: &SharedData<impl Cells>, me: NodeId, update: &Update<'_>) -> Result<(), NotLeader> {
    definitions::apply(data, me, update)?;
    records::apply(data, me, update)
}

#[cfg(test)]
mod tests;
