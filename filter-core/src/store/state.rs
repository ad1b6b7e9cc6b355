//! How far the store is, in a cell that the leader writes after the records: what the state says is in the store.

use contract::id::Epoch;
use serde::{Deserialize, Serialize};

use crate::shared::election::NodeId;
use crate::shared::fenced::{NotLeader, write};
use crate::shared::{CellKey, Cells, SharedData};

/// How far the store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreState {
    /// The life of the database that the store mirrors.
    pub epoch: Epoch,
    /// Every change up to this revision is in the store.
    pub revision: u64,
    /// Keys in the store, as the control plane counts them.
    pub keys: u64,
    /// When the control plane last confirmed that this is the newest revision, in milliseconds of Unix time.
    pub synced_ms: u64,
}

/// Reads the state; `None` until the store was loaded for the first time.
pub fn read(data: &SharedData<impl Cells>) -> Option<StoreState> {
    postcard::from_bytes(&data.get(CellKey::State)?.value).ok()
}

/// Writes the state.
///
/// # Errors
/// [`NotLeader`]; the state is as it was then.
pub fn set(data: &SharedData<impl Cells>, me: NodeId, state: &StoreState) -> Result<(), NotLeader> {
    let bytes = postcard::to_allocvec(state).unwrap_or_default();
    write(data, me, CellKey::State, &|_| Some(bytes.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::MockHost;
    use crate::shared::election::acquire;

    const EPOCH: Epoch = Epoch([9; 16]);

    #[test]
    fn the_state_is_read_as_the_leader_wrote_it() {
        let data = SharedData::new(MockHost::default(), "cluster", "default");
        assert!(acquire(&data, NodeId(1), 0));
        assert_eq!(read(&data), None);
        let full = StoreState { epoch: EPOCH, revision: 7, keys: 3, synced_ms: 1_000 };
        set(&data, NodeId(1), &full).unwrap();
        assert_eq!(read(&data), Some(full));
        assert_eq!(set(&data, NodeId(2), &full), Err(NotLeader));
    }
}
