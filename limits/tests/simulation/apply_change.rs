//! Changes: Envoys come and go, and limits are changed.

use std::collections::BTreeMap;

use contract::id::ReporterId;
use contract::rate::Rate;
use limits::pool::{Kind, PoolId, Terms};

use crate::envoy::Record;
use crate::judge::Changed;
use crate::world::{Change, Event, MS, World};

/// Answers that are under way may be this old when all Envoys have the new record.
const ANSWER_MS: u64 = 500;

impl World {
    pub fn change(&mut self, change: Change) {
        match change {
            Change::Kill(place) => self.remove_envoy(place),
            Change::End(place) => {
                let call = self.envoys[place].end(self.now_ns);
                self.send(&Event::Call { envoy: place, worker: 0, token: 0, call });
                self.report(place, true);
                self.remove_envoy(place);
            }
            Change::Start(place) => self.start(place),
            Change::Terms(pool, terms) => {
                self.control_plane.pools.get_mut(&pool).unwrap().terms = terms;
                self.judge_change(pool, Changed::Terms(terms));
                self.change_record(pool, rate_of(&terms), 0);
            }
            Change::Add(pool, more) => {
                if let Some(left) = self.left_mut(pool) {
                    *left += more;
                }
                if let Some(window) = self.control_plane.windows.get_mut(&pool) {
                    window.requests += more;
                }
                self.judge_change(pool, Changed::Add(more));
                self.change_record(pool, None, 1);
            }
            Change::Reset(pool) => {
                let changed = self.renew(pool);
                self.settle(pool, changed, true);
                self.change_record(pool, None, 1);
            }
            Change::Renew(pool) => {
                let window = self.control_plane.windows.get_mut(&pool).unwrap();
                window.ends_ns += window.length_ns;
                let ends_ns = window.ends_ns;
                self.at(ends_ns, Event::Change(Change::Renew(pool)));
                let changed = self.renew(pool);
                let (at_ns, renewals) = (self.now_ns + self.stale_ns(), self.judge.renewals(pool));
                self.at(at_ns, Event::Settled { pool, changed, is_more: true, renewals });
            }
            Change::Away(is_away) => self.control_plane.is_away = is_away,
        }
    }

    fn left_mut(&mut self, pool: PoolId) -> Option<&mut i64> {
        match &mut self.control_plane.pools.get_mut(&pool).unwrap().terms {
            Terms::Stock { left, .. } => Some(left),
            Terms::Rate(_) => None,
        }
    }

    /// The use of a quota starts anew. Reports that come later count in the present window.
    fn renew(&mut self, pool: PoolId) -> Changed {
        let requests = self.control_plane.windows[&pool].requests;
        *self.left_mut(pool).unwrap() = requests;
        let mut late = 0;
        for place in 0..self.envoys.len() {
            let of = if self.envoys[place].is_up { self.unbooked(place, pool) } else { 0 };
            self.envoys[place].late.insert(pool, of);
            late += of;
        }
        self.found.worst_late = self.found.worst_late.max(late);
        self.judge.renew(pool, requests, late, self.now_ns)
    }

    /// What an Envoy has spent of a pool that the control plane does not know.
    fn unbooked(&self, place: usize, pool: PoolId) -> u64 {
        let envoy = &self.envoys[place];
        if pool.kind == Kind::Rate {
            let own = envoy.holdings.get(&pool);
            return own.map_or(0, |own| self.control_plane.unreported(envoy.reporter, pool, own.session, own.spent));
        }
        let under_way = envoy.reports.iter().filter(|(seq, _)| !self.control_plane.is_booked(envoy.reporter, *seq));
        let tokens = under_way.map(|(_, tokens)| tokens).chain([&envoy.unreported]);
        tokens.filter_map(|tokens| tokens.get(&pool)).sum()
    }

    pub fn note_booked(&mut self, place: usize, reporter: ReporterId, booked: &BTreeMap<PoolId, u64>) {
        let envoy = &mut self.envoys[place];
        if envoy.reporter == reporter {
            for (pool, tokens) in booked {
                // What was spent first is reported first.
                let late = envoy.late.entry(*pool).or_default();
                *late = late.saturating_sub(*tokens);
            }
        }
    }

    /// The Envoy is gone. Usage that it has not reported is lost, unless a message is under way.
    fn remove_envoy(&mut self, place: usize) {
        for pool in self.records.keys().copied().collect::<Vec<_>>() {
            let lost = self.unbooked(place, pool);
            let late = self.envoys[place].late.get(&pool).copied().unwrap_or_default();
            self.judge.lose(pool, lost, late.min(lost));
        }
        self.envoys[place].is_up = false;
    }

    /// A message reports usage. If its Envoy is gone, this usage is no longer lost.
    pub fn find(&mut self, reporter: ReporterId, reported: impl IntoIterator<Item = (PoolId, u64)>) {
        if !self.envoys.iter().any(|envoy| envoy.reporter == reporter && envoy.is_up) {
            for (pool, tokens) in reported {
                self.judge.find(pool, tokens, self.now_ns);
            }
        }
    }

    fn judge_change(&mut self, pool: PoolId, changed: Changed) {
        let is_more = self.judge.is_more(pool, &changed);
        self.judge.change(pool, &changed, self.now_ns);
        self.settle(pool, changed, is_more);
    }

    /// All Envoys know of a change after some time.
    fn settle(&mut self, pool: PoolId, changed: Changed, is_more: bool) {
        if self.settings.record_ms == 0 {
            self.judge.settle(pool, &changed, is_more, self.now_ns);
        } else {
            let at_ns = self.now_ns + (self.settings.record_ms + ANSWER_MS) * MS;
            let renewals = self.judge.renewals(pool);
            self.at(at_ns, Event::Settled { pool, changed, is_more, renewals });
        }
    }

    /// The record of a key changes, and comes to all Envoys.
    pub fn change_record(&mut self, pool: PoolId, rate: Option<Rate>, fills: u32) {
        let before = self.records.get(&pool).map_or((0, 1), |record| (record.version, record.fill));
        let record = Record { version: before.0 + 1, rate, fill: before.1 + fills };
        self.records.insert(pool, record);
        for place in 0..self.envoys.len() {
            let reporter = self.envoys[place].reporter;
            let event = Event::Record { envoy: place, reporter, pool, record };
            let delay_ns = self.random.below(self.settings.record_ms * MS);
            if self.settings.record_ms == 0 {
                self.envoys[place].note_record(pool, record);
            } else {
                self.at(self.now_ns + delay_ns, event);
            }
        }
    }
}

const fn rate_of(terms: &Terms) -> Option<Rate> {
    match terms {
        Terms::Rate(rate) => Some(*rate),
        Terms::Stock { .. } => None,
    }
}
