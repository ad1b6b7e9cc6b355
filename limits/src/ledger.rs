//! The control plane's side of a pool: what is used, what each Envoy holds, and what an Envoy is granted.
//!
//! Tokens that an Envoy holds are reserved: no other Envoy is granted them. Spent tokens of a rate limit count as used once the
//! Envoy reports them, from the time at which it spent them. Spent tokens of a quota or a balance count as used once the usage
//! report is stored, together with the counts; until then they count as held.

use contract::id::ReporterId;
use contract::rate::Rate;
use contract::time::{NS_PER_MS, NS_PER_S};

use crate::message::{Ask, Grant};
use crate::pool::{Terms, rescale};
use crate::{EXPIRES_AFTER_MS, IDLE_MS, TICK_MS};

/// What Envoys may hold of a pool beyond what their waiting requests need.
struct AheadBounds {
    /// One token in this many of those that are left is granted ahead of need, to all Envoys together.
    part: u64,
    /// If fewer tokens can be granted than this multiple of what other Envoys hold, these hand back all.
    scarce: u64,
}

/// Rate limits whose burst comes back within [`FAST_NS`]. The burst is small for the rate, and an Envoy needs enough tokens until
/// its next answer. So the Envoys that use the limit may hold all of it. After a tick without use they hand tokens back.
const OF_FAST: AheadBounds = AheadBounds { part: 1, scarce: 0 };

/// A rate limit is fast if its burst comes back within this time, in nanoseconds.
pub(crate) const FAST_NS: u64 = 10 * NS_PER_S;

/// Other rate limits.
const OF_RATE: AheadBounds = AheadBounds { part: 8, scarce: 4 };

/// Quotas and balances. Envoys get a sixteenth of what is left ahead of need, and hand it back above a ninth.
const OF_STOCK: AheadBounds = AheadBounds { part: 16, scarce: 8 };

/// If unused Envoys hold more than one token in this many of those that are left, they hand back all.
pub(crate) const UNUSED_PART: u64 = 8;

/// An Envoy that has not used a pool for this long counts as unused, in milliseconds: it has had a tick without use, and has
/// called since.
const UNUSED_MS: u64 = 3 * TICK_MS;

/// An Envoy that has been silent for this long, in milliseconds, is not expected to hand back tokens: several of its ticks have
/// passed. No request waits for its tokens.
const SILENT_MS: u64 = 1_500;

/// For how long an Envoy may rely on an answer while other Envoys hold tokens that they can hand back, in milliseconds.
const OTHERS_MS: u32 = 100;

/// For how long an Envoy may rely on an answer while silent Envoys hold tokens, in milliseconds.
const SILENT_KNOWN_MS: u32 = 1_000;

/// A pool as the control plane keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// What it allows at present.
    pub terms: Terms,
    /// Rate limits: the theoretical arrival time, in nanoseconds of Unix time.
    pub arrival_ns: u64,
    /// Rate limits: the interval between two requests as of the last change. 0 before the first.
    pub interval_ns: u64,
    /// What each Envoy holds. Those that were silent for [`EXPIRES_AFTER_MS`] are left out.
    pub holders: Vec<Holder>,
}

/// One Envoy's part of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The Envoy process.
    pub reporter: ReporterId,
    /// See [`Ask::session`].
    pub session: u64,
    /// All that it was granted in the session.
    pub granted: u64,
    /// Tokens that are booked as spent.
    pub spent: u64,
    /// What it handed back.
    pub returned: u64,
    /// When it last used the pool, in milliseconds of Unix time.
    pub used_ms: u64,
    /// It must hand back what it holds.
    pub is_recalled: bool,
    /// When the Envoy last called, in milliseconds of Unix time; 0 if it has ended.
    pub heard_ms: u64,
}

/// Whether the control plane can grant tokens to the calling Envoy now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherEnvoys {
    /// No other Envoy may decide by itself: tokens can be granted.
    Several,
    /// Another Envoy may still decide by itself: nothing can be granted.
    AnotherIsAlone,
}

