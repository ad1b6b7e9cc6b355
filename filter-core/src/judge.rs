//! One request: its credential and its route's policy come in, a [`Verdict`] goes out. The decision is the contract's; here
//! it gets what it asks for, and what needs a memory comes after it: rate limits, then quota and credits.
//!
//! Nothing is read that the request does not need: the client's address only for keys that are bound to networks and for
//! limits of requests without a key, definitions only for keys that refer to some, stocks only for keys
//! that have some, the time only for keys that end or have limits.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::rc::Rc;

use contract::decision::{Facts, Presented, cost, decide, depends_on_time};
use contract::definition::Definitions;
use contract::id::KeyId;
use contract::outcome::Outcome;
use contract::policy::Policy;
use contract::rate::WHOLE;

use crate::address::Client;
use crate::cells::{Cells, Names};
use crate::config::{Config, WhenBlind};
use crate::credential::Credential;
use crate::limiter::{self, Refused, Subject};
use crate::recent::{Known, Recent};
use crate::reply::Wait;
use crate::slice::{Limits, Slices};
use crate::stock;
use crate::store::State;

const NS_PER_MS: u64 = 1_000_000;
const MS_PER_S: u64 = 1_000;

/// What a VM judges requests with.
pub struct Judge<'a, C, A, N> {
    /// Shared data.
    pub cells: &'a C,
    /// The names of its cells.
    pub names: &'a Names,
    /// What the operator chose.
    pub config: &'a Config,
    /// How far the store is; `None` before the first sync.
    pub state: Option<State>,
    /// What the VM remembers of keys.
    pub recent: &'a Recent,
    /// What the VM took from limits ahead.
    pub slices: &'a Slices,
    /// The number of writes of the store, read before anything else.
    pub number: Option<NonZeroU64>,
    /// Tells the client's address, if it is asked.
    pub address: A,
    /// Tells the time in nanoseconds of Unix time, if it is asked; the same each time.
    pub now_ns: N,
}

/// What came of a request.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The outcome, whether or not it is enforced.
    pub outcome: Outcome,
    /// Whether the request goes upstream though the outcome refuses it.
    pub shadowed: bool,
    /// What is known of the key.
    pub key: Option<Rc<Known>>,
    /// What the request costs, if its key is known.
    pub cost: u32,
    /// How long to wait, if it is refused.
    pub wait: Wait,
}

impl Verdict {
    const fn without_a_key(outcome: Outcome) -> Self {
        Self { outcome, shadowed: false, key: None, cost: 0, wait: Wait::Usual }
    }
}

