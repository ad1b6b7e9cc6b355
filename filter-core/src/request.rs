//! One request, from its headers to its reply. [`handle`] is the whole walk: it decides, responds and counts.
//!
//! A request waits only if it finds no allowance of a limit that all Envoys share. Then the walk stops before anything is
//! changed or counted, and once the control plane has answered, the request is decided anew from its headers: a key that was
//! revoked meanwhile is refused.
//!
//! A step reads only what its request needs: the client's address for keys that are bound to networks and for limits of
//! requests without a key, and the path, host and method if there are rules. The time is read for keys that expire or have limits,
//! for limits of requests without a key, and where the configuration bounds staleness.

use std::cell::OnceCell;
use std::sync::Arc;

use contract::decision::{Facts, Presented, cost, decide, depends_on_time};
use contract::definition::Definitions;
use contract::outcome::Outcome;
use contract::policy::Policy;
use contract::record::Record;
use contract::usage::KeyRef;

use crate::address::Client;
use crate::config::{AttributeHeader, Config, FailureMode, SHADOW_HEADER};
use crate::extract::{self, Credential, Extraction, strip};
use crate::host::{Clock, Flow, Host, Reply, Stream};
use crate::identity;
use crate::keys::{KeyLookup, StoredKey};
use crate::limits::charge::{Attempt, Charged, Left, Limits, charge};
use crate::limits::client::charge_client;
use crate::limits::retry_after::RetryAfter;
use crate::reply::{RequestFacts, is_grpc, left_fields, reply, request_id};
use crate::time::{NS_PER_MS, NS_PER_S};
use crate::vm::Vm;

mod policy;

/// Filter state for the access log: the id of a known key, unless an identity header shows it. Envoy shows it as
/// `wasm.portcullis.key_id`.
const KEY_ID_STATE: &str = "portcullis.key_id";

/// Filter state for the access log: the outcome of a refused request.
const REFUSED_STATE: &str = "portcullis.refused";

/// Filter state for the access log: the outcome of a request that shadow mode let through.
const SHADOW_STATE: &str = "portcullis.shadow";

/// Filter state for response headers: the value of `RateLimit` for an allowed request.
const LEFT_STATE: &str = "portcullis.ratelimit";

/// Filter state for response headers: the value of `RateLimit-Policy`.
const LIMITS_STATE: &str = "portcullis.ratelimit_policy";

/// The header by which Envoy identifies requests in its access log.
const REQUEST_ID: &str = "x-request-id";

/// How long a request has waited for an allowance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// For how many milliseconds.
    pub ms: u64,
    /// The call that it waited for was not answered.
    pub has_failed: bool,
}

/// Handles the headers of a request.
pub fn handle<H: Host, K: KeyLookup>(vm: &Vm<H, K>, config: &Config, stream: &mut impl Stream, waited: Waited) -> Flow {
    let definitions = vm.keys.definitions();
    let request = Request { vm, config, definitions: &definitions, time: RequestTime::new(vm.host()), waited };
    let Some((verdict, extraction)) = request.verify(stream) else { return Flow::Wait };
    let flow = request.respond(&verdict, &extraction, stream);
    request.count(&verdict);
    flow
}

/// Handles the trailers of a request. Envoy calls this for requests with trailers only.
pub fn handle_trailers(config: &Config, stream: &mut impl Stream) -> Flow {
    for name in &config.trailers_removed {
        stream.remove_trailer(name);
    }
    Flow::Continue
}

/// The decision on a request, and what depends on it.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The outcome, whether or not it is enforced.
    pub outcome: Outcome,
    /// Whether the request goes upstream although the outcome refuses it.
    pub shadowed: bool,
    /// The key, if the store has it.
    pub key: Option<Arc<StoredKey>>,
    /// The price of the request in credits, if its key is known.
    pub cost: u32,
    /// How long a refused client should wait.
    pub wait: RetryAfter,
    /// What is left of the limits of an allowed request. Empty unless `rate_limit_state` is on.
    pub left: Vec<Left>,
}

/// The outcome after the limits were charged.
struct AfterLimits {
    outcome: Outcome,
    wait: RetryAfter,
    left: Vec<Left>,
}

impl Verdict {
    const fn without_key(outcome: Outcome) -> Self {
        Self { outcome, shadowed: false, key: None, cost: 0, wait: RetryAfter::Usual, left: Vec::new() }
    }
}

/// The time of a request: read once, and only if a step needs it.
struct RequestTime<'a, H> {
    host: &'a H,
    now_ns: OnceCell<u64>,
}

