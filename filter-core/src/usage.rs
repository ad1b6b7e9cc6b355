//! Usage on its way out of an Envoy: each VM counts its requests, the counts are merged in shared data, and the leader freezes
//! them into reports that it sends until they are acknowledged.
//!
//! ```text
//! Counts (of a VM) ─ publish ─▶ usage cells ─ collect ─▶ outbox { frozen reports, pending } ─▶ control plane
//! ```
//! Every step writes one cell, so a count is in exactly one place. A VM that traps loses the counts since its last publish
//! and nothing else. Each step merges counts of the same key, outcome and hour, so during an outage memory grows with the
//! number of active keys and not with requests.

pub(crate) mod codec;
pub mod collector;
pub mod counter;
pub mod outbox;

#[cfg(test)]
mod tests;
