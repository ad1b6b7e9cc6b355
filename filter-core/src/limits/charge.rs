//! Takes the tokens of a request from all limits of its key, or from none of them: rate limits, the quota and the owner's
//! credits.
//!
//! The state of the key's limits is in one cell, and that of its owner's limits in another. So a request costs one read and one
//! write of a cell, and one more of each if its owner has limits.

use contract::outcome::Outcome;
use contract::policy::PolicyLimits;
use contract::rate::{Rate, tag};
use contract::record::{Per, RateLimit, Record};
use limits::LONGEST_WAIT_MS;
use limits::holding::{Holding, Limited, Spent};
use limits::pool::{PoolId, Subject};

use super::allowances::Allowances;
use super::cell::{Entries, cell_of};
use super::retry_after::{Exceeded, RetryAfter};
use crate::config::{FailureMode, LimitModes, RateMode};
use crate::keys::StoredKey;
use crate::shared::{Cells, SharedData};
use crate::time::{MS_PER_S, NS_PER_MS, NS_PER_S};

/// Marks the tag of a policy's limit, beyond those of keys.
pub(super) const OF_POLICY: u64 = 1 << 56;

/// After too much contention on a cell, its limits count as exceeded for this long.
pub(super) const CONTENTION_MS: u64 = 1_000;

/// All limits of a request with a key.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// The record of the key.
    pub record: &'a Record,
    /// The rate limits of the key, of its plan or of the filter.
    pub own: &'a [RateLimit],
    /// The rate limits of the route's policy, which are local to each Envoy.
    pub route: &'a PolicyLimits,
    /// The price of the request.
    pub cost: u32,
}

/// How to charge a request that finds no allowance.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// What to do while the control plane does not answer.
    pub modes: LimitModes,
    /// The control plane does not answer, or the request may not wait for its answer.
    pub is_unreachable: bool,
    /// How long the request has waited, in milliseconds.
    pub waited_ms: u64,
    /// Whether to report what is left of the limits.
    pub reports_left: bool,
}

/// The result of charging a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Charged {
    /// It is taken from all limits. The list says what is left of each; it is empty unless [`Attempt::reports_left`].
    Yes(Vec<Left>),
    /// It must wait for an allowance.
    Wait,
    /// A limit refuses it.
    No(Outcome, RetryAfter),
}

/// What is left of a limit after a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The rate limit. `None` for a quota or credits; `outcome` says which.
    pub limit: Option<RateLimit>,
    /// The outcome of a request for which nothing is left.
    pub outcome: Outcome,
    /// Requests or credits. Of a limit that all Envoys share: as far as this Envoy knows.
    pub tokens: u64,
    /// Seconds until the limit is full again if no request comes; `None` if unknown.
    pub full_s: Option<u64>,
}

/// [`Left`] with the place of the limit instead of the limit itself.
#[derive(Clone, Copy, Debug)]
struct LeftOf {
    subject: Subject,
    place: Option<usize>,
    outcome: Outcome,
    tokens: u64,
    full_s: Option<u64>,
}

/// One limit of a request.
#[derive(Clone, Copy, Debug)]
enum Limit {
    /// A rate limit that is local to each Envoy, by its tag.
    Local { place: usize, tag: u64, rate: Rate },
    /// A rate limit that all Envoys share.
    Shared { place: usize, pool: PoolId, rate: Rate },
    /// A quota or credits.
    Stock { outcome: Outcome, pool: PoolId, cost: u64, fill: u32 },
}

/// The decision of one or more limits about a request.
#[derive(Clone, Copy, Debug)]
enum Verdict {
    /// It is taken.
    Taken,
    /// Tokens are lacking that the Envoy may get: see [`Charging::lacking`].
    Lacking,
    No(Refusal),
}

/// Tokens that an Envoy must ask for.
#[derive(Clone, Copy, Debug)]
struct Lack {
    pool: PoolId,
    tokens: u64,
    /// Only other Envoys have them.
    for_others: bool,
}

#[derive(Clone, Copy, Debug)]
struct Refusal {
    outcome: Outcome,
    /// Of a rate limit, its place.
    place: Option<usize>,
    empty_ms: u64,
    is_hopeless: bool,
}

