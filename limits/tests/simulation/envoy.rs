//! An Envoy of the simulation: its workers run the code of the filter.

use std::collections::BTreeMap;

use contract::id::ReporterId;
use contract::rate::Rate;
use limits::asking::{Asking, Sent};
use limits::contact::Contact;
use limits::holding::{Holding, Limited, Spent};
use limits::message::{Answer, Call};
use limits::pool::PoolId;
use limits::{LONGEST_WAIT_MS, TICK_MS};

const MS: u64 = 1_000_000;

/// A pool that a request needs tokens of.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    pub pool: PoolId,
    pub cost: u64,
    pub rate: Option<Rate>,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    pub since_ns: u64,
    pub needs: Vec<Need>,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Admitted,
    /// A pool has no tokens.
    Refused(PoolId, u64),
    /// The control plane did not answer.
    Unreachable,
    Waits,
}

#[derive(Debug, Default)]
pub struct Worker {
    pub asking: Asking,
    pub waiting: Vec<Request>,
}

#[derive(Debug)]
pub struct Envoy {
    pub reporter: ReporterId,
    /// How far its clock is ahead.
    pub skew_ns: u64,
    pub contact: Contact,
    pub holdings: BTreeMap<PoolId, Holding>,
    pub workers: Vec<Worker>,
    /// Tokens of quotas and balances that are in no report yet, and those in the report that is under way.
    pub unreported: BTreeMap<PoolId, u64>,
    pub report: Option<(u64, BTreeMap<PoolId, u64>)>,
    pub report_seq: u64,
    pub is_up: bool,
}