impl<'a, H: Clock> RequestTime<'a, H> {
    const fn new(host: &'a H) -> Self {
        Self { host, now_ns: OnceCell::new() }
    }

    fn ns(&self) -> u64 {
        *self.now_ns.get_or_init(|| self.host.now_ns())
    }

    fn ms(&self) -> u64 {
        self.ns() / NS_PER_MS
    }

    fn s(&self) -> u64 {
        self.ns() / NS_PER_S
    }

    fn is_read(&self) -> bool {
        self.now_ns.get().is_some()
    }
}

/// The steps of one request, in the order of the walk.
struct Request<'a, H, K> {
    vm: &'a Vm<H, K>,
    config: &'a Config,
    /// Roles, plans and policies when the request came.
    definitions: &'a Definitions,
    time: RequestTime<'a, H>,
    waited: Waited,
}

impl<'a, H: Host, K: KeyLookup> Request<'a, H, K> {
    /// Extracts the key, finds its record, decides, and charges the limits. `None`: the request must wait for an allowance.
    fn verify(&self, stream: &impl Stream) -> Option<(Verdict, Extraction<'a>)> {
        let extraction = extract::find_and_hash(&self.config.key_sources, stream);
        let policy = self.find_policy(stream);
        let mut verdict = match (policy, self.find_obstacle()) {
            (None, _) => Verdict::without_key(Outcome::PolicyUnknown),
            (Some(_), Some(obstacle)) => Verdict::without_key(obstacle),
            (Some(policy), None) => {
                let key = self.find_key(extraction.credential);
                let outcome = self.authorize(extraction.credential, key.as_deref(), policy, stream);
                let cost = key.as_ref().map_or(0, |key| cost(&key.record, policy));
                let AfterLimits { outcome, wait, left } = self.charge(outcome, key.as_deref(), cost, policy, stream)?;
                Verdict { outcome, shadowed: false, key, cost, wait, left }
            }
        };
        let in_shadow = self.config.shadow || policy.is_some_and(|policy| policy.shadow);
        verdict.shadowed = in_shadow && !verdict.outcome.goes_upstream();
        if let (Outcome::Unknown, true, Credential::Hashed(hash)) =
            (verdict.outcome, policy.is_some_and(|policy| policy.capture_unknown), extraction.credential)
        {
            self.vm.seen.borrow_mut().unknown_key(hash);
        }
        Some((verdict, extraction))
    }

    /// The outcome of every request while the store is not loaded, or older than the operator allows.
    fn find_obstacle(&self) -> Option<Outcome> {
        let config = self.config;
        let (outcome, mode) = match (self.vm.state(), config.max_staleness_ms) {
            (None, _) => (Outcome::NotReady, config.failure_mode.not_ready),
            (Some(state), Some(limit_ms)) if self.time.ms().saturating_sub(state.synced_ms) > limit_ms => {
                (Outcome::Stale, config.failure_mode.stale)
            }
            (Some(_), _) => return None,
        };
        Some(match mode {
            FailureMode::Deny => outcome,
            FailureMode::Allow => Outcome::FailedOpen,
        })
    }

    /// Looks the key up.
    fn find_key(&self, credential: Credential) -> Option<Arc<StoredKey>> {
        match credential {
            Credential::Hashed(hash) => self.vm.keys.find(&hash, self.config.pepper.as_ref()),
            Credential::Missing | Credential::Oversized => None,
        }
    }

    /// Decides whether the key may make this request, limits aside.
    fn authorize(
        &self,
        credential: Credential,
        key: Option<&StoredKey>,
        policy: &Policy,
        stream: &impl Stream,
    ) -> Outcome {
        let presented = match (credential, key) {
            (Credential::Missing, _) => Presented::Missing,
            (_, None) => Presented::Unknown,
            (_, Some(key)) => Presented::Key(&key.record),
        };
        let is_bound = key.is_some_and(|key| !key.record.networks.is_empty());
        let address = if is_bound { stream.client_address() } else { None };
        let definitions = key.map_or(Definitions::NONE, |key| &key.definitions);
        let now_s = key.map_or(0, |key| self.now_s_for(key));
        decide(presented, &Facts { policy, definitions, address, ..Facts::at(now_s) })
    }

