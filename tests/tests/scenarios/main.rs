//! Scenarios on the whole stack, or on the built filter in a real Envoy against a control plane that plays a script.
#![allow(clippy::print_stdout, reason = "some print figures")]

mod config;
mod definitions;
mod faults;
mod grpc;
mod hardened;
mod hostile;
mod identity;
mod import;
mod insight;
mod lifecycle;
mod limits;
mod lineage;
mod metrics;
mod networks;
mod odd_keys;
mod outcomes;
mod paths;
mod plans;
mod policies;
mod prices;
mod quota;
mod readme;
mod redirects;
mod rotation;
mod secrecy;
mod seldom;
mod shadow;
mod shares;
mod sources;
mod stocks;
mod trailers;
mod wasm;
