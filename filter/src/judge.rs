//! One request: its credential and its route's policy come in, a [`Verdict`] goes out. The decision is the contract's; here
//! it gets what it asks for, and what needs a memory comes after it: rate limits, then quota and credits.
//!
//! Nothing is read that the request does not need: the client's address only for keys that are bound to networks and for
//! limits of requests without a key, definitions only for keys that refer to some, stocks only for keys that have some.

use std::net::IpAddr;
use std::rc::Rc;

use contract::decision::{Facts, Presented, cost, decide};
use contract::definition::Definitions;
use contract::outcome::Outcome;
use contract::policy::Policy;
use contract::record::{RateLimit, Record};

use crate::address::Client;
use crate::cells::{Cells, Names};
use crate::config::{Config, WhenBlind};
use crate::credential::Credential;
use crate::definitions::Cached;
use crate::limiter::{self, Limit, Subject, Tag};
use crate::reply::Wait;
use crate::stock;
use crate::store::{self, State};

const NS_PER_MS: u64 = 1_000_000;
const MS_PER_S: u64 = 1_000;

/// What a VM judges requests with.
pub struct Judge<'a, C, A> {
    /// Shared data.
    pub cells: &'a C,
    /// The names of its cells.
    pub names: &'a Names,
    /// What the operator chose.
    pub config: &'a Config,
    /// How far the store is; `None` before the first sync.
    pub state: Option<State>,
    /// The VM's copy of the definitions.
    pub definitions: &'a Cached,
    /// Tells the client's address, if it is asked.
    pub address: A,
}

/// What came of a request.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The outcome, whether or not it is enforced.
    pub outcome: Outcome,
    /// Whether the request goes upstream though the outcome refuses it.
    pub shadowed: bool,
    /// What is known of the key.
    pub record: Option<Record>,
    /// What the record refers to.
    pub definitions: Rc<Definitions>,
    /// What the request costs, if it is allowed.
    pub cost: u32,
    /// How long to wait, if it is refused.
    pub wait: Wait,
}

impl Verdict {
    const fn without_a_key(outcome: Outcome, definitions: Rc<Definitions>) -> Self {
        Self { outcome, shadowed: false, record: None, definitions, cost: 0, wait: Wait::Usual }
    }
}

