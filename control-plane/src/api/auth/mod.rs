//! Authentication: the extractors that say who calls.

mod caller;
mod filter;
mod keyless;
mod presented_key;

pub use caller::Caller;
pub use filter::SyncCaller;
pub use keyless::Keyless;
pub use presented_key::KEY_HEADER;
