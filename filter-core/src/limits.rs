//! Limits of requests. [`charge`] takes a request from all limits of its key; [`allowances`] keeps what this Envoy holds of
//! limits that all Envoys share; [`cell`] is the memory of both.

pub mod allowances;
pub mod cell;
pub mod charge;
pub mod client;
pub mod retry_after;
#[cfg(test)]
pub(crate) mod testing;
