//! What one worker asks the control plane for, and when: at once for requests that wait and for allowances that run low, and
//! on each tick for pools that it used. One call is under way at a time.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;

use crate::message::POOLS;
use crate::pool::PoolId;
use crate::{IDLE_MS, TICK_MS};

/// After this many calls in a row without an answer, no request waits until a call is answered.
const FAILURES: u32 = 2;

/// Maximum number of pools whose state a worker keeps while they are not used.
pub const REMEMBERED: usize = 10_000;

/// The state of one worker.
#[derive(Clone, Debug, Default)]
pub struct Asking {
    /// All pools that were used lately. The control plane creates ids at random, so a fast hash is enough.
    pools: HashMap<PoolId, Use, FxBuildHasher>,
    /// Pools that requests wait for, each once.
    lacking: Vec<PoolId>,
    /// The call for these pools must not wait for the next tick.
    needs_are_urgent: bool,
    /// Pools to ask for soon, each once: their allowance runs low, or usage or a hand-back is to be reported.
    soon: Vec<PoolId>,
    /// Pools that were used since the last call on a tick, each once.
    used: Vec<PoolId>,
    /// Pools that were used in this tick, each once, and those that were used in the tick before.
    used_now: Vec<PoolId>,
    used_before: Vec<PoolId>,
    /// The number of this tick. A new entry has another one.
    ticks: u32,
    /// The number of the present idle period. Each lasts [`IDLE_MS`].
    period: u32,
    period_began_ms: u64,
    in_flight: Option<InFlight>,
    /// A tick came while a call was under way.
    missed_tick: bool,
    failures: u32,
}

/// A pool to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// The pool.
    pub pool: PoolId,
    /// Tokens that requests wait for.
    pub need: u64,
    /// Tokens for the cheapest of them.
    pub least: u64,
    /// The pool is not used at present. The ask wants no tokens.
    pub is_unused: bool,
}

/// The use of one pool.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    /// Tokens that requests wait for.
    need: u64,
    /// Tokens for the cheapest of them.
    least: u64,
    /// Tokens that were missing for requests that were decided without them.
    missed: u64,
    is_soon: bool,
    is_used: bool,
    /// See [`Due::is_unused`].
    is_unused: bool,
    /// The idle period of the last use.
    period: u32,
    /// The tick of the last use.
    tick: u32,
}

impl Use {
    /// Whether there is something to ask for or to report.
    const fn has_more(&self) -> bool {
        self.is_soon || self.is_used || self.need > 0
    }

    /// Whether the pool was used neither in this idle period nor in the one before.
    const fn is_idle(&self, period: u32) -> bool {
        period.wrapping_sub(self.period) > 1
    }
}

#[derive(Clone, Debug)]
struct InFlight {
    token: u32,
    sent_ms: u64,
    pools: Vec<PoolId>,
}

