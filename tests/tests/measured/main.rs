//! Scenarios on the whole stack that measure, and therefore run alone, one after another. Each prints its figures.
#![expect(clippy::print_stdout, reason = "a scenario that measures prints its figures")]

mod cold_start;
mod counts;
mod credits;
mod flood;
mod memory;
mod revocation;
mod scopes;
mod shared_limits;
mod torture;
mod untaken;
