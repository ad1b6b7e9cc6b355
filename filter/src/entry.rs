//! The entry point that the SDK's macro makes: it registers the root context.

use crate::root::Root;

proxy_wasm::main! {{
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}
