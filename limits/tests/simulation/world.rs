//! The simulated world: Envoys, a control plane, and the messages between them, which may be late, lost or doubled.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use contract::id::ReporterId;
use limits::asking::Due;
use limits::ledger::{Company, Holder, Pool};
use limits::message::{Answer, Call};
use limits::pool::{PoolId, Terms};
use limits::{AGAIN_MS, ALONE_GRACE_MS, ALONE_MS, EXPIRES_AFTER_MS, IDLE_MS, LIVE_MS, LONGEST_WAIT_MS};

use crate::envoy::{Envoy, Fate, Need, Request, TICK_NS};
use crate::exact::Exact;
use crate::random::Random;

pub const MS: u64 = 1_000_000;
pub const S: u64 = 1_000 * MS;

/// After this time a call has failed.
const TIMEOUT_NS: u64 = 250 * MS;

/// How old an Envoy's knowledge of a pool may be when it refuses a request: the least time for which a pool counts as empty,
/// and the way of a message.
const STALE_NS: u64 = 20 * MS;

#[derive(Clone, Debug)]
pub enum Event {
    Request { envoy: usize, needs: Vec<Need> },
    Tick { envoy: usize, worker: usize },
    Again { envoy: usize, worker: usize },
    Call { envoy: usize, worker: usize, token: u32, call: Call },
    Answer { envoy: usize, worker: usize, token: u32, answer: Answer },
    TimeOut { envoy: usize, worker: usize, token: u32 },
    Report { envoy: usize, reporter: ReporterId, seq: u64, tokens: BTreeMap<PoolId, u64> },
    Acknowledged { envoy: usize, seq: u64 },
    Change(Change),
}

/// What happens to Envoys and limits.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Kill(usize),
    End(usize),
    Start(usize),
    Terms(PoolId, Terms),
    Add(PoolId, i64),
    /// The control plane does not answer.
    Away(bool),
}

/// How messages travel.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    pub least_ms: u64,
    pub most_ms: u64,
    pub lost_per_mille: u64,
    pub doubled_per_mille: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    pub requests: u64,
    pub admitted: u64,
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
    /// Tokens left at the end.
    pub left: i64,
    pub calls: u64,
}

#[derive(Debug)]
struct ControlPlane {
    pools: BTreeMap<PoolId, Pool>,
    heard_ns: BTreeMap<ReporterId, u64>,
    ended: Vec<ReporterId>,
    alone: Option<(ReporterId, u64)>,
    reports: BTreeMap<ReporterId, u64>,
    is_away: bool,
}

pub struct World {
    pub now_ns: u64,
    pub random: Random,
    pub envoys: Vec<Envoy>,
    pub exact: BTreeMap<PoolId, Exact>,
    /// What an exact limiter that sees every request would have left.
    ideal: BTreeMap<PoolId, Exact>,
    pub found: Findings,
    /// How often quotas and balances were filled, as records say.
    fill: u32,
    network: Network,
    workers: usize,
    control_plane: ControlPlane,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Event>,
    next_event: u64,
    next_token: u32,
    next_reporter: u64,
    round_robin: usize,
}

impl World {
    pub fn new(seed: u64, envoys: usize, workers: usize, network: Network) -> Self {
        let control_plane = ControlPlane {
            pools: BTreeMap::new(),
            heard_ns: BTreeMap::new(),
            ended: Vec::new(),
            alone: None,
            reports: BTreeMap::new(),
            is_away: false,
        };
        let mut world = Self {
            now_ns: 1_800_000_000 * S,
            random: Random(seed),
            envoys: Vec::new(),
            exact: BTreeMap::new(),
            ideal: BTreeMap::new(),
            found: Findings::default(),
            fill: 1,
            network,
            workers,
            control_plane,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            next_token: 0,
            next_reporter: 1,
            round_robin: 0,
        };
        for place in 0..envoys {
            world.start(place);
        }
        world
    }

    /// What the control plane counts as held by an Envoy.
    pub fn held(&self, envoy: usize, pool: PoolId) -> u64 {
        let holders = self.control_plane.pools[&pool].holders.iter();
        holders.filter(|holder| holder.reporter == self.envoys[envoy].reporter).map(Holder::held).sum()
    }

    pub fn add_pool(&mut self, pool: PoolId, terms: Terms) {
        let exact = match &terms {
            Terms::Rate(rate) => Exact::Rate { rate: *rate, arrival_ns: 0 },
            Terms::Stock { left, .. } => Exact::Stock { left: *left },
        };
        self.exact.insert(pool, exact.clone());
        self.ideal.insert(pool, exact);
        self.control_plane.pools.insert(pool, Pool::new(terms));
    }

