//! One VM: what it remembers between requests, and what it does with that on each tick.
//!
//! It belongs to the VM and not to one configuration: after a configuration update the same VM serves the requests of the old
//! configuration and of the new one, and both must see the same counts.

use std::cell::{Cell as Slot, RefCell};

use crate::host::Host;
use crate::limits::allowances::Allowances;
use crate::shared::SharedData;
use crate::sightings::SightingsBuffer;
use crate::stats::Statistics;
use crate::store::state::{self, StoreState};
use crate::time::{NS_PER_MS, is_ahead};
use crate::usage::counter::{Counts, take_slot};

/// Time between two ticks, in milliseconds. On each tick counts are published and the leader extends its term.
pub const TICK_MS: u64 = limits::TICK_MS;

/// Most unknown policies whose names are remembered and logged. Requests that name others are only counted.
const UNKNOWN_POLICIES: usize = 100;

/// One VM of one key store.
#[derive(Debug)]
pub struct Vm<H, K> {
    /// The cells of the store, and the host.
    pub data: SharedData<H>,
    /// The look-up of keys.
    pub keys: K,
    /// The statistics.
    pub stats: Statistics<H>,
    /// This VM's part in asking for what the Envoy holds of shared limits.
    pub allowances: Allowances,
    /// Requests that were counted since the last tick.
    pub counts: RefCell<Counts>,
    /// The state of the store as of the last tick.
    state: Slot<Option<StoreState>>,
    /// When the next tick is due, in milliseconds of Unix time; 0 before the first.
    next_tick_ms: Slot<u64>,
    usage_slot: Slot<Option<u16>>,
    unknown_policies: RefCell<Vec<String>>,
    /// Unknown keys and named policies that this VM has to report.
    pub seen: RefCell<SightingsBuffer>,
}

impl<H: Host, K> Vm<H, K> {
    /// A VM that has not ticked yet.
    pub fn new(data: SharedData<H>, keys: K) -> Self {
        Self {
            stats: Statistics::define(data.host().clone()),
            data,
            keys,
            allowances: Allowances::default(),
            counts: RefCell::default(),
            state: Slot::new(None),
            next_tick_ms: Slot::new(0),
            usage_slot: Slot::new(None),
            unknown_policies: RefCell::default(),
            seen: RefCell::default(),
        }
    }

    /// The host.
    pub const fn host(&self) -> &H {
        self.data.host()
    }

    /// The time in milliseconds of Unix time.
    pub fn now_ms(&self) -> u64 {
        self.host().now_ns() / NS_PER_MS
    }

    /// The state of the store as of the last tick. As long as there is none, it is read again each time.
    pub fn state(&self) -> Option<StoreState> {
        if self.state.get().is_none() {
            self.state.set(state::read(&self.data));
        }
        self.state.get()
    }

    /// Takes a state that the leader has just written.
    pub fn set_state(&self, state: StoreState) {
        self.state.set(Some(state));
    }

    /// Whether a tick is due, and not one that comes before its time for requests that wait.
    pub fn is_tick_due(&self, now_ms: u64) -> bool {
        // A clock that has stepped back must not stop the ticks.
        !is_ahead(self.next_tick_ms.get(), now_ms.saturating_add(TICK_MS / 2), TICK_MS)
    }

    /// The time to count a request under if nothing else of it needed the time: that of the next tick, so that no use of a key
    /// seems to precede the change that allowed it. `None` before the first tick.
    pub fn next_tick_ms(&self) -> Option<u64> {
        Some(self.next_tick_ms.get()).filter(|next_ms| *next_ms > 0)
    }

    /// Publishes counts and statistics, and reads the state of the store and the contact with the control plane.
    pub fn tick(&self, now_ms: u64) {
        self.publish();
        self.allowances.refresh(&self.data);
        self.next_tick_ms.set(now_ms.saturating_add(TICK_MS));
        self.state.set(state::read(&self.data));
    }

    /// The VM ends: publishes counts and statistics.
    pub fn end(&self) {
        self.publish();
    }

    /// Remembers the name of an unknown policy. Returns whether it is new.
    pub fn is_new_unknown_policy(&self, name: &str) -> bool {
        let mut known = self.unknown_policies.borrow_mut();
        let is_new = known.len() < UNKNOWN_POLICIES && !known.iter().any(|known| known == name);
        if is_new {
            known.push(name.to_owned());
        }
        is_new
    }

    fn publish(&self) {
        let slot = self.usage_slot.get().unwrap_or_else(|| take_slot(&self.data));
        self.usage_slot.set(Some(slot));
        self.counts.borrow_mut().publish(&self.data, slot);
        self.stats.flush();
    }
}
