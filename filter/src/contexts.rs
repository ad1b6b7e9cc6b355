//! The contexts of proxy-wasm: one root context for each plugin configuration, and one context for each request.
//!
//! Envoy first configures a temporary VM, only to check the configuration. So nothing happens before the first tick.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use filter_core::config::Config;
use filter_core::filter::Filter;
use filter_core::host::{Flow, Log};
use filter_core::limits::allowances::Reached;
use filter_core::setup::Setup;
use filter_core::store::CellStore;
use filter_core::vm::TICK_MS;
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};

use crate::host::{Envoy, Response};
use crate::stream::EnvoyStream;

/// One key store in this VM, and the requests that wait for it. During a configuration update the VM has an old and a new root
/// context, which share it.
struct Served {
    filter: Filter<Envoy, CellStore<Envoy>>,
    waiting: RefCell<Vec<Waiting>>,
    /// How many root contexts share it.
    roots: Cell<usize>,
}

/// A request that waits for an allowance.
struct Waiting {
    context_id: u32,
    setup: Rc<Setup>,
    since_ms: u64,
}

thread_local! {
    /// The key stores of this VM.
    static SERVED: RefCell<Vec<Rc<Served>>> = const { RefCell::new(Vec::new()) };
}

/// The key store of a configuration, for one more root context.
fn served(config: &Config) -> Result<Rc<Served>, String> {
    SERVED.with_borrow_mut(|all| {
        let known = all.iter().find(|served| served.filter.is_of(config)).map(Rc::clone);
        let served = match known {
            Some(served) => served,
            None => {
                let filter = Filter::new(Envoy, config)?;
                let served = Rc::new(Served { filter, waiting: RefCell::default(), roots: Cell::new(0) });
                all.push(Rc::clone(&served));
                served
            }
        };
        served.roots.set(served.roots.get().saturating_add(1));
        Ok(served)
    })
}

/// The root context of one plugin configuration.
pub(crate) struct Root {
    context_id: u32,
    plugin: Option<Plugin>,
    tick_ms: Cell<u64>,
}

/// A plugin whose configuration was accepted.
#[derive(Clone)]
struct Plugin {
    served: Rc<Served>,
    setup: Rc<Setup>,
}

impl Plugin {
    fn start() -> Result<Self, String> {
        let setup = Setup::read(&Envoy, &Envoy)?;
        Envoy::register_queue()?;
        Ok(Self { served: served(&setup.config)?, setup: Rc::new(setup) })
    }

    /// Decides all requests that wait, in their own contexts, and returns to that of the root.
    fn decide_again(&self, reached: Reached, root_id: u32) {
        let waiting = self.served.waiting.take();
        if waiting.is_empty() {
            return;
        }
        for request in waiting {
            if hostcalls::set_effective_context(request.context_id).is_err() {
                continue;
            }
            let Waiting { setup, since_ms, .. } = &request;
            let flow = self.served.filter.decide_again(&setup.config, &mut EnvoyStream, *since_ms, reached);
            if flow == Flow::Wait {
                self.served.waiting.borrow_mut().push(request);
            }
        }
        let _ = hostcalls::set_effective_context(root_id);
    }
}

impl Root {
    /// A root context that is not configured yet.
    pub(crate) const fn new(context_id: u32) -> Self {
        Self { context_id, plugin: None, tick_ms: Cell::new(0) }
    }

    /// Runs a callback of the filter, then sets the time of the next tick.
    fn run(&self, act: impl FnOnce(&Plugin)) {
        let Some(plugin) = &self.plugin else { return };
        act(plugin);
        self.set_tick(plugin.served.filter.tick_ms());
    }

    fn set_tick(&self, tick_ms: u64) {
        if self.tick_ms.replace(tick_ms) != tick_ms {
            let _ = hostcalls::set_tick_period(Duration::from_millis(tick_ms));
        }
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, _bytes: usize) -> bool {
        match Plugin::start() {
            Ok(plugin) => {
                self.plugin = Some(plugin);
                self.set_tick(TICK_MS);
                true
            }
            Err(why) => {
                Envoy.error(&format!("the plugin configuration was refused: {why}"));
                false
            }
        }
    }

    fn on_tick(&mut self) {
        self.run(|plugin| {
            plugin.served.filter.on_tick(&plugin.setup, |reached| plugin.decide_again(reached, self.context_id));
        });
    }

    fn on_queue_ready(&mut self, queue_id: u32) {
        Envoy::empty_queue(queue_id);
        self.run(|plugin| plugin.served.filter.on_wake(&plugin.setup));
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, context_id: u32) -> Option<Box<dyn HttpContext>> {
        let plugin = self.plugin.clone()?;
        Some(Box::new(Request { context_id, plugin, has_waited: false }))
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, headers: usize, body_bytes: usize, _trailers: usize) {
        #[cfg(feature = "trap")]
        crate::trap::on_response(headers);
        self.run(|plugin| {
            let response = Response { has_headers: headers > 0, body_bytes };
            let decide_again = |reached| plugin.decide_again(reached, self.context_id);
            plugin.served.filter.on_call_response(&plugin.setup, token, &response, decide_again);
        });
    }
}

/// The end of the plugin. With `proxy_on_done` exported, Envoy would call it at the end of every request too. A root context is
/// dropped in `proxy_on_delete`, where the same hostcalls work.
impl Drop for Root {
    fn drop(&mut self) {
        if let Some(Plugin { served, setup }) = &self.plugin {
            served.roots.set(served.roots.get().saturating_sub(1));
            served.filter.on_end(setup, served.roots.get() > 0);
        }
    }
}

/// The context of one request.
struct Request {
    context_id: u32,
    plugin: Plugin,
    has_waited: bool,
}

impl Context for Request {}

impl HttpContext for Request {
    fn on_http_request_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        #[cfg(feature = "trap")]
        crate::trap::on_request();
        let Plugin { served, setup } = &self.plugin;
        let flow = served.filter.on_request_headers(&setup.config, &mut EnvoyStream);
        if flow == Flow::Wait {
            self.has_waited = true;
            let (context_id, since_ms) = (self.context_id, served.filter.now_ms());
            served.waiting.borrow_mut().push(Waiting { context_id, setup: Rc::clone(setup), since_ms });
        }
        action(flow)
    }

    fn on_http_request_trailers(&mut self, _trailers: usize) -> Action {
        action(self.plugin.served.filter.on_request_trailers(&self.plugin.setup.config, &mut EnvoyStream))
    }
}

/// A client that leaves waits no longer.
impl Drop for Request {
    fn drop(&mut self) {
        if self.has_waited {
            self.plugin.served.waiting.borrow_mut().retain(|waiting| waiting.context_id != self.context_id);
        }
    }
}

const fn action(flow: Flow) -> Action {
    match flow {
        Flow::Continue => Action::Continue,
        Flow::Stop | Flow::Wait => Action::Pause,
    }
}
