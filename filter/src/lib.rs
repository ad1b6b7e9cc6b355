//! The filter as Envoy's proxy-wasm plugin: contexts, hostcalls and statistics of Envoy, and nothing else. What the filter does
//! is in `filter_core`.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]
#![forbid(unsafe_code)]
#![cfg(target_arch = "wasm32")]

mod contexts;
mod host;
mod stream;
#[cfg(feature = "trap")]
mod trap;

/// Envoy starts each VM here.
mod entry {
    proxy_wasm::main! {{
        proxy_wasm::set_root_context(|id| Box::new(crate::contexts::Root::new(id)));
    }}
}
