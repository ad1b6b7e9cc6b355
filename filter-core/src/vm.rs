//! One VM: what it remembers between requests, and what it does with that on each tick.
//!
//! It belongs to the VM and not to one configuration: after a configuration update the same VM serves the requests of the old
//! configuration and of the new one, and both must see the same counts.

use std::cell::{Cell as Slot, RefCell};
use std::collections::BTreeSet;

use contract::rate::WHOLE;

use crate::host::Host;
use crate::limits::slice::Slices;
use crate::shared::SharedData;
use crate::stats::Statistics;
use crate::store::state::{self, StoreState};
use crate::time::NS_PER_MS;
use crate::usage::counter::{Counts, take_slot};

/// Time between two ticks, in milliseconds. On each tick counts are published and the leader extends its term.
pub const TICK_MS: u64 = 250;

/// Most unknown policies whose names are remembered and logged. Requests that name others are only counted.
const UNKNOWN_POLICIES: usize = 100;

/// Groups of keys whose slices are given back in turn, one group on each tick.
const SLICE_GROUPS: u8 = 4;

/// One VM of one key store.
#[derive(Debug)]
pub struct Vm<H, K> {
    /// The cells of the store, and the host.
    pub data: SharedData<H>,
    /// The look-up of keys.
    pub keys: K,
    /// The statistics.
    pub stats: Statistics<H>,
    /// Requests that were taken from rate limits ahead of time.
    pub slices: Slices,
    /// Requests that were counted since the last tick.
    pub counts: RefCell<Counts>,
    /// The state of the store as of the last tick.
    state: Slot<Option<StoreState>>,
    /// When the next tick is due, in milliseconds of Unix time; 0 before the first.
    next_tick_ms: Slot<u64>,
    usage_slot: Slot<Option<u16>>,
    slice_group: Slot<u8>,
    unknown_policies: RefCell<BTreeSet<String>>,
}

impl<H: Host, K> Vm<H, K> {
    /// A VM that has not ticked yet.
    pub fn new(data: SharedData<H>, keys: K) -> Self {
        Self {
            stats: Statistics::define(data.host().clone()),
            data,
            keys,
            slices: Slices::default(),
            counts: RefCell::default(),
            state: Slot::new(None),
            next_tick_ms: Slot::new(0),
            usage_slot: Slot::new(None),
            slice_group: Slot::new(0),
            unknown_policies: RefCell::default(),
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

    /// This Envoy's share of a limit before any grant, in parts per million.
    pub fn default_share(&self) -> u32 {
        self.state.get().map_or(WHOLE, |state| state.default_share())
    }

    /// The time to count a request under if nothing else of it needed the time: that of the next tick, so that no use of a key
    /// seems to precede the change that allowed it. `None` before the first tick.
    pub fn next_tick_ms(&self) -> Option<u64> {
        Some(self.next_tick_ms.get()).filter(|next_ms| *next_ms > 0)
    }

    /// Publishes counts and statistics, gives back a quarter of the slices and reads the state of the store.
    pub fn tick(&self, now_ms: u64) {
        self.publish();
        let group = self.slice_group.get().wrapping_add(1) % SLICE_GROUPS;
        self.slice_group.set(group);
        self.give_back(group, now_ms);
        self.next_tick_ms.set(now_ms.saturating_add(TICK_MS));
        self.state.set(state::read(&self.data));
    }

    /// The VM ends: publishes counts and statistics, and gives back all slices.
    pub fn end(&self, now_ms: u64) {
        self.publish();
        for group in 0..SLICE_GROUPS {
            self.give_back(group, now_ms);
        }
    }

    /// Remembers the name of an unknown policy. Returns whether it is new.
    pub fn is_new_unknown_policy(&self, name: &str) -> bool {
        let mut known = self.unknown_policies.borrow_mut();
        let is_new = known.len() < UNKNOWN_POLICIES && !known.contains(name);
        if is_new {
            known.insert(name.to_owned());
        }
        is_new
    }

    fn publish(&self) {
        let slot = self.usage_slot.get().unwrap_or_else(|| take_slot(&self.data));
        self.usage_slot.set(Some(slot));
        self.counts.borrow_mut().publish(&self.data, slot);
        self.stats.flush();
    }

    fn give_back(&self, group: u8, now_ms: u64) {
        self.slices.give_back(group, &self.data, self.default_share(), now_ms.saturating_mul(NS_PER_MS));
    }
}
