//! The state of one pool at one Envoy, and how a request spends from it. All workers of the Envoy share it.

use contract::rate::Rate;
use contract::time::{NS_PER_MS, NS_PER_S};

use crate::asking::Due;
use crate::contact::Contact;
use crate::ledger::{FAST_NS, UNUSED_PART};
use crate::message::{Ask, Grant};
use crate::{FORGOTTEN_MS, IDLE_MS, TICK_MS};

mod words;

pub use words::WORDS;

/// The shortest time between two asks for more of a pool while no request waits, in milliseconds.
const TOP_UP_PAUSE_MS: u64 = 5;

/// A pool that was empty is taken to be empty for at least this long, in milliseconds. It bounds the calls of an Envoy whose
/// clients hammer at an empty pool.
const LEAST_EMPTY_MS: u64 = 10;

/// Each tick in which tokens are spent lowers the remembered demand by 1 / `DECAY` of it.
const DECAY: u64 = 32;

/// Demand is stored in units of 1 / `SCALE` of a token.
const SCALE: u64 = 256;

/// What one Envoy knows and holds of one pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// See [`Ask::session`].
    pub session: u64,
    /// See [`Ask::granted`].
    pub granted: u64,
    /// See [`Ask::spent`].
    pub spent: u64,
    /// See [`Ask::returned`].
    pub returned: u64,
    /// Rate limits: spent tokens that can be spent again, because their requests did not go upstream after all.
    pub refunded: u64,
    /// Rate limits: the theoretical arrival time of the Envoy's own requests, in nanoseconds of Unix time; while the Envoy is
    /// alone, that of the pool.
    pub arrival_ns: u64,
    /// Rate limits: the interval between two requests with which `arrival_ns` was computed.
    pub interval_ns: u64,
    /// Rate limits: the time that the burst takes. Quotas and balances: how often they were filled, see
    /// [`Budget::fill`](contract::record::Budget::fill).
    pub terms: u64,
    /// Rate limits: the theoretical arrival time at the capacity that is safe while the control plane does not answer.
    pub fallback_ns: u64,
    /// The number of the term in which the Envoy is alone and knows the state of this pool: see [`Contact::alone_term`].
    pub alone_term: u32,
    /// In that term: tokens of a quota or a balance that are left.
    pub alone_left: u64,
    /// In the last answer: tokens that could still be granted.
    pub left: u64,
    /// In the last answer: tokens that other Envoys held and could hand back.
    pub others: u64,
    /// Until when the Envoy relies on the last answer, in milliseconds of Unix time.
    pub known_until_ms: u64,
    /// When one more token comes, if no Envoy hands any back.
    pub empty_until_ms: u64,
    /// When the Envoy last asked.
    pub asked_ms: u64,
    /// When a request last needed tokens.
    pub needed_ms: u64,
    /// The tick of the last spent token.
    pub tick: u64,
    /// Tokens spent in that tick.
    pub used: u64,
    /// The most tokens spent in a tick before that one, in 256ths; it decays.
    pub peak: u64,
    /// In the last answer: how many Envoys use the pool.
    pub users: u64,
}

/// The limit of a pool, as the record of a key has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limited<'a> {
    /// A rate limit.
    Rate(&'a Rate),
    /// A quota or a balance.
    Stock {
        /// See [`Budget::fill`](contract::record::Budget::fill).
        fill: u32,
    },
}

impl<'a> Limited<'a> {
    const fn rate(self) -> Option<&'a Rate> {
        match self {
            Self::Rate(rate) => Some(rate),
            Self::Stock { .. } => None,
        }
    }
}

/// The result of spending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spent {
    /// The tokens are spent. `is_low`: the Envoy should ask for more soon.
    Yes {
        /// Less than half of what the Envoy wants to hold is left.
        is_low: bool,
    },
    /// The Envoy must ask first.
    Wait {
        /// The pool has too few tokens besides those that other Envoys hold. The control plane recalls these.
        for_others: bool,
    },
    /// The pool has too few tokens.
    No {
        /// In how many milliseconds one more comes; `u64::MAX` if none comes by itself.
        empty_ms: u64,
    },
}

