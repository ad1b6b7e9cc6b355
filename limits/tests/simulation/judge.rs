//! The judge: exact pools of which all admitted requests are taken, and what was seen.

use std::collections::BTreeMap;

use limits::pool::{Kind, PoolId, Terms};

use crate::envoy::{Need, Request};
use crate::exact::Exact;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    pub requests: u64,
    pub admitted: u64,
    /// Of those, admitted at the safe rate.
    pub safe: u64,
    /// What an exact limiter that sees every request would have admitted.
    pub ideal: u64,
    pub refused: u64,
    pub unreachable: u64,
    pub waited: u64,
    pub waits_ns: Vec<u64>,
    /// Refused although the exact pool had more than other Envoys held and other requests waited for.
    pub wrong: u64,
    pub worst_wrong: i64,
    /// Admitted beyond the exact pool.
    pub excess: u64,
    pub worst_excess: u64,
    /// The same, if what was admitted at the safe rate counts for nothing.
    pub granted_excess: u64,
    /// The most tokens of a window that were counted in the next one, because they were reported late.
    pub worst_late: u64,
    /// Tokens left at the end.
    pub left: i64,
    pub calls: u64,
    /// Messages that were lost, or came after the time-out of a call.
    pub lost: u64,
}

/// The exact pools that a pool is compared with.
#[derive(Clone, Debug)]
struct Pools {
    /// Excess is judged by it. It grows at once, and shrinks when all Envoys know that.
    most: Exact,
    /// The same without what was admitted at the safe rate.
    granted: Exact,
    /// Refusals are judged by it. It shrinks at once, and grows when all Envoys know that.
    least: Exact,
    /// A rate limit that was lowered, from then on: use beyond the burst counts as the burst.
    early: Option<Exact>,
    /// How often the use of a quota was reset. A reset quota includes all earlier changes.
    renewals: u32,
    /// What an exact limiter that sees every request would have left.
    ideal: Exact,
}

#[derive(Clone, Debug, Default)]
pub struct Judge {
    pools: BTreeMap<PoolId, Pools>,
}

/// A change of one pool.
#[derive(Clone, Copy, Debug)]
pub enum Changed {
    Terms(Terms),
    Add(i64),
}

impl Changed {
    fn apply(&self, exact: &mut Exact, now_ns: u64) {
        match self {
            Self::Terms(Terms::Rate(rate)) => exact.change(rate, now_ns),
            Self::Terms(Terms::Stock { .. }) => {}
            Self::Add(more) => exact.add(*more),
        }
    }
}

impl Judge {
    pub fn add_pool(&mut self, pool: PoolId, terms: &Terms) {
        let exact = Exact::new(terms);
        let pools = Pools {
            most: exact.clone(),
            granted: exact.clone(),
            least: exact.clone(),
            early: None,
            renewals: 0,
            ideal: exact,
        };
        self.pools.insert(pool, pools);
    }

    fn of(&mut self, pool: PoolId) -> &mut Pools {
        self.pools.get_mut(&pool).unwrap()
    }

    /// Tokens that are left at least.
    pub fn left(&self, pool: PoolId, now_ns: u64) -> i64 {
        self.pools[&pool].least.left(now_ns)
    }

    /// Takes an admitted request.
    pub fn take(&mut self, needs: &[Need], is_safe: bool, now_ns: u64, found: &mut Findings) {
        for need in needs {
            let of = self.of(need.pool);
            let over = of.most.take(need.cost, now_ns);
            of.least.take(need.cost, now_ns);
            if let Some(early) = &mut of.early {
                early.take(need.cost, now_ns);
                early.clamp(now_ns);
            }
            found.excess += u64::from(over > 0);
            found.worst_excess = found.worst_excess.max(over);
            if need.pool.kind != Kind::Rate || !is_safe {
                found.granted_excess = found.granted_excess.max(of.granted.take(need.cost, now_ns));
            }
        }
    }

    /// The use of an Envoy that ended is lost. `late`: of an earlier window.
    pub fn lose(&mut self, pool: PoolId, tokens: u64, late: u64) {
        let of = self.of(pool);
        of.least.give_back(tokens);
        for exact in [&mut of.most, &mut of.granted] {
            exact.give_back(tokens.saturating_sub(late));
        }
    }

    /// A message of an Envoy that ended has come after all.
    pub fn find(&mut self, pool: PoolId, tokens: u64, now_ns: u64) {
        let of = self.of(pool);
        for exact in [&mut of.most, &mut of.granted, &mut of.least] {
            exact.take(tokens, now_ns);
        }
    }

    /// A pool changes; not all Envoys know that yet.
    pub fn change(&mut self, pool: PoolId, changed: &Changed, now_ns: u64) {
        let is_more = self.is_more(pool, changed);
        let of = self.of(pool);
        changed.apply(&mut of.ideal, now_ns);
        if is_more {
            changed.apply(&mut of.most, now_ns);
            changed.apply(&mut of.granted, now_ns);
        } else {
            changed.apply(&mut of.least, now_ns);
            let mut early = of.most.clone();
            changed.apply(&mut early, now_ns);
            of.early = Some(early);
        }
    }

    pub fn renewals(&self, pool: PoolId) -> u32 {
        self.pools[&pool].renewals
    }

    /// All Envoys know of a change. `is_more`: what [`Judge::is_more`] said when it was made.
    pub fn settle(&mut self, pool: PoolId, changed: &Changed, is_more: bool, now_ns: u64) {
        let of = self.of(pool);
        if is_more {
            changed.apply(&mut of.least, now_ns);
        } else {
            for exact in [&mut of.most, &mut of.granted] {
                changed.apply(exact, now_ns);
                if matches!(changed, Changed::Terms(_)) {
                    // The control plane counted by the new limit from the beginning. Envoys brought their use within the burst
                    // when they learned it, at other moments: less than a token.
                    if let Some(early) = of.early.as_ref().filter(|early| early.left(now_ns) > exact.left(now_ns)) {
                        exact.clone_from(early);
                    }
                    exact.give_back(1);
                }
            }
        }
    }

    pub fn is_more(&self, pool: PoolId, changed: &Changed) -> bool {
        match (changed, &self.pools[&pool].ideal) {
            (Changed::Terms(Terms::Rate(new)), Exact::Rate { rate, .. }) => new.interval_ns() < rate.interval_ns(),
            (Changed::Add(more), _) => *more > 0,
            _ => false,
        }
    }

    /// The use of a quota is reset. `late`: tokens that reports will count in this window although they were spent before.
    /// Returns by how much more is left at least; that is still to be applied, by [`Judge::settle`].
    pub fn renew(&mut self, pool: PoolId, requests: i64, late: u64, now_ns: u64) -> Changed {
        let of = self.of(pool);
        of.renewals += 1;
        for exact in [&mut of.most, &mut of.granted, &mut of.ideal] {
            *exact = Exact::Stock { left: requests };
        }
        Changed::Add(requests - i64::try_from(late).unwrap() - of.least.left(now_ns))
    }

    pub fn judge_ideally(&mut self, request: &Request, now_ns: u64, found: &mut Findings) {
        let has = |need: &Need| self.pools[&need.pool].ideal.left(now_ns) >= i64::try_from(need.cost).unwrap();
        if request.needs.iter().all(has) {
            found.ideal += 1;
            for need in &request.needs {
                self.of(need.pool).ideal.take(need.cost, now_ns);
            }
        }
    }
}
