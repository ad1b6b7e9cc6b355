//! An Envoy of the simulation: its workers run the code of the filter.

use std::collections::BTreeMap;

use contract::id::ReporterId;
use contract::rate::Rate;
use limits::asking::{Asking, Due, Sent};
use limits::contact::Contact;
use limits::holding::{AfterUse, Holding, Limited, Spent};
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

/// Usage reports with their numbers: tokens of quotas and balances.
pub type Reports = Vec<(u64, BTreeMap<PoolId, u64>)>;

/// What the record of a key says of one pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Records come in any order; the last one counts.
    pub version: u64,
    pub rate: Option<Rate>,
    /// How often a quota or a balance was filled.
    pub fill: u32,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Admitted,
    /// The control plane did not answer.
    AdmittedAtSafeRate,
    /// A pool has no tokens.
    Refused(PoolId, u64),
    /// The control plane did not answer.
    Unreachable,
    Waits,
}

#[derive(Debug, Default)]
pub struct Worker {
    pub asking: Asking,
    /// As of its last tick or answer.
    pub contact: Contact,
    pub waiting: Vec<Request>,
}

#[derive(Debug)]
pub struct Envoy {
    pub reporter: ReporterId,
    /// How far its clock is ahead.
    pub skew_ns: i64,
    /// Requests are admitted at the safe rate while the control plane does not answer; else they are refused as unreachable.
    pub has_safe_rate: bool,
    pub contact: Contact,
    pub records: BTreeMap<PoolId, Record>,
    pub holdings: BTreeMap<PoolId, Holding>,
    pub workers: Vec<Worker>,
    /// Tokens of quotas and balances that are in no report yet, and those in the reports that are under way.
    pub unreported: BTreeMap<PoolId, u64>,
    pub reports: Reports,
    pub report_seq: u64,
    /// Of those, tokens that were spent before the present window of the quota.
    pub late: BTreeMap<PoolId, u64>,
    /// Requests that it admitted.
    pub admitted: u64,
    pub is_up: bool,
}

