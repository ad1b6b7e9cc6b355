//! The simulated world: Envoys, a control plane, and the messages between them, which may be late, lost or doubled.

use std::collections::BTreeMap;

use contract::id::ReporterId;
use limits::ledger::{Holder, Pool};
use limits::message::{Answer, Call};
use limits::pool::{PoolId, Terms};
use limits::{AGAIN_MS, LONGEST_WAIT_MS};

use crate::control_plane::{ControlPlane, Window};
use crate::envoy::{Envoy, Fate, Need, Record, Reports, Request, TICK_NS};
use crate::judge::{Changed, Findings, Judge};
use crate::queue::Queue;
use crate::random::Random;

pub const MS: u64 = 1_000_000;
pub const S: u64 = 1_000 * MS;

/// After this time a call has failed.
const TIMEOUT_NS: u64 = 250 * MS;

/// For how long a pool counts as empty at least.
const LEAST_EMPTY_NS: u64 = 10 * MS;

/// While silent Envoys hold tokens, an answer is certain for this long. What they held may be free meanwhile.
const SILENT_KNOWN_NS: u64 = S;

#[derive(Clone, Debug)]
pub enum Event {
    Request { envoy: usize, needs: Vec<Need> },
    Tick { envoy: usize, worker: usize, reporter: ReporterId },
    Again { envoy: usize, worker: usize },
    Call { envoy: usize, worker: usize, token: u32, call: Call },
    Answer { envoy: usize, worker: usize, token: u32, answer: Answer },
    TimeOut { envoy: usize, worker: usize, token: u32 },
    Report { envoy: usize, reporter: ReporterId, reports: Reports },
    Acknowledged { envoy: usize, reporter: ReporterId, seq: u64 },
    Record { envoy: usize, reporter: ReporterId, pool: PoolId, record: Record },
    Settled { pool: PoolId, changed: Changed, is_more: bool, renewals: u32 },
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
    /// The use of a quota is reset.
    Reset(PoolId),
    /// The window of a quota ends.
    Renew(PoolId),
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
    /// Of a thousand messages, how many come only after the call has failed.
    pub late_per_mille: u64,
}

/// How Envoys differ.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The clocks of Envoys differ from that of the control plane by up to this much, in both directions.
    pub skew_ns: u64,
    /// The longest time until an Envoy has a changed record; 0: at once.
    pub record_ms: u64,
    pub has_safe_rate: bool,
}

pub struct World {
    pub now_ns: u64,
    pub random: Random,
    pub envoys: Vec<Envoy>,
    pub judge: Judge,
    pub found: Findings,
    pub settings: Settings,
    network: Network,
    workers: usize,
    /// The records as the control plane has them.
    pub records: BTreeMap<PoolId, Record>,
    pub control_plane: ControlPlane,
    queue: Queue<Event>,
    next_token: u32,
    next_reporter: u64,
    round_robin: usize,
}

impl World {
    pub fn new(seed: u64, envoys: usize, workers: usize, network: Network) -> Self {
        let settings = Settings { skew_ns: 5 * S, record_ms: 0, has_safe_rate: true };
        Self::with_settings(seed, envoys, workers, network, settings)
    }

