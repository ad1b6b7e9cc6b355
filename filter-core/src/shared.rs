//! The host's shared data: named cells of bytes that all VMs of the process see, each with a version that changes whenever
//! the cell is written. Cells cannot be deleted, so names come from bounded sets only.
//!
//! VMs share nothing else. Two rules build on it: [`election`] settles which VM leads, and [`fenced`] writes cells so that a
//! VM that no longer leads cannot overwrite its successor.

pub mod election;
pub mod fenced;

/// A cell as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Its bytes; empty if the cell was emptied.
    pub value: Vec<u8>,
    /// Passed back when the cell is written, as proof that it was not written in between.
    pub version: u32,
}

/// Another VM wrote the cell since it was read. Read it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another VM wrote the cell in between")]
pub struct Conflict;

/// Cells with compare-and-swap, as a host offers them.
pub trait Cells {
    /// Reads a cell; `None` if it was never written (returns data).
    fn get(&self, name: &str) -> Option<Cell>;

    /// Writes a cell whose version is still `seen`, where `None` means that it was never written.
    ///
    /// # Errors
    /// [`Conflict`] if the version is another; the cell is unchanged then.
    fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Conflict>;
}

/// How often [`SharedData::update`] starts over. Each time another VM has succeeded, so only a defect of the host can use
/// this up, even with hundreds of workers.
const UPDATE_ATTEMPTS: usize = 1_000;

/// The cells of one key store.
///
/// The prefix of their names separates stores of different control planes, other filters and other layouts of cells: Istio
/// gives all filters of an Envoy the same shared data.
#[derive(Clone, Debug)]
pub struct SharedData<C> {
    cells: C,
    prefix: String,
}

/// The layout of all cells, as part of their names. Raise it with any change to the content of a cell.
const LAYOUT: u32 = 1;

impl<C: Cells> SharedData<C> {
    /// The cells of the store of this name that is fed through this cluster of the host.
    pub fn new(cells: C, cluster: &str, store: &str) -> Self {
        Self { cells, prefix: prefix(cluster, store) }
    }

    /// Whether these are the cells of the store of this name that is fed through this cluster.
    pub fn is_of(&self, cluster: &str, store: &str) -> bool {
        self.prefix == prefix(cluster, store)
    }

    /// The host.
    pub const fn host(&self) -> &C {
        &self.cells
    }

    /// Reads a cell; `None` if it was never written.
    pub fn get(&self, key: CellKey) -> Option<Cell> {
        self.cells.get(&key.name(&self.prefix))
    }

    /// Writes a cell whose version is still `seen`.
    ///
    /// # Errors
    /// [`Conflict`] if the version is another; the cell is unchanged then.
    pub fn put(&self, key: CellKey, value: &[u8], seen: Option<u32>) -> Result<(), Conflict> {
        self.cells.put(&key.name(&self.prefix), value, seen)
    }

    /// Reads a cell, computes its new value and writes it; starts over whenever another VM wrote the cell in between.
    /// `change` gets the bytes of the cell (none for a new one). It returns the bytes to write and a result, or `Err` with
    /// the result to write nothing.
    ///
    /// # Errors
    /// [`Conflict`] after `UPDATE_ATTEMPTS`; nothing is written then.
    pub fn update<T>(
        &self,
        key: CellKey,
        mut change: impl FnMut(&[u8]) -> Result<(Vec<u8>, T), T>,
    ) -> Result<T, Conflict> {
        let mut result = None;
        // The loop is compiled once for all types of results.
        self.update_untyped(key, &mut |cell| match change(cell) {
            Ok((value, written)) => {
                result = Some(written);
                Some(value)
            }
            Err(unwritten) => {
                result = Some(unwritten);
                None
            }
        })?;
        result.ok_or(Conflict)
    }

    fn update_untyped(&self, key: CellKey, change: &mut dyn FnMut(&[u8]) -> Option<Vec<u8>>) -> Result<(), Conflict> {
        let name = key.name(&self.prefix);
        for _ in 0..UPDATE_ATTEMPTS {
            let cell = self.cells.get(&name);
            let (value, seen) = cell.map_or((Vec::new(), None), |cell| (cell.value, Some(cell.version)));
            let Some(value) = change(&value) else { return Ok(()) };
            if self.cells.put(&name, &value, seen).is_ok() {
                return Ok(());
            }
        }
        Err(Conflict)
    }
}