impl<C: Cells, A: Fn() -> Option<IpAddr>, N: Fn() -> u64> Judge<'_, C, A, N> {
    /// Judges a request. `policy` is that of its route; `None` if the route names one that there is not.
    pub fn judge(&self, credential: Credential, policy: Option<&Policy>) -> Verdict {
        let blind = Verdict::without_a_key;
        let mut verdict = match (policy, self.blind()) {
            (None, _) => blind(Outcome::PolicyUnknown),
            (Some(_), Some(outcome)) => blind(outcome),
            (Some(policy), None) => self.decide(credential, policy),
        };
        let shadow = self.config.shadow || policy.is_some_and(|policy| policy.shadow);
        verdict.shadowed = shadow && !verdict.outcome.goes_upstream();
        verdict
    }

    /// What to do with any request, if the store cannot be asked.
    fn blind(&self) -> Option<Outcome> {
        let age_ms = |state: State| {
            let now_ms = (self.now_ns)().checked_div(NS_PER_MS).unwrap_or_default();
            now_ms.saturating_sub(state.synced_ms)
        };
        let config = self.config;
        let (outcome, choice) = match (self.state, config.max_staleness_ms) {
            (None, _) => (Outcome::NotReady, config.on_not_ready),
            (Some(state), Some(limit_ms)) if age_ms(state) > limit_ms => (Outcome::Stale, config.on_stale),
            (Some(_), _) => return None,
        };
        Some(match choice {
            WhenBlind::Refuse => outcome,
            WhenBlind::Allow => Outcome::FailedOpen,
        })
    }

    fn decide(&self, credential: Credential, policy: &Policy) -> Verdict {
        let key = match credential {
            Credential::Presented(hash) => {
                self.recent.find(self.cells, self.names, self.number, &hash, self.config.pepper.as_ref())
            }
            Credential::Missing | Credential::Oversized => None,
        };
        let presented = match (credential, &key) {
            (Credential::Missing, _) => Presented::Nothing,
            (_, None) => Presented::Stranger,
            (_, Some(key)) => Presented::Key(&key.record),
        };
        let bound = key.as_ref().is_some_and(|key| !key.record.further.networks.is_empty());
        let definitions = key.as_ref().map_or(Definitions::NONE, |key| &key.definitions);
        let address = if bound { (self.address)() } else { None };
        let timed = key.as_ref().is_some_and(|key| depends_on_time(&key.record));
        let now_s = if timed { self.now_s() } else { 0 };
        let facts = Facts { policy, definitions, address, ..Facts::at(now_s) };
        let mut verdict = Verdict::without_a_key(decide(presented, &facts));
        verdict.cost = key.as_ref().map_or(0, |key| cost(&key.record, policy));
        match (&key, verdict.outcome) {
            (Some(key), Outcome::Allowed) => self.charge(&mut verdict, key, policy),
            (_, Outcome::Anonymous) => self.limit_client(&mut verdict, policy),
            (Some(key), outcome) => {
                verdict.wait = stock::wait(self.cells, self.names, outcome, &key.record, verdict.cost, now_s);
            }
            (None, _) => {}
        }
        Verdict { key, ..verdict }
    }

    /// Takes an allowed request from the limits and stocks of its key, or refuses it after all.
    fn charge(&self, verdict: &mut Verdict, key: &Known, policy: &Policy) {
        let Known { record, definitions, .. } = key;
        let (own, alone) = definitions.rate_limits(record);
        // The default is each Envoy's own.
        let (own, alone) = if own.is_empty() { (self.config.rate_limit.as_slice(), u32::MAX) } else { (own, alone) };
        let limits = Limits { own, alone, route: policy.rate_limit.as_ref() };
        if let Some(wait) = self.limit_key(record.key_id, &limits) {
            verdict.outcome = Outcome::RateLimited;
            verdict.wait = wait;
        } else if let Some(outcome) = stock::spend(self.cells, self.names, record, policy) {
            verdict.outcome = outcome;
            verdict.wait = stock::wait(self.cells, self.names, outcome, record, verdict.cost, self.now_s());
        }
    }

    /// Takes a request without a key from the route's limit, if it has one.
    fn limit_client(&self, verdict: &mut Verdict, policy: &Policy) {
        let limits = Limits { own: &[], alone: 0, route: policy.rate_limit.as_ref() };
        if limits.is_empty() {
            return;
        }
        let client = Subject::Client((self.address)().map_or(Client::UNKNOWN, Client::of));
        let taken = limiter::take(self.cells, self.names, client, &limits.all(), 1, WHOLE, (self.now_ns)());
        if let Err(refused) = taken {
            verdict.outcome = Outcome::RateLimited;
            verdict.wait = wait_of(&limits, refused);
        }
    }

    fn limit_key(&self, key: KeyId, limits: &Limits<'_>) -> Option<Wait> {
        if limits.is_empty() {
            return None;
        }
        let share = self.state.map_or(WHOLE, |state| state.default_share());
        let taken = self.slices.take(self.cells, self.names, key, limits, share, &self.now_ns);
        taken.err().map(|refused| wait_of(limits, refused))
    }

    fn now_s(&self) -> u64 {
        (self.now_ns)().checked_div(NS_PER_MS.saturating_mul(MS_PER_S)).unwrap_or_default()
    }
}

fn wait_of(limits: &Limits<'_>, refused: Refused) -> Wait {
    Wait::Limits(limits.own.iter().chain(limits.route).cloned().collect(), refused)
}

#[cfg(test)]
mod tests;
