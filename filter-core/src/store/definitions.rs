//! Roles, plans and policies: the leader writes those of each update into one cell, and every VM keeps a copy that it reads again
//! when the version has changed.
//!
//! The version has a cell of its own, written after the definitions. A VM that sees the new version gets the new
//! definitions, and once the leader has written the version, no VM uses the old ones. A VM reads the version when the store has
//! a new generation, and for each record that it reads and that references a role or plan: the record may be newer than the
//! generation that the VM knows.

use std::cell::{Cell as Slot, RefCell};
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use contract::definition::{Definition, Definitions};
use contract::record::Record;
use contract::update::{Entry, Part, Update};

use crate::shared::election::NodeId;
use crate::shared::fenced::{NotLeader, write};
use crate::shared::{CellKey, Cells, SharedData};

/// Writes the definitions of an update. The first update of a snapshot has all of them.
///
/// # Errors
/// [`NotLeader`]; the new leader writes them.
pub fn apply(data: &SharedData<impl Cells>, me: NodeId, update: &Update<'_>) -> Result<(), NotLeader> {
    let is_complete = matches!(update.header.part, Part::Snapshot { from: 0, .. });
    let is_definition = |entry| matches!(entry, Entry::Define { .. } | Entry::Undefine { .. });
    if !is_complete && !update.entries().any(is_definition) {
        return Ok(());
    }
    write(data, me, CellKey::Definitions, &|old| {
        let mut definitions = if is_complete { BTreeMap::new() } else { read(old) };
        for entry in update.entries() {
            match entry {
                Entry::Define { number, definition } => {
                    // Updates are checked before they are applied, so every definition decodes.
                    definitions.insert(number, Definition::from_bytes(&definition).unwrap_or_default());
                }
                Entry::Undefine { number } => {
                    definitions.remove(&number);
                }
                Entry::Put { .. } | Entry::Remove { .. } => {}
            }
        }
        Some(postcard::to_allocvec(&definitions).unwrap_or_default())
    })?;
    // Also if they are the same as before: a former leader may have written them without the version.
    write(data, me, CellKey::DefinitionsVersion, &|old| {
        Some(version(old).unwrap_or_default().wrapping_add(1).to_le_bytes().to_vec())
    })
}

fn read(cell: &[u8]) -> BTreeMap<u32, Definition> {
    postcard::from_bytes(cell).unwrap_or_default()
}

fn version(cell: &[u8]) -> Option<u64> {
    cell.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes))
}

/// One VM's copy of the definitions.
#[derive(Debug, Default)]
pub struct DefinitionsCopy {
    /// The generation of the store in which the copy was last compared with the cells.
    generation: Slot<Option<NonZeroU64>>,
    version: Slot<Option<u64>>,
    definitions: RefCell<Arc<Definitions>>,
    none: Arc<Definitions>,
}

impl DefinitionsCopy {
    /// The definitions for a record. A record without roles and plan gets none and reads nothing. As long as the definitions
    /// do not change, all calls return the same allocation.
    pub fn for_record(&self, data: &SharedData<impl Cells>, record: &Record) -> Arc<Definitions> {
        if record.roles.is_empty() && record.plan.is_none() {
            return Arc::clone(&self.none);
        }
        self.newest(data)
    }

    /// The definitions in this generation of the store. `None`: the host does not keep the generation, so each call reads the
    /// version.
    pub fn in_generation(&self, data: &SharedData<impl Cells>, generation: Option<NonZeroU64>) -> Arc<Definitions> {
        if generation.is_some() && self.generation.get() == generation {
            return Arc::clone(&self.definitions.borrow());
        }
        let definitions = self.newest(data);
        self.generation.set(generation);
        definitions
    }

    fn newest(&self, data: &SharedData<impl Cells>) -> Arc<Definitions> {
        let newest = data.get(CellKey::DefinitionsVersion).and_then(|cell| version(&cell.value));
        if self.version.get() != newest {
            // The version was read first, so the definitions are as new as it or newer.
            let definitions = data.get(CellKey::Definitions).map(|cell| read(&cell.value)).unwrap_or_default();
            *self.definitions.borrow_mut() = Arc::new(Definitions::new(definitions));
            self.version.set(newest);
        }
        Arc::clone(&self.definitions.borrow())
    }
}

#[cfg(test)]
mod tests {
    use contract::hash::BUCKETS;
    use contract::id::{Epoch, KeyId, OwnerId};
    use contract::update::{Header, UpdateWriter};

    use super::*;
    use crate::mock::{TestData, new_data};
    use crate::shared::election::{TERM_MS, acquire};

    const ME: NodeId = NodeId(1);
    const CHANGES: Part = Part::Changes { after: 0 };
    const FIRST: Part = Part::Snapshot { from: 0, to: 9 };

    fn leading() -> TestData {
        let data = new_data();
        assert!(acquire(&data, ME, 0));
        data
    }

    fn update(part: Part, defined: &[(u32, &str)], undefined: &[u32]) -> Vec<u8> {
        let mut writer = UpdateWriter::default();
        for (number, scope) in defined {
            let definition = Definition { scopes: vec![(*scope).into()], ..Definition::default() };
            writer.define(*number, &definition.to_bytes().unwrap());
        }
        for number in undefined {
            writer.undefine(*number);
        }
        writer.finish(&Header { epoch: Epoch([9; 16]), revision: 1, total_keys: 1, part }).unwrap()
    }

