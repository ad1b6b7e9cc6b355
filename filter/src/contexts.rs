//! The contexts of proxy-wasm: one root context for each plugin configuration, and one context for each request.
//!
//! Envoy first configures a temporary VM, only to check the configuration. So nothing happens before the first tick.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use filter_core::config::Config;
use filter_core::filter::Filter;
use filter_core::host::{Flow, Log};
use filter_core::setup::Setup;
use filter_core::store::CellStore;
use filter_core::vm::TICK_MS;
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};

use crate::host::{Envoy, Response};
use crate::stream::EnvoyStream;

type EnvoyFilter = Filter<Envoy, CellStore<Envoy>>;

thread_local! {
    /// The filters of this VM, one for each key store. They belong to the VM: during a configuration update it has an old and a
    /// new root context, which share a filter.
    static FILTERS: RefCell<Vec<Rc<EnvoyFilter>>> = const { RefCell::new(Vec::new()) };
}

fn filter_for(config: &Config) -> Result<Rc<EnvoyFilter>, String> {
    FILTERS.with_borrow_mut(|filters| {
        if let Some(filter) = filters.iter().find(|filter| filter.is_of(config)) {
            return Ok(Rc::clone(filter));
        }
        let filter = Rc::new(Filter::new(Envoy, config)?);
        filters.push(Rc::clone(&filter));
        Ok(filter)
    })
}

/// The root context of one plugin configuration.
#[derive(Default)]
pub(crate) struct Root {
    plugin: Option<Plugin>,
}

/// A plugin whose configuration was accepted.
#[derive(Clone)]
struct Plugin {
    filter: Rc<EnvoyFilter>,
    setup: Rc<Setup>,
}

impl Plugin {
    fn start() -> Result<Self, String> {
        let setup = Setup::read(&Envoy, &Envoy)?;
        Ok(Self { filter: filter_for(&setup.config)?, setup: Rc::new(setup) })
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, _bytes: usize) -> bool {
        match Plugin::start() {
            Ok(plugin) => {
                self.plugin = Some(plugin);
                let _ = hostcalls::set_tick_period(Duration::from_millis(TICK_MS));
                true
            }
            Err(why) => {
                Envoy.error(&format!("the plugin configuration was refused: {why}"));
                false
            }
        }
    }

    fn on_tick(&mut self) {
        if let Some(Plugin { filter, setup }) = &self.plugin {
            filter.on_tick(setup);
        }
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _context_id: u32) -> Option<Box<dyn HttpContext>> {
        let plugin = self.plugin.clone()?;
        Some(Box::new(plugin))
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, headers: usize, body_bytes: usize, _trailers: usize) {
        #[cfg(feature = "trap")]
        crate::trap::on_response(headers);
        if let Some(Plugin { filter, setup }) = &self.plugin {
            filter.on_call_response(setup, token, &Response { has_headers: headers > 0, body_bytes });
        }
    }
}

/// The end of the plugin. With `proxy_on_done` exported, Envoy would call it at the end of every request too. A root context is
/// dropped in `proxy_on_delete`, where the same hostcalls work.
impl Drop for Root {
    fn drop(&mut self) {
        if let Some(Plugin { filter, setup }) = &self.plugin {
            filter.on_end(setup);
        }
    }
}

impl Context for Plugin {}

impl HttpContext for Plugin {
    fn on_http_request_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        #[cfg(feature = "trap")]
        crate::trap::on_request();
        action(self.filter.on_request_headers(&self.setup.config, &mut EnvoyStream))
    }

    fn on_http_request_trailers(&mut self, _trailers: usize) -> Action {
        action(self.filter.on_request_trailers(&self.setup.config, &mut EnvoyStream))
    }
}

const fn action(flow: Flow) -> Action {
    match flow {
        Flow::Continue => Action::Continue,
        Flow::Stop | Flow::Wait => Action::Pause,
    }
}
