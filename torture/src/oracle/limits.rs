//! Judging of limits, quotas and credits: what the oracle notes for it, and the result.

use std::time::{Duration, Instant};

use portcullis_harness::dice::Dice;

use super::{Answer, Known, Oracle, Ticket};
use crate::envoy_model::Span;
use crate::limit_model::{Capacity, Fate, Pool, Use};
use crate::report::Journal;

/// Secrets of a group that clients use: the last ones.
const RECENT: usize = 6;

impl Oracle {
    /// Adds a pool. Returns its number.
    pub(crate) fn add_pool(&self, name: &'static str, code: &'static str, capacity: Capacity) -> usize {
        let mut known = self.known();
        known.pools.push(Pool::new(name, code, capacity));
        known.pools.len() - 1
    }

    /// The administrator asks for more tokens of a pool. Returns the number of the fill.
    pub(crate) fn ask_to_fill(&self, pool: usize, tokens: u64) -> usize {
        self.known().pools.get_mut(pool).map_or(0, |pool| pool.ask(tokens))
    }

    /// The API confirmed that.
    pub(crate) fn filled(&self, pool: usize, fill: usize) {
        if let Some(pool) = self.known().pools.get_mut(pool) {
            pool.confirm(fill);
        }
    }

    /// By how many tokens the requests so far may exceed what was confirmed. After a restore, they do.
    pub(crate) fn overdrawn(&self, pool: usize) -> u64 {
        self.known().pools.get(pool).map_or(0, Pool::overdrawn)
    }

    /// Selects a secret of a group with limits for the next request.
    pub(crate) fn pick_of(&self, group: usize, dice: &mut Dice) -> Option<Ticket> {
        let known = self.known();
        let secrets = known.groups.get(group)?;
        let place = secrets.len().checked_sub(1 + dice.below(secrets.len().min(RECENT)))?;
        known.ticket(*secrets.get(place)?)
    }

    /// What an Envoy admitted lately may be lost with its counts: what it reports after `usual` at a time without disruptions.
    pub(crate) fn lose_uncounted(&self, envoy: usize, usual: Duration) {
        let now = Instant::now();
        if let Some(model) = self.known().models.get_mut(envoy) {
            let from = model.unreported_since(now, usual);
            model.uncounted.push(Span { from, to: now });
        }
    }

    /// An Envoy was killed: what it holds comes back after this time.
    pub(crate) fn hold(&self, envoy: usize, lasts: Duration) {
        let now = Instant::now();
        if let Some(model) = self.known().models.get_mut(envoy) {
            model.holds.push(Span { from: now, to: now + lasts });
        }
    }
}

impl Known {
    /// Notes what a request took, or did not get, of its pools.
    pub(super) fn note_use(&mut self, envoy: usize, ticket: &Ticket, sent: Instant, answer: &Answer) {
        let Self { secrets, pools, .. } = self;
        let Some(secret) = ticket.secret.and_then(|secret| secrets.get(secret)) else { return };
        let time = Span { from: sent, to: Instant::now().max(sent) };
        for pool in secret.pools.iter() {
            let Some(pool) = pools.get_mut(*pool) else { continue };
            let fate = match answer {
                Answer::Came(200, _) => Fate::Admitted,
                Answer::Lost | Answer::Came(_, None) => Fate::Doubtful,
                Answer::Came(_, Some(code)) if code == pool.code => Fate::Refused,
                Answer::Unsent | Answer::Came(..) => continue,
            };
            pool.note(Use { envoy, time, fate });
        }
    }

    /// Judges the requests of all pools.
    pub(super) fn judge_limits(&mut self, journal: &Journal) {
        let verdicts: Vec<_> = self.pools.iter().map(|pool| pool.judge(&self.models)).collect();
        for verdict in &verdicts {
            let name = verdict.name;
            for (envoy, sent, took) in &verdict.wrongful {
                let (sent, took) = (sent.saturating_duration_since(journal.start).as_secs_f64(), took.as_secs_f64());
                let why = format!(
                    "{name}: Envoy {envoy} refused a request of {sent:.3} s after {took:.3} s although there was room"
                );
                self.break_promise(why, journal);
            }
            if verdict.excess > 0 {
                self.break_promise(format!("{name}: {} requests too many were admitted", verdict.excess), journal);
            }
            if verdict.admitted == 0 {
                self.break_promise(format!("{name}: no request was admitted"), journal);
            }
        }
        if !verdicts.is_empty() && verdicts.iter().all(|verdict| verdict.judged == 0) {
            self.break_promise("no request with a shared limit was judged".into(), journal);
        }
        self.found.limited = verdicts;
    }
}