impl Refusal {
    /// The control plane must be asked and does not answer.
    const UNAVAILABLE: Self =
        Self { outcome: Outcome::LimitsUnavailable, place: None, empty_ms: 0, is_hopeless: false };
}

impl Verdict {
    /// A refusal takes precedence over a wait, and of two refusals the one with the longer wait.
    const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No(one), Self::No(other)) if other.empty_ms > one.empty_ms => Self::No(other),
            (Self::No(one), _) => Self::No(one),
            (Self::Taken, other) | (other, Self::Taken) => other,
            (Self::Lacking, other) => other,
        }
    }
}

impl Limits<'_> {
    /// The limits whose state is in the cell of the key, and those whose state is in the cell of its owner.
    fn by_subject(&self) -> [OfSubject; 2] {
        let (record, cost) = (self.record, u64::from(self.cost));
        let mut of_key = Vec::with_capacity(self.own.len().saturating_add(2));
        let mut of_owner = Vec::new();
        for (place, limit) in self.own.iter().enumerate() {
            let rate = Rate::of(limit);
            match (limit.shared, limit.per) {
                (false, _) => of_key.push(Limit::Local { place, tag: tag(&limit.name), rate }),
                (true, per) => {
                    let limit = Limit::Shared { place, pool: PoolId::of_limit(limit, record), rate };
                    if per == Per::Key { of_key.push(limit) } else { of_owner.push(limit) }
                }
            }
        }
        for (number, limit) in self.route_limits().enumerate() {
            let place = self.own.len().saturating_add(number);
            let local = Limit::Local { place, tag: tag(&limit.name) | OF_POLICY, rate: Rate::of(limit) };
            if number < self.route.key.len() { of_key.push(local) } else { of_owner.push(local) }
        }
        if let Some(quota) = record.quota {
            let pool = PoolId::of_quota(quota.per, record);
            let limit = Limit::Stock { outcome: Outcome::QuotaExceeded, pool, cost: 1, fill: quota.fill };
            if quota.per == Per::Key { of_key.push(limit) } else { of_owner.push(limit) }
        }
        if let Some(credits) = record.credits.filter(|_| cost > 0) {
            let pool = PoolId::of_credits(record.owner_id);
            of_owner.push(Limit::Stock { outcome: Outcome::CreditsExhausted, pool, cost, fill: credits.fill });
        }
        [(record.key_id.into(), of_key), (record.owner_id.into(), of_owner)]
    }

    /// The limits of the route for each key, then those for each owner.
    fn route_limits(&self) -> impl Iterator<Item = &RateLimit> {
        self.route.key.iter().chain(&self.route.owner)
    }

    fn left(&self, left: &[LeftOf]) -> Vec<Left> {
        let all: Vec<&RateLimit> = self.own.iter().chain(self.route_limits()).collect();
        let named = |&LeftOf { place, outcome, tokens, full_s, .. }: &LeftOf| {
            let limit = place.and_then(|place| all.get(place)).map(|limit| (*limit).clone());
            Left { limit, outcome, tokens, full_s }
        };
        left.iter().map(named).collect()
    }

    fn refused(&self, refusal: &Refusal) -> Charged {
        let Refusal { outcome, place, empty_ms, is_hopeless } = *refusal;
        let seconds = empty_ms.div_ceil(MS_PER_S).max(1);
        let wait = match place {
            Some(limit) => {
                let all = self.own.iter().chain(self.route_limits()).cloned().collect();
                RetryAfter::Limits(all, Exceeded { limit, retry_after_s: seconds })
            }
            None if is_hopeless && outcome == Outcome::CreditsExhausted => RetryAfter::Hopeless,
            None if empty_ms == u64::MAX => RetryAfter::Usual,
            None => RetryAfter::Seconds(seconds),
        };
        Charged::No(outcome, wait)
    }
}

