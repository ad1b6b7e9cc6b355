//! Judge of all responses: from the changes of keys and the faults so far, it decides whether a
//! response breaks a promise.
//!
//! **Bound.** A change of a key counts from the moment that the API confirmed it; it is committed
//! by then. From there, every worker of every Envoy must obey it within [`BOUND`], as long as that
//! Envoy can reach a control plane that can reach the database. A *disruption* in between extends
//! the deadline: it lasts as long as the fault, plus the stated time that the parts need to
//! recover. What an Envoy already knows needs no control plane: by its own clock, it enforces the
//! expiry that a key was created with to the second, whatever is broken. An expiry that a rotation
//! sets for the old secret is a change.
//!
//! A request counts from the moment that it was sent; it was decided later than that.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use portcullis_harness::dice::Dice;

use crate::envoy_model::{BOUND, Disruption, EnvoyModel, Hinders, Span, close, gap};
use crate::limit_model::Pool;
use crate::report::Journal;
use crate::verdict::{Tally, Verdict};

/// Times in records have whole seconds.
const SECOND: Duration = Duration::from_secs(1);

/// Maximum number of broken promises with their text; more are only counted.
const MAX_TEXTS: usize = 50;

/// Expected state of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It must be admitted.
    Good,
    /// It must be refused.
    Dead,
    /// A change is in progress, or its result is unknown.
    Doubtful,
}

#[derive(Clone, Debug)]
struct Secret {
    key: Arc<str>,
    text: Arc<str>,
    standing: Standing,
    since: Instant,
    version: u64,
    ends_at: Option<SystemTime>,
    /// Set if the expiry came with a change, which an Envoy may not have received. The expiry may be earlier by this much, since
    /// the time of the change is unknown.
    end_changed: Option<Duration>,
    /// The pools of its limits, by number.
    pools: Arc<[usize]>,
}

/// A request before it is sent, with the expected state of its secret at that time.
#[derive(Clone, Debug)]
pub struct Ticket {
    pub text: Arc<str>,
    secret: Option<usize>,
    standing: Standing,
    since: Instant,
    version: u64,
    ends_at: Option<SystemTime>,
    end_changed: Option<Duration>,
}

/// Result of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection was refused, so it was not sent.
    Unsent,
    /// It was sent, and the connection ended or timed out.
    Lost,
    /// A response: its status, and the code of the problem if it has one.
    Came(u16, Option<String>),
}

/// Handle of a disruption, to end it.
#[derive(Clone, Debug)]
pub(crate) struct Disruptions(Vec<(usize, usize)>, Hinders);

#[derive(Debug, Default)]
struct Known {
    secrets: Vec<Secret>,
    /// The first secrets, which never change.
    steady: usize,
    /// Secrets without limits, or with credits, for the common load.
    common: Vec<usize>,
    /// Of those, the ones that never change.
    steady_common: usize,
    /// Secrets with limits, for clients of their own.
    groups: Vec<Vec<usize>>,
    models: Vec<EnvoyModel>,
    tallies: HashMap<Arc<str>, Tally>,
    /// Its tallies, and the gaps of each Envoy, are filled in at the end.
    found: Verdict,
    forgotten: HashSet<Arc<str>>,
    last_admitted: Option<Instant>,
    pools: Vec<Pool>,
}

#[derive(Debug)]
pub struct Oracle {
    known: Mutex<Known>,
    journal: Journal,
}