    /// Charges an allowed request to the limits, the quota and the credits of its key; a request without a key to the limit of
    /// its route. `None` if the request must wait for an allowance.
    fn charge(
        &self,
        outcome: Outcome,
        key: Option<&StoredKey>,
        cost: u32,
        policy: &Policy,
        stream: &impl Stream,
    ) -> Option<AfterLimits> {
        let of = |outcome| AfterLimits { outcome, wait: RetryAfter::Usual, left: Vec::new() };
        match (key, outcome) {
            (Some(key), Outcome::Allowed) => match self.charge_key(key, cost, policy) {
                Charged::Yes(left) => Some(AfterLimits { left, ..of(outcome) }),
                Charged::Wait => None,
                Charged::No(outcome, wait) => Some(AfterLimits { wait, ..of(outcome) }),
            },
            (_, Outcome::Anonymous) => {
                let limits = &*policy.rate_limits.address;
                let wait = if limits.is_empty() {
                    None
                } else {
                    let client = stream.client_address().map_or(Client::UNKNOWN, Client::of);
                    charge_client(&self.vm.data, client, limits, self.time.ns())
                };
                Some(wait.map_or(of(outcome), |wait| AfterLimits { wait, ..of(Outcome::RateLimited) }))
            }
            (Some(key), _) => {
                let wait = exhausted_wait(outcome, &key.record, self.now_s_for(key));
                Some(AfterLimits { wait, ..of(outcome) })
            }
            (None, _) => Some(of(outcome)),
        }
    }

    /// Takes a request from all limits of its key.
    fn charge_key(&self, key: &StoredKey, cost: u32, policy: &Policy) -> Charged {
        let Vm { data, allowances, stats, .. } = self.vm;
        let own = key.definitions.rate_limits(&key.record);
        let own = if own.is_empty() { self.config.rate_limit.as_slice() } else { &*own };
        let limits = Limits { record: &key.record, own, route: &policy.rate_limits, cost };
        let Waited { ms, has_failed } = self.waited;
        if allowances.is_unreachable() {
            // The control plane may have answered another VM meanwhile.
            allowances.refresh(data);
        }
        let attempt = Attempt {
            modes: self.config.on_limits_unreachable,
            is_unreachable: has_failed || self.config.limits_wait_ms == 0 || allowances.is_unreachable(),
            waited_ms: ms,
            reports_left: self.config.rate_limit_state,
        };
        let charged = charge(data, allowances, &limits, attempt, || self.time.ns());
        // A request that is decided again is in the root context, which asks once all are decided.
        if ms == 0 {
            if charged == Charged::Wait {
                stats.count_allowance_wait();
            }
            if allowances.must_wake() {
                self.vm.host().wake();
            }
        }
        charged
    }

    /// Refuses the request, or lets it go upstream.
    fn respond(&self, verdict: &Verdict, extraction: &Extraction<'_>, stream: &mut impl Stream) -> Flow {
        let Verdict { outcome, shadowed, wait, .. } = verdict;
        let refusal = || reply(*outcome, &self.config.challenge, wait, |status| facts_of(stream, status));
        match (!shadowed).then(refusal).flatten() {
            Some(reply) => self.refuse(verdict, &reply, stream),
            None => self.forward(verdict, extraction, stream),
        }
    }

    /// Answers the request in place of the upstream.
    fn refuse(&self, verdict: &Verdict, reply: &Reply, stream: &mut impl Stream) -> Flow {
        let Config { key_sources, identity, .. } = self.config;
        self.log_key(verdict, stream);
        self.log(REFUSED_STATE, verdict.outcome.name(), stream);
        // The access log shows these as the identity of the key. What the client sent must not pass for it.
        let attributes = identity.attributes.iter().map(|attribute| &attribute.header);
        for name in [&identity.credential, &identity.packed].into_iter().flatten().chain(attributes) {
            stream.remove_header(name);
        }
        strip::conceal(key_sources, stream);
        stream.send_reply(reply);
        Flow::Stop
    }

    /// Lets the request go upstream, with the identity of its key in place of the key. Refused requests do not go upstream, so
    /// this is the only place where headers of a client could reach it.
    fn forward(&self, verdict: &Verdict, extraction: &Extraction<'_>, stream: &mut impl Stream) -> Flow {
        let Config { key_sources, identity, strip_key, remove_headers, envoy_removes_identity_headers, .. } =
            self.config;
        let key = verdict.key.as_deref().filter(|_| verdict.outcome == Outcome::Allowed);
        // Without a good key the filter removes them all the same: an Envoy that does not remove them then gives no identity to
        // a request without one.
        let are_removed = *envoy_removes_identity_headers && key.is_some();
        self.set_identity(key, are_removed, stream);
        if key.is_none() || (identity.credential.is_none() && identity.packed.is_none()) {
            self.log_key(verdict, stream);
        }
        if let Some((left, policy)) = left_fields(&verdict.left) {
            stream.set_filter_state(LEFT_STATE, &left);
            if !policy.is_empty() {
                stream.set_filter_state(LIMITS_STATE, &policy);
            }
        }
        if verdict.shadowed {
            self.log(SHADOW_STATE, verdict.outcome.name(), stream);
            stream.set_header(SHADOW_HEADER, verdict.outcome.name().as_bytes());
        } else if !are_removed {
            stream.remove_header(SHADOW_HEADER);
        }
        for name in remove_headers {
            stream.remove_header(name);
        }
        if *strip_key {
            strip::strip(key_sources, extraction, stream);
        }
        Flow::Continue
    }

