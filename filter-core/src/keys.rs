//! Look-up of keys and policies, as traits. [`crate::store`] is the look-up in cells of bytes, which is all that VMs of Envoy
//! share; a host with shared memory may have a table of its own.

use std::sync::Arc;

use contract::definition::Definitions;
use contract::hash::KeyHash;
use contract::pepper::Pepper;
use contract::record::Record;
use contract::update::Update;

use crate::shared::election::NodeId;
use crate::shared::fenced::NotLeader;

/// Look-up of keys and policies.
pub trait KeyLookup {
    /// The roles, plans and policies as of now.
    fn definitions(&self) -> Arc<Definitions>;

    /// Finds a key by its SHA-256 or, if there is a pepper, by the peppered hash that imported keys are stored under. `None`:
    /// the store has no such key, or is not loaded yet.
    fn find(&self, hash: &KeyHash, pepper: Option<&Pepper>) -> Option<Arc<StoredKey>>;
}

/// A store of keys that the leader keeps up to date.
pub trait KeyStore: KeyLookup {
    /// Applies an update of the control plane. When this returns, every look-up that begins finds what the update says.
    ///
    /// # Errors
    /// [`NotLeader`] if `me` does not lead any longer. Part of the update may be applied; the new leader applies all of it.
    fn apply(&self, me: NodeId, update: &Update<'_>) -> Result<(), NotLeader>;
}

/// A key of the store, with all that a request needs of it as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// Its record.
    pub record: Record,
    /// The roles and plans that the record references.
    pub definitions: Arc<Definitions>,
    /// The owner's id.
    pub owner_id: Box<str>,
    /// The key's id.
    pub key_id: Box<str>,
    /// All its scopes, separated by spaces; `None` if it has none.
    pub scopes: Option<Box<str>>,
}

impl StoredKey {
    /// The key of a record.
    #[must_use]
    pub fn new(record: Record, definitions: Arc<Definitions>) -> Self {
        let scopes = definitions.scopes(&record).join(" ");
        let scopes = (!scopes.is_empty()).then(|| scopes.into_boxed_str());
        let (owner_id, key_id) = (record.owner_id.to_string().into(), record.key_id.to_string().into());
        Self { record, definitions, owner_id, key_id, scopes }
    }
}