impl Oracle {
    pub fn new(envoys: usize, journal: Journal) -> Self {
        let models = (0..envoys).map(|_| EnvoyModel::default()).collect();
        let known = Known { models, ..Known::default() };
        Self { known: Mutex::new(known), journal }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a secret that the API returned, with the pools of its limits. Secrets before [`Self::all_are_steady`] never change.
    /// Those of a group have clients of their own.
    pub fn add(
        &self,
        key: &str,
        text: &str,
        ends_at: Option<SystemTime>,
        pools: &[usize],
        group: Option<usize>,
    ) -> usize {
        let mut known = self.known();
        let (standing, since) = (Standing::Good, Instant::now());
        let secret = Secret {
            key: key.into(),
            text: text.into(),
            standing,
            since,
            version: 0,
            ends_at,
            end_changed: None,
            pools: pools.into(),
        };
        known.secrets.push(secret);
        let number = known.secrets.len() - 1;
        let known = &mut *known;
        match group {
            None => known.common.push(number),
            Some(group) => {
                known.groups.resize(known.groups.len().max(group + 1), Vec::new());
                known.groups[group].push(number);
            }
        }
        number
    }

    pub fn all_are_steady(&self) {
        let mut known = self.known();
        (known.steady, known.steady_common) = (known.secrets.len(), known.common.len());
    }

    /// A change of a secret will be requested.
    pub fn doubt(&self, secret: usize) {
        self.settle(secret, Standing::Doubtful, None);
    }

    /// The API confirmed the state of a secret; with an expiry, its latest time, and by how much it may be earlier.
    pub fn settle(&self, secret: usize, standing: Standing, ends: Option<(SystemTime, Duration)>) {
        if let Some(secret) = self.known().secrets.get_mut(secret) {
            secret.standing = standing;
            secret.since = Instant::now();
            secret.version += 1;
            if let Some((latest, earlier)) = ends {
                (secret.ends_at, secret.end_changed) = (Some(latest), Some(earlier));
            }
        }
    }

    /// Begins a disruption of these Envoys. `after` is the time that recovery takes after its end.
    pub(crate) fn begin(&self, hinders: Hinders, envoys: &[usize], after: Duration) -> Disruptions {
        let mut known = self.known();
        let disruption = Disruption { start: Instant::now(), end: None, after };
        let mut places = Vec::new();
        for envoy in envoys {
            if let Some(model) = known.models.get_mut(*envoy) {
                let disruptions = model.disruptions(hinders);
                disruptions.push(disruption);
                places.push((*envoy, disruptions.len() - 1));
            }
        }
        Disruptions(places, hinders)
    }

    pub(crate) fn end(&self, disruptions: &Disruptions) {
        let mut known = self.known();
        for (envoy, place) in &disruptions.0 {
            if let Some(disruption) =
                known.models.get_mut(*envoy).and_then(|model| model.disruptions(disruptions.1).get_mut(*place))
            {
                disruption.end = Some(Instant::now());
            }
        }
    }

    /// An Envoy ended. Until it has its keys again, it refuses everything.
    pub fn unready(&self, envoy: usize) {
        if let Some(model) = self.known().models.get_mut(envoy) {
            model.ready = None;
        }
    }

    /// Sets the possible skew of an Envoy's clock.
    pub fn clock(&self, envoy: usize, behind: Duration, ahead: Duration) {
        if let Some(model) = self.known().models.get_mut(envoy) {
            (model.behind, model.ahead) = (behind, ahead);
        }
    }

    /// The number of requests that an Envoy decided lately.
    pub fn decided_within(&self, envoy: usize, lately: Duration) -> u64 {
        self.known().models.get(envoy).map_or(0, |model| model.decided_within(lately, Instant::now()))
    }

    /// Excuses lost counts, for a reason.
    pub fn may_lose(&self, why: &str, requests: u64) {
        *self.known().found.losses.entry(why.to_owned()).or_default() += requests;
        self.journal.note(&format!("up to {requests} requests may go uncounted: {why}"));
    }

    /// The time by which every Envoy must obey a change of the time `since`. None during a disruption.
    pub fn all_obey_by(&self, since: Instant) -> Option<Instant> {
        let latest = |latest: Instant, deadline: Option<Instant>| deadline.map(|deadline| latest.max(deadline));
        self.known().models.iter().try_fold(since, |by, model| latest(by, model.deadline(since)))
    }

    /// Ends the measurement of gaps, and checks that the load tested something.
    pub fn load_is_over(&self) {
        let (start, now) = (self.journal.start, Instant::now());
        let mut known = self.known();
        known.models.iter_mut().for_each(|model| model.close(start, now));
        let last = known.last_admitted;
        close(last, &mut known.found.longest_gap, start, now);
        if known.found.judged_dead == 0 {
            known.break_promise("no request with a dead key was judged".into(), &self.journal);
        }
        known.judge_limits(&self.journal);
    }

    /// Counts requests without a known key that other parts than the clients sent.
    pub fn probed(&self, decided: u64, doubtful: u64) {
        let mut known = self.known();
        known.found.keyless.refused += decided;
        known.found.keyless.doubtful += doubtful;
    }

    pub fn broken(&self, what: &str) {
        let mut known = self.known();
        known.break_promise(what.to_owned(), &self.journal);
    }

    /// Selects a secret for the next request of the common load.
    pub fn pick(&self, dice: &mut Dice, unknown: &[Arc<str>]) -> Ticket {
        let known = self.known();
        let (all, steady) = (known.common.len(), known.steady_common);
        let recent = all.saturating_sub(steady).min(80);
        let place = match dice.below(100) {
            0..45 => Some(dice.below(steady)),
            45..92 if recent > 0 => Some(all - 1 - dice.below(recent)),
            92..95 => Some(dice.below(all)),
            _ => None,
        };
        let number = place.and_then(|place| known.common.get(place).copied());
        number.and_then(|number| known.ticket(number)).unwrap_or_else(|| {
            let text = unknown.get(dice.below(unknown.len())).cloned().unwrap_or_else(|| "nobody's".into());
            let (standing, since) = (Standing::Dead, self.journal.start);
            Ticket { text, secret: None, standing, since, version: 0, ends_at: None, end_changed: None }
        })
    }

    pub fn judge(&self, envoy: usize, ticket: &Ticket, sent: Instant, sent_at: SystemTime, answer: &Answer) {
        let mut known = self.known();
        known.count(envoy, ticket, answer);
        known.note_use(envoy, ticket, sent, answer);
        if let Some(why) = known.wrong(envoy, ticket, sent, sent_at, answer) {
            let key = ticket.secret.and_then(|secret| known.secrets.get(secret)).map_or("-", |secret| &*secret.key);
            let why = format!("Envoy {envoy}, key {key}, sent {:.3} s ago: {why}", sent.elapsed().as_secs_f64());
            known.break_promise(why, &self.journal);
        }
    }

    pub fn verdict(&self) -> Verdict {
        let known = self.known();
        let of_known = known.tallies.iter().filter(|(key, _)| !known.forgotten.contains(*key));
        Verdict {
            longest_gaps: known.models.iter().map(|model| model.longest_gap).collect(),
            tallies: of_known.map(|(key, tally)| (key.to_string(), *tally)).collect(),
            ..known.found.clone()
        }
    }
}

impl Known {
    fn ticket(&self, number: usize) -> Option<Ticket> {
        let secret = self.secrets.get(number)?;
        Some(Ticket {
            text: Arc::clone(&secret.text),
            secret: Some(number),
            standing: secret.standing,
            since: secret.since,
            version: secret.version,
            ends_at: secret.ends_at,
            end_changed: secret.end_changed,
        })
    }