    fn apply_bytes(data: &TestData, me: NodeId, bytes: &[u8]) -> Result<(), NotLeader> {
        apply(data, me, &Update::read(bytes).unwrap())
    }

    fn with_role() -> Record {
        Record { roles: vec![1], ..Record::plain(KeyId([1; 16]), OwnerId([2; 16])) }
    }

    fn scopes(data: &TestData, copy: &DefinitionsCopy) -> Vec<(u32, String)> {
        let definitions = copy.for_record(data, &with_role());
        definitions.by_number().iter().map(|(number, definition)| (*number, definition.scopes.concat())).collect()
    }

    #[test]
    fn changes_add_replace_and_remove_and_a_snapshot_replaces_all() {
        let (data, copy) = (leading(), DefinitionsCopy::default());
        assert_eq!(scopes(&data, &copy), []);
        apply_bytes(&data, ME, &update(CHANGES, &[(1, "a"), (2, "b")], &[])).unwrap();
        assert_eq!(scopes(&data, &copy), [(1, "a".into()), (2, "b".into())]);
        apply_bytes(&data, ME, &update(CHANGES, &[(2, "c"), (3, "d")], &[1, 7])).unwrap();
        assert_eq!(scopes(&data, &copy), [(2, "c".into()), (3, "d".into())]);
        apply_bytes(&data, ME, &update(FIRST, &[(4, "e")], &[])).unwrap();
        assert_eq!(scopes(&data, &copy), [(4, "e".into())]);
        // The other updates of a snapshot say nothing of definitions.
        apply_bytes(&data, ME, &update(Part::Snapshot { from: 9, to: BUCKETS }, &[], &[])).unwrap();
        assert_eq!(scopes(&data, &copy), [(4, "e".into())]);
        apply_bytes(&data, ME, &update(FIRST, &[], &[])).unwrap();
        assert_eq!(scopes(&data, &copy), []);
    }

    #[test]
    fn a_record_without_roles_and_plan_reads_no_cell() {
        let (data, copy) = (leading(), DefinitionsCopy::default());
        apply_bytes(&data, ME, &update(FIRST, &[(1, "a")], &[])).unwrap();
        let plain = Record::plain(KeyId([1; 16]), OwnerId([2; 16]));
        assert_eq!(*copy.for_record(&data, &plain), Definitions::default());
        assert_eq!(copy.version.get(), None);
    }

    #[test]
    fn a_former_leader_cannot_overwrite_newer_definitions() {
        let (data, copy) = (leading(), DefinitionsCopy::default());
        let newer = update(CHANGES, &[(1, "new")], &[]);
        let other = data.clone();
        data.host().before_next_put(move || {
            assert!(acquire(&other, NodeId(2), TERM_MS));
            apply_bytes(&other, NodeId(2), &newer).unwrap();
        });
        assert_eq!(apply_bytes(&data, ME, &update(CHANGES, &[(1, "old")], &[])), Err(NotLeader));
        assert_eq!(scopes(&data, &copy), [(1, "new".into())]);
    }

    #[test]
    fn a_copy_read_between_the_two_writes_is_read_again() {
        let (data, copy) = (leading(), DefinitionsCopy::default());
        apply_bytes(&data, ME, &update(CHANGES, &[(1, "old")], &[])).unwrap();
        assert_eq!(scopes(&data, &copy), [(1, "old".into())]);
        let bytes = update(CHANGES, &[(1, "new")], &[]);
        // The leader is cut off once the definitions are written; its successor applies the update again.
        let half = BTreeMap::from([(1_u32, Definition { scopes: vec!["new".into()], ..Definition::default() })]);
        let seen = data.get(CellKey::Definitions).unwrap().version;
        data.put(CellKey::Definitions, &postcard::to_allocvec(&half).unwrap(), Some(seen)).unwrap();
        assert_eq!(scopes(&data, &copy), [(1, "old".into())]);
        apply_bytes(&data, ME, &bytes).unwrap();
        assert_eq!(scopes(&data, &copy), [(1, "new".into())]);
    }

    #[test]
    fn a_copy_is_compared_with_the_cells_once_in_each_generation() {
        let (data, copy) = (leading(), DefinitionsCopy::default());
        let numbers = |generation| {
            let reads = data.host().reads();
            let definitions = copy.in_generation(&data, NonZeroU64::new(generation));
            (definitions.by_number().keys().copied().collect::<Vec<_>>(), data.host().reads() - reads)
        };
        apply_bytes(&data, ME, &update(CHANGES, &[(1, "a")], &[])).unwrap();
        assert_eq!((numbers(1), numbers(1)), ((vec![1], 2), (vec![1], 0)));
        // Another generation with the same definitions, then one with others.
        assert_eq!((numbers(2), numbers(2)), ((vec![1], 1), (vec![1], 0)));
        apply_bytes(&data, ME, &update(CHANGES, &[(2, "b")], &[])).unwrap();
        assert_eq!((numbers(3), numbers(3)), ((vec![1, 2], 2), (vec![1, 2], 0)));
        // Without a generation each call looks.
        assert_eq!((numbers(0), numbers(0)), ((vec![1, 2], 1), (vec![1, 2], 1)));
    }
}