    pub fn at(&mut self, at_ns: u64, event: Event) {
        self.queue.push(Reverse((at_ns, self.next_event)));
        self.events.insert(self.next_event, event);
        self.next_event += 1;
    }

    /// Runs all events up to a time.
    pub fn run(&mut self, until_ns: u64) {
        while let Some(Reverse((at_ns, number))) = self.queue.pop() {
            if at_ns > until_ns {
                self.queue.push(Reverse((at_ns, number)));
                break;
            }
            self.now_ns = at_ns;
            let event = self.events.remove(&number).unwrap();
            self.handle(event);
        }
        self.now_ns = until_ns;
    }

    /// An Envoy that is up, in turn.
    pub fn in_turn(&mut self) -> usize {
        let up: Vec<usize> = (0..self.envoys.len()).filter(|place| self.envoys[*place].is_up).collect();
        self.round_robin += 1;
        up[self.round_robin % up.len()]
    }

    /// One Envoy more.
    pub fn add_envoy(&mut self) {
        self.start(self.envoys.len());
    }

    fn start(&mut self, place: usize) {
        let skew_ns = self.random.below(5 * S);
        let envoy = Envoy::new(self.next_reporter, self.workers, skew_ns);
        self.next_reporter += 1;
        if place < self.envoys.len() {
            self.envoys[place] = envoy;
        } else {
            self.envoys.push(envoy);
        }
        for worker in 0..self.workers {
            let first_ns = self.random.below(TICK_NS);
            self.at(self.now_ns + first_ns, Event::Tick { envoy: place, worker });
        }
    }

    /// All Envoys receive the key of a pool.
    pub fn learn(&mut self, need: Need) {
        for envoy in &mut self.envoys {
            envoy.learn(need, self.fill, self.now_ns);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Request { envoy, needs } => {
                let request = Request { since_ns: self.now_ns, needs };
                self.found.requests += 1;
                self.judge_ideally(&request);
                let worker = usize::try_from(self.random.below(self.workers as u64)).unwrap();
                if self.envoys[envoy].is_up {
                    self.decide(envoy, worker, request, true, false);
                }
                self.call(envoy, worker, false);
            }
            Event::Tick { envoy, worker } => self.tick(envoy, worker),
            Event::Again { envoy, worker } => {
                self.envoys[envoy].workers[worker].asking.ask_again();
                self.call(envoy, worker, false);
            }
            Event::Call { envoy, worker, token, call } => {
                if let Some(answer) = self.control_plane.answer(&call, self.now_ns) {
                    self.send(&Event::Answer { envoy, worker, token, answer });
                }
            }
            Event::Answer { envoy, worker, token, answer } => {
                if let Some(sent) = self.envoys[envoy].workers[worker].asking.take_response(token) {
                    let waited = self.envoys[envoy].answer(worker, &sent, &answer, self.now_ns);
                    self.decide_again(envoy, worker, waited, false);
                }
            }
            Event::TimeOut { envoy, worker, token } => {
                if let Some(sent) = self.envoys[envoy].workers[worker].asking.take_response(token) {
                    let waited = self.envoys[envoy].fail(worker, &sent);
                    self.decide_again(envoy, worker, waited, true);
                }
            }
            Event::Report { envoy, reporter, seq, tokens } => {
                if self.control_plane.report(reporter, seq, &tokens, self.now_ns) {
                    self.send(&Event::Acknowledged { envoy, seq });
                }
            }
            Event::Acknowledged { envoy, seq } => {
                let envoy = &mut self.envoys[envoy];
                if envoy.report.as_ref().is_some_and(|(of, _)| *of == seq) {
                    envoy.report = None;
                }
            }
            Event::Change(change) => self.change(change),
        }
    }

    fn decide_again(&mut self, envoy: usize, worker: usize, waited: Vec<Request>, has_failed: bool) {
        self.envoys[envoy].workers[worker].asking.start_over();
        for request in waited {
            self.decide(envoy, worker, request, false, has_failed);
        }
        self.call(envoy, worker, false);
        if self.envoys[envoy].workers[worker].asking.is_to_ask_again() {
            self.at(self.now_ns + AGAIN_MS * MS, Event::Again { envoy, worker });
        }
    }

