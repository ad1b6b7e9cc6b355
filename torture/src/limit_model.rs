//! Model of what all Envoys share: rate limits, quotas and credits. From the requests of a pool, each with the time when it
//! was sent and when its answer came, it finds what is certain: more admitted than the pool has, in whatever order requests
//! were decided (*excess*), and requests refused although the pool had room, in whatever order (*wrongful*).
//!
//! Faults announce *spells*, the periods around a fault: see [`EnvoyModel`]. Outside of them, the tolerances are those of the book's page on
//! limits.

use std::time::{Duration, Instant};

use crate::envoy_model::{EnvoyModel, Span};

/// Time by whose tokens, plus one, a rate limit that several Envoys use may run behind an exact one.
const BEHIND: Duration = Duration::from_millis(300);

/// How old an Envoy's knowledge of an empty pool may be: 10 ms and the way of a message, on a busy machine.
const LAG: Duration = Duration::from_millis(100);

/// All Envoys together hold at most this part of what is left.
const PART: u64 = 8;

/// One Envoy holds at most this part of a limit whose burst comes back within [`FAST`].
const PART_OF_FAST: u64 = 2;

const FAST: Duration = Duration::from_secs(10);

/// Tokens that an Envoy may hold beyond that, for requests that waited when it ended or was cut off.
const WAITING: u64 = 2;

/// How long before a refusal the pool's state is considered when bounding what an Envoy may hold.
const GRANTED: Duration = Duration::from_secs(70);

/// What a pool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capacity {
    /// One token in each interval, and as many at once as the burst.
    Rate { interval: Duration, burst: u64 },
    /// The tokens that it was filled with.
    Stock,
}

/// Tokens that an administrator added to a stock.
#[derive(Clone, Copy, Debug)]
struct Fill {
    tokens: u64,
    asked: Instant,
    confirmed: Option<Instant>,
    /// When a restored database without this fill took over.
    lost: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Admitted,
    /// There was no answer.
    Doubtful,
    Refused,
}

/// A request that needed a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    pub(crate) envoy: usize,
    pub(crate) time: Span,
    pub(crate) fate: Fate,
}

/// A pool and its requests.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    pub(crate) name: &'static str,
    /// The code of a refusal.
    pub(crate) code: &'static str,
    capacity: Capacity,
    fills: Vec<Fill>,
    uses: Vec<Use>,
}

/// What was found of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolVerdict {
    pub name: &'static str,
    pub admitted: u64,
    pub refused: u64,
    /// Requests outside of spells that were admitted or refused.
    pub judged: u64,
    /// Requests that were refused outside of spells although the pool had room: the Envoy, when it was sent, and how long the
    /// answer took.
    pub wrongful: Vec<(usize, Instant, Duration)>,
    /// Requests that were admitted beyond what the pool has.
    pub excess: u64,
}

impl Pool {
    pub(crate) const fn new(name: &'static str, code: &'static str, capacity: Capacity) -> Self {
        Self { name, code, capacity, fills: Vec::new(), uses: Vec::new() }
    }

    /// Whether nothing is admitted without an answer of a control plane.
    pub(crate) fn is_stock(&self) -> bool {
        self.capacity == Capacity::Stock
    }

    pub(crate) fn note(&mut self, used: Use) {
        self.uses.push(used);
    }

    /// The administrator asks for more tokens. Returns the number of the fill.
    pub(crate) fn ask(&mut self, tokens: u64) -> usize {
        self.fills.push(Fill { tokens, asked: Instant::now(), confirmed: None, lost: None });
        self.fills.len() - 1
    }

    pub(crate) fn confirm(&mut self, fill: usize) {
        if let Some(fill) = self.fills.get_mut(fill) {
            fill.confirmed = Some(Instant::now());
        }
    }

    /// The database was restored to its state at a time. What is not confirmed may still be carried out.
    pub(crate) fn go_back(&mut self, to: Instant) {
        for fill in self.fills.iter_mut().filter(|fill| fill.confirmed.is_some_and(|at| at > to)) {
            if fill.asked > to {
                fill.lost = Some(Instant::now());
            } else {
                fill.confirmed = None;
            }
        }
    }

    /// By how many tokens the requests so far may exceed what was confirmed.
    pub(crate) fn overdrawn(&self) -> u64 {
        let filled = self.fills.iter().filter(|fill| fill.confirmed.is_some() && fill.lost.is_none());
        self.used_until(None).saturating_sub(filled.map(|fill| fill.tokens).sum())
    }

    pub(crate) fn judge(&self, envoys: &[EnvoyModel]) -> PoolVerdict {
        let count = |fate| self.uses.iter().filter(|used| used.fate == fate).count() as u64;
        let judged = |used: &&Use| used.fate != Fate::Doubtful && !is_cut_off(used, envoys);
        let wrongful = self.uses.iter().filter(|used| used.fate == Fate::Refused && judged(used));
        let wrongful = wrongful.filter(|refused| self.had_room(refused, envoys));
        PoolVerdict {
            name: self.name,
            admitted: count(Fate::Admitted),
            refused: count(Fate::Refused),
            judged: self.uses.iter().filter(judged).count() as u64,
            wrongful: wrongful.map(|used| (used.envoy, used.time.from, used.time.to - used.time.from)).collect(),
            excess: self.excess(envoys),
        }
    }

