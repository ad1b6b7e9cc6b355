//! The shared limits of the fake control plane: pools as the real one keeps them, in memory. A test
//! sets what quotas and balances have left, lets other Envoys hold some of it, and loses answers.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use contract::definition::Definitions;
use contract::id::ReporterId;
use contract::outcome::Outcome;
use contract::rate::Rate;
use contract::record::Record;
use contract::usage::Report;
use limits::ALONE_MS;
use limits::ledger::{Holder, OtherEnvoys, Pool};
use limits::message::{Answer, Call};
use limits::pool::{PoolId, Terms};

/// The pools, and what was asked.
#[derive(Debug, Default)]
pub struct FakeLimits {
    pools: BTreeMap<PoolId, Pool>,
    /// How many Envoys to say are live; 0: the asking one is alone.
    pub live: u32,
    /// The calls, in their order.
    pub calls: Vec<Call>,
    /// Whether calls are answered.
    pub mode: Mode,
}

/// How calls for allowances are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// As the real control plane does.
    #[default]
    Answer,
    /// With 503.
    Refuse,
    /// Not at all.
    Hang,
}

/// The control plane's time, in nanoseconds of Unix time.
fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or_default()
}

impl FakeLimits {
    /// Sets what a quota or a balance has left.
    pub fn set_left(&mut self, pool: PoolId, left: i64, renews_in_ms: Option<u64>) {
        let terms = Terms::Stock { left, renews_in_ms };
        self.pools.entry(pool).or_insert_with(|| Pool::new(terms)).terms = terms;
    }

    /// Lets another Envoy hold tokens, which hands them back when they are recalled if it is `live`.
    pub fn let_another_hold(&mut self, pool: PoolId, rate: Option<&Rate>, tokens: u64, live: bool) {
        let terms = rate.map_or(Terms::Stock { left: 0, renews_in_ms: None }, |rate| Terms::Rate(*rate));
        let pool = self.pools.entry(pool).or_insert_with(|| Pool::new(terms));
        let heard_ms = if live { u64::MAX } else { 0 };
        pool.holders.push(Holder { granted: tokens, heard_ms, ..Holder::new(ReporterId([0xee; 16]), 1) });
    }

    /// What is left of a pool now.
    pub fn left(&self, pool: &PoolId) -> u64 {
        self.pools.get(pool).map_or(0, |pool| pool.left(now_ns()))
    }

    /// Answers a call.
    pub fn answer(&mut self, call: Call, records: &[&Record], definitions: &Definitions) -> Answer {
        let now_ns = now_ns();
        let grants = call.asks.iter().map(|ask| {
            let limits_of = |record: &&Record| definitions.rate_limits(record).to_vec();
            let rate =
                records.iter().flat_map(|record| limits_of(record).into_iter().map(move |limit| (record, limit)));
            let rate = rate.filter(|(record, limit)| PoolId::of_limit(limit, record) == ask.pool);
            let rate = rate.map(|(_, limit)| Terms::Rate(Rate::of(&limit))).next();
            let none = Terms::Stock { left: 0, renews_in_ms: None };
            let pool = self.pools.entry(ask.pool).or_insert_with(|| Pool::new(rate.unwrap_or(none)));
            pool.terms = rate.unwrap_or(pool.terms);
            let grant = pool.answer(call.reporter, ask, OtherEnvoys::Several, now_ns);
            // The other Envoy hands back what is recalled.
            for other in
                pool.holders.iter_mut().filter(|holder| holder.is_recalled && holder.heard_ms > now_ns / 1_000_000)
            {
                other.returned = other.granted;
            }
            grant
        });
        let grants = grants.collect();
        let alone_ms = if self.live == 0 { u32::try_from(ALONE_MS).unwrap_or_default() } else { 0 };
        self.calls.push(call);
        Answer { live: self.live.max(1), alone_ms, grants, recalls: Vec::new() }
    }

    /// Books what a report has used of quotas and balances.
    pub fn book(&mut self, report: &Report, records: &[&Record]) {
        for count in report.counts.iter().filter(|count| count.of.outcome == Outcome::Allowed.code()) {
            let of = |record: &&&Record| count.of.key.is_some_and(|key| key.id == record.key_id);
            let Some(record) = records.iter().find(of) else { continue };
            let quota = record.quota.map(|quota| (PoolId::of_quota(quota.per, record), count.requests));
            let credits = record.credits.map(|_| (PoolId::of_credits(record.owner_id), count.cost));
            for (pool, tokens) in quota.into_iter().chain(credits) {
                let Some(pool) = self.pools.get_mut(&pool) else { continue };
                if let Terms::Stock { left, .. } = &mut pool.terms {
                    *left -= i64::try_from(tokens).unwrap_or_default();
                }
                let holder = pool.holders.iter_mut().find(|holder| holder.reporter == report.reporter);
                holder.into_iter().for_each(|holder| holder.book(tokens));
            }
        }
    }
}
