//! Writes of cells that only the leader may write.
//!
//! A VM may be suspended for longer than its leadership lasts and then go on as if it led. So a leader reads the version of
//! a cell, checks that it still leads, and then writes with compare-and-swap: a former leader sees the new leader in the
//! check, or its write fails because the new leader has written the cell.

use super::election::{Fencing, NodeId, check};
use super::{Cell, CellKey, Cells, SharedData};

/// Another VM leads: this one must stop writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another VM leads now")]
pub struct NotLeader;

/// Cells that are written after one check of the leadership.
pub(crate) const BATCH: usize = 64;

/// Writes the result of `change` to a cell, or nothing if the result is `None`.
///
/// # Errors
/// [`NotLeader`]; the cell is as it was then.
pub(crate) fn write(
    data: &SharedData<impl Cells>,
    me: NodeId,
    key: CellKey,
    change: &dyn Fn(&[u8]) -> Option<Vec<u8>>,
) -> Result<(), NotLeader> {
    loop {
        let (old, seen) = read(data, key);
        let Some(new) = change(&old) else { return Ok(()) };
        check(data, me).ok_or(NotLeader)?;
        // Only leaders write these cells: the writer in between led a moment ago or leads now. Check again.
        if data.put(key, &new, seen) == Ok(()) {
            return Ok(());
        }
    }
}

/// Computes the new content of a cell from its number, its old content and the fencing; `None` leaves the cell as it is.
pub(crate) type Change<'a> = &'a dyn Fn(u16, &[u8], Fencing) -> Option<Vec<u8>>;

/// Writes many cells of records. One check of the leadership serves [`BATCH`] cells, all of which are read before it.
///
/// # Errors
/// [`NotLeader`]; some of the cells may be written then.
pub(crate) fn write_records(
    data: &SharedData<impl Cells>,
    me: NodeId,
    numbers: &[u16],
    change: Change<'_>,
) -> Result<(), NotLeader> {
    for batch in numbers.chunks(BATCH) {
        let cells: Vec<_> = batch.iter().map(|number| (*number, read(data, CellKey::Records(*number)))).collect();
        let fencing = check(data, me).ok_or(NotLeader)?;
        for (number, (old, seen)) in cells {
            let key = CellKey::Records(number);
            let Some(new) = change(number, &old, fencing) else { continue };
            if data.put(key, &new, seen).is_err() {
                write(data, me, key, &|old| change(number, old, Fencing::EveryCell))?;
            }
        }
    }
    Ok(())
}

/// The bytes of a cell, none if it was never written, and its version.
fn read(data: &SharedData<impl Cells>, key: CellKey) -> (Vec<u8>, Option<u32>) {
    data.get(key).map_or((Vec::new(), None), |Cell { value, version }| (value, Some(version)))
}