/// What an Envoy does with its tokens after a tick without use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterUse {
    /// It has no more than it may hold.
    KeepsAll,
    /// It handed tokens back. The next [`Holding::ask`] reports it.
    HandedBack,
    /// The pool was used in this tick after all.
    InUse,
}

impl Holding {
    /// Spends tokens. `waiting`: tokens that requests of this worker wait for.
    #[must_use]
    pub fn spend(&mut self, cost: u64, of: Limited<'_>, waiting: u64, contact: &Contact, now_ns: u64) -> Spent {
        let now_ms = now_ns / NS_PER_MS;
        self.prepare(of, contact, now_ns);
        let rate = of.rate();
        if self.spend_refunded(cost, now_ns) {
            return Spent::Yes { is_low: false };
        }
        if contact.is_alone(now_ms) && self.is_known(contact) {
            return self.spend_alone(cost, rate, now_ns);
        }
        if self.available(contact, now_ms) >= cost {
            self.take(cost, rate, now_ns);
            let is_low = self.available(contact, now_ms).saturating_mul(2) < self.want()
                && now_ms.abs_diff(self.asked_ms) >= TOP_UP_PAUSE_MS;
            return Spent::Yes { is_low };
        }
        let available = self.available(contact, now_ms);
        self.wait_or_refuse(cost.saturating_sub(available), waiting, now_ms)
    }

    /// Notes that a request needs tokens under these terms. Store the holding even if the request must wait, so that the answer
    /// applies to these terms.
    pub fn prepare(&mut self, of: Limited<'_>, contact: &Contact, now_ns: u64) {
        let now_ms = now_ns / NS_PER_MS;
        self.renew(contact, now_ms);
        self.adopt(of, now_ns);
        self.needed_ms = now_ms;
        if let Limited::Rate(rate) = of {
            self.mend_clock_step(contact, now_ns);
            self.fallback_ns = rate.slowed(contact.live).after_clock_step(self.fallback_ns, now_ns);
        }
    }

    /// Corrects a time that was set before the clock stepped back. An Envoy that decides by itself treats the limit as used up.
    /// Any other Envoy must not report that time, because then all Envoys would refuse.
    const fn mend_clock_step(&mut self, contact: &Contact, now_ns: u64) {
        let reach_ns = now_ns.saturating_add(self.terms);
        // Clocks of workers that differ by less than a second are no step.
        if self.interval_ns > 0 && self.arrival_ns > reach_ns.saturating_add(NS_PER_S) {
            let decides_itself = contact.is_alone(now_ns / NS_PER_MS) && self.is_known(contact);
            self.arrival_ns = if decides_itself { reach_ns } else { now_ns };
            if !decides_itself {
                self.forget_state();
            }
        }
    }

    /// Spends tokens that were refunded, as far as they have not come back with time.
    const fn spend_refunded(&mut self, cost: u64, now_ns: u64) -> bool {
        if self.arrival_ns <= now_ns {
            self.refunded = 0;
        }
        if self.refunded < cost {
            return false;
        }
        let next_ns = now_ns.saturating_add(self.interval_ns.saturating_mul(self.refunded));
        if self.arrival_ns < next_ns {
            self.arrival_ns = next_ns;
        }
        self.refunded = self.refunded.saturating_sub(cost);
        true
    }

    /// Spends a token of a rate limit while the control plane does not answer, at the rate that is safe if all Envoys do the
    /// same.
    ///
    /// # Errors
    /// In how many nanoseconds the next token comes.
    pub fn spend_at_safe_rate(&mut self, rate: &Rate, contact: &Contact, now_ns: u64) -> Result<(), u64> {
        let next_ns = rate.slowed(contact.live).take(Some(self.fallback_ns.max(self.arrival_ns)), now_ns)?;
        self.take(1, Some(rate), now_ns);
        self.fallback_ns = next_ns;
        Ok(())
    }

