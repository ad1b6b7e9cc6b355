//! Helpers that only tests need. The stack itself is in `portcullis-harness`, whose modules are re-exported, so that a
//! scenario finds everything in one place.

#![deny(unsafe_code)]

pub use portcullis_harness::{
    control_plane, demo, dice, envoy, envoy_config, flood, http, log, paths, ports, postgres, process, rest, service,
    shell, stack, tools, wait,
};

pub mod containers;
pub mod fake_control_plane;
pub mod fake_limits;
pub mod filter_harness;
pub mod policy;

pub mod expect;
pub mod load;
pub mod raw_http;
pub mod raw_http2;

pub mod certificates;
pub mod tls;
