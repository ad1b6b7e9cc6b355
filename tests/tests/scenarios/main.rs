//! Scenarios on the whole stack, or on the built filter in a real Envoy against a fake control plane.
#![allow(clippy::print_stdout, reason = "some print figures")]

mod allowances;
mod api_owners;
mod book;

mod command_line;
mod config;
mod containers;
mod cors;
mod definitions;
mod existing;
mod faults;
mod grpc;
mod hardened;
mod hostile;
mod identity;
mod import;
mod insight;
mod lifecycle;
mod limits;
mod limits_unreachable;
mod lineage;
mod malformed_keys;
mod metrics;
mod networks;
mod outcomes;
mod pages;
mod paths;
mod plans;
mod policies;
mod policy_sources;
mod quota;
mod redirects;
mod rolling_restart;
mod rotation;
mod route_costs;
mod secrecy;
mod service;
mod shadow;
mod shared_limits;
mod shipped;
mod sources;
mod trailers;
mod up;
mod usage_log;
mod wasm;
