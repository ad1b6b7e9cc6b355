//! Keys in the control plane: what clients say of them is parsed in [`domain`], what is kept of them is read and written
//! in [`store`], what was counted of them is read in [`usage`].

pub mod domain;
pub mod store;
pub mod usage;