    pub fn with_settings(seed: u64, envoys: usize, workers: usize, network: Network, settings: Settings) -> Self {
        let mut world = Self {
            now_ns: 1_800_000_000 * S,
            random: Random(seed),
            envoys: Vec::new(),
            judge: Judge::default(),
            found: Findings::default(),
            settings,
            network,
            workers,
            records: BTreeMap::new(),
            control_plane: ControlPlane::default(),
            queue: Queue::default(),
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
        self.judge.add_pool(pool, &terms);
        self.control_plane.pools.insert(pool, Pool::new(terms));
        let rate = if let Terms::Rate(rate) = terms { Some(rate) } else { None };
        self.change_record(pool, rate, 0);
    }

    /// The quota has windows of this length. The first begins now.
    pub fn add_windows(&mut self, pool: PoolId, requests: i64, length_ns: u64) {
        let window = Window { requests, length_ns, ends_ns: self.now_ns + length_ns };
        self.control_plane.windows.insert(pool, window);
        self.at(window.ends_ns, Event::Change(Change::Renew(pool)));
    }

    pub fn at(&mut self, at_ns: u64, event: Event) {
        self.queue.add(at_ns, event);
    }

    /// Runs all events up to a time.
    pub fn run(&mut self, until_ns: u64) {
        while let Some((at_ns, event)) = self.queue.pop(until_ns) {
            self.now_ns = at_ns;
            self.handle(event);
        }
        self.now_ns = until_ns;
    }

    /// The places of Envoys that are up.
    pub fn up(&self) -> Vec<usize> {
        (0..self.envoys.len()).filter(|place| self.envoys[*place].is_up).collect()
    }

    /// An Envoy that is up, in turn.
    pub fn next_envoy(&mut self) -> usize {
        let up = self.up();
        self.round_robin += 1;
        up[self.round_robin % up.len()]
    }

    /// One Envoy more.
    pub fn add_envoy(&mut self) {
        self.start(self.envoys.len());
    }

    pub fn start(&mut self, place: usize) {
        let skew_ns =
            self.random.below(2 * self.settings.skew_ns + 1).cast_signed() - self.settings.skew_ns.cast_signed();
        let mut envoy = Envoy::new(self.next_reporter, self.workers, skew_ns, self.settings.has_safe_rate);
        envoy.records.clone_from(&self.records);
        let reporter = envoy.reporter;
        self.next_reporter += 1;
        if place < self.envoys.len() {
            self.envoys[place] = envoy;
        } else {
            self.envoys.push(envoy);
        }
        for worker in 0..self.workers {
            let first_ns = self.random.below(TICK_NS);
            self.at(self.now_ns + first_ns, Event::Tick { envoy: place, worker, reporter });
        }
    }

    /// All Envoys receive the key of a pool.
    pub fn learn(&mut self, need: Need) {
        for envoy in &mut self.envoys {
            envoy.learn(need, self.now_ns);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Request { envoy, needs } => self.request(envoy, needs),
            Event::Tick { envoy, worker, reporter } => self.tick(envoy, worker, reporter),
            Event::Again { envoy, worker } => {
                self.envoys[envoy].workers[worker].asking.ask_again();
                self.call(envoy, worker, false);
            }
            Event::Call { envoy, worker, token, call } => {
                if let Some((answer, reported)) = self.control_plane.answer(&call, self.now_ns) {
                    self.send(&Event::Answer { envoy, worker, token, answer });
                    self.find(call.reporter, reported);
                }
            }
            Event::Answer { envoy, worker, token, answer } => {
                if let Some(sent) = self.take_response(envoy, worker, token) {
                    let waited = self.envoys[envoy].answer(worker, &sent, &answer, self.now_ns);
                    self.decide_again(envoy, worker, waited, false);
                }
            }
            Event::TimeOut { envoy, worker, token } => {
                if let Some(sent) = self.take_response(envoy, worker, token) {
                    let waited = self.envoys[envoy].fail(worker, &sent);
                    self.decide_again(envoy, worker, waited, true);
                }
            }
            Event::Report { envoy, reporter, reports } => {
                if let Some(booked) = self.control_plane.book(reporter, &reports) {
                    let seq = reports.iter().map(|(seq, _)| *seq).max().unwrap();
                    self.send(&Event::Acknowledged { envoy, reporter, seq });
                    self.note_booked(envoy, reporter, &booked);
                    self.find(reporter, booked);
                }
            }
            Event::Acknowledged { envoy, reporter, seq } => {
                let envoy = &mut self.envoys[envoy];
                if envoy.reporter == reporter {
                    envoy.reports.retain(|(of, _)| *of > seq);
                }
            }
            Event::Record { envoy, reporter, pool, record } => {
                let envoy = &mut self.envoys[envoy];
                if envoy.reporter == reporter {
                    envoy.note_record(pool, record);
                }
            }
            Event::Settled { pool, changed, is_more, renewals } => {
                if self.judge.renewals(pool) == renewals {
                    self.judge.settle(pool, &changed, is_more, self.now_ns);
                }
            }
            Event::Change(change) => self.change(change),
        }
    }

    fn take_response(&mut self, envoy: usize, worker: usize, token: u32) -> Option<limits::asking::Sent> {
        let envoy = &mut self.envoys[envoy];
        if envoy.is_up { envoy.workers[worker].asking.take_response(token) } else { None }
    }

    fn request(&mut self, place: usize, mut needs: Vec<Need>) {
        let envoy = &self.envoys[place];
        for need in &mut needs {
            if let Some(record) = envoy.records.get(&need.pool) {
                need.rate = record.rate;
            }
        }
        let request = Request { since_ns: self.now_ns, needs };
        self.judge.judge_ideally(&request, self.now_ns, &mut self.found);
        self.found.requests += 1;
        let worker = usize::try_from(self.random.below(self.workers as u64)).unwrap();
        if self.envoys[place].is_up {
            self.decide(place, worker, request, true, false);
            self.call(place, worker, false);
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
        let fate = self.envoys[envoy].decide(worker, &request, has_failed, self.now_ns);
        if fate != Fate::Waits && !is_new {
            self.found.waits_ns.push(self.now_ns - request.since_ns);
        }
        match fate {
            Fate::Admitted | Fate::AdmittedAtSafeRate => {
                let is_safe = fate == Fate::AdmittedAtSafeRate;
                self.found.admitted += 1;
                self.found.safe += u64::from(is_safe);
                self.judge.take(&request.needs, is_safe, self.now_ns, &mut self.found);
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

    /// How old an Envoy's knowledge of a pool may be when it refuses a request: the least time for which a pool counts as empty,
    /// and the way of the messages.
    pub fn stale_ns(&self) -> u64 {
        (2 * self.network.most_ms * MS).max(LEAST_EMPTY_NS) + LEAST_EMPTY_NS
    }

    fn judge_refusal(&mut self, envoy: usize, pool: PoolId, cost: u64, out_of_time: bool) {
        let left = self.judge.left(pool, self.now_ns - self.stale_ns());
        let holders = self.control_plane.pools[&pool].holders.iter();
        let holders = holders.filter(|holder| holder.reporter != self.envoys[envoy].reporter && holder.held() > 0);
        let is_up = |of: &Holder| self.envoys.iter().any(|envoy| envoy.reporter == of.reporter && envoy.is_up);
        // A request waits for the tokens of live Envoys, if a recall and the hand-back are faster than the longest wait: a tick of
        // the other Envoy, and the ways of eight messages.
        let out_of_time = out_of_time && TICK_NS + 8 * self.network.most_ms * MS < LONGEST_WAIT_MS * MS;
        let held: u64 = holders.filter(|of| !out_of_time || !is_up(of)).map(|of| self.idle(of, pool)).sum();
        let is_new = |of: &&(PoolId, u64, u64)| of.0 == pool && self.now_ns - of.1 < SILENT_KNOWN_NS + self.stale_ns();
        let freed: u64 = self.control_plane.freed.iter().rev().take_while(is_new).map(|of| of.2).sum();
        let idle = held + freed + self.on_its_way(envoy, pool);
        let needs = self.envoys[envoy].workers.iter().flat_map(|worker| &worker.waiting).flat_map(|of| &of.needs);
        let promised: u64 = needs.filter(|need| need.pool == pool).map(|need| need.cost).sum();
        let wrong = left - i64::try_from(idle + promised + cost).unwrap();
        if wrong >= 0 {
            self.found.wrong += 1;
            self.found.worst_wrong = self.found.worst_wrong.max(wrong + 1);
        }
    }

    /// Tokens that an Envoy itself hands back with a call that is under way. The answer to an earlier call does not know of them.
    fn on_its_way(&self, envoy: usize, pool: PoolId) -> u64 {
        let (envoy, holders) = (&self.envoys[envoy], &self.control_plane.pools[&pool].holders);
        let own = &envoy.holdings[&pool];
        let is_new = envoy.ns(self.now_ns) / MS - own.asked_ms <= 2 * self.network.most_ms;
        let reported = holders.iter().find(|of| of.reporter == envoy.reporter && of.session == own.session);
        reported.filter(|_| is_new).map_or(0, |reported| own.returned.saturating_sub(reported.returned))
    }

    /// Tokens that an Envoy was granted, some in answers that are under way, and has not spent. They belong to the Envoy until
    /// the control plane knows that it hands them back. Tokens that a dead Envoy spent without a report count, too.
    fn idle(&self, holder: &Holder, pool: PoolId) -> u64 {
        let envoy = self.envoys.iter().find(|envoy| envoy.reporter == holder.reporter && envoy.is_up);
        let own = envoy.and_then(|envoy| envoy.holdings.get(&pool)).filter(|own| own.session == holder.session);
        own.map_or(holder.held(), |own| holder.granted.saturating_sub(own.spent).saturating_sub(holder.returned))
    }

    fn tick(&mut self, place: usize, worker: usize, reporter: ReporterId) {
        let envoy = &mut self.envoys[place];
        if !envoy.is_up || envoy.reporter != reporter {
            return;
        }
        envoy.refresh(worker);
        let waited = std::mem::take(&mut envoy.workers[worker].waiting);
        envoy.workers[worker].asking.start_over();
        for request in waited {
            self.decide(place, worker, request, false, false);
        }
        self.call(place, worker, true);
        if worker == 0 {
            self.report(place, false);
        }
        self.at(self.now_ns + TICK_NS, Event::Tick { envoy: place, worker, reporter });
    }

    fn call(&mut self, place: usize, worker: usize, is_tick: bool) {
        let envoy = &mut self.envoys[place];
        let Some((call, pools)) = envoy.call(worker, is_tick, self.now_ns) else { return };
        self.found.calls += 1;
        self.next_token += 1;
        let token = self.next_token;
        let sent_ms = envoy.ns(self.now_ns) / MS;
        envoy.workers[worker].asking.sent(token, pools, sent_ms);
        self.at(self.now_ns + TIMEOUT_NS, Event::TimeOut { envoy: place, worker, token });
        self.send(&Event::Call { envoy: place, worker, token, call });
    }

    pub fn report(&mut self, place: usize, is_last: bool) {
        let envoy = &mut self.envoys[place];
        if let Some(reports) = envoy.report(is_last) {
            let reporter = envoy.reporter;
            self.send(&Event::Report { envoy: place, reporter, reports });
        }
    }

    pub fn send(&mut self, event: &Event) {
        let Network { least_ms, most_ms, lost_per_mille, doubled_per_mille, late_per_mille } = self.network;
        let times = 1 + u64::from(self.random.happens(doubled_per_mille));
        for _ in 0..times {
            let is_lost = self.random.happens(lost_per_mille);
            let is_late = self.random.happens(late_per_mille);
            if is_lost || is_late {
                self.found.lost += 1;
            }
            if !is_lost {
                let late_ns = if is_late { self.random.between(TIMEOUT_NS, 3 * TIMEOUT_NS) } else { 0 };
                let delay_ns = self.random.between(least_ms * MS, most_ms * MS);
                self.at(self.now_ns + delay_ns + late_ns, event.clone());
            }
        }
    }
}