impl Envoy {
    pub fn new(reporter: u64, workers: usize, skew_ns: i64, has_safe_rate: bool) -> Self {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&reporter.to_le_bytes());
        Self {
            reporter: ReporterId(id),
            skew_ns,
            has_safe_rate,
            contact: Contact::default(),
            records: BTreeMap::new(),
            holdings: BTreeMap::new(),
            workers: (0..workers).map(|_| Worker::default()).collect(),
            unreported: BTreeMap::new(),
            reports: Vec::new(),
            report_seq: 0,
            late: BTreeMap::new(),
            admitted: 0,
            is_up: true,
        }
    }

    /// The time of its clock.
    pub fn ns(&self, now_ns: u64) -> u64 {
        now_ns.strict_add_signed(self.skew_ns)
    }

    fn fill(&self, pool: PoolId) -> u32 {
        self.records.get(&pool).map_or(1, |record| record.fill)
    }

    /// The key of a pool has come: the Envoy asks for its state.
    pub fn learn(&mut self, need: Need, now_ns: u64) {
        let ns = self.ns(now_ns);
        let fill = self.fill(need.pool);
        let of = need.rate.as_ref().map_or(Limited::Stock { fill }, Limited::Rate);
        self.holdings.entry(need.pool).or_default().prepare(of, &self.contact, ns);
        self.workers[0].asking.needed(need.pool);
        self.workers[0].asking.queue(need.pool);
    }

    /// Decides a request, or makes it wait. `has_failed`: the call that it waited for was not answered.
    pub fn decide(&mut self, worker: usize, request: &Request, has_failed: bool, now_ns: u64) -> Fate {
        let mut attempt = self.spend(worker, request, now_ns);
        // Another worker may have learnt that the Envoy is alone.
        if attempt.lacks() && self.refresh(worker) {
            self.refund(&attempt.spent);
            attempt = self.spend(worker, request, now_ns);
        }
        let is_unreachable = has_failed || self.workers[worker].asking.is_unreachable();
        let waited_ms = (now_ns - request.since_ns) / MS;
        let mut fate = match attempt.refused {
            Some((pool, ms)) => Fate::Refused(pool, ms),
            None => Fate::Admitted,
        };
        for (need, for_others) in &attempt.lacking {
            if matches!(fate, Fate::Refused(..) | Fate::Unreachable) {
                break;
            }
            fate = if is_unreachable || waited_ms >= LONGEST_WAIT_MS {
                self.decide_unanswered(worker, *need, (!is_unreachable).then_some(waited_ms), now_ns)
            } else {
                self.workers[worker].asking.need(need.pool, need.cost, *for_others);
                Fate::Waits
            };
        }
        match fate {
            Fate::Admitted | Fate::AdmittedAtSafeRate => {
                self.admitted += 1;
                for (need, is_low) in &attempt.spent {
                    self.workers[worker].asking.spent(need.pool, *is_low);
                }
                for need in request.needs.iter().filter(|need| need.rate.is_none()) {
                    *self.unreported.entry(need.pool).or_default() += need.cost;
                }
            }
            _ => self.refund(&attempt.spent),
        }
        fate
    }

    fn spend(&mut self, worker: usize, request: &Request, now_ns: u64) -> Attempt {
        let ns = self.ns(now_ns);
        let mut attempt = Attempt::default();
        for need in &request.needs {
            let fill = self.fill(need.pool);
            let Worker { asking, contact, .. } = &mut self.workers[worker];
            let holding = self.holdings.entry(need.pool).or_default();
            asking.needed(need.pool);
            let of = need.rate.as_ref().map_or(Limited::Stock { fill }, Limited::Rate);
            match holding.spend(need.cost, of, asking.waiting(&need.pool), contact, ns) {
                Spent::Yes { is_low } => attempt.spent.push((*need, is_low)),
                Spent::Wait { for_others } => attempt.lacking.push((*need, for_others)),
                Spent::No { empty_ms } => attempt.refused = Some((need.pool, empty_ms)),
            }
        }
        attempt
    }

    fn refund(&mut self, spent: &[(Need, bool)]) {
        for (need, _) in spent {
            self.holdings.get_mut(&need.pool).unwrap().refund(need.cost);
        }
    }

    /// Decides a request that may not wait longer, for a pool that lacks tokens. `waited_ms`: for how long the request waited
    /// for other Envoys; `None` if the control plane does not answer.
    fn decide_unanswered(&mut self, worker: usize, need: Need, waited_ms: Option<u64>, now_ns: u64) -> Fate {
        let ns = self.ns(now_ns);
        let holding = self.holdings.get_mut(&need.pool).unwrap();
        if waited_ms.is_some_and(|ms| holding.is_known_to_lack(need.cost, ns / MS - ms)) {
            return Fate::Refused(need.pool, holding.empty_ms(ns / MS));
        }
        let Worker { asking, contact, .. } = &mut self.workers[worker];
        asking.ask_for(need.pool, need.cost);
        match need.rate {
            Some(rate) if self.has_safe_rate && holding.spend_at_safe_rate(&rate, contact, ns).is_ok() => {
                asking.spent(need.pool, true);
                Fate::AdmittedAtSafeRate
            }
            _ => Fate::Unreachable,
        }
    }

    /// Reads the contact with the control plane, as other workers know it. Returns whether the Envoy may decide by itself for
    /// longer than this worker knew.
    pub fn refresh(&mut self, worker: usize) -> bool {
        let contact = self.contact;
        let before = self.workers[worker].note(contact, &[]);
        contact.alone_until_ms > before.alone_until_ms
    }

    /// The call to send now, if one is due.
    pub fn call(&mut self, worker: usize, is_tick: bool, now_ns: u64) -> Option<(Call, Vec<PoolId>)> {
        let ns = self.ns(now_ns);
        let leads = worker == 0;
        let Worker { asking, contact, .. } = &mut self.workers[worker];
        let is_tick = is_tick || asking.has_missed_tick();
        if is_tick {
            for pool in asking.unused() {
                match self.holdings.get_mut(&pool).map(|holding| holding.hand_back_after_use(ns / MS)) {
                    Some(AfterUse::HandedBack) => asking.queue_unused(pool),
                    Some(AfterUse::InUse) => asking.watch(pool),
                    Some(AfterUse::KeepsAll) | None => {}
                }
            }
            for pool in asking.idle(contact.was_alone(), ns / MS) {
                if let Some(holding) = self.holdings.get_mut(&pool)
                    && holding.is_idle(ns / MS)
                {
                    holding.hand_back();
                    asking.queue(pool);
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
        let asks = due.iter().map(|due| self.holdings.entry(due.pool).or_default().ask(*due, contact, ns));
        let call = Call { reporter: self.reporter, is_last: false, asks: asks.collect() };
        Some((call, due.into_iter().map(|due| due.pool).collect()))
    }

    /// The last call: hands all back.
    pub fn end(&mut self, now_ns: u64) -> Call {
        let (contact, ns) = (self.contact, self.ns(now_ns));
        let asks = self.holdings.iter_mut().map(|(pool, holding)| {
            holding.hand_back();
            holding.ask(Due { pool: *pool, need: 0, least: 0, is_unused: false }, &contact, ns)
        });
        Call { reporter: self.reporter, is_last: true, asks: asks.collect() }
    }

    /// Applies an answer. Returns the requests that waited, to be decided again.
    pub fn answer(&mut self, worker: usize, sent: &Sent, answer: &Answer, now_ns: u64) -> Vec<Request> {
        let now_ms = self.ns(now_ns) / MS;
        self.contact.answered(sent.sent_ms, now_ms, answer.live, answer.alone_ms);
        let contact = self.contact;
        let Self { workers, holdings, .. } = self;
        workers[worker].note(contact, &sent.pools);
        let Worker { asking, waiting, .. } = &mut workers[worker];
        asking.on_answer();
        for (pool, grant) in sent.pools.iter().zip(&answer.grants) {
            let holding = holdings.entry(*pool).or_default();
            holding.apply(grant, &contact, sent.sent_ms);
            if holding.is_settled(grant) && holding.is_idle(now_ms) {
                holdings.remove(pool);
            }
        }
        for pool in &answer.recalls {
            if let Some(holding) = holdings.get_mut(pool) {
                holding.hand_back();
                asking.queue(*pool);
            }
        }
        std::mem::take(waiting)
    }

    pub fn fail(&mut self, worker: usize, sent: &Sent) -> Vec<Request> {
        self.workers[worker].asking.on_failure(sent);
        std::mem::take(&mut self.workers[worker].waiting)
    }

    /// The reports to send: those under way, and a new one with what was spent meanwhile if there is none, or if it is the last.
    pub fn report(&mut self, is_last: bool) -> Option<Reports> {
        if (is_last || self.reports.is_empty()) && !self.unreported.is_empty() {
            self.report_seq += 1;
            self.reports.push((self.report_seq, std::mem::take(&mut self.unreported)));
        }
        (!self.reports.is_empty()).then(|| self.reports.clone())
    }

    /// The record of a key has come.
    pub fn note_record(&mut self, pool: PoolId, record: Record) {
        let known = self.records.entry(pool).or_insert(record);
        if record.version > known.version {
            *known = record;
        }
    }
}

/// What a request has spent, and what it lacks.
#[derive(Debug, Default)]
struct Attempt {
    spent: Vec<(Need, bool)>,
    lacking: Vec<(Need, bool)>,
    refused: Option<(PoolId, u64)>,
}

impl Attempt {
    const fn lacks(&self) -> bool {
        self.refused.is_none() && !self.lacking.is_empty()
    }
}

impl Worker {
    /// Notes the contact with the control plane. Returns what it knew before.
    fn note(&mut self, contact: Contact, answered: &[PoolId]) -> Contact {
        let before = std::mem::replace(&mut self.contact, contact);
        if contact.answered_ms > before.answered_ms {
            self.asking.on_answer();
        }
        if before.alone_term != contact.alone_term {
            self.asking.queue_all_but(answered);
        }
        before
    }
}

pub const TICK_NS: u64 = TICK_MS * MS;