/// Takes a request from its limits. `now_ns` is asked for the time only if there is a limit.
pub fn charge(
    data: &SharedData<impl Cells>,
    allowances: &Allowances,
    limits: &Limits<'_>,
    attempt: Attempt,
    now_ns: impl Fn() -> u64,
) -> Charged {
    let of = limits.by_subject();
    if of.iter().all(|of| of.1.is_empty()) {
        return Charged::Yes(Vec::new());
    }
    let mut charging = Charging::new(allowances, attempt, now_ns());
    let mut verdict = take_all(data, &mut charging, &of);
    // The leader may have learnt since this VM's last tick that the Envoy is alone.
    if matches!(verdict, Verdict::Lacking) && allowances.refresh(data) {
        charging = Charging::new(allowances, attempt, charging.now_ns);
        verdict = take_all(data, &mut charging, &of);
    }
    match verdict {
        Verdict::Taken => {
            allowances.note_spent(&charging.spent);
            Charged::Yes(limits.left(&charging.left))
        }
        Verdict::Lacking => {
            charging.lacking.into_iter().for_each(|lack| allowances.need(lack.pool, lack.tokens, lack.for_others));
            Charged::Wait
        }
        Verdict::No(refusal) => limits.refused(&refusal),
    }
}

/// Takes a request from all its limits or from none.
fn take_all(
    data: &SharedData<impl Cells>,
    charging: &mut Charging<'_>,
    [of_key, of_owner]: &[OfSubject; 2],
) -> Verdict {
    let first = take(data, charging, of_key, true);
    // If the key's limits do not admit the request, those of its owner are only asked what they lack.
    let is_taken = matches!(first, Verdict::Taken);
    let second = take(data, charging, of_owner, is_taken);
    if is_taken && !matches!(second, Verdict::Taken) && !of_key.1.is_empty() {
        let given = data.update(cell_of(of_key.0), |cell| Ok::<_, ()>((charging.give_back(cell, of_key), ())));
        // If the refund fails, the key loses one request. That is better than admitting one too many.
        let _ = given;
    }
    first.and(second)
}

/// Takes a request from all limits of a subject or from none. Without `commit` it only looks.
fn take(data: &SharedData<impl Cells>, charging: &mut Charging<'_>, of: &OfSubject, commit: bool) -> Verdict {
    if of.1.is_empty() {
        return Verdict::Taken;
    }
    let taken = data.update(cell_of(of.0), |cell| charging.change(cell, of, commit));
    taken.unwrap_or_else(|_| {
        let (outcome, place) =
            of.1.first().map_or((Outcome::RateLimited, None), |limit| (limit.outcome(), limit.place()));
        Verdict::No(Refusal { outcome, place, empty_ms: CONTENTION_MS, is_hopeless: false })
    })
}

/// Queues the key's shared limits whose state is unknown for the next call.
pub fn prepare(data: &SharedData<impl Cells>, allowances: &Allowances, key: &StoredKey, now_ns: u64) {
    let own = key.definitions.rate_limits(&key.record);
    let limits = Limits { record: &key.record, own: &own, route: PolicyLimits::NONE, cost: 1 };
    for of in limits.by_subject() {
        if of.1.iter().all(|limit| limit.shared().is_none()) {
            continue;
        }
        let noted = data.update(cell_of(of.0), |cell| Ok(note(cell, &of, allowances, now_ns)));
        noted.into_iter().flatten().for_each(|pool| allowances.queue(pool));
    }
}

/// The cell unchanged, except for the terms to ask for and times corrected after a clock step. Also returns the pools whose
/// state is unknown.
fn note(cell: &[u8], (subject, limits): &OfSubject, allowances: &Allowances, now_ns: u64) -> (Vec<u8>, Vec<PoolId>) {
    let mut entries = Entries::read(cell);
    let mut unknown = Vec::new();
    for limit in limits {
        if let Limit::Local { tag, rate, .. } = limit
            && let Some(arrival_ns) = entries.arrival(subject.0, *tag)
        {
            entries.set_arrival(subject.0, *tag, rate.after_clock_step(arrival_ns, now_ns));
        }
        let Some((pool, _, of)) = limit.shared() else { continue };
        let mut holding = entries.holding(&pool);
        holding.prepare(of, &allowances.contact(), now_ns);
        entries.set_holding(&pool, holding);
        allowances.needed(pool);
        if !holding.is_known(&allowances.contact()) {
            unknown.push(pool);
        }
    }
    (entries.write(now_ns), unknown)
}

