//! Envoy's shared data, as this filter uses it: named cells of bytes that all VMs of the process see, each with a version
//! that changes whenever the cell is written. There is no delete, so names come from bounded sets only.

use contract::budget::Stock;

/// A cell as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Its bytes; an emptied cell has none.
    pub value: Vec<u8>,
    /// To be given back when the cell is written, as proof that nobody wrote it in between.
    pub version: u32,
}

/// Somebody else wrote the cell since it was read. Read it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cell was written by another VM in between")]
pub struct Raced;

/// What a filter VM does with cells. `host` does it in Envoy; tests do it in memory.
pub trait Cells {
    /// Reads a cell; `None` if it was never written.
    fn get(&self, name: &str) -> Option<Cell>;

    /// Writes a cell that is still as it was `seen`, where `None` means that it was never written.
    ///
    /// # Errors
    /// [`Raced`] if it no longer is; nothing is written then.
    fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Raced>;
}

/// How often [`update`] starts over. Each start-over means that another VM got through, so that even with hundreds of
/// workers this is only reached if something is badly wrong with the host.
const UPDATE_ATTEMPTS: usize = 1_000;

/// Reads a cell, computes its new value and writes it, from the start again whenever another VM came in between.
/// `change` sees the present bytes (none for a new cell) and returns the bytes to write, or `Err` with the result if
/// nothing is to be written; with the bytes it returns the result for the case that they are written.
///
/// # Errors
/// [`Raced`] after `UPDATE_ATTEMPTS`; nothing was written then.
pub fn update<T>(
    cells: &impl Cells,
    name: &str,
    mut change: impl FnMut(&[u8]) -> Result<(Vec<u8>, T), T>,
) -> Result<T, Raced> {
    let mut result = None;
    // The loop is compiled once for all kinds of results.
    update_untyped(cells, name, &mut |cell| match change(cell) {
        Ok((value, written)) => {
            result = Some(written);
            Some(value)
        }
        Err(unwritten) => {
            result = Some(unwritten);
            None
        }
    })?;
    result.ok_or(Raced)
}

fn update_untyped(
    cells: &impl Cells,
    name: &str,
    change: &mut dyn FnMut(&[u8]) -> Option<Vec<u8>>,
) -> Result<(), Raced> {
    for _ in 0..UPDATE_ATTEMPTS {
        let cell = cells.get(name);
        let (value, seen) = cell.map_or((Vec::new(), None), |cell| (cell.value, Some(cell.version)));
        let Some(value) = change(&value) else { return Ok(()) };
        if cells.put(name, &value, seen).is_ok() {
            return Ok(());
        }
    }
    Err(Raced)
}

/// The names of the cells of one store. The prefix keeps stores of different control planes, other filters and other
/// versions of the cells' layout apart: Istio gives every filter of an Envoy the same shared data.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Names {
    prefix: String,
}

/// The layout of all cells, as part of their names. To be raised with any change to what a cell holds.
const LAYOUT: u32 = 5;

impl Names {
    /// The names for the store of this name that is fed through this Envoy cluster.
    #[must_use]
    pub fn of(cluster: &str, store: &str) -> Self {
        let mut both = crc32fast::Hasher::new();
        both.update(cluster.as_bytes());
        both.update(b"\0");
        both.update(store.as_bytes());
        Self { prefix: format!("portcullis{LAYOUT}:{:08x}:", both.finalize()) }
    }

    /// A cell of the store.
    #[must_use]
    pub fn records(&self, cell: u16) -> String {
        self.numbered('b', cell)
    }

    /// A cell of the rate limiter for keys.
    #[must_use]
    pub fn limiter(&self, cell: u16) -> String {
        self.numbered('l', cell)
    }

    /// A cell of the rate limiter for addresses.
    #[must_use]
    pub fn addresses(&self, cell: u16) -> String {
        self.numbered('a', cell)
    }

    /// What this Envoy holds of stocks of one kind.
    #[must_use]
    pub fn stock(&self, stock: Stock, cell: u16) -> String {
        let kind = match stock {
            Stock::Share => 's',
            Stock::Quota => 'q',
            Stock::Credits => 'c',
            Stock::Balance => 't',
            // Is told and not kept.
            Stock::Used => 'x',
        };
        self.numbered(kind, cell)
    }

    /// What records refer to by number.
    #[must_use]
    pub fn definitions(&self) -> String {
        self.named("definitions")
    }

    /// How often the definitions were written.
    #[must_use]
    pub fn definitions_version(&self) -> String {
        self.named("definitions-version")
    }

    /// A cell in which workers lay their counts for the leader.
    #[must_use]
    pub fn usage(&self, slot: u16) -> String {
        self.numbered('u', slot)
    }

    /// What the leader has collected and not yet seen acknowledged.
    #[must_use]
    pub fn outbox(&self) -> String {
        self.named("outbox")
    }