    /// Sets the identity headers of a good key in place of any that the client sent, and removes the others unless Envoy has
    /// removed them.
    fn set_identity(&self, key: Option<&StoredKey>, are_removed: bool, stream: &mut impl Stream) {
        let identity = &self.config.identity;
        let packed = identity.packed.as_ref().zip(key).map(|(_, key)| identity::packed(key));
        let headers = [
            (&identity.consumer, key.map(|key| &*key.owner_id)),
            (&identity.credential, key.map(|key| &*key.key_id)),
            (&identity.scopes, key.and_then(|key| key.scopes.as_deref())),
            (&identity.packed, packed.as_deref()),
        ];
        for (name, value) in headers {
            match (name, value) {
                (Some(name), Some(value)) => stream.set_header(name, value.as_bytes()),
                (Some(name), None) if !are_removed => stream.remove_header(name),
                _ => {}
            }
        }
        // The operator chose these names, so Envoy's list of removed headers may lack them. The filter always sets or removes
        // them.
        for AttributeHeader { header, attribute } in &identity.attributes {
            match key.and_then(|key| key.record.attribute(attribute)) {
                Some(value) => stream.set_header(header, value.as_bytes()),
                None => stream.remove_header(header),
            }
        }
        if !are_removed {
            for name in &identity.unused {
                stream.remove_header(name);
            }
        }
    }

    /// Sets filter state with the id of the key, if the store has the key.
    fn log_key(&self, verdict: &Verdict, stream: &mut impl Stream) {
        if let Some(key) = &verdict.key {
            self.log(KEY_ID_STATE, &key.key_id, stream);
        }
    }

    /// Sets filter state for the access log.
    fn log(&self, name: &str, value: &str, stream: &mut impl Stream) {
        if self.config.access_log_state {
            stream.set_filter_state(name, value);
        }
    }

    /// Counts the request.
    fn count(&self, verdict: &Verdict) {
        let key = verdict.key.as_ref();
        let key_ref = key.map(|key| KeyRef { id: key.record.key_id, generation: key.record.generation });
        // Counts carry the time to a quarter of a second, so most requests need not read the clock.
        let now_ms = match self.vm.next_tick_ms() {
            Some(next_ms) if !self.time.is_read() => next_ms,
            _ => self.time.ms(),
        };
        // Unless the credits of its owner are metered, a request is free.
        let is_metered = key.is_some_and(|key| key.record.credits.is_some());
        let cost = if is_metered { verdict.cost } else { 0 };
        self.vm.counts.borrow_mut().add(key_ref, verdict.outcome, verdict.shadowed, cost, now_ms);
        self.vm.stats.count(verdict.outcome, verdict.shadowed);
    }

    /// The time in seconds, if the decision on this key depends on it; otherwise any time will do.
    fn now_s_for(&self, key: &StoredKey) -> u64 {
        if depends_on_time(&key.record) { self.time.s() } else { 0 }
    }
}

/// How long a client should wait whose key is marked as exhausted; as usual for other outcomes.
fn exhausted_wait(outcome: Outcome, record: &Record, now_s: u64) -> RetryAfter {
    let budget = match outcome {
        Outcome::QuotaExceeded => record.quota,
        Outcome::CreditsExhausted => record.credits,
        _ => None,
    };
    let resets_at_s = budget.and_then(|budget| budget.resets_at_s);
    resets_at_s.map_or(RetryAfter::Usual, |at| RetryAfter::Seconds(at.saturating_sub(now_s).max(1)))
}

/// What the reply to a refused request needs of the request.
fn facts_of(stream: &impl Stream, status: u16) -> RequestFacts {
    RequestFacts {
        id: stream.header(REQUEST_ID).as_deref().and_then(request_id),
        is_grpc: status == 429 && stream.header("content-type").as_deref().is_some_and(is_grpc),
    }
}

#[cfg(test)]
mod tests;