/// The limits whose memory is with one key or user.
type OfSubject = (Subject, Vec<Limit>);

/// The charging of one request.
struct Charging<'a> {
    allowances: &'a Allowances,
    attempt: Attempt,
    now_ns: u64,
    /// Pools that were spent from, and whether little is left of them.
    spent: Vec<(PoolId, bool)>,
    lacking: Vec<Lack>,
    /// What is left of each limit, if the attempt reports it.
    left: Vec<LeftOf>,
    /// The cell must be written although the request takes no tokens: see [`note`].
    is_to_note: bool,
}

impl<'a> Charging<'a> {
    const fn new(allowances: &'a Allowances, attempt: Attempt, now_ns: u64) -> Self {
        Self {
            allowances,
            attempt,
            now_ns,
            spent: Vec::new(),
            lacking: Vec::new(),
            left: Vec::new(),
            is_to_note: false,
        }
    }

    /// Takes a request from all limits of a cell or from none: the bytes to write, if there is something to write.
    fn change(&mut self, cell: &[u8], of: &OfSubject, commit: bool) -> Result<(Vec<u8>, Verdict), Verdict> {
        let (subject, limits) = of;
        // The update runs again if the cell has changed meanwhile. Forget what the earlier run found in this cell.
        let is_of_others = |pool: &PoolId| pool.subject != *subject;
        self.spent.retain(|(pool, _)| is_of_others(pool));
        self.lacking.retain(|lack| is_of_others(&lack.pool));
        self.left.retain(|left| left.subject != *subject);
        self.is_to_note = false;
        let mut entries = Entries::read(cell);
        let take = |verdict: Verdict, limit| verdict.and(self.take_one(&mut entries, *subject, limit));
        match limits.iter().fold(Verdict::Taken, take) {
            Verdict::Taken if commit => Ok((entries.write(self.now_ns), Verdict::Taken)),
            denied if self.is_to_note => Ok((note(cell, of, self.allowances, self.now_ns).0, denied)),
            other => Err(other),
        }
    }

    fn take_one(&mut self, entries: &mut Entries, subject: Subject, limit: &Limit) -> Verdict {
        let now_ns = self.now_ns;
        let left = |tokens, full_ns: Option<u64>| LeftOf {
            subject,
            place: limit.place(),
            outcome: limit.outcome(),
            tokens,
            full_s: full_ns.map(|ns| ns.div_ceil(NS_PER_S)),
        };
        let no = |empty_ms, is_hopeless| {
            Verdict::No(Refusal { outcome: limit.outcome(), place: limit.place(), empty_ms, is_hopeless })
        };
        if let Limit::Local { tag, rate, .. } = limit {
            let before_ns = entries.arrival(subject.0, *tag);
            match rate.take(before_ns, now_ns) {
                Ok(arrival_ns) => {
                    entries.set_arrival(subject.0, *tag, arrival_ns);
                    if self.attempt.reports_left {
                        let room = rate.room(arrival_ns, now_ns);
                        self.left.push(left(room, Some(arrival_ns.saturating_sub(now_ns))));
                    }
                }
                Err(wait_ns) => {
                    self.is_to_note |= before_ns.is_some_and(|before| rate.after_clock_step(before, now_ns) != before);
                    return no(wait_ns.div_ceil(NS_PER_MS), false);
                }
            }
        }
        let Some((pool, cost, of)) = limit.shared() else { return Verdict::Taken };
        let contact = self.allowances.contact();
        let mut holding = entries.holding(&pool);
        let before_ns = holding.arrival_ns;
        let spent = holding.spend(cost, of, self.allowances.waiting(&pool), &contact, now_ns);
        self.is_to_note |= matches!(spent, Spent::Wait { .. }) || holding.arrival_ns < before_ns;
        let verdict = match spent {
            Spent::Yes { is_low } => {
                self.spent.push((pool, is_low));
                if self.attempt.reports_left {
                    let (tokens, full_ns) = holding.left(of, &contact, now_ns);
                    self.left.push(left(tokens, full_ns));
                }
                Verdict::Taken
            }
            Spent::No { empty_ms } => no(empty_ms, holding.has_some()),
            Spent::Wait { .. } if self.attempt.is_unreachable => self.take_unanswered(&mut holding, limit, no),
            Spent::Wait { .. } if self.attempt.waited_ms >= LONGEST_WAIT_MS => {
                let now_ms = now_ns / NS_PER_MS;
                if holding.is_known_to_lack(cost, now_ms.saturating_sub(self.attempt.waited_ms)) {
                    no(holding.empty_ms(now_ms), holding.has_some())
                } else {
                    self.take_unanswered(&mut holding, limit, no)
                }
            }
            Spent::Wait { for_others } => {
                self.lacking.push(Lack { pool, tokens: cost, for_others });
                Verdict::Lacking
            }
        };
        entries.set_holding(&pool, holding);
        verdict
    }