    /// How far the store is.
    #[must_use]
    pub fn state(&self) -> String {
        self.named("state")
    }

    /// Who leads.
    #[must_use]
    pub fn lease(&self) -> String {
        self.named("lease")
    }

    /// How many VMs have asked for a usage slot.
    #[must_use]
    pub fn slots(&self) -> String {
        self.named("slots")
    }

    fn named(&self, name: &str) -> String {
        let mut full = String::with_capacity(self.prefix.len().saturating_add(name.len()));
        full.push_str(&self.prefix);
        full.push_str(name);
        full
    }

    fn numbered(&self, kind: char, number: u16) -> String {
        let mut full = String::with_capacity(self.prefix.len().saturating_add(5));
        full.push_str(&self.prefix);
        full.push(kind);
        for shift in [12_u32, 8, 4, 0] {
            let digit = u32::from(number).checked_shr(shift).unwrap_or_default() & 0xf;
            full.push(char::from_digit(digit, 16).unwrap_or('0'));
        }
        full
    }
}

#[cfg(test)]
pub(crate) mod memory {
    //! Cells in memory, with Envoy's semantics, and a hook to let another VM come in between.

    use std::cell::{Cell as Slot, RefCell};
    use std::collections::BTreeMap;

    use super::{Cell, Cells, Raced};

    type BeforePut = Box<dyn FnOnce(&MemoryCells)>;

    #[derive(Default)]
    pub(crate) struct MemoryCells {
        cells: RefCell<BTreeMap<String, Cell>>,
        versions: Slot<u32>,
        pub(crate) reads: Slot<u32>,
        pub(crate) writes: Slot<u32>,
        before_put: RefCell<Option<(String, BeforePut)>>,
    }

    impl MemoryCells {
        /// Lets `act` happen once, just before the next write.
        pub(crate) fn before_next_put(&self, act: impl FnOnce(&MemoryCells) + 'static) {
            self.before_put_of("", act);
        }

        /// Lets `act` happen once, just before the next write of a cell with `part` in its name.
        pub(crate) fn before_put_of(&self, part: &str, act: impl FnOnce(&MemoryCells) + 'static) {
            *self.before_put.borrow_mut() = Some((part.to_owned(), Box::new(act)));
        }

        pub(crate) fn names(&self) -> Vec<String> {
            self.cells.borrow().keys().cloned().collect()
        }
    }

    impl Cells for MemoryCells {
        fn get(&self, name: &str) -> Option<Cell> {
            self.reads.set(self.reads.get() + 1);
            self.cells.borrow().get(name).cloned()
        }

        fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Raced> {
            let act = self.before_put.borrow_mut().take_if(|(part, _)| name.contains(part.as_str()));
            if let Some((_, act)) = act {
                act(self);
            }
            let present = self.cells.borrow().get(name).map(|cell| cell.version);
            if present != seen {
                return Err(Raced);
            }
            self.versions.set(self.versions.get() + 1);
            self.writes.set(self.writes.get() + 1);
            let cell = Cell { value: value.to_vec(), version: self.versions.get() };
            self.cells.borrow_mut().insert(name.to_owned(), cell);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::memory::MemoryCells;
    use super::*;

    #[test]
    fn an_update_that_was_overtaken_starts_over_from_the_newer_value() {
        let cells = MemoryCells::default();
        let append = |cells: &MemoryCells, byte: u8| {
            update(cells, "cell", |old| {
                let mut new = old.to_vec();
                new.push(byte);
                Ok::<_, ()>((new, ()))
            })
        };
        cells.before_next_put(move |cells| append(cells, 1).unwrap());
        append(&cells, 2).unwrap();
        assert_eq!(cells.get("cell").unwrap().value, [1, 2]);
    }

    #[test]
    fn an_update_that_declines_writes_nothing() {
        let cells = MemoryCells::default();
        assert_eq!(update(&cells, "cell", |_| Err(7)), Ok(7));
        assert_eq!(cells.get("cell"), None);
    }

    #[test]
    fn stores_of_different_clusters_or_names_share_no_cell() {
        let names =
            [Names::of("a", "default"), Names::of("b", "default"), Names::of("a", "other"), Names::of("ad", "efault")];
        for (place, one) in names.iter().enumerate() {
            for other in names.iter().skip(place + 1) {
                assert_ne!(one.records(0xff), other.records(0xff));
            }
        }
        assert!(names[0].records(0xff).ends_with(":b00ff"));
        let [a, ..] = &names;
        let stocks = [Stock::Share, Stock::Quota, Stock::Credits, Stock::Balance].map(|stock| a.stock(stock, 1));
        let mut kinds = vec![a.records(1), a.limiter(1), a.addresses(1), a.usage(1)];
        kinds.extend(stocks);
        let all = kinds.len();
        kinds.sort();
        kinds.dedup();
        assert_eq!(kinds.len(), all);
    }
}
