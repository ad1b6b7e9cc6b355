//! The filter in one VM, as a shell runs it: the host's callbacks come in here.

use std::cell::RefCell;

use crate::config::Config;
use crate::host::{CallResponse, Flow, Host, Stream, random_bytes};
use crate::keys::KeyStore;
use crate::leader::Leader;
use crate::request;
use crate::setup::Setup;
use crate::shared::SharedData;
use crate::shared::election::NodeId;
use crate::store::CellStore;
use crate::vm::Vm;

/// The filter of one VM for one key store. Several configurations may use it, such as the old and the new one during an
/// update.
#[derive(Debug)]
pub struct Filter<H, K> {
    vm: Vm<H, K>,
    leader: RefCell<Leader>,
}

impl<H: Host> Filter<H, CellStore<H>> {
    /// A filter whose key store is in the cells of the host.
    ///
    /// # Errors
    /// If the system has no randomness: VMs and Envoys would have no distinct ids.
    pub fn new(host: H, config: &Config) -> Result<Self, String> {
        let data = SharedData::new(host, &config.cluster, &config.store);
        let keys = CellStore::new(data.clone());
        // Every request reads the generation. If Envoy's configuration keeps metrics from the filter, the SDK traps. It is
        // better to trap here: Envoy refuses the configuration then, and its log names proxy_get_metric.
        let _ = keys.generation();
        Self::with_keys(data, keys)
    }
}

impl<H: Host, K: KeyStore> Filter<H, K> {
    /// A filter with a key store of the shell.
    ///
    /// # Errors
    /// If the system has no randomness: VMs and Envoys would have no distinct ids.
    pub fn with_keys(data: SharedData<H>, keys: K) -> Result<Self, String> {
        let node = random_bytes(data.host()).map(u64::from_le_bytes).ok_or("the system has no randomness")?;
        // 0 stands for no VM.
        let leader = Leader::new(NodeId(node.max(1)));
        Ok(Self { vm: Vm::new(data, keys), leader: RefCell::new(leader) })
    }

    /// Whether the key store is that of this configuration.
    pub fn is_of(&self, config: &Config) -> bool {
        self.vm.data.is_of(&config.cluster, &config.store)
    }

    /// The headers of a request have come.
    pub fn on_request_headers(&self, config: &Config, stream: &mut impl Stream) -> Flow {
        request::handle(&self.vm, config, stream)
    }

    /// The trailers of a request have come.
    pub fn on_request_trailers(&self, config: &Config, stream: &mut impl Stream) -> Flow {
        request::handle_trailers(config, stream)
    }

    /// Call this every [`crate::vm::TICK_MS`].
    pub fn on_tick(&self, setup: &Setup) {
        let now_ms = self.vm.now_ms();
        self.vm.tick(now_ms);
        self.leader.borrow_mut().tick(&self.vm, setup, now_ms);
    }

    /// The response to a call has come, or its failure.
    pub fn on_call_response(&self, setup: &Setup, token: u32, response: &impl CallResponse) {
        self.leader.borrow_mut().on_response(&self.vm, setup, token, response);
    }

    /// The VM ends: reports everything that was counted.
    pub fn on_end(&self, setup: &Setup) {
        self.vm.end(self.vm.now_ms());
        self.leader.borrow_mut().end(&self.vm, setup);
    }
}

#[cfg(test)]
mod tests;