impl<C: Cells, A: Fn() -> Option<IpAddr>> Judge<'_, C, A> {
    /// Judges a request. `policy` is that of its route; `None` if the route names one that there is not.
    pub fn judge(&self, credential: Credential, policy: Option<&Policy>, now_ns: u64) -> Verdict {
        let blind = |outcome| Verdict::without_a_key(outcome, Rc::default());
        let mut verdict = match (policy, self.blind(now_ns)) {
            (None, _) => blind(Outcome::PolicyUnknown),
            (Some(_), Some(outcome)) => blind(outcome),
            (Some(policy), None) => self.decide(credential, policy, now_ns),
        };
        let shadow = self.config.shadow || policy.is_some_and(|policy| policy.shadow);
        verdict.shadowed = shadow && !verdict.outcome.goes_upstream();
        verdict
    }

    /// What to do with any request, if the store cannot be asked.
    fn blind(&self, now_ns: u64) -> Option<Outcome> {
        let now_ms = now_ns.checked_div(NS_PER_MS).unwrap_or_default();
        let config = self.config;
        let (outcome, choice) = match (self.state, config.max_staleness_ms) {
            (None, _) => (Outcome::NotReady, config.on_not_ready),
            (Some(state), Some(limit_ms)) if now_ms.saturating_sub(state.synced_ms) > limit_ms => {
                (Outcome::Stale, config.on_stale)
            }
            (Some(_), _) => return None,
        };
        Some(match choice {
            WhenBlind::Refuse => outcome,
            WhenBlind::Allow => Outcome::FailedOpen,
        })
    }

    fn decide(&self, credential: Credential, policy: &Policy, now_ns: u64) -> Verdict {
        let record = match credential {
            Credential::Presented(hash) => store::find(self.cells, self.names, &hash),
            Credential::Missing | Credential::Oversized => None,
        };
        let definitions = record.as_ref().map(|record| self.definitions.for_record(self.cells, self.names, record));
        let definitions = definitions.unwrap_or_default();
        let presented = match (credential, &record) {
            (Credential::Missing, _) => Presented::Nothing,
            (_, None) => Presented::Stranger,
            (_, Some(record)) => Presented::Key(record),
        };
        let bound = record.as_ref().is_some_and(|record| !record.further.networks.is_empty());
        let address = if bound { (self.address)() } else { None };
        let now_s = now_ns.checked_div(NS_PER_MS.saturating_mul(MS_PER_S)).unwrap_or_default();
        let facts = Facts { policy, definitions: &definitions, address, ..Facts::at(now_s) };
        let mut verdict = Verdict::without_a_key(decide(presented, &facts), Rc::clone(&definitions));
        match (&record, verdict.outcome) {
            (Some(record), Outcome::Allowed) => self.charge(&mut verdict, record, policy, now_ns),
            (_, Outcome::Anonymous) => self.limit_client(&mut verdict, policy, now_ns),
            (Some(record), outcome) => {
                verdict.wait = stock::retry_after_s(outcome, record, now_s).map_or(Wait::Usual, Wait::Seconds);
            }
            (None, _) => {}
        }
        Verdict { record, ..verdict }
    }

    /// Takes an allowed request from the limits and stocks of its key, or refuses it after all.
    fn charge(&self, verdict: &mut Verdict, record: &Record, policy: &Policy, now_ns: u64) {
        verdict.cost = cost(record, policy);
        let (own, alone) = verdict.definitions.rate_limits(record);
        // The default is each Envoy's own.
        let (own, alone) = if own.is_empty() { (self.config.rate_limit.as_slice(), u32::MAX) } else { (own, alone) };
        let is_alone = |place: usize| {
            let bit = u32::try_from(place).ok().and_then(|place| alone.checked_shr(place));
            bit.is_none_or(|bit| bit & 1 == 1)
        };
        let of_key = own.iter().enumerate().map(|(place, limit)| {
            let tag = Tag::of_key(&limit.name);
            Limit { limit, tag, shared: !is_alone(place) }
        });
        let limits: Vec<Limit<'_>> = of_key.chain(of_route(policy)).collect();
        if let Some(wait) = self.limit(Subject::Key(record.key_id), &limits, now_ns) {
            verdict.outcome = Outcome::RateLimited;
            verdict.wait = wait;
        } else if let Some(outcome) = stock::spend(self.cells, self.names, record, policy) {
            let now_s = now_ns.checked_div(NS_PER_MS.saturating_mul(MS_PER_S)).unwrap_or_default();
            verdict.outcome = outcome;
            verdict.wait = stock::retry_after_s(outcome, record, now_s).map_or(Wait::Usual, Wait::Seconds);
        }
    }

    /// Takes a request without a key from the route's limit, if it has one.
    fn limit_client(&self, verdict: &mut Verdict, policy: &Policy, now_ns: u64) {
        let limits: Vec<Limit<'_>> = of_route(policy).collect();
        if limits.is_empty() {
            return;
        }
        let client = (self.address)().map_or(Client::UNKNOWN, Client::of);
        if let Some(wait) = self.limit(Subject::Client(client), &limits, now_ns) {
            verdict.outcome = Outcome::RateLimited;
            verdict.wait = wait;
        }
    }

    fn limit(&self, subject: Subject, limits: &[Limit<'_>], now_ns: u64) -> Option<Wait> {
        if limits.is_empty() {
            return None;
        }
        let share = self.state.map_or(contract::rate::WHOLE, |state| state.default_share());
        let refused = limiter::take(self.cells, self.names, subject, limits, share, now_ns).err()?;
        let limits: Vec<RateLimit> = limits.iter().map(|limit| limit.limit.clone()).collect();
        Some(Wait::Limits(limits, refused))
    }
}

/// The limit of a route. Each Envoy judges it alone.
fn of_route(policy: &Policy) -> impl Iterator<Item = Limit<'_>> {
    let limit = |limit: &'_ RateLimit| Tag::of_policy(&limit.name);
    policy.rate_limit.iter().map(move |of| Limit { limit: of, tag: limit(of), shared: false })
}

#[cfg(test)]
mod tests;
