//! What one worker asks the control plane for, and when: at once for requests that wait and for allowances that run low, and
//! on each tick for pools that it used. One call is under way at a time.

use std::collections::{BTreeMap, HashSet};

use rustc_hash::FxBuildHasher;

use crate::message::POOLS;
use crate::pool::PoolId;
use crate::{IDLE_MS, TICK_MS};

/// After so many calls without an answer no request waits, until one is answered.
const FAILURES: u32 = 2;

/// The control plane draws ids at random, so a fast hash is enough.
type Pools = HashSet<PoolId, FxBuildHasher>;

/// The state of one worker.
#[derive(Clone, Debug, Default)]
pub struct Asking {
    /// Tokens that requests wait for.
    needs: BTreeMap<PoolId, u64>,
    /// Some of them are not to wait for the next tick.
    needs_are_urgent: bool,
    /// Tokens that requests lacked which were decided without them. The pools are in `soon` too.
    missed: BTreeMap<PoolId, u64>,
    /// Pools whose allowance runs low, or whose usage or hand-back is to be told soon.
    soon: Pools,
    /// Pools that were used since the last call.
    used: Pools,
    /// Pools that were used since the last turn of [`IDLE_MS`], and in the one before.
    recent: Pools,
    earlier: Pools,
    turned_ms: u64,
    in_flight: Option<InFlight>,
    failures: u32,
}

#[derive(Clone, Debug)]
struct InFlight {
    token: u32,
    sent_ms: u64,
    pools: Vec<PoolId>,
}

/// A call that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// When it was sent, in milliseconds of Unix time.
    pub sent_ms: u64,
    /// The pools that it asked for, in order.
    pub pools: Vec<PoolId>,
}

impl Asking {
    /// A request needs tokens of a pool.
    pub fn needed(&mut self, pool: PoolId) {
        self.recent.insert(pool);
    }

    /// A request has spent from a pool.
    pub fn spent(&mut self, pool: PoolId, is_low: bool) {
        self.used.insert(pool);
        if is_low {
            self.soon.insert(pool);
        }
    }

    /// A request waits for tokens of a pool. `is_again`: the control plane has just said that other Envoys hold
    /// them. The worker asks again after [`AGAIN_MS`](crate::AGAIN_MS), by [`Asking::ask_again`].
    pub fn need(&mut self, pool: PoolId, tokens: u64, is_again: bool) {
        self.needs_are_urgent |= !is_again;
        let need = self.needs.entry(pool).or_default();
        *need = need.saturating_add(tokens);
    }

    /// A request was decided without the tokens that it needs: ask for as many with the next call.
    pub fn ask_for(&mut self, pool: PoolId, tokens: u64) {
        self.recent.insert(pool);
        self.soon.insert(pool);
        let missed = self.missed.entry(pool).or_default();
        *missed = tokens.max(*missed);
    }

    /// Whether requests wait for tokens that other Envoys hold.
    #[must_use]
    pub fn is_to_ask_again(&self) -> bool {
        !self.needs.is_empty() && !self.needs_are_urgent
    }

    /// [`AGAIN_MS`](crate::AGAIN_MS) have passed.
    pub fn ask_again(&mut self) {
        self.needs_are_urgent = !self.needs.is_empty();
    }

    /// Tell of a pool with the next call.
    pub fn tell(&mut self, pool: PoolId) {
        self.soon.insert(pool);
    }

    /// All waiting requests are decided again: those that still wait say so again.
    pub fn start_over(&mut self) {
        self.needs.clear();
    }

    /// The tokens that requests wait for.
    #[must_use]
    pub fn waiting(&self, pool: &PoolId) -> u64 {
        self.needs.get(pool).copied().unwrap_or_default()
    }

    /// Whether the control plane does not answer: no request waits.
    #[must_use]
    pub const fn is_unreachable(&self) -> bool {
        self.failures >= FAILURES
    }

    /// Whether a call should be sent before the next tick.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        self.in_flight.is_none() && !self.is_unreachable() && (self.needs_are_urgent || !self.soon.is_empty())
    }

    /// Pools that were not used for [`IDLE_MS`] to twice that: their allowance is to be handed back.
    pub fn idle(&mut self, now_ms: u64) -> Vec<PoolId> {
        if now_ms.abs_diff(self.turned_ms) < IDLE_MS {
            return Vec::new();
        }
        self.turned_ms = now_ms;
        let earlier = std::mem::replace(&mut self.earlier, std::mem::take(&mut self.recent));
        earlier.into_iter().filter(|pool| !self.earlier.contains(pool)).collect()
    }

    /// All pools that may have something to tell or to hand back: the worker ends.
    pub fn all(&mut self) -> Vec<PoolId> {
        let sets = [&mut self.soon, &mut self.used, &mut self.recent, &mut self.earlier].map(std::mem::take);
        sets.into_iter().flatten().collect::<Pools>().into_iter().collect()
    }

    /// The pools to ask for now, with the tokens that requests wait for; `None` while a call is under way. A call on a tick
    /// tells the usage of all pools that were used.
    pub fn due(&mut self, is_tick: bool, now_ms: u64) -> Option<Vec<(PoolId, u64)>> {
        // A call whose context is gone is never answered.
        let is_lost = |call: &InFlight| now_ms.abs_diff(call.sent_ms) > TICK_MS.saturating_mul(8);
        if self.in_flight.as_ref().is_some_and(|call| !is_lost(call)) {
            return None;
        }
        self.needs_are_urgent = false;
        let mut pools: Vec<(PoolId, u64)> = std::mem::take(&mut self.needs).into_iter().collect();
        pools.truncate(POOLS);
        for (pool, need) in &mut pools {
            *need = self.take_missed(pool).max(*need);
        }
        let told = if is_tick { &self.used } else { &self.soon };
        let room = POOLS.saturating_sub(pools.len());
        let more: Vec<PoolId> =
            self.soon.iter().chain(told).copied().collect::<Pools>().into_iter().take(room).collect();
        for pool in more {
            let missed = self.take_missed(&pool);
            pools.push((pool, missed));
        }
        Some(pools)
    }

    /// Takes a pool off the lists, as it is asked for. Returns the tokens that requests missed.
    fn take_missed(&mut self, pool: &PoolId) -> u64 {
        self.soon.remove(pool);
        self.used.remove(pool);
        self.missed.remove(pool).unwrap_or_default()
    }

    /// A call was sent.
    pub fn sent(&mut self, token: u32, pools: Vec<PoolId>, now_ms: u64) {
        self.in_flight = Some(InFlight { token, sent_ms: now_ms, pools });
    }

    /// If this token is that of the call under way: the call, which is no longer under way.
    pub fn take_response(&mut self, token: u32) -> Option<Sent> {
        let InFlight { sent_ms, pools, .. } = self.in_flight.take_if(|call| call.token == token)?;
        Some(Sent { sent_ms, pools })
    }

    /// The call was answered.
    pub const fn on_answer(&mut self) {
        self.failures = 0;
    }

    /// The call was not answered: its usage is told again.
    pub fn on_failure(&mut self, sent: &Sent) {
        self.failures = self.failures.saturating_add(1);
        self.used.extend(&sent.pools);
    }
}

#[cfg(test)]
mod tests;