/// A call that is no longer under way: it was answered, or it failed.
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
        let period = self.period;
        self.entry(pool).period = period;
    }

    /// A request has spent from a pool.
    pub fn spent(&mut self, pool: PoolId, is_low: bool) {
        self.needed(pool);
        self.note_used(pool);
        let now = self.ticks;
        if std::mem::replace(&mut self.entry(pool).tick, now) != now {
            self.used_now.push(pool);
        }
        if is_low {
            self.queue(pool);
        }
    }

    /// A request waits for tokens of a pool. `is_again`: the control plane has just said that other Envoys hold
    /// them. The worker asks again after [`AGAIN_MS`](crate::AGAIN_MS), by [`Asking::ask_again`].
    pub fn need(&mut self, pool: PoolId, tokens: u64, is_again: bool) {
        self.needs_are_urgent |= !is_again;
        self.needed(pool);
        let of = self.entry(pool);
        let is_first = of.need == 0;
        of.least = if is_first { tokens } else { of.least.min(tokens) };
        of.need = of.need.saturating_add(tokens);
        if is_first {
            self.lacking.push(pool);
        }
    }

    /// A request was decided without the tokens that it needs: ask for as many with the next call.
    pub fn ask_for(&mut self, pool: PoolId, tokens: u64) {
        self.needed(pool);
        let of = self.entry(pool);
        of.missed = of.missed.max(tokens);
        self.queue(pool);
    }

    /// Whether requests wait for tokens that other Envoys hold.
    #[must_use]
    pub const fn is_to_ask_again(&self) -> bool {
        !self.lacking.is_empty() && !self.needs_are_urgent
    }

    /// [`AGAIN_MS`](crate::AGAIN_MS) have passed.
    pub const fn ask_again(&mut self) {
        self.needs_are_urgent = !self.lacking.is_empty();
    }

    /// Queues a pool for the next call, which reports its use and asks for its state.
    pub fn queue(&mut self, pool: PoolId) {
        let of = self.entry(pool);
        if !std::mem::replace(&mut of.is_soon, true) {
            self.soon.push(pool);
        }
    }

    /// Queues a pool that is not used at present: the ask wants no tokens.
    pub fn queue_unused(&mut self, pool: PoolId) {
        self.queue(pool);
        self.entry(pool).is_unused = true;
    }

    /// Whether pools are queued for the next call.
    #[must_use]
    pub const fn has_queued(&self) -> bool {
        !self.soon.is_empty()
    }

    /// Asks again for all pools except those just answered. The Envoy has become alone and does not know their state.
    pub fn queue_all_but(&mut self, answered: &[PoolId]) {
        let pools = self.known();
        answered.iter().for_each(|pool| self.entry(*pool).is_soon = true);
        pools.into_iter().for_each(|pool| self.queue(pool));
        answered.iter().for_each(|pool| self.entry(*pool).is_soon = false);
    }

    /// Whether the worker knows the state of no pool.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.pools.is_empty()
    }

    /// The entry of a pool. A new entry counts as idle.
    fn entry(&mut self, pool: PoolId) -> &mut Use {
        let (period, tick) = (self.period.wrapping_sub(2), self.ticks.wrapping_sub(1));
        self.pools.entry(pool).or_insert(Use { period, tick, ..Use::default() })
    }

    fn note_used(&mut self, pool: PoolId) {
        let of = self.entry(pool);
        if !std::mem::replace(&mut of.is_used, true) {
            self.used.push(pool);
        }
    }

    /// All waiting requests are decided again. Those that must still wait are noted again.
    pub fn start_over(&mut self) {
        self.needs_are_urgent = false;
        for pool in std::mem::take(&mut self.lacking) {
            self.entry(pool).need = 0;
        }
    }

    /// The tokens that requests wait for.
    #[must_use]
    pub fn waiting(&self, pool: &PoolId) -> u64 {
        self.pools.get(pool).map_or(0, |of| of.need)
    }

    /// Whether the control plane does not answer: no request waits.
    #[must_use]
    pub const fn is_unreachable(&self) -> bool {
        self.failures >= FAILURES
    }

    /// Whether a call should be sent before the next tick.
    #[must_use]
    pub const fn is_urgent(&self) -> bool {
        let has_more = (self.needs_are_urgent && !self.lacking.is_empty()) || !self.soon.is_empty();
        self.in_flight.is_none() && !self.is_unreachable() && has_more
    }

    /// Whether the call of the last tick is still to be sent, because it had to wait for the answer to another.
    #[must_use]
    pub const fn has_missed_tick(&self) -> bool {
        self.missed_tick && self.in_flight.is_none()
    }

    /// Pools that were not used for [`IDLE_MS`] to twice that: their allowance is to be handed back. An Envoy that is alone
    /// remembers the state of [`REMEMBERED`] pools for as long as it is alone.
    pub fn idle(&mut self, is_alone: bool, now_ms: u64) -> Vec<PoolId> {
        if now_ms.abs_diff(self.period_began_ms) < IDLE_MS || (is_alone && self.pools.len() <= REMEMBERED) {
            return Vec::new();
        }
        self.period_began_ms = now_ms;
        self.period = self.period.wrapping_add(1);
        let period = self.period;
        let is_idle = |of: &Use| of.is_idle(period);
        let idle = self.pools.iter().filter(|(_, of)| is_idle(of)).map(|(pool, _)| *pool).collect();
        // A pool with something to report is kept, and is idle again in the next period.
        self.pools.retain(|_, of| !is_idle(of) || of.has_more());
        idle
    }

    /// On a tick: pools that were used in the tick before, and not since. Call [`Asking::watch`] for those that are in use after all.
    pub fn unused(&mut self) -> Vec<PoolId> {
        let now = self.ticks;
        self.ticks = now.wrapping_add(1);
        let before = std::mem::replace(&mut self.used_before, std::mem::take(&mut self.used_now));
        before.into_iter().filter(|pool| self.pools.get(pool).is_none_or(|of| of.tick != now)).collect()
    }

    /// Looks again at the next tick whether a pool is unused.
    pub fn watch(&mut self, pool: PoolId) {
        self.used_before.push(pool);
    }

    /// All pools that the worker knows.
    #[must_use]
    pub fn known(&self) -> Vec<PoolId> {
        self.pools.keys().copied().collect()
    }

    /// All pools that may have something to report or to hand back: the worker ends.
    pub fn all(&mut self) -> Vec<PoolId> {
        (self.lacking, self.soon, self.used) = (Vec::new(), Vec::new(), Vec::new());
        self.pools.drain().map(|(pool, _)| pool).collect()
    }

    /// The pools to ask for now; `None` while a call is under way. A call on a tick reports the usage of all pools that were used.
    pub fn due(&mut self, is_tick: bool, now_ms: u64) -> Option<Vec<Due>> {
        // A call whose context is gone is never answered.
        let is_lost = |call: &InFlight| now_ms.abs_diff(call.sent_ms) > TICK_MS.saturating_mul(8);
        if self.in_flight.as_ref().is_some_and(|call| !is_lost(call)) {
            self.missed_tick |= is_tick;
            return None;
        }
        (self.needs_are_urgent, self.missed_tick) = (false, false);
        let mut due = Vec::new();
        self.take_due(|asking| &mut asking.lacking, &mut due);
        self.take_due(|asking| &mut asking.soon, &mut due);
        if is_tick {
            self.take_due(|asking| &mut asking.used, &mut due);
        }
        Some(due)
    }

    /// Takes pools off a list, as many as a call has room for.
    fn take_due(&mut self, list: fn(&mut Self) -> &mut Vec<PoolId>, due: &mut Vec<Due>) {
        while due.len() < POOLS {
            let Some(pool) = list(self).pop() else { return };
            let of = *self.entry(pool);
            if of.has_more() {
                let least = if of.need > 0 { of.least } else { of.missed };
                let need = of.need.max(of.missed);
                due.push(Due { pool, need, least, is_unused: of.is_unused && need == 0 && !of.is_used });
            }
            if of.is_idle(self.period) {
                self.pools.remove(&pool);
            } else {
                *self.entry(pool) = Use { period: of.period, tick: of.tick, ..Use::default() };
            }
        }
    }

    /// A call was sent.
    pub fn sent(&mut self, token: u32, pools: Vec<PoolId>, now_ms: u64) {
        self.in_flight = Some(InFlight { token, sent_ms: now_ms, pools });
    }

    /// Takes the call under way, if it has this token.
    pub fn take_response(&mut self, token: u32) -> Option<Sent> {
        let InFlight { sent_ms, pools, .. } = self.in_flight.take_if(|call| call.token == token)?;
        Some(Sent { sent_ms, pools })
    }

    /// The call was answered.
    pub const fn on_answer(&mut self) {
        self.failures = 0;
    }

    /// The call was not answered: its usage is reported again.
    pub fn on_failure(&mut self, sent: &Sent) {
        self.failures = self.failures.saturating_add(1);
        sent.pools.iter().for_each(|pool| self.note_used(*pool));
    }
}

#[cfg(test)]
mod tests;
