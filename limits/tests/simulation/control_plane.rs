//! The control plane of the simulation: the ledger, and what the database knows of Envoys, reports and windows.

use std::collections::BTreeMap;

use contract::id::ReporterId;
use limits::ledger::{Holder, OtherEnvoys, Pool};
use limits::message::{Answer, Call};
use limits::pool::{Kind, PoolId, Terms};
use limits::{ALONE_GRACE_MS, ALONE_MS, EXPIRES_AFTER_MS, IDLE_MS, LIVE_MS};

use crate::envoy::Reports;
use crate::world::MS;

/// A quota whose use starts anew at the end of each window.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub requests: i64,
    pub length_ns: u64,
    pub ends_ns: u64,
}

#[derive(Debug, Default)]
pub struct ControlPlane {
    pub pools: BTreeMap<PoolId, Pool>,
    pub windows: BTreeMap<PoolId, Window>,
    last_call_ns: BTreeMap<ReporterId, u64>,
    ended: Vec<ReporterId>,
    alone: Option<(ReporterId, u64)>,
    /// The last report of each Envoy.
    reports: BTreeMap<ReporterId, u64>,
    /// Rate limits: the session of each Envoy, and the usage that it has reported in it.
    reported: BTreeMap<(ReporterId, PoolId), (u64, u64)>,
    /// When tokens of Envoys that were silent for too long became free, and how many.
    pub freed: Vec<(PoolId, u64, u64)>,
    pub is_away: bool,
}

impl ControlPlane {
    /// Answers a call. Also returns the tokens of rate limits whose usage this call is the first to report.
    pub fn answer(&mut self, call: &Call, now_ns: u64) -> Option<(Answer, Vec<(PoolId, u64)>)> {
        if self.is_away {
            return None;
        }
        let me = call.reporter;
        if call.is_last && !self.ended.contains(&me) {
            self.ended.push(me);
        }
        self.last_call_ns.insert(me, now_ns);
        let silent_ms = |last_call_ns: &u64| (now_ns - last_call_ns) / MS;
        let live = self
            .last_call_ns
            .iter()
            .filter(|(id, last_ns)| !self.ended.contains(id) && silent_ms(last_ns) < LIVE_MS)
            .count();
        let another = self.alone.filter(|(id, until_ns)| *id != me && now_ns < *until_ns);
        let company = if another.is_some() { OtherEnvoys::AnotherIsAlone } else { OtherEnvoys::Several };
        let is_alone = live == 1 && another.is_none() && !self.ended.contains(&me);
        if is_alone {
            self.alone = Some((me, now_ns + (ALONE_MS + ALONE_GRACE_MS) * MS));
        }
        let grants = call.asks.iter().filter_map(|ask| {
            let window = self.windows.get(&ask.pool).copied();
            let pool = self.pools.get_mut(&ask.pool)?;
            if let (Terms::Stock { renews_in_ms, .. }, Some(window)) = (&mut pool.terms, window) {
                *renews_in_ms = Some((window.ends_ns - now_ns) / MS + 1);
            }
            let freed = tidy(pool, &self.last_call_ns, &self.ended, now_ns);
            if freed > 0 {
                self.freed.push((ask.pool, now_ns, freed));
            }
            Some(pool.answer(me, ask, company, now_ns))
        });
        let grants = grants.collect();
        let mut recalls = Vec::new();
        for (id, pool) in &mut self.pools {
            for holder in pool.holders.iter_mut().filter(|holder| holder.reporter == me && holder.is_recalled) {
                holder.is_recalled = false;
                recalls.push(*id);
            }
        }
        let alone_ms = if is_alone { u32::try_from(ALONE_MS).unwrap() } else { 0 };
        let answer = Answer { live: u32::try_from(live).unwrap(), alone_ms, grants, recalls };
        Some((answer, self.note_reported(call)))
    }

    fn note_reported(&mut self, call: &Call) -> Vec<(PoolId, u64)> {
        let mut new = Vec::new();
        for ask in call.asks.iter().filter(|ask| ask.pool.kind == Kind::Rate) {
            let reported = self.reported.entry((call.reporter, ask.pool)).or_default();
            let before = if reported.0 == ask.session { reported.1 } else { 0 };
            if ask.session >= reported.0 && ask.spent > before {
                *reported = (ask.session, ask.spent);
                new.push((ask.pool, ask.spent - before));
            }
        }
        new
    }

    /// Spent tokens of a rate limit that no call has reported.
    pub fn unreported(&self, reporter: ReporterId, pool: PoolId, session: u64, spent: u64) -> u64 {
        let reported = self
            .reported
            .get(&(reporter, pool))
            .filter(|reported| reported.0 == session)
            .map_or(0, |reported| reported.1);
        spent.saturating_sub(reported)
    }

    /// Books reports. Returns the tokens that were booked now.
    pub fn book(&mut self, reporter: ReporterId, reports: &Reports) -> Option<BTreeMap<PoolId, u64>> {
        if self.is_away {
            return None;
        }
        let mut booked = BTreeMap::new();
        for (seq, tokens) in reports {
            let last = self.reports.entry(reporter).or_default();
            if *seq <= *last {
                continue;
            }
            *last = *seq;
            for (id, tokens) in tokens {
                *booked.entry(*id).or_default() += tokens;
                let pool = self.pools.get_mut(id).unwrap();
                if let Terms::Stock { left, .. } = &mut pool.terms {
                    *left -= i64::try_from(*tokens).unwrap();
                }
                if let Some(holder) = pool.holders.iter_mut().find(|holder| holder.reporter == reporter) {
                    holder.book(*tokens);
                }
            }
        }
        Some(booked)
    }

    pub fn is_booked(&self, reporter: ReporterId, seq: u64) -> bool {
        self.reports.get(&reporter).is_some_and(|last| *last >= seq)
    }
}

/// Forgets Envoys that were silent for too long, and those that hold nothing and did not use the pool for long. Returns what
/// becomes free.
fn tidy(pool: &mut Pool, last_call_ns: &BTreeMap<ReporterId, u64>, ended: &[ReporterId], now_ns: u64) -> u64 {
    let before = pool.held();
    let is_expired =
        |id: &ReporterId| last_call_ns.get(id).is_none_or(|last_ns| (now_ns - last_ns) / MS >= EXPIRES_AFTER_MS);
    let is_unused = |holder: &Holder| holder.held() == 0 && now_ns / MS - holder.used_ms > 3 * IDLE_MS;
    pool.holders.retain(|holder| !is_expired(&holder.reporter) && !is_unused(holder));
    for holder in &mut pool.holders {
        let has_ended = ended.contains(&holder.reporter);
        holder.heard_ms = if has_ended { 0 } else { last_call_ns[&holder.reporter] / MS };
    }
    before - pool.held()
}