    fn decide(&mut self, envoy: usize, worker: usize, request: Request, is_new: bool, has_failed: bool) {
        let fate = self.envoys[envoy].decide(worker, &request, self.fill, has_failed, self.now_ns);
        if fate != Fate::Waits && !is_new {
            self.found.waits_ns.push(self.now_ns - request.since_ns);
        }
        match fate {
            Fate::Admitted => {
                self.found.admitted += 1;
                for need in &request.needs {
                    let over = self.exact.get_mut(&need.pool).unwrap().take(need.cost, self.now_ns);
                    self.found.excess += u64::from(over > 0);
                    self.found.worst_excess = self.found.worst_excess.max(over);
                }
            }
            Fate::Refused(pool, _) => {
                self.found.refused += 1;
                let cost = request.needs.iter().find(|need| need.pool == pool).unwrap().cost;
                let out_of_time = self.now_ns - request.since_ns >= LONGEST_WAIT_MS * MS;
                self.judge_refusal(envoy, pool, cost, out_of_time);
            }
            Fate::Unreachable => self.found.unreachable += 1,
            Fate::Waits => {
                self.found.waited += u64::from(is_new);
                self.envoys[envoy].workers[worker].waiting.push(request);
            }
        }
    }

    fn judge_ideally(&mut self, request: &Request) {
        let has = |need: &Need| self.ideal[&need.pool].left(self.now_ns) >= i64::try_from(need.cost).unwrap();
        if request.needs.iter().all(has) {
            self.found.ideal += 1;
            for need in &request.needs {
                self.ideal.get_mut(&need.pool).unwrap().take(need.cost, self.now_ns);
            }
        }
    }

    fn judge_refusal(&mut self, envoy: usize, pool: PoolId, cost: u64, out_of_time: bool) {
        let left = self.exact[&pool].left(self.now_ns - STALE_NS);
        // Tokens that other Envoys were granted, some in answers that are under way, and have not spent. Those of live Envoys a
        // request waits for.
        let holders = self.control_plane.pools[&pool].holders.iter();
        let idle: u64 = holders
            .filter(|holder| holder.reporter != self.envoys[envoy].reporter && holder.held() > 0)
            .map(|holder| {
                let of_it = self.envoys.iter().find(|other| other.reporter == holder.reporter);
                if out_of_time && of_it.is_some_and(|other| other.is_up) {
                    return 0;
                }
                let own = of_it.and_then(|other| other.holdings.get(&pool)).copied().unwrap_or_default();
                holder.granted.saturating_sub(own.spent).saturating_sub(own.returned)
            })
            .sum();
        let waiting =
            self.envoys[envoy].workers.iter().flat_map(|worker| &worker.waiting).flat_map(|request| &request.needs);
        let promised: u64 = waiting.filter(|need| need.pool == pool).map(|need| need.cost).sum();
        let wrong = left - i64::try_from(idle + promised + cost).unwrap();
        if wrong >= 0 {
            self.found.wrong += 1;
            self.found.worst_wrong = self.found.worst_wrong.max(wrong + 1);
        }
    }

    fn tick(&mut self, place: usize, worker: usize) {
        let envoy = &mut self.envoys[place];
        if !envoy.is_up || worker >= envoy.workers.len() {
            return;
        }
        let waited = std::mem::take(&mut envoy.workers[worker].waiting);
        envoy.workers[worker].asking.start_over();
        for request in waited {
            self.decide(place, worker, request, false, false);
        }
        self.call(place, worker, true);
        if worker == 0 {
            self.report(place);
        }
        self.at(self.now_ns + TICK_NS, Event::Tick { envoy: place, worker });
    }

    fn call(&mut self, place: usize, worker: usize, is_tick: bool) {
        let envoy = &mut self.envoys[place];
        let Some((call, pools)) = envoy.call(worker, is_tick, self.now_ns) else { return };
        self.found.calls += 1;
        self.next_token += 1;
        let token = self.next_token;
        envoy.workers[worker].asking.sent(token, pools, (self.now_ns + envoy.skew_ns) / MS);
        self.at(self.now_ns + TIMEOUT_NS, Event::TimeOut { envoy: place, worker, token });
        self.send(&Event::Call { envoy: place, worker, token, call });
    }

    fn report(&mut self, place: usize) {
        let envoy = &mut self.envoys[place];
        if envoy.report.is_none() && !envoy.unreported.is_empty() {
            envoy.report_seq += 1;
            envoy.report = Some((envoy.report_seq, std::mem::take(&mut envoy.unreported)));
        }
        if let Some((seq, tokens)) = envoy.report.clone() {
            let reporter = envoy.reporter;
            self.send(&Event::Report { envoy: place, reporter, seq, tokens });
        }
    }