impl Holder {
    /// One that holds nothing yet.
    #[must_use]
    pub const fn new(reporter: ReporterId, session: u64) -> Self {
        Self { reporter, session, granted: 0, spent: 0, returned: 0, used_ms: 0, is_recalled: false, heard_ms: 0 }
    }

    /// Tokens that it holds.
    #[must_use]
    pub const fn held(&self) -> u64 {
        self.granted.saturating_sub(self.spent).saturating_sub(self.returned)
    }

    /// Tokens that the Envoy can still spend. It holds more while usage that it reports is not booked.
    fn unspent(&self, ask: &Ask) -> u64 {
        self.granted.saturating_sub(self.spent.max(ask.spent)).saturating_sub(self.returned)
    }

    /// Whether the Envoy called lately, so that it can hand back tokens.
    const fn has_called_lately(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.heard_ms) < SILENT_MS
    }

    /// Books usage of a quota or a balance that a report has.
    pub fn book(&mut self, tokens: u64) {
        self.spent = self.spent.saturating_add(tokens);
        // What was spent beyond the grants, or in an earlier session, must not count as handed back later. The Envoy learns
        // with its next answer that it is spent.
        self.granted = self.granted.max(self.spent.saturating_add(self.returned));
    }
}

impl Pool {
    /// A pool of which nothing is used or held.
    #[must_use]
    pub const fn new(terms: Terms) -> Self {
        Self { terms, arrival_ns: 0, interval_ns: 0, holders: Vec::new() }
    }

    /// Answers an Envoy's ask: books the usage that it reports, and grants what it needs and wants as far as the pool has
    /// tokens.
    pub fn answer(&mut self, reporter: ReporterId, ask: &Ask, company: OtherEnvoys, now_ns: u64) -> Grant {
        self.adopt_terms(now_ns);
        let Some(mut me) = self.take_holder(reporter, ask.session) else {
            // A call of an earlier session. Only its session number matters to the Envoy.
            let session = self.holders.iter().find(|holder| holder.reporter == reporter).map_or(0, |me| me.session);
            return Grant { session, ..Grant::default() };
        };
        self.book(&mut me, ask, now_ns);
        let others: u64 = self.holders.iter().fold(0, |sum, holder| sum.saturating_add(holder.held()));
        let (needed, ahead) = match company {
            OtherEnvoys::Several => self.grantable(&me, ask, others, now_ns),
            OtherEnvoys::AnotherIsAlone => (0, 0),
        };
        let missing = ask.need.saturating_sub(me.unspent(ask)).saturating_sub(needed);
        let users = self.other_users(now_ns / NS_PER_MS).saturating_add(1);
        me.granted = me.granted.saturating_add(needed).saturating_add(ahead);
        // A recall stands until the Envoy has handed back all tokens, or needs tokens itself.
        me.is_recalled &= ask.need == 0 && me.unspent(ask) > 0;
        if ask.need > 0 || ask.spent > 0 {
            me.used_ms = now_ns / NS_PER_MS;
        }
        me.heard_ms = now_ns / NS_PER_MS;
        self.holders.push(me);
        let left = self.room(now_ns);
        self.recall_if_scarce(reporter, missing > 0, now_ns);
        let others = self.recallable(reporter, now_ns / NS_PER_MS);
        let silent_ms = self.silent_ms(reporter, now_ns / NS_PER_MS);
        let (left, others) = match company {
            OtherEnvoys::Several => (left, others),
            // The usage of that Envoy is not known yet. Requests wait until it is.
            OtherEnvoys::AnotherIsAlone => (0, u64::MAX),
        };
        Grant {
            session: me.session,
            granted: me.granted,
            spent: me.spent,
            held: me.held(),
            left,
            others,
            empty_ms: match &self.terms {
                // More come soon, so a request that needs more than is left asks again.
                Terms::Rate(_) if left > 0 => 0,
                _ => self.empty_ms(now_ns).min(silent_ms),
            },
            known_ms: match (others, silent_ms) {
                (0, u32::MAX) => u32::MAX,
                (0, _) => SILENT_KNOWN_MS,
                _ => OTHERS_MS,
            },
            ahead_ns: self.arrival_ns.saturating_sub(now_ns),
            interval_ns: self.interval_ns,
            users: u32::try_from(users).unwrap_or(u32::MAX),
        }
    }