    /// Takes back tokens of a request that did not go upstream after all.
    pub const fn refund(&mut self, cost: u64) {
        if self.interval_ns > 0 {
            // They may have been reported already, so the sum must not fall.
            self.refunded = self.refunded.saturating_add(cost);
        } else {
            // Tokens of a quota or a balance count only once a usage report has them.
            self.spent = self.spent.saturating_sub(cost);
            self.alone_left = self.alone_left.saturating_add(cost);
        }
    }

    /// In how many milliseconds one more token comes, as far as is known; `u64::MAX` if none comes by itself.
    #[must_use]
    pub const fn empty_ms(&self, now_ms: u64) -> u64 {
        if self.empty_until_ms == u64::MAX { u64::MAX } else { self.empty_until_ms.saturating_sub(now_ms) }
    }

    /// Whether the pool has tokens, too few for a request that it refused.
    #[must_use]
    pub const fn has_some(&self) -> bool {
        self.left.saturating_add(self.unspent()) > 0
    }

    /// Tokens that this Envoy can still spend: those that it holds, and those that the control plane could still grant at its
    /// last answer. Also the nanoseconds until a rate limit is full again; `None` if unknown.
    #[must_use]
    pub fn left(&self, of: Limited<'_>, contact: &Contact, now_ns: u64) -> (u64, Option<u64>) {
        let decides_itself = contact.is_alone(now_ns / NS_PER_MS) && self.is_known(contact);
        match (decides_itself, of) {
            (true, Limited::Rate(rate)) => {
                (rate.room(self.arrival_ns, now_ns), Some(self.arrival_ns.saturating_sub(now_ns)))
            }
            (true, Limited::Stock { .. }) => (self.alone_left, None),
            (false, _) => (self.unspent().saturating_add(self.left), None),
        }
    }

    /// Whether an answer that is new enough says that the pool lacks these tokens, without those that other Envoys hold. If
    /// none does, the request waited in vain for another reason: another Envoy may still decide by itself, or answers are slow.
    #[must_use]
    pub const fn is_known_to_lack(&self, cost: u64, since_ms: u64) -> bool {
        self.others < u64::MAX && self.known_until_ms > since_ms && cost.saturating_sub(self.unspent()) > self.left
    }

    /// Whether the Envoy is alone and knows the state of the pool.
    #[must_use]
    pub const fn is_known(&self, contact: &Contact) -> bool {
        self.alone_term == contact.alone_term
    }

    /// Whether no request needed tokens for [`IDLE_MS`].
    #[must_use]
    pub const fn is_idle(&self, now_ms: u64) -> bool {
        now_ms.abs_diff(self.needed_ms) >= IDLE_MS
    }

    /// Hands back what is not spent, for example because the pool is recalled. The next [`Holding::ask`] reports it.
    pub const fn hand_back(&mut self) {
        self.put_back(self.unspent());
        (self.used, self.peak) = (0, 0);
    }

    /// After a tick without use: hands back the tokens of a fast limit that are beyond this Envoy's part of what unused Envoys may
    /// hold.
    pub const fn hand_back_after_use(&mut self, now_ms: u64) -> AfterUse {
        let is_fast = self.interval_ns > 0 && self.terms <= FAST_NS;
        if !is_fast {
            return AfterUse::KeepsAll;
        }
        if now_ms / TICK_MS == self.tick {
            return AfterUse::InUse;
        }
        let all = self.left.saturating_add(self.others).saturating_add(self.unspent());
        let part = match (all / UNUSED_PART).checked_div(self.users) {
            Some(part) => part,
            None => all / UNUSED_PART,
        };
        let surplus = self.unspent().saturating_sub(part);
        self.put_back(surplus);
        if surplus > 0 { AfterUse::HandedBack } else { AfterUse::KeepsAll }
    }

    /// The pool has these tokens again. Until an answer says more, requests that need them ask.
    const fn put_back(&mut self, tokens: u64) {
        self.returned = self.returned.saturating_add(tokens);
        self.left = self.left.saturating_add(tokens);
    }