    fn count(&mut self, envoy: usize, ticket: &Ticket, answer: &Answer) {
        let name = match answer {
            Answer::Unsent => "connection refused".to_owned(),
            Answer::Lost => "no response".to_owned(),
            Answer::Came(status, None) => format!("{status}"),
            Answer::Came(status, Some(code)) => format!("{status} {code}"),
        };
        *self.found.answers.entry(name).or_default() += 1;
        if *answer == Answer::Unsent {
            return;
        }
        self.found.sent += 1;
        let keyless = matches!(answer, Answer::Came(_, Some(code)) if code == "unknown" || code == "not_ready");
        let key = ticket.secret.and_then(|secret| self.secrets.get(secret)).filter(|_| !keyless);
        let tally = match key {
            Some(secret) => self.tallies.entry(Arc::clone(&secret.key)).or_default(),
            None => &mut self.found.keyless,
        };
        let now = Instant::now();
        let decided = match answer {
            Answer::Came(200, _) => {
                tally.admitted += 1;
                gap(&mut self.last_admitted, &mut self.found.longest_gap, now);
                true
            }
            Answer::Came(_, Some(_)) => {
                tally.refused += 1;
                true
            }
            Answer::Came(_, None) | Answer::Lost | Answer::Unsent => {
                tally.doubtful += 1;
                false
            }
        };
        let Some(model) = self.models.get_mut(envoy) else { return };
        if matches!(answer, Answer::Came(200, _)) {
            model.admitted(now);
        }
        if decided {
            model.decided(now);
        }
    }

