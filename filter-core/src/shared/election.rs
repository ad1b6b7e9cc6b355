//! The election of the leader: the one VM that speaks with the control plane and writes the store.
//!
//! A cell names the leader and when its term ends. The leader extends its term on every tick; any VM takes over once the
//! term has ended. Writes of the leader are fenced, see [`super::fenced`].
//!
//! ```text
//! cell: node (8 bytes) │ end of the term in milliseconds of Unix time (8 bytes) │ 1 after any takeover    little-endian
//! ```

use super::{CellKey, Cells, SharedData};
use crate::time::is_ahead;

/// How long a term lasts unless it is extended.
pub const TERM_MS: u64 = 3_000;

/// A VM, by a random number that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeId(pub u64);

const NONE: NodeId = NodeId(0);

/// Which cells a leader has to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fencing {
    /// Those that change: in this process every leader has resigned before the next one was elected.
    ChangedCells,
    /// All, changed or not: a leader's term once ended without its knowledge, and it may still be about to write. Its write
    /// fails only if the cell has a new version. It may go on at any time, so this lasts as long as the process.
    EveryCell,
}

/// Begins or extends the term of `me`, unless another VM's term lasts. Returns whether `me` leads now.
pub fn acquire(data: &SharedData<impl Cells>, me: NodeId, now_ms: u64) -> bool {
    let cell = data.get(CellKey::Election);
    let seen = cell.as_ref().map(|cell| cell.version);
    let term = cell.and_then(|cell| read(&cell.value));
    let others = term.filter(|(node, ..)| *node != me && *node != NONE);
    if others.is_some_and(|(_, end_ms, _)| is_ahead(end_ms, now_ms, TERM_MS)) {
        return false;
    }
    let fencing =
        if others.is_some() { Fencing::EveryCell } else { term.map_or(Fencing::ChangedCells, |(.., fencing)| fencing) };
    data.put(CellKey::Election, &write(me, now_ms.saturating_add(TERM_MS), fencing), seen).is_ok()
}

/// Which cells `me` has to write; `None` if another VM has taken over. Whether the term has ended does not matter.
pub fn check(data: &SharedData<impl Cells>, me: NodeId) -> Option<Fencing> {
    let (node, _, fencing) = data.get(CellKey::Election).and_then(|cell| read(&cell.value))?;
    (node == me).then_some(fencing)
}

/// Ends the term of `me`, so that the next VM can take over at once.
pub fn resign(data: &SharedData<impl Cells>, me: NodeId) {
    let Some(cell) = data.get(CellKey::Election) else { return };
    if let Some((node, _, fencing)) = read(&cell.value)
        && node == me
    {
        // If the write fails, another VM has taken over already.
        let _ = data.put(CellKey::Election, &write(NONE, 0, fencing), Some(cell.version));
    }
}

fn write(node: NodeId, end_ms: u64, fencing: Fencing) -> Vec<u8> {
    let every = [u8::from(fencing == Fencing::EveryCell)];
    node.0.to_le_bytes().into_iter().chain(end_ms.to_le_bytes()).chain(every).collect()
}

fn read(bytes: &[u8]) -> Option<(NodeId, u64, Fencing)> {
    let (node, rest) = bytes.split_first_chunk::<8>()?;
    let (end_ms, rest) = rest.split_first_chunk::<8>()?;
    let fencing = if rest == [0] { Fencing::ChangedCells } else { Fencing::EveryCell };
    Some((NodeId(u64::from_le_bytes(*node)), u64::from_le_bytes(*end_ms), fencing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::new_data;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);

    #[test]
    fn the_first_to_ask_leads_until_its_term_ends() {
        let data = new_data();
        assert!(acquire(&data, A, 1_000));
        assert!(!acquire(&data, B, 1_000 + TERM_MS - 1));
        assert!(acquire(&data, B, 1_000 + TERM_MS));
        assert!(!acquire(&data, A, 1_000 + TERM_MS));
        assert_eq!((check(&data, A), check(&data, B)), (None, Some(Fencing::EveryCell)));
    }

    #[test]
    fn a_term_that_is_extended_does_not_end() {
        let data = new_data();
        for now in (0..10_000).step_by(250) {
            assert!(acquire(&data, A, now));
            assert!(!acquire(&data, B, now + 100));
        }
    }

    #[test]
    fn after_a_resignation_the_next_leads_at_once_and_only_the_leader_can_resign() {
        let data = new_data();
        resign(&data, A);
        assert!(acquire(&data, A, 0));
        resign(&data, B);
        assert_eq!(check(&data, A), Some(Fencing::ChangedCells));
        resign(&data, A);
        assert!(acquire(&data, B, 1));
        assert_eq!(check(&data, B), Some(Fencing::ChangedCells));
    }

    #[test]
    fn every_leader_after_a_takeover_writes_every_cell() {
        let data = new_data();
        assert!(acquire(&data, A, 0) && acquire(&data, B, TERM_MS));
        assert!(acquire(&data, B, TERM_MS + 1));
        resign(&data, B);
        assert!(acquire(&data, C, TERM_MS + 2));
        assert_eq!(check(&data, C), Some(Fencing::EveryCell));
    }

    #[test]
    fn a_clock_that_steps_back_ends_the_term() {
        let data = new_data();
        assert!(acquire(&data, A, 1_000_000));
        assert!(acquire(&data, B, 500_000));
    }

    #[test]
    fn of_two_that_ask_after_the_end_of_a_term_one_leads() {
        let data = new_data();
        assert!(acquire(&data, A, 0));
        let other = data.clone();
        data.host().before_next_put(move || assert!(acquire(&other, C, TERM_MS)));
        assert!(!acquire(&data, B, TERM_MS));
    }
}