    /// By how much the most favourable order of the requests that certainly count exceeds what the pool has.
    fn excess(&self, envoys: &[EnvoyModel]) -> u64 {
        let is_rate = self.capacity != Capacity::Stock;
        let counts = |used: &&Use| {
            let model = envoys.get(used.envoy);
            let is_uncounted = model.is_some_and(|model| model.uncounted.iter().any(|spell| spell.meets(used.time)));
            // At the safe rate, an Envoy spends what others may have spent.
            used.fate == Fate::Admitted && !is_uncounted && !(is_rate && is_cut_off(used, envoys))
        };
        let mut counted: Vec<Span> = self.uses.iter().filter(counts).map(|used| used.time).collect();
        counted.sort_unstable_by_key(|time| time.to);
        match self.capacity {
            Capacity::Rate { interval, burst } => rate_excess(&counted, interval, burst),
            Capacity::Stock => {
                let beyond = |(before, time): (u64, &Span)| (before + 1).saturating_sub(self.filled_by(time.to));
                (0..).zip(&counted).map(beyond).max().unwrap_or_default()
            }
        }
    }

    /// All tokens that the pool may have had until a time. Of a fill that was lost, Envoys may still hold some.
    fn filled_by(&self, time: Instant) -> u64 {
        let had = |fill: &Fill| {
            let is_lost = fill.lost.is_some_and(|lost| lost <= time);
            if is_lost { fill.tokens / PART + WAITING } else { fill.tokens }
        };
        self.fills.iter().filter(|fill| fill.asked <= time).map(had).sum()
    }

    /// The most requests that were decided before a time.
    fn used_until(&self, time: Option<Instant>) -> u64 {
        let used = |used: &&Use| used.fate != Fate::Refused && time.is_none_or(|time| used.time.from < time);
        self.uses.iter().filter(used).count() as u64
    }

    /// Whether the pool certainly had a token for a request that was refused.
    fn had_room(&self, refused: &Use, envoys: &[EnvoyModel]) -> bool {
        let Span { from, to } = refused.time;
        let others = envoys.iter().enumerate().filter(|(envoy, _)| *envoy != refused.envoy);
        let is_held = others
            .map(|(_, model)| model)
            .any(|model| model.holds.iter().any(|spell| spell.meets(refused.time)) || model.is_cut_off(refused.time))
            || envoys.get(refused.envoy).is_some_and(|model| model.holds.iter().any(|spell| spell.meets(refused.time)));
        match self.capacity {
            Capacity::Rate { interval, burst } => {
                let is_fast = interval * u32::try_from(burst).unwrap_or(u32::MAX) <= FAST;
                let part = if is_fast { PART_OF_FAST } else { PART };
                let held = if is_held { burst / part + WAITING } else { 0 };
                let tolerance = BEHIND + LAG + interval * u32::try_from(1 + held).unwrap_or(u32::MAX);
                self.arrival(to, interval).saturating_duration_since(from) + interval + tolerance
                    <= interval * u32::try_from(burst).unwrap_or(u32::MAX)
            }
            Capacity::Stock => {
                let Some(model) = envoys.get(refused.envoy) else { return false };
                let is_known = |at: Instant| model.deadline(at).is_some_and(|deadline| from > deadline);
                let known = self.fills.iter().filter(|fill| fill.confirmed.is_some_and(is_known));
                let known = known.filter(|fill| fill.lost.is_none_or(|lost| lost > to));
                let known: u64 = known.map(|fill| fill.tokens).sum();
                let left_before = self.filled_by(to).saturating_sub(self.used_until(from.checked_sub(GRANTED)));
                let held = if is_held { left_before / PART + WAITING } else { 0 };
                self.used_until(Some(to)) + held < known
            }
        }
    }

    /// The theoretical arrival time of a rate limit, if each request was decided as late as possible before a time.
    fn arrival(&self, time: Instant, interval: Duration) -> Instant {
        let used = self.uses.iter().filter(|used| used.fate != Fate::Refused && used.time.from < time);
        let mut decided: Vec<Instant> = used.map(|used| used.time.to.min(time)).collect();
        decided.sort_unstable();
        let first = decided.first().copied().unwrap_or(time);
        decided.into_iter().fold(first, |arrival, at| arrival.max(at) + interval)
    }
}

/// Whether the Envoy may have had no answer of a control plane to a request for tokens.
fn is_cut_off(used: &Use, envoys: &[EnvoyModel]) -> bool {
    envoys.get(used.envoy).is_some_and(|model| model.is_cut_off(used.time))
}

/// The most that requests exceed a rate limit by, in any span of time. They are sorted by the times of their answers.
fn rate_excess(requests: &[Span], interval: Duration, burst: u64) -> u64 {
    let beyond = |first: &Span| {
        // Those that were certainly decided between the start of the first one and the end of each.
        let within = requests.iter().filter(|request| request.from >= first.from);
        let allowed = |until: Instant| {
            let intervals = (until - first.from).as_nanos() / interval.as_nanos().max(1);
            burst + u64::try_from(intervals).unwrap_or(u64::MAX)
        };
        let beyond = (1_u64..).zip(within).map(|(number, last)| number.saturating_sub(allowed(last.to)));
        beyond.max().unwrap_or_default()
    };
    requests.iter().map(beyond).max().unwrap_or_default()
}

#[cfg(test)]
mod tests;