    /// The promise that a result breaks, if any.
    fn wrong(
        &mut self,
        envoy: usize,
        ticket: &Ticket,
        sent: Instant,
        sent_at: SystemTime,
        answer: &Answer,
    ) -> Option<String> {
        let secret = ticket.secret.and_then(|secret| self.secrets.get(secret));
        let unchanged = secret.is_none_or(|secret| secret.version == ticket.version);
        let model = self.models.get_mut(envoy)?;
        let (status, code) = match answer {
            Answer::Unsent | Answer::Lost | Answer::Came(_, None)
                if model.requests.iter().any(|disruption| disruption.meets(sent)) =>
            {
                (answer_status(answer), None)
            }
            Answer::Unsent => return Some("connection refused without a disruption".into()),
            Answer::Lost => return Some("no response without a disruption".into()),
            Answer::Came(200, _) => (200, None),
            Answer::Came(status, None) => return Some(format!("an undocumented response: {status}")),
            Answer::Came(status, Some(code)) => (*status, Some(code.as_str())),
        };
        if code == Some("not_ready") {
            return model.ready.is_some_and(|ready| sent > ready).then(|| "not_ready once it was ready".into());
        }
        if code.is_some() || status == 200 {
            model.ready.get_or_insert_with(Instant::now);
        }
        let overdue = model.deadline(ticket.since).is_some_and(|deadline| sent > deadline);
        if secret.is_some() && ticket.standing == Standing::Dead && overdue && answer_status(answer) > 0 {
            self.found.judged_dead += 1;
        }
        if status == 200 {
            let pools = secret.map_or(&[][..], |secret| &secret.pools);
            if pools.iter().filter_map(|pool| self.pools.get(*pool)).any(Pool::is_stock) {
                model.unavailable_since = None;
            }
            return self.wrongly_admitted(envoy, ticket, sent, sent_at, overdue);
        }
        let code = code?;
        let time = Span { from: sent, to: Instant::now().max(sent) };
        let pools = secret.map_or(&[][..], |secret| &secret.pools);
        // These are judged at the end, when all requests of the pool are known.
        let is_limited = pools.iter().filter_map(|pool| self.pools.get(*pool)).any(|pool| pool.code == code);
        if is_limited {
            return None;
        }
        if code == "limits_unavailable" {
            let is_excused = !pools.is_empty() && (model.is_cut_off(time) || model.may_stall(sent));
            return (!is_excused).then(|| "limits_unavailable, although control planes answer".into());
        }
        let expected = ticket.standing == Standing::Good && unchanged;
        let earlier = model.ahead + SECOND + ticket.end_changed.unwrap_or_default();
        let ends = ticket.ends_at.is_some_and(|end| sent_at.max(SystemTime::now()) + earlier > end);
        (expected && overdue && !ends).then(|| format!("a good key was refused: {status} {code}"))
    }

    /// The promise that an admitted request breaks, if any.
    fn wrongly_admitted(
        &mut self,
        envoy: usize,
        ticket: &Ticket,
        sent: Instant,
        sent_at: SystemTime,
        overdue: bool,
    ) -> Option<String> {
        let model = self.models.get(envoy)?;
        let deadline = model.deadline(ticket.since);
        if ticket.standing == Standing::Dead && deadline == Some(ticket.since + BOUND) {
            self.found.longest_open = self.found.longest_open.max(sent.saturating_duration_since(ticket.since));
        }
        if let Some(deadline) = deadline.filter(|deadline| ticket.standing == Standing::Dead && sent > *deadline) {
            self.found.admitted_wrongly += 1;
            return Some(format!("admitted {:?} later than the bound", sent - deadline));
        }
        // By the Envoy's own clock. The Envoy has known the expiry since it first admitted the key, unless a rotation set it.
        let known = ticket.end_changed.is_none() || overdue;
        let ended = ticket.ends_at.and_then(|end| sent_at.duration_since(end + model.behind + SECOND).ok());
        let late = ended.filter(|_| known && ticket.standing == Standing::Good)?;
        self.found.admitted_wrongly += 1;
        Some(format!("admitted {late:?} after its expiry"))
    }

    fn break_promise(&mut self, what: String, journal: &Journal) {
        if self.found.broken.len() < MAX_TEXTS {
            journal.note(&format!("BROKEN: {what}"));
            self.found.broken.push(what);
        } else {
            self.found.unnamed += 1;
        }
    }
}

const fn answer_status(answer: &Answer) -> u16 {
    match answer {
        Answer::Came(status, _) => *status,
        Answer::Unsent | Answer::Lost => 0,
    }
}

mod limits;
mod restore;
#[cfg(test)]
mod tests;