    /// Makes the next request ask.
    const fn forget_state(&mut self) {
        self.known_until_ms = 0;
        self.alone_term = self.alone_term.wrapping_sub(1);
    }

    /// What to ask for. Hands back what is far more than the Envoy uses.
    pub fn ask(&mut self, due: Due, contact: &Contact, now_ns: u64) -> Ask {
        let Due { pool, need, least, is_unused } = due;
        let now_ms = now_ns / NS_PER_MS;
        self.renew(contact, now_ms);
        self.mend_clock_step(contact, now_ns);
        self.asked_ms = now_ms;
        let want = self.want();
        let surplus = self.unspent().saturating_sub(want.saturating_mul(2).max(need));
        self.put_back(surplus);
        let Self { session, granted, spent, returned, .. } = *self;
        let (ahead_ns, interval_ns) = (self.arrival_ns.saturating_sub(now_ns), self.interval_ns);
        Ask {
            pool,
            session,
            granted,
            spent,
            returned,
            ahead_ns,
            interval_ns,
            need,
            least,
            want: if is_unused { 0 } else { want },
        }
    }

    /// Applies the answer to an ask that was sent at `sent_ms`. Call [`Contact::answered`] first.
    pub fn apply(&mut self, grant: &Grant, contact: &Contact, sent_ms: u64) {
        if grant.session != self.session {
            // An answer about an earlier session is ignored. If the control plane knows a later one, the clock has stepped
            // back.
            self.session = self.session.max(grant.session.saturating_add(u64::from(grant.session > self.session)));
            return;
        }
        self.granted = self.granted.max(grant.granted);
        // The control plane did not know yet of tokens that were handed back since the call.
        let known_returned = grant.granted.saturating_sub(grant.spent).saturating_sub(grant.held);
        self.left = grant.left.saturating_add(self.returned.saturating_sub(known_returned));
        (self.others, self.users) = (grant.others, grant.users.into());
        let unreported = self.spent.saturating_sub(grant.spent);
        // The control plane may know of use that no allowance covered: a quota that lets requests through unchecked.
        self.spent = self.spent.max(grant.spent);
        let empty_ms = if grant.empty_ms == u32::MAX { u64::MAX } else { grant.empty_ms.into() };
        self.empty_until_ms = sent_ms.saturating_add(empty_ms);
        let known_ms = if grant.known_ms == u32::MAX { empty_ms } else { empty_ms.min(grant.known_ms.into()) };
        self.known_until_ms = sent_ms.saturating_add(known_ms.max(LEAST_EMPTY_MS));
        if contact.was_alone() {
            // With different intervals, one side does not know yet that the limit has changed.
            if !self.is_known(contact) && grant.interval_ns == self.interval_ns {
                self.alone_term = contact.alone_term;
                // The control plane measured `ahead_ns` before the answer came. Counted from the call, the time would be too
                // early, so it counts from the answer. Tokens that this Envoy has spent since the call are added.
                let unreported_ns = unreported.saturating_mul(self.interval_ns);
                let arrival_ns = contact.answered_ms.saturating_mul(NS_PER_MS).saturating_add(grant.ahead_ns);
                self.arrival_ns = self.arrival_ns.max(arrival_ns.saturating_add(unreported_ns));
            }
            let spent = self.spent.saturating_add(self.returned);
            self.alone_left = grant.left.saturating_add(grant.granted).saturating_sub(spent);
        }
    }

    /// Whether neither side counts anything as held: the holding can be forgotten.
    #[must_use]
    pub const fn is_settled(&self, grant: &Grant) -> bool {
        grant.session == self.session && grant.held == 0 && self.unspent() == 0
    }

    /// What the Envoy may spend without asking.
    #[must_use]
    pub const fn available(&self, contact: &Contact, now_ms: u64) -> u64 {
        let is_void = contact.is_cut_off(now_ms) || self.session < contact.since_ms;
        if is_void { 0 } else { self.unspent() }
    }

    const fn unspent(&self) -> u64 {
        self.granted.saturating_sub(self.spent).saturating_sub(self.returned)
    }

