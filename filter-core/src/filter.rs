//! The filter in one VM, as a shell runs it: the host's callbacks come in here.

use std::cell::RefCell;

use limits::LONGEST_WAIT_MS;

use crate::config::Config;
use crate::host::{CallResponse, Flow, Host, Stream, random_bytes};
use crate::keys::KeyStore;
use crate::leader::Leader;
use crate::leader::control_plane::{explain, send_sightings};
use crate::limits::allowances::{self, Reached};
use crate::request::{self, Waited};
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

    /// The cells of the store.
    #[cfg(test)]
    pub(crate) const fn data(&self) -> &SharedData<H> {
        &self.vm.data
    }

    /// The headers of a request have come. If the request must wait, the shell keeps it, and calls [`Filter::decide_again`]
    /// for it when it is told to.
    pub fn on_request_headers(&self, config: &Config, stream: &mut impl Stream) -> Flow {
        request::handle(&self.vm, config, stream, Waited::default())
    }

    /// Decides a request that waits, since `since_ms`. [`Flow::Wait`]: it goes on waiting.
    pub fn decide_again(&self, config: &Config, stream: &mut impl Stream, since_ms: u64, reached: Reached) -> Flow {
        // If the clock has stepped back, it is unknown for how long the request has waited: then it waits no longer.
        let ms = self.vm.now_ms().checked_sub(since_ms).unwrap_or(LONGEST_WAIT_MS).max(1);
        let flow = request::handle(&self.vm, config, stream, Waited { ms, has_failed: reached == Reached::No });
        if flow == Flow::Continue {
            stream.resume();
        }
        flow
    }

    /// The time in milliseconds of Unix time, for requests that begin to wait.
    pub fn now_ms(&self) -> u64 {
        self.vm.now_ms()
    }

    /// The trailers of a request have come.
    pub fn on_request_trailers(&self, config: &Config, stream: &mut impl Stream) -> Flow {
        request::handle_trailers(config, stream)
    }

    /// Call this every [`Filter::tick_ms`]. `decide_again` calls [`Filter::decide_again`] for all requests that wait.
    pub fn on_tick(&self, setup: &Setup, decide_again: impl FnOnce(Reached)) {
        let now_ms = self.vm.now_ms();
        if !self.vm.is_tick_due(now_ms) {
            self.vm.allowances.ask_again();
            return self.call(setup, false);
        }
        self.vm.tick(now_ms);
        self.leader.borrow_mut().tick(&self.vm, setup, now_ms);
        self.send_sightings(setup, now_ms);
        self.vm.allowances.start_over();
        decide_again(Reached::Yes);
        self.call(setup, true);
    }

    /// The time until the next tick, in milliseconds. It may change with each callback.
    pub fn tick_ms(&self) -> u64 {
        self.vm.allowances.tick_ms()
    }

    fn send_sightings(&self, setup: &Setup, now_ms: u64) {
        let mut seen = self.vm.seen.borrow_mut();
        let Some(message) = seen.due(now_ms) else { return };
        match send_sightings(self.vm.host(), setup, &message) {
            Some(token) => seen.sent(token, message, now_ms),
            None => seen.not_sent(message),
        }
    }

    fn call(&self, setup: &Setup, is_tick: bool) {
        allowances::call(&self.vm, setup, is_tick, self.leader.borrow().leads());
    }

    /// The host has been asked by [`Wake`](crate::host::Wake) to call this.
    pub fn on_wake(&self, setup: &Setup) {
        self.call(setup, false);
    }

    /// The response to a call has come, or its failure. `decide_again` calls [`Filter::decide_again`] for all requests that
    /// wait.
    pub fn on_call_response(
        &self,
        setup: &Setup,
        token: u32,
        response: &impl CallResponse,
        decide_again: impl FnOnce(Reached),
    ) {
        match allowances::on_response(&self.vm, token, response) {
            Some(reached) => {
                self.vm.allowances.start_over();
                decide_again(reached);
            }
            None if self.is_of_sightings(token, response) => {}
            None => self.leader.borrow_mut().on_response(&self.vm, setup, token, response),
        }
        self.call(setup, false);
    }

    /// Whether this is the response to sightings.
    fn is_of_sightings(&self, token: u32, response: &impl CallResponse) -> bool {
        let mut seen = self.vm.seen.borrow_mut();
        if !seen.is_in_flight(token) {
            return false;
        }
        let status = response.status();
        if status != Some(200) {
            let why = explain(status, "send unknown keys and policies");
            self.vm.host().warn(&format!("unknown keys and policies are sent again: {why}"));
        }
        seen.take_response(token, status == Some(200), self.vm.now_ms())
    }

    /// A configuration ends: reports everything that was counted. `is_in_use`: another configuration uses this filter. If none
    /// does, the VM ends, and hands allowances back.
    pub fn on_end(&self, setup: &Setup, is_in_use: bool) {
        self.vm.end();
        let led = self.leader.borrow_mut().end(&self.vm, setup);
        if !is_in_use {
            allowances::end(&self.vm, setup, led);
        }
    }
}

#[cfg(test)]
mod tests;