impl Envoy {
    pub fn new(reporter: u64, workers: usize, skew_ns: u64) -> Self {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&reporter.to_le_bytes());
        Self {
            reporter: ReporterId(id),
            skew_ns,
            contact: Contact::default(),
            holdings: BTreeMap::new(),
            workers: (0..workers).map(|_| Worker::default()).collect(),
            unreported: BTreeMap::new(),
            report: None,
            report_seq: 0,
            is_up: true,
        }
    }

    fn ns(&self, now_ns: u64) -> u64 {
        now_ns + self.skew_ns
    }

    /// The key of a pool has come: the Envoy asks for its state.
    pub fn learn(&mut self, need: Need, fill: u32, now_ns: u64) {
        let ns = self.ns(now_ns);
        let of = need.rate.as_ref().map_or(Limited::Stock { fill }, Limited::Rate);
        self.holdings.entry(need.pool).or_default().prepare(of, &self.contact, ns);
        self.workers[0].asking.needed(need.pool);
        self.workers[0].asking.tell(need.pool);
    }

    /// Decides a request, or makes it wait. `fill`: how often quotas and balances were filled; `has_failed`: the call that it
    /// waited for was not answered.
    pub fn decide(&mut self, worker: usize, request: &Request, fill: u32, has_failed: bool, now_ns: u64) -> Fate {
        let ns = self.ns(now_ns);
        let asking = &mut self.workers[worker].asking;
        let mut spent: Vec<Need> = Vec::new();
        let mut lacking: Vec<(Need, bool)> = Vec::new();
        let mut refused = None;
        for need in &request.needs {
            let holding = self.holdings.entry(need.pool).or_default();
            asking.needed(need.pool);
            let of = need.rate.as_ref().map_or(Limited::Stock { fill }, Limited::Rate);
            match holding.spend(need.cost, of, asking.waiting(&need.pool), &self.contact, ns) {
                Spent::Yes { is_low } => {
                    asking.spent(need.pool, is_low);
                    spent.push(*need);
                }
                Spent::Wait { for_others } => lacking.push((*need, for_others)),
                Spent::No { empty_ms } => refused = Some((need.pool, empty_ms)),
            }
        }
        let is_unreachable = has_failed || asking.is_unreachable();
        let out_of_time = now_ns - request.since_ns >= LONGEST_WAIT_MS * MS;
        let fate = match (refused, lacking.first()) {
            (Some((pool, ms)), _) => Fate::Refused(pool, ms),
            (None, None) => Fate::Admitted,
            (None, Some((need, _))) if out_of_time && !is_unreachable => {
                let empty_ms = self.holdings[&need.pool].empty_until_ms.saturating_sub(ns / MS);
                Fate::Refused(need.pool, empty_ms)
            }
            (None, Some(_)) if is_unreachable => {
                let safe = |(need, _): &(Need, bool)| {
                    let holding = self.holdings.get_mut(&need.pool).unwrap();
                    need.rate.is_some_and(|rate| holding.spend_at_safe_rate(&rate, &self.contact, ns).is_ok())
                };
                if lacking.iter().all(safe) { Fate::Admitted } else { Fate::Unreachable }
            }
            (None, Some(_)) => {
                for (need, for_others) in &lacking {
                    asking.need(need.pool, need.cost, *for_others);
                }
                Fate::Waits
            }
        };
        if fate == Fate::Admitted {
            for need in request.needs.iter().filter(|need| need.rate.is_none()) {
                *self.unreported.entry(need.pool).or_default() += need.cost;
            }
        } else {
            for need in spent {
                self.holdings.get_mut(&need.pool).unwrap().refund(need.cost);
            }
        }
        fate
    }

    /// The call to send now, if one is due.
    pub fn call(&mut self, worker: usize, is_tick: bool, now_ns: u64) -> Option<(Call, Vec<PoolId>)> {
        let ns = self.ns(now_ns);
        let leads = worker == 0;
        let asking = &mut self.workers[worker].asking;
        let is_tick = is_tick || asking.has_missed_tick();
        if is_tick {
            for pool in asking.idle(self.contact.was_alone(), ns / MS) {
                if let Some(holding) = self.holdings.get_mut(&pool)
                    && holding.is_idle(ns / MS)
                {
                    holding.hand_back();
                    asking.tell(pool);
                }
            }
        } else if !asking.is_urgent() {
            return None;
        }
        let due = asking.due(is_tick, ns / MS)?;
        // The leader's calls also show that the Envoy is live, and bring what is recalled.
        if due.is_empty() && !(is_tick && leads) {
            return None;
        }
        let contact = self.contact;
        let asks = due.iter().map(|due| self.holdings.entry(due.pool).or_default().ask(*due, &contact, ns));
        let call = Call { reporter: self.reporter, is_last: false, asks: asks.collect() };
        Some((call, due.into_iter().map(|due| due.pool).collect()))
    }

    /// Applies an answer. Returns the requests that waited, to be decided again.
    pub fn answer(&mut self, worker: usize, sent: &Sent, answer: &Answer, now_ns: u64) -> Vec<Request> {
        let now_ms = self.ns(now_ns) / MS;
        let alone_term = self.contact.alone_term;
        self.contact.answered(sent.sent_ms, now_ms, answer.live, answer.alone_ms);
        if self.contact.alone_term != alone_term {
            self.workers.iter_mut().for_each(|worker| worker.asking.tell_all_but(&sent.pools));
        }
        let Worker { asking, waiting } = &mut self.workers[worker];
        asking.on_answer();
        for (pool, grant) in sent.pools.iter().zip(&answer.grants) {
            let holding = self.holdings.entry(*pool).or_default();
            holding.apply(grant, &self.contact, sent.sent_ms);
            if holding.is_settled(grant) && holding.is_idle(now_ms) {
                self.holdings.remove(pool);
            }
        }
        for pool in &answer.recalls {
            if let Some(holding) = self.holdings.get_mut(pool) {
                holding.hand_back();
                asking.tell(*pool);
            }
        }
        std::mem::take(waiting)
    }

    pub fn fail(&mut self, worker: usize, sent: &Sent) -> Vec<Request> {
        self.workers[worker].asking.on_failure(sent);
        std::mem::take(&mut self.workers[worker].waiting)
    }
}

pub const TICK_NS: u64 = TICK_MS * MS;
