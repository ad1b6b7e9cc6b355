//! One plugin configuration: checks it, ticks, hands answers to the core, makes a context for each request.
//!
//! Envoy configures a temporary VM first, only to see whether the configuration is good. So nothing happens here before
//! the first tick.

use std::rc::Rc;
use std::time::Duration;

use contract::pepper::Pepper;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;

use crate::core::Core;
use crate::host;
use crate::request::Request;
use filter_core::config::Config;
use filter_core::recent::Writes;

/// How often counts are published, the lease renewed and pauses looked after, in milliseconds.
pub(crate) const TICK_MS: u64 = 250;

/// Where the pepper is, unless the configuration says otherwise.
const PEPPER_VARIABLE: &str = "PORTCULLIS_PEPPER";

#[derive(Default)]
pub(crate) struct Root {
    configured: Option<Configured>,
}

struct Configured {
    config: Rc<Config>,
    sync_key: String,
    core: Rc<Core>,
}

impl Root {
    fn configure() -> Result<Configured, String> {
        let mut config = Config::parse(&host::plugin_configuration()).map_err(|error| error.to_string())?;
        config.pepper = pepper(config.pepper_variable.as_deref())?;
        let variable = &config.sync_key_variable;
        let sync_key = host::environment(variable).filter(|key| !key.is_empty()).ok_or_else(|| {
            format!(
                "the environment variable {variable} is not set: start Envoy with a key of scope sync in it and name it \
                 in vm_config.environment_variables.host_env_keys"
            )
        })?;
        if !sync_key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("the environment variable {variable} holds characters that no key has"));
        }
        if !host::may_ask_for_properties() {
            let remedy = "add proxy_get_property to capability_restriction_config.allowed_capabilities";
            // Without it, routes would silently get the default policy.
            if !config.policies.named.is_empty() {
                return Err(format!("policies: the filter may not ask which one a route names: {remedy}"));
            }
            host::warn(&format!("keys that are bound to networks will be refused from everywhere: {remedy}"));
        }
        let core = Core::of(&config)?;
        // Every request asks for it. Where Envoy's configuration keeps it from the filter, the SDK traps: better here, where
        // Envoy refuses the configuration and its log names proxy_get_metric, than with the first request.
        let _ = core.metrics.store_writes.number();
        Ok(Configured { config: Rc::new(config), sync_key, core })
    }
}

/// The pepper of imported keys: there may be none, unless the configuration says in which variable it is.
fn pepper(named: Option<&str>) -> Result<Option<Pepper>, String> {
    let variable = named.unwrap_or(PEPPER_VARIABLE);
    match host::environment(variable).filter(|text| !text.is_empty()) {
        Some(text) => {
            Pepper::parse(&text).map(Some).map_err(|error| format!("the environment variable {variable}: {error}"))
        }
        None if named.is_some() => Err(format!(
            "pepper_variable: the environment variable {variable} is not set: start Envoy with the control plane's pepper in it \
             and name it in vm_config.environment_variables.host_env_keys"
        )),
        None => Ok(None),
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, headers: usize, body_bytes: usize, _trailers: usize) {
        if let Some(Configured { config, sync_key, core }) = &self.configured {
            // None: the answer broke off. Envoy has no headers then, and the SDK would panic asking for one.
            let status = if headers == 0 { None } else { host::answer_status() };
            core.answered(config, sync_key, token, status, body_bytes);
        }
    }
}

/// The last words. Envoy tells of the end of every request too if `proxy_on_done` is exported, so it is not; a root context
/// that ends is dropped as `proxy_on_delete` is called, which can do the same.
impl Drop for Root {
    fn drop(&mut self) {
        if let Some(Configured { config, sync_key, core }) = &self.configured {
            core.end(config, sync_key);
        }
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, _bytes: usize) -> bool {
        match Self::configure() {
            Ok(configured) => {
                self.configured = Some(configured);
                host::tick_every(Duration::from_millis(TICK_MS));
                true
            }
            Err(why) => {
                host::error(&format!("the plugin configuration was refused: {why}"));
                false
            }
        }
    }

    fn on_tick(&mut self) {
        if let Some(Configured { config, sync_key, core }) = &self.configured {
            core.tick(config, sync_key);
        }
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _context_id: u32) -> Option<Box<dyn HttpContext>> {
        let Configured { config, core, .. } = self.configured.as_ref()?;
        Some(Box::new(Request { core: Rc::clone(core), config: Rc::clone(config) }))
    }
}