    /// Decides by the operator's choice, since the control plane does not answer.
    fn take_unanswered(&mut self, holding: &mut Holding, limit: &Limit, no: impl Fn(u64, bool) -> Verdict) -> Verdict {
        let LimitModes { rate_limits, quotas, credits } = self.attempt.modes;
        let Some((pool, cost, of)) = limit.shared() else { return Verdict::Taken };
        self.allowances.ask_for(pool, cost);
        let lets_through = match (of, limit.outcome()) {
            (Limited::Rate(rate), _) if rate_limits == RateMode::SafeRate => {
                return match holding.spend_at_safe_rate(rate, &self.allowances.contact(), self.now_ns) {
                    Ok(()) => {
                        self.spent.push((pool, true));
                        Verdict::Taken
                    }
                    Err(wait_ns) => no(wait_ns.div_ceil(NS_PER_MS), false),
                };
            }
            (Limited::Rate(_), _) => rate_limits == RateMode::Allow,
            (Limited::Stock { .. }, Outcome::QuotaExceeded) => quotas == FailureMode::Allow,
            (Limited::Stock { .. }, _) => credits == FailureMode::Allow,
        };
        if lets_through { Verdict::Taken } else { Verdict::No(Refusal::UNAVAILABLE) }
    }

    /// The cell with what was taken from all limits of a subject given back.
    fn give_back(&self, cell: &[u8], (subject, limits): &OfSubject) -> Vec<u8> {
        let mut entries = Entries::read(cell);
        for limit in limits {
            if let Limit::Local { tag, rate, .. } = limit {
                let arrival_ns = entries.arrival(subject.0, *tag).unwrap_or_default();
                entries.set_arrival(subject.0, *tag, arrival_ns.saturating_sub(rate.interval_ns()));
            }
            // A limit that let the request through unchecked took nothing.
            let is_spent = |pool: &PoolId| self.spent.iter().any(|(spent, _)| spent == pool);
            if let Some((pool, cost, _)) = limit.shared().filter(|(pool, ..)| is_spent(pool)) {
                let mut holding = entries.holding(&pool);
                holding.refund(cost);
                entries.set_holding(&pool, holding);
            }
        }
        entries.write(self.now_ns)
    }
}

impl Limit {
    /// The pool of a limit that all Envoys share, what the request costs, and the terms.
    const fn shared(&self) -> Option<(PoolId, u64, Limited<'_>)> {
        match self {
            Self::Local { .. } => None,
            Self::Shared { pool, rate, .. } => Some((*pool, 1, Limited::Rate(rate))),
            Self::Stock { pool, cost, fill, .. } => Some((*pool, *cost, Limited::Stock { fill: *fill })),
        }
    }

    const fn outcome(&self) -> Outcome {
        match self {
            Self::Local { .. } | Self::Shared { .. } => Outcome::RateLimited,
            Self::Stock { outcome, .. } => *outcome,
        }
    }

    const fn place(&self) -> Option<usize> {
        match self {
            Self::Local { place, .. } | Self::Shared { place, .. } => Some(*place),
            Self::Stock { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests;