    /// Tokens that can be granted: left, and held by no Envoy.
    #[must_use]
    pub fn room(&self, now_ns: u64) -> u64 {
        self.left(now_ns).saturating_sub(self.held())
    }

    /// Tokens that are not used, also those that Envoys hold.
    #[must_use]
    pub fn left(&self, now_ns: u64) -> u64 {
        match &self.terms {
            Terms::Rate(rate) => rate.room(self.arrival_ns, now_ns),
            Terms::Stock { left, .. } => u64::try_from(*left).unwrap_or_default(),
        }
    }

    /// Tokens that Envoys hold.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.holders.iter().fold(0, |sum, holder| sum.saturating_add(holder.held()))
    }

    const fn ahead_bounds(&self) -> AheadBounds {
        match &self.terms {
            Terms::Rate(rate) if rate.tolerance_ns() <= FAST_NS => OF_FAST,
            Terms::Rate(_) => OF_RATE,
            Terms::Stock { .. } => OF_STOCK,
        }
    }

    /// Brings the use of a rate limit to its present rate: the tokens that are used stay used.
    fn adopt_terms(&mut self, now_ns: u64) {
        let Terms::Rate(rate) = &self.terms else { return };
        let interval_ns = rate.interval_ns();
        if self.interval_ns != interval_ns {
            self.arrival_ns = rescale(self.arrival_ns, self.interval_ns, interval_ns, now_ns);
            self.interval_ns = interval_ns;
        }
        self.arrival_ns = self.arrival_ns.min(rate.within_reach(self.arrival_ns, now_ns));
    }

    /// Removes the Envoy's entry and returns it, or a new one for a later session; `None` if the ask is of an earlier session.
    fn take_holder(&mut self, reporter: ReporterId, session: u64) -> Option<Holder> {
        let place = self.holders.iter().position(|holder| holder.reporter == reporter);
        let known = place.and_then(|place| self.holders.get(place).copied());
        let me = match known {
            Some(known) if known.session > session => return None,
            Some(known) if known.session == session => known,
            _ => Holder::new(reporter, session),
        };
        if let Some(place) = place {
            self.holders.swap_remove(place);
        }
        Some(me)
    }

    fn book(&mut self, me: &mut Holder, ask: &Ask, now_ns: u64) {
        me.returned = me.returned.max(ask.returned);
        // After a crash of the database the Envoy knows of grants that the database forgot.
        me.granted = me.granted.max(ask.granted).max(ask.spent.saturating_add(me.returned));
        if let Terms::Rate(rate) = &self.terms {
            let used = ask.spent.saturating_sub(me.spent);
            me.spent = me.spent.max(ask.spent);
            let after_all = self.arrival_ns.saturating_add(rate.interval_ns().saturating_mul(used));
            let own = now_ns.saturating_add(ask.ahead_ns);
            let own = rescale(own, ask.interval_ns, rate.interval_ns(), now_ns);
            self.arrival_ns = rate.within_reach(after_all.max(own), now_ns).min(after_all.max(own));
        }
    }

    /// Tokens for the requests that wait, and tokens ahead of need.
    fn grantable(&self, me: &Holder, ask: &Ask, others: u64, now_ns: u64) -> (u64, u64) {
        let room = self.left(now_ns).saturating_sub(others).saturating_sub(me.held());
        let unspent = me.unspent(ask);
        let needed =
            if unspent.saturating_add(room) < ask.least { 0 } else { ask.need.saturating_sub(unspent).min(room) };
        let room = room.saturating_sub(needed);
        let idle = unspent.saturating_add(needed).saturating_sub(ask.need);
        let now_ms = now_ns / NS_PER_MS;
        let users = self.other_users(now_ms).saturating_add(1);
        let most = room.checked_div(self.ahead_bounds().part).unwrap_or_default();
        // What one Envoy holds is lost for a while if the Envoy is killed.
        let even = most.checked_div(users).unwrap_or_default().min(self.left(now_ns) / 2).saturating_sub(idle);
        let all = most.saturating_sub(others.saturating_add(idle));
        (needed, ask.want.saturating_sub(idle).min(even).min(all))
    }

    /// The Envoys other than the asking one that have used the pool lately. The asking one's entry is taken out.
    fn other_users(&self, now_ms: u64) -> u64 {
        let in_use = |holder: &&Holder| now_ms.saturating_sub(holder.used_ms) < IDLE_MS;
        u64::try_from(self.holders.iter().filter(in_use).count()).unwrap_or(u64::MAX)
    }

    /// Tokens that other Envoys hold and can hand back.
    fn recallable(&self, reporter: ReporterId, now_ms: u64) -> u64 {
        let others =
            self.holders.iter().filter(|holder| holder.reporter != reporter && holder.has_called_lately(now_ms));
        others.fold(0, |sum, holder| sum.saturating_add(holder.held()))
    }

    /// In how many milliseconds what silent Envoys hold is free at the latest; `u32::MAX` if they hold nothing.
    fn silent_ms(&self, reporter: ReporterId, now_ms: u64) -> u32 {
        let silent =
            self.holders.iter().filter(|of| of.reporter != reporter && of.held() > 0 && !of.has_called_lately(now_ms));
        let free_ms = silent.map(|of| of.heard_ms.saturating_add(EXPIRES_AFTER_MS).saturating_sub(now_ms)).min();
        free_ms.map_or(u32::MAX, |ms| u32::try_from(ms).unwrap_or(u32::MAX).max(SILENT_KNOWN_MS))
    }

    /// Recalls the tokens of all other Envoys if tokens are missing or scarce. Otherwise recalls those of unused Envoys if they hold
    /// too much.
    fn recall_if_scarce(&mut self, reporter: ReporterId, is_missing: bool, now_ns: u64) {
        let now_ms = now_ns / NS_PER_MS;
        let is_unused = |holder: &Holder| now_ms.saturating_sub(holder.used_ms) >= UNUSED_MS;
        let held = |unused_only: bool| {
            let others = self.holders.iter().filter(|of| of.reporter != reporter && (!unused_only || is_unused(of)));
            others.fold(0, |sum: u64, holder| sum.saturating_add(holder.held()))
        };
        let recalls_all = is_missing || self.room(now_ns) < held(false).saturating_mul(self.ahead_bounds().scarce);
        let recalls_unused = self.left(now_ns) < held(true).saturating_mul(UNUSED_PART);
        for holder in self.holders.iter_mut().filter(|of| of.reporter != reporter && of.held() > 0) {
            holder.is_recalled |= recalls_all || (recalls_unused && is_unused(holder));
        }
    }

    /// In how many milliseconds one more token can be granted if no Envoy hands any back.
    fn empty_ms(&self, now_ns: u64) -> u32 {
        match &self.terms {
            Terms::Rate(rate) => {
                // As if Envoys spent now what they hold.
                let held_ns = rate.interval_ns().saturating_mul(self.held());
                let wait_ns = rate.wait_ns(self.arrival_ns.max(now_ns).saturating_add(held_ns), 1, now_ns);
                u32::try_from(wait_ns.div_ceil(NS_PER_MS)).unwrap_or(u32::MAX.saturating_sub(1))
            }
            Terms::Stock { renews_in_ms, .. } => {
                renews_in_ms.map_or(u32::MAX, |ms| u32::try_from(ms).unwrap_or(u32::MAX.saturating_sub(1)))
            }
        }
    }
}

/// The rate of a pool, if it is one of a rate limit.
#[must_use]
pub const fn rate_of(terms: &Terms) -> Option<&Rate> {
    match terms {
        Terms::Rate(rate) => Some(rate),
        Terms::Stock { .. } => None,
    }
}

#[cfg(test)]
mod tests;