    /// Starts a session if there is none, if its allowance is void, or if the control plane may have forgotten it.
    fn renew(&mut self, contact: &Contact, now_ms: u64) {
        let is_forgotten = self.needed_ms > 0 && now_ms.saturating_sub(self.needed_ms) >= FORGOTTEN_MS;
        if self.session == 0 || self.session < contact.valid_since_ms(now_ms) || is_forgotten {
            self.session = self.session.saturating_add(1).max(now_ms);
            (self.granted, self.spent, self.returned, self.refunded) = (0, 0, 0, 0);
        }
    }

    /// Brings the use of a changed limit to its present terms, and forgets the known state of the pool.
    fn adopt(&mut self, of: Limited<'_>, now_ns: u64) {
        let (interval_ns, terms) = match of {
            Limited::Rate(rate) => (rate.interval_ns(), rate.tolerance_ns()),
            Limited::Stock { fill } => (0, fill.into()),
        };
        if (self.interval_ns, self.terms) == (interval_ns, terms) {
            return;
        }
        if self.interval_ns > 0 {
            // The limit changed after the last request, so its tokens came back at one rate first and then at the other. Count
            // the higher rate: the control plane knows the use exactly.
            let since_ns = self.needed_ms.saturating_mul(NS_PER_MS);
            let at = |changed_ns| crate::pool::rescale(self.arrival_ns, self.interval_ns, interval_ns, changed_ns);
            self.arrival_ns = at(now_ns).min(at(since_ns));
        }
        (self.interval_ns, self.terms) = (interval_ns, terms);
        // A lowered pool may have fewer tokens left than the Envoy holds.
        self.hand_back();
        self.forget_state();
    }

    fn spend_alone(&mut self, cost: u64, rate: Option<&Rate>, now_ns: u64) -> Spent {
        match rate {
            Some(rate) => match rate.take(Some(self.arrival_ns), now_ns) {
                Ok(_) => {}
                Err(wait_ns) => return Spent::No { empty_ms: wait_ns.div_ceil(NS_PER_MS) },
            },
            None if self.alone_left >= cost => {}
            None => return self.wait_or_refuse(cost, 0, now_ns / NS_PER_MS),
        }
        self.take(cost, rate, now_ns);
        Spent::Yes { is_low: false }
    }

    /// Refuses a request if the pool certainly lacks the tokens: either it has none left, or other Envoys hold fewer than this
    /// request and the waiting ones need.
    const fn wait_or_refuse(&self, lacking: u64, waiting: u64, now_ms: u64) -> Spent {
        // An answer from before a clock step is void. While the pool has tokens, it is unknown which waiting request gets them.
        if now_ms >= self.known_until_ms || now_ms < self.asked_ms || lacking <= self.left {
            return Spent::Wait { for_others: false };
        }
        if lacking.saturating_add(waiting) <= self.left.saturating_add(self.others) {
            return Spent::Wait { for_others: true };
        }
        Spent::No { empty_ms: self.empty_ms(now_ms) }
    }

    fn take(&mut self, cost: u64, rate: Option<&Rate>, now_ns: u64) {
        let now_ms = now_ns / NS_PER_MS;
        self.spent = self.spent.saturating_add(cost);
        self.alone_left = self.alone_left.saturating_sub(cost);
        if let Some(rate) = rate {
            self.arrival_ns = self.arrival_ns.max(now_ns).saturating_add(rate.interval_ns());
        }
        let tick = now_ms / TICK_MS;
        if tick != self.tick {
            self.peak = self.peak();
            self.peak = self.peak.saturating_sub(self.peak / DECAY);
            (self.tick, self.used) = (tick, 0);
        }
        self.used = self.used.saturating_add(cost);
    }

    /// What the Envoy wants to hold: twice the most that it spent in a tick lately.
    fn want(&self) -> u64 {
        self.peak().saturating_mul(2).div_ceil(SCALE)
    }

    fn peak(&self) -> u64 {
        self.peak.max(self.used.saturating_mul(SCALE))
    }
}

#[cfg(test)]
mod tests;