    fn send(&mut self, event: &Event) {
        let Network { least_ms, most_ms, lost_per_mille, doubled_per_mille } = self.network;
        let times = 1 + u64::from(self.random.happens(doubled_per_mille));
        for _ in 0..times {
            if !self.random.happens(lost_per_mille) {
                let delay_ns = self.random.between(least_ms * MS, most_ms * MS);
                self.at(self.now_ns + delay_ns, event.clone());
            }
        }
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Kill(place) => self.envoys[place].is_up = false,
            Change::End(place) => {
                let envoy = &mut self.envoys[place];
                envoy.is_up = false;
                let (reporter, contact, ns) = (envoy.reporter, envoy.contact, self.now_ns + envoy.skew_ns);
                let pools: Vec<PoolId> = envoy.holdings.keys().copied().collect();
                let asks = pools.iter().map(|pool| {
                    let holding = envoy.holdings.get_mut(pool).unwrap();
                    holding.hand_back();
                    holding.ask(Due { pool: *pool, need: 0, least: 0 }, &contact, ns)
                });
                let call = Call { reporter, is_last: true, asks: asks.collect() };
                self.send(&Event::Call { envoy: place, worker: 0, token: 0, call });
                self.report(place);
            }
            Change::Start(place) => self.start(place),
            Change::Terms(pool, terms) => {
                let kept = self.control_plane.pools.get_mut(&pool).unwrap();
                kept.terms = terms;
                for judge in [&mut self.exact, &mut self.ideal] {
                    judge.get_mut(&pool).unwrap().change(&terms, self.now_ns);
                }
            }
            Change::Add(pool, more) => {
                self.fill += 1;
                if let Terms::Stock { left, .. } = &mut self.control_plane.pools.get_mut(&pool).unwrap().terms {
                    *left += more;
                }
                for judge in [&mut self.exact, &mut self.ideal] {
                    judge.get_mut(&pool).unwrap().add(more);
                }
            }
            Change::Away(is_away) => self.control_plane.is_away = is_away,
        }
    }
}

impl ControlPlane {
    fn answer(&mut self, call: &Call, now_ns: u64) -> Option<Answer> {
        if self.is_away {
            return None;
        }
        let me = call.reporter;
        if call.is_last {
            self.ended.push(me);
        }
        self.heard_ns.insert(me, now_ns);
        let silent_ms = |heard_ns: &u64| (now_ns - heard_ns) / MS;
        let live =
            self.heard_ns.iter().filter(|(id, heard)| !self.ended.contains(id) && silent_ms(heard) < LIVE_MS).count();
        let another = self.alone.filter(|(id, until_ns)| *id != me && now_ns < *until_ns);
        let company = if another.is_some() { Company::AnotherIsAlone } else { Company::Several };
        let is_alone = live == 1 && another.is_none() && !call.is_last;
        if is_alone {
            self.alone = Some((me, now_ns + (ALONE_MS + ALONE_GRACE_MS) * MS));
        }
        let mut grants = Vec::new();
        for ask in &call.asks {
            let Some(pool) = self.pools.get_mut(&ask.pool) else { continue };
            let is_expired =
                |id: &ReporterId| self.heard_ns.get(id).is_none_or(|heard| silent_ms(heard) >= EXPIRES_AFTER_MS);
            let is_unused = |holder: &Holder| holder.held() == 0 && now_ns / MS - holder.used_ms > 3 * IDLE_MS;
            pool.holders.retain(|holder| !is_expired(&holder.reporter) && !is_unused(holder));
            for holder in &mut pool.holders {
                let is_ended = self.ended.contains(&holder.reporter);
                holder.heard_ms = if is_ended { 0 } else { self.heard_ns[&holder.reporter] / MS };
            }
            grants.push(pool.answer(me, ask, company, now_ns));
        }
        let mut recalls = Vec::new();
        for (id, pool) in &mut self.pools {
            for holder in pool.holders.iter_mut().filter(|holder| holder.reporter == me && holder.is_recalled) {
                holder.is_recalled = false;
                recalls.push(*id);
            }
        }
        let alone_ms = if is_alone { u32::try_from(ALONE_MS).unwrap() } else { 0 };
        Some(Answer { live: u32::try_from(live).unwrap(), alone_ms, grants, recalls })
    }

    fn report(&mut self, reporter: ReporterId, seq: u64, tokens: &BTreeMap<PoolId, u64>, _now_ns: u64) -> bool {
        if self.is_away {
            return false;
        }
        let last = self.reports.entry(reporter).or_default();
        if seq > *last {
            *last = seq;
            for (id, tokens) in tokens {
                let pool = self.pools.get_mut(id).unwrap();
                if let Terms::Stock { left, .. } = &mut pool.terms {
                    *left -= i64::try_from(*tokens).unwrap();
                }
                if let Some(holder) = pool.holders.iter_mut().find(|holder| holder.reporter == reporter) {
                    holder.book(*tokens);
                }
            }
        }
        true
    }
}
