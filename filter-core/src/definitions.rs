//! Roles and plans, which records refer to by number: the leader takes them from pages into one cell, every VM keeps a copy
//! of that cell and reads it anew when its version has changed.
//!
//! The version stands in a small cell of its own, written after the definitions: whoever sees the new version gets the new
//! definitions, and once the leader has written it, nobody uses the old ones. Only requests whose record refers to
//! something read it.

use std::cell::RefCell;
use std::rc::Rc;

use contract::definition::{Definition, Definitions};
use contract::page::{Entry, Page, Part};
use contract::record::Record;

use crate::cells::{Cells, Names};
use crate::lease::Holder;
use crate::store::{Deposed, write};

/// Writes what a page says of definitions. The first page of a snapshot holds all that there are.
///
/// # Errors
/// [`Deposed`]: whoever leads now will write them.
pub fn apply(cells: &impl Cells, names: &Names, me: Holder, page: &Page<'_>) -> Result<(), Deposed> {
    let anew = matches!(page.header.part, Part::Snapshot { from: 0, .. });
    let about = |entry| matches!(entry, Entry::Define { .. } | Entry::Undefine { .. });
    if !anew && !page.entries().any(about) {
        return Ok(());
    }
    write(cells, names, me, &names.definitions(), &|old| {
        let mut definitions = if anew { Definitions::default() } else { read(old) };
        for entry in page.entries() {
            match entry {
                Entry::Define { number, definition } => {
                    // Only pages that were checked get here, so a definition that does not decode is not to be expected.
                    definitions.0.insert(number, Definition::from_bytes(definition).unwrap_or_default());
                }
                Entry::Undefine { number } => {
                    definitions.0.remove(&number);
                }
                Entry::Put { .. } | Entry::Remove { .. } | Entry::Newer => {}
            }
        }
        Some(postcard::to_allocvec(&definitions).unwrap_or_default())
    })?;
    // Even if they are the same as before: a leader that was cut off may have written them and not their version.
    write(cells, names, me, &names.definitions_version(), &|old| {
        Some(version(old).unwrap_or_default().wrapping_add(1).to_le_bytes().to_vec())
    })
}

fn read(cell: &[u8]) -> Definitions {
    postcard::from_bytes(cell).unwrap_or_default()
}

fn version(cell: &[u8]) -> Option<u64> {
    cell.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes))
}

/// One VM's copy.
#[derive(Debug, Default)]
pub struct Cached {
    version: RefCell<Option<u64>>,
    definitions: RefCell<Rc<Definitions>>,
    none: Rc<Definitions>,
}

impl Cached {
    /// The definitions that a record needs: none if it refers to none, which costs nothing. As long as they do not change,
    /// they are the same in memory too.
    pub fn for_record(&self, cells: &impl Cells, names: &Names, record: &Record) -> Rc<Definitions> {
        if record.roles.is_empty() && record.further.plan.is_none() {
            return Rc::clone(&self.none);
        }
        let newest = cells.get(&names.definitions_version()).and_then(|cell| version(&cell.value));
        if *self.version.borrow() != newest {
            // The version was read first, so what is read now is as new as that or newer.
            let definitions = cells.get(&names.definitions()).map(|cell| read(&cell.value)).unwrap_or_default();
            *self.definitions.borrow_mut() = Rc::new(definitions);
            *self.version.borrow_mut() = newest;
        }
        Rc::clone(&self.definitions.borrow())
    }
}

#[cfg(test)]
mod tests {
    use contract::hash::BUCKETS;
    use contract::id::{Epoch, KeyId, OwnerId};
    use contract::page::{Header, PageWriter};

    use super::*;
    use crate::cells::memory::MemoryCells;
    use crate::lease::{LEASE_MS, hold};

    const ME: Holder = Holder(1);
    const CHANGES: Part = Part::Changes { after: 0 };
    const FIRST: Part = Part::Snapshot { from: 0, to: 9 };

    fn names() -> Names {
        Names::of("cluster", "default")
    }

    fn leading() -> MemoryCells {
        let cells = MemoryCells::default();
        assert!(hold(&cells, &names(), ME, 0));
        cells
    }

