//! What one VM does for one store when a request comes: it decides and counts. What happens between requests is in
//! `conversation`.
//!
//! The core belongs to the VM and not to a root context: after a configuration update the same VM serves the old root
//! context and the new one, and both must see the same counts and the same conversation.

use std::cell::{Cell as Slot, OnceCell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use contract::usage::KeyRef;

use crate::conversation::Leading;
use crate::host::{self, SharedData};
use crate::metrics::Metrics;
use filter_core::cells::Names;
use filter_core::config::Config;
use filter_core::credential::Credential;
use filter_core::judge::{Judge, Verdict};
use filter_core::lease::Holder;
use filter_core::recent::{Recent, Writes};
use filter_core::slice::Slices;
use filter_core::store::{self, State};
use filter_core::usage::{Counts, Drawn};

const NS_PER_MS: u64 = 1_000_000;

/// Most names of unknown policies that are remembered, and so logged: further ones are only counted.
const UNKNOWN_POLICIES: usize = 100;

thread_local! {
    static CORES: RefCell<Vec<Rc<Core>>> = const { RefCell::new(Vec::new()) };
}

/// One VM's part in one store.
pub(crate) struct Core {
    pub(crate) names: Names,
    pub(crate) me: Holder,
    pub(crate) slot: Slot<Option<u16>>,
    pub(crate) metrics: Metrics,
    pub(crate) state: Slot<Option<State>>,
    pub(crate) counts: RefCell<Counts>,
    /// When the next tick is due, in milliseconds of Unix time; 0 before the first. Requests that need no time otherwise
    /// are counted under this one, so that no use of a key ever seems to come before what made it possible.
    pub(crate) next_tick_ms: Slot<u64>,
    /// Requests that no acknowledged report has told of, as of the last tick.
    pub(crate) pending: Slot<u64>,
    /// The conversation with the control plane, while this VM leads.
    pub(crate) leading: RefCell<Option<Leading>>,
    recent: Recent,
    pub(crate) slices: Slices,
    /// The quarter of the keys whose slices were given back last.
    pub(crate) quarter: Slot<u8>,
    unknown_policies: RefCell<BTreeSet<String>>,
}

impl Core {
    /// The core of this VM for the store that a configuration names.
    ///
    /// # Errors
    /// If the system has no randomness, without which VMs and Envoys cannot be told apart.
    pub(crate) fn of(config: &Config) -> Result<Rc<Self>, String> {
        let names = Names::of(&config.cluster, &config.store);
        CORES.with_borrow_mut(|cores| {
            if let Some(known) = cores.iter().find(|core| core.names == names) {
                return Ok(Rc::clone(known));
            }
            let me = host::random_bytes().map(u64::from_le_bytes).ok_or("the system has no randomness")?;
            let core = Rc::new(Self::new(names, Holder(me.max(1))));
            cores.push(Rc::clone(&core));
            Ok(core)
        })
    }

    fn new(names: Names, me: Holder) -> Self {
        Self {
            names,
            me,
            slot: Slot::new(None),
            metrics: Metrics::define(),
            state: Slot::new(None),
            counts: RefCell::default(),
            next_tick_ms: Slot::new(0),
            pending: Slot::new(0),
            leading: RefCell::new(None),
            recent: Recent::default(),
            slices: Slices::default(),
            quarter: Slot::new(0),
            unknown_policies: RefCell::default(),
        }
    }

    /// Decides one request and counts it.
    pub(crate) fn decide(&self, config: &Config, credential: Credential) -> Verdict {
        let asked_ns = OnceCell::new();
        let now_ns = || *asked_ns.get_or_init(host::now_ns);
        // Without named policies, there is nothing that a route could name.
        let named = if config.policies.named.is_empty() { None } else { host::route_policy() };
        let policy = config.policies.find(named.as_deref());
        if let Some(name) = named.filter(|_| policy.is_none()) {
            self.warn_of_policy(name);
        }
        // The state is read anew on each tick, and on each request as long as there is none.
        if self.state.get().is_none() {
            self.state.set(store::state(&SharedData, &self.names));
        }
        // Read before the store: what is found then is at least as new.
        let number =
            if matches!(credential, Credential::Presented(_)) { self.metrics.store_writes.number() } else { None };
        let judge = Judge {
            cells: &SharedData,
            names: &self.names,
            config,
            state: self.state.get(),
            recent: &self.recent,
            slices: &self.slices,
            number,
            address: host::client_address,
            now_ns,
        };
        let verdict = judge.judge(credential, policy);
        let key = verdict.key.as_ref().map(|key| KeyRef { id: key.record.key_id, generation: key.record.generation });
        // What is counted carries the time, to a quarter of a second: see `next_tick_ms`.
        let now_ms = match (asked_ns.get(), self.next_tick_ms.get()) {
            (None, ahead_ms) if ahead_ms > 0 => ahead_ms,
            _ => now_ns().checked_div(NS_PER_MS).unwrap_or_default(),
        };
        // Requests of owners whose credits are not metered are free: what is told is what was drawn from the lease.
        let drawn = verdict.key.as_ref().map_or_else(Drawn::default, |key| Drawn {
            credits: key.record.further.credits.map_or(0, |_| verdict.cost),
            quota: key.record.further.quota.is_some(),
        });
        self.counts.borrow_mut().add(key, verdict.outcome, verdict.shadowed, drawn, now_ms);
        self.metrics.decided(verdict.outcome, verdict.shadowed);
        verdict
    }

    /// Says once in each VM which policy a route names and the configuration lacks.
    fn warn_of_policy(&self, name: String) {
        let mut known = self.unknown_policies.borrow_mut();
        if known.len() < UNKNOWN_POLICIES && !known.contains(&name) {
            let problem = if name.is_empty() {
                "filter_metadata.portcullis of a route is not {policy: NAME}, or NAME is empty".to_owned()
            } else {
                format!("a route names the policy {name:?}, which the plugin configuration does not have")
            };
            host::error(&format!(
                "{problem}: requests to it are refused; add the policy to policies, or correct \
                 filter_metadata.portcullis.policy of the route"
            ));
            known.insert(name);
        }
    }
}