fn prefix(cluster: &str, store: &str) -> String {
    let mut both = crc32fast::Hasher::new();
    both.update(cluster.as_bytes());
    both.update(b"\0");
    both.update(store.as_bytes());
    format!("portcullis{LAYOUT}:{:08x}:", both.finalize())
}

/// Which cell of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CellKey {
    /// Records of keys.
    Records(u16),
    /// How far the store is.
    State,
    /// Roles, plans and policies.
    Definitions,
    /// The version of [`CellKey::Definitions`].
    DefinitionsVersion,
    /// Limits of keys and users.
    Limits(u16),
    /// Rate limits of client addresses.
    ClientLimits(u16),
    /// The Envoy's contact with the control plane about shared limits.
    Contact,
    /// Pools of VMs that have ended.
    EndedPools,
    /// Counts that workers publish for the leader.
    Usage(u16),
    /// How many VMs have asked for a usage slot.
    UsageSlots,
    /// Usage that the leader has collected and the control plane has not acknowledged.
    Outbox,
    /// Which VM leads.
    Election,
}

impl CellKey {
    fn name(self, prefix: &str) -> String {
        let (kind, number) = match self {
            Self::Records(number) => ("b", Some(number)),
            Self::Limits(number) => ("l", Some(number)),
            Self::ClientLimits(number) => ("a", Some(number)),
            Self::Usage(number) => ("u", Some(number)),
            Self::State => ("state", None),
            Self::Definitions => ("definitions", None),
            Self::DefinitionsVersion => ("definitions-version", None),
            Self::UsageSlots => ("slots", None),
            Self::Outbox => ("outbox", None),
            Self::Contact => ("contact", None),
            Self::EndedPools => ("ended-pools", None),
            Self::Election => ("lease", None),
        };
        let mut name = String::with_capacity(prefix.len().saturating_add(kind.len()).saturating_add(4));
        name.push_str(prefix);
        name.push_str(kind);
        if let Some(number) = number {
            // Four hexadecimal digits.
            for shift in [12_u32, 8, 4, 0] {
                let digit = u32::from(number).checked_shr(shift).unwrap_or_default() & 0xf;
                name.push(char::from_digit(digit, 16).unwrap_or('0'));
            }
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{TestData, new_data};

    #[test]
    fn an_update_that_meets_a_newer_value_starts_over_from_it() {
        let data = new_data();
        let append = |data: &TestData, byte: u8| {
            data.update(CellKey::State, |old| {
                let mut new = old.to_vec();
                new.push(byte);
                Ok::<_, ()>((new, ()))
            })
        };
        let other = data.clone();
        data.host().before_next_put(move || append(&other, 1).unwrap());
        append(&data, 2).unwrap();
        assert_eq!(data.get(CellKey::State).unwrap().value, [1, 2]);
    }

    #[test]
    fn an_update_that_declines_writes_nothing() {
        let data = new_data();
        assert_eq!(data.update(CellKey::State, |_| Err(7)), Ok(7));
        assert_eq!(data.get(CellKey::State), None);
    }

    #[test]
    fn an_update_gives_up_on_a_host_that_refuses_every_write() {
        let data = new_data();
        data.host().refuse_writes(true);
        assert_eq!(data.update(CellKey::State, |_| Ok((vec![1], ()))), Err(Conflict));
        assert_eq!(data.get(CellKey::State), None);
    }

    #[test]
    fn stores_of_different_clusters_or_names_share_no_cell() {
        let stores = [("a", "default"), ("b", "default"), ("a", "other"), ("ad", "efault")];
        let prefixes = stores.map(|(cluster, store)| prefix(cluster, store));
        for (place, one) in prefixes.iter().enumerate() {
            assert!(prefixes.iter().skip(place + 1).all(|other| one != other));
        }
        let data = new_data();
        assert!(data.is_of("cluster", "default") && !data.is_of("cluster", "other"));
        assert!(CellKey::Records(0xff).name(&data.prefix).ends_with(":b00ff"));
        let mut kinds = vec![CellKey::Records(1), CellKey::Limits(1), CellKey::ClientLimits(1), CellKey::Usage(1)];
        kinds.extend([CellKey::State, CellKey::Definitions, CellKey::DefinitionsVersion, CellKey::UsageSlots]);
        kinds.extend([CellKey::Outbox, CellKey::Election, CellKey::Contact, CellKey::EndedPools]);
        let mut names: Vec<String> = kinds.iter().map(|key| key.name("p:")).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), kinds.len());
    }
}