    fn page(part: Part, defined: &[(u32, &str)], undefined: &[u32]) -> Vec<u8> {
        let mut writer = PageWriter::new();
        for (number, scope) in defined {
            let definition = Definition { scopes: vec![(*scope).into()], ..Definition::default() };
            writer.define(*number, &definition.to_bytes().unwrap());
        }
        for number in undefined {
            writer.undefine(*number);
        }
        writer.finish(&Header { epoch: Epoch([9; 16]), revision: 1, total_keys: 1, part, filters: 0 }).unwrap()
    }

    fn apply_bytes(cells: &MemoryCells, me: Holder, bytes: &[u8]) -> Result<(), Deposed> {
        apply(cells, &names(), me, &Page::read(bytes).unwrap())
    }

    fn with_role() -> Record {
        Record { roles: vec![1], ..Record::plain(KeyId([1; 16]), OwnerId([2; 16])) }
    }

    fn scopes(cells: &MemoryCells, copy: &Cached) -> Vec<(u32, String)> {
        let definitions = copy.for_record(cells, &names(), &with_role());
        definitions.0.iter().map(|(number, definition)| (*number, definition.scopes.concat())).collect()
    }

    #[test]
    fn changes_add_replace_and_remove_and_a_snapshot_replaces_all() {
        let (cells, copy) = (leading(), Cached::default());
        assert_eq!(scopes(&cells, &copy), []);
        apply_bytes(&cells, ME, &page(CHANGES, &[(1, "a"), (2, "b")], &[])).unwrap();
        assert_eq!(scopes(&cells, &copy), [(1, "a".into()), (2, "b".into())]);
        apply_bytes(&cells, ME, &page(CHANGES, &[(2, "c"), (3, "d")], &[1, 7])).unwrap();
        assert_eq!(scopes(&cells, &copy), [(2, "c".into()), (3, "d".into())]);
        apply_bytes(&cells, ME, &page(FIRST, &[(4, "e")], &[])).unwrap();
        assert_eq!(scopes(&cells, &copy), [(4, "e".into())]);
        // The other pages of a snapshot say nothing of definitions.
        apply_bytes(&cells, ME, &page(Part::Snapshot { from: 9, to: BUCKETS }, &[], &[])).unwrap();
        assert_eq!(scopes(&cells, &copy), [(4, "e".into())]);
        apply_bytes(&cells, ME, &page(FIRST, &[], &[])).unwrap();
        assert_eq!(scopes(&cells, &copy), []);
    }

    #[test]
    fn a_record_that_refers_to_nothing_reads_nothing() {
        let (cells, copy) = (leading(), Cached::default());
        apply_bytes(&cells, ME, &page(FIRST, &[(1, "a")], &[])).unwrap();
        let plain = Record::plain(KeyId([1; 16]), OwnerId([2; 16]));
        assert_eq!(*copy.for_record(&cells, &names(), &plain), Definitions::default());
        assert_eq!(*copy.version.borrow(), None);
    }

    #[test]
    fn a_late_leader_cannot_put_old_definitions_over_new_ones() {
        let (cells, copy) = (leading(), Cached::default());
        let newer = page(CHANGES, &[(1, "new")], &[]);
        cells.before_next_put(move |cells| {
            assert!(hold(cells, &names(), Holder(2), LEASE_MS));
            apply_bytes(cells, Holder(2), &newer).unwrap();
        });
        assert_eq!(apply_bytes(&cells, ME, &page(CHANGES, &[(1, "old")], &[])), Err(Deposed));
        assert_eq!(scopes(&cells, &copy), [(1, "new".into())]);
    }

    #[test]
    fn a_copy_that_was_taken_between_the_two_writes_is_taken_again() {
        let (cells, copy) = (leading(), Cached::default());
        apply_bytes(&cells, ME, &page(CHANGES, &[(1, "old")], &[])).unwrap();
        assert_eq!(scopes(&cells, &copy), [(1, "old".into())]);
        let bytes = page(CHANGES, &[(1, "new")], &[]);
        // The leader is cut off once the definitions are written; its successor applies the page again.
        let half = Definitions([(1, Definition { scopes: vec!["new".into()], ..Definition::default() })].into());
        let seen = cells.get(&names().definitions()).unwrap().version;
        cells.put(&names().definitions(), &postcard::to_allocvec(&half).unwrap(), Some(seen)).unwrap();
        assert_eq!(scopes(&cells, &copy), [(1, "old".into())]);
        apply_bytes(&cells, ME, &bytes).unwrap();
        assert_eq!(scopes(&cells, &copy), [(1, "new".into())]);
    }
}
