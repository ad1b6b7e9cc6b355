//! The control plane on a real PostgreSQL: its router, its binary and its data. One program, so that it is linked once.
#![allow(clippy::print_stdout, reason = "a test that measures prints its figures")]
#![allow(clippy::disallowed_methods, reason = "tests hold locks of their own")]

mod addresses;
mod allowances;
mod attributes;
mod authorization;
mod binary;
mod bodies;
mod connections;
mod credits;
mod document;
mod entrance;
mod explain;
mod feed;
mod filters;
mod fuzz;
mod hostile;
mod idempotency;
mod import;
mod keys;
mod last_admin;
mod lifecycle;
mod management;
mod memory;
mod owners;
mod plans;
mod policies;
mod quota;
mod roles;
mod rotation;
mod search;
mod shared_limits;
mod statistics;
mod support;
mod sync;
mod tls;
mod transactions;
mod unknown_keys;
mod usage;
mod usage_calendar;
mod usage_events;
mod usage_log;
mod usage_query;
mod users;
