//! The decision on one request: a pure function of the key's record, the request and the time, whose result is an [`Outcome`].
//!
//! No other function admits a key. The filter calls it for each request, the control plane for its own callers, and `explain`
//! to show each check. The first check that fails names the outcome. A quota or credits that the record marks as used up fail
//! here too.
//!
//! The filter asks before whether it has keys and whether the policy is known. Afterwards it takes the tokens of an allowed
//! request from its rate limits, quota and credits, whose state is not in the record.

use std::net::IpAddr;

use crate::definition::Definitions;
use crate::outcome::Outcome;
use crate::policy::{KeyNeed, Policy, ScopeNeed};
use crate::record::{Budget, Flags, Record, Requires, UNDERSTOOD};

/// The key of a request, as far as the store knows it.
#[derive(Clone, Copy, Debug)]
pub enum Presented<'a> {
    /// The request has no key.
    Missing,
    /// The store does not have the key.
    Unknown,
    /// The store has this record of the key.
    Key(&'a Record),
}

/// The facts of a request beside its key.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Now, in seconds of Unix time.
    pub now_s: u64,
    /// The restrictions that the host understands.
    pub understands: Requires,
    /// The policy of the route.
    pub policy: &'a Policy,
    /// All roles, plans and policies.
    pub definitions: &'a Definitions,
    /// The client's address, if it is known. Used only if the key is bound to networks.
    pub address: Option<IpAddr>,
    /// Whether the request counts against quota and credits. A request to the control plane itself does not.
    pub metered: bool,
}

impl Facts<'_> {
    /// The facts of a request to a route that requires a good key and nothing else.
    #[must_use]
    pub const fn at(now_s: u64) -> Self {
        Self {
            now_s,
            understands: UNDERSTOOD,
            policy: Policy::PLAIN,
            definitions: Definitions::NONE,
            address: None,
            metered: true,
        }
    }
}

/// Decides one request.
#[must_use]
pub fn decide(presented: Presented<'_>, facts: &Facts<'_>) -> Outcome {
    match presented {
        Presented::Missing => keyless(facts.policy, Outcome::Missing),
        Presented::Unknown => keyless(facts.policy, Outcome::Unknown),
        Presented::Key(record) => {
            let refused = Check::ALL.into_iter().find_map(|check| check.refusal(record, facts));
            refused.map_or(Outcome::Allowed, |outcome| keyless(facts.policy, outcome))
        }
    }
}

/// The outcome of a request without a good key: anonymous if the policy allows that, else the refusal.
const fn keyless(policy: &Policy, outcome: Outcome) -> Outcome {
    let lets_through = match outcome {
        Outcome::Missing => !matches!(policy.key, KeyNeed::Required),
        Outcome::Unknown
        | Outcome::Revoked
        | Outcome::Expired
        | Outcome::Disabled
        | Outcome::KindDenied
        | Outcome::AddressDenied => {
            matches!(policy.key, KeyNeed::Optional)
        }
        Outcome::ScopeDenied
        | Outcome::RateLimited
        | Outcome::QuotaExceeded
        | Outcome::CreditsExhausted
        | Outcome::NotReady
        | Outcome::Stale
        | Outcome::Unsupported
        | Outcome::PolicyUnknown
        | Outcome::LimitsUnavailable
        | Outcome::Allowed
        | Outcome::FailedOpen
        | Outcome::Anonymous => false,
    };
    if lets_through { Outcome::Anonymous } else { outcome }
}

/// Whether the decision on a key may depend on the time. If not, the caller need not read the clock.
#[must_use]
pub const fn depends_on_time(record: &Record) -> bool {
    let used_up = Flags::QUOTA_EXCEEDED.0 | Flags::CREDITS_EXHAUSTED.0;
    record.expires_at_s.is_some() || record.flags.0 & used_up != 0
}

/// The cost of a request with this key, in credits.
#[must_use]
pub fn cost(record: &Record, policy: &Policy) -> u32 {
    policy.cost.unwrap_or(record.cost)
}

/// One check of a key that the store has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Was it revoked?
    Revocation,
    /// Has it expired?
    Expiry,
    /// Is it switched off?
    Switch,
    /// Does it have a restriction that this version does not understand?
    Support,
    /// Is it of a kind that the route accepts?
    Kind,
    /// May it be used from the client's address?
    Address,
    /// Does it have the scopes that the route requires?
    Scopes,
    /// Is its quota used up?
    Quota,
    /// Are its owner's credits used up?
    Credits,
}

impl Check {
    /// All checks, in the order in which they run.
    pub const ALL: [Self; 9] = [
        Self::Revocation,
        Self::Expiry,
        Self::Switch,
        Self::Support,
        Self::Kind,
        Self::Address,
        Self::Scopes,
        Self::Quota,
        Self::Credits,
    ];

    /// The name, as `explain` shows it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Revocation => "revocation",
            Self::Expiry => "expiry",
            Self::Switch => "switch",
            Self::Support => "support",
            Self::Kind => "kind",
            Self::Address => "address",
            Self::Scopes => "scopes",
            Self::Quota => "quota",
            Self::Credits => "credits",
        }
    }

    /// The outcome if the check fails.
    #[must_use]
    pub fn refusal(self, record: &Record, facts: &Facts<'_>) -> Option<Outcome> {
        let (fails, outcome) = match self {
            Self::Revocation => (record.flags.contains(Flags::REVOKED), Outcome::Revoked),
            Self::Expiry => (record.expires_at_s.is_some_and(|end| facts.now_s >= end), Outcome::Expired),
            Self::Switch => (record.flags.contains(Flags::DISABLED), Outcome::Disabled),
            Self::Support => {
                (!facts.understands.covers(record.requires) || lacks_plan(record, facts), Outcome::Unsupported)
            }
            Self::Kind => {
                let kinds = &facts.policy.kinds;
                (!kinds.is_empty() && !kinds.contains(&record.kind), Outcome::KindDenied)
            }
            Self::Address => (!may_use_address(record, facts), Outcome::AddressDenied),
            Self::Scopes => (!has_scopes(record, facts), Outcome::ScopeDenied),
            Self::Quota => {
                let used_up = record.flags.contains(Flags::QUOTA_EXCEEDED);
                (facts.metered && used_up && !is_refilled(record.quota, facts.now_s), Outcome::QuotaExceeded)
            }
            Self::Credits => {
                let used_up = record.flags.contains(Flags::CREDITS_EXHAUSTED) && cost(record, facts.policy) > 0;
                (facts.metered && used_up && !is_refilled(record.credits, facts.now_s), Outcome::CreditsExhausted)
            }
        };
        fails.then_some(outcome)
    }

    /// The facts that the check used, in words.
    #[must_use]
    pub fn detail(self, record: &Record, facts: &Facts<'_>) -> String {
        let budget = |flag, budget: Option<Budget>| match (budget, record.flags.contains(flag)) {
            (None, false) => "none is set".to_string(),
            (_, true) => match budget.and_then(|budget| budget.resets_at_s) {
                Some(end) => format!("used up until {end} (Unix time)"),
                None => "used up".to_string(),
            },
            (Some(_), false) => "not used up".to_string(),
        };
        match self {
            Self::Revocation if record.flags.contains(Flags::REVOKED) => "the key is revoked".to_string(),
            Self::Revocation => "the key is not revoked".to_string(),
            Self::Expiry => match record.expires_at_s {
                Some(end) => format!("the key ends at {end}, it is {} (Unix time)", facts.now_s),
                None => "the key does not end".to_string(),
            },
            Self::Switch if record.flags.contains(Flags::DISABLED) => "the key is switched off".to_string(),
            Self::Switch => "the key is switched on".to_string(),
            Self::Support => match record.plan {
                Some(plan) if lacks_plan(record, facts) => format!("plan {plan} is not in the store"),
                _ => format!("the key requires {:#x}, {:#x} is understood", record.requires.0, facts.understands.0),
            },
            Self::Kind => {
                let accepted: Vec<_> = facts.policy.kinds.iter().map(|kind| kind.name()).collect();
                let accepted = if accepted.is_empty() { "all kinds".to_string() } else { list(&accepted) };
                format!("the route accepts {accepted}, the kind of the key is {}", record.kind.name())
            }
            Self::Address => match facts.address {
                _ if record.networks.is_empty() => "the key may be used from any address".to_string(),
                Some(address) => {
                    format!("the client's address is {address}, the key is bound to {}", list(&record.networks))
                }
                None => format!("the client's address is not known, the key is bound to {}", list(&record.networks)),
            },
            Self::Scopes => {
                let asked = match &facts.policy.scopes {
                    ScopeNeed::None => return "the route asks for none".to_string(),
                    ScopeNeed::All(scopes) => format!("all of {}", list(scopes)),
                    ScopeNeed::Any(scopes) => format!("one of {}", list(scopes)),
                };
                format!("the route asks for {asked}, the key has {}", list(&facts.definitions.scopes(record)))
            }
            Self::Quota => budget(Flags::QUOTA_EXCEEDED, record.quota),
            Self::Credits => {
                let cost = cost(record, facts.policy);
                format!("{}; the request costs {cost}", budget(Flags::CREDITS_EXHAUSTED, record.credits))
            }
        }
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    if items.is_empty() { "none".to_string() } else { items.join(", ") }
}

/// Without its plan, the limits of a key are unknown. The plan arrives with the next update.
fn lacks_plan(record: &Record, facts: &Facts<'_>) -> bool {
    record.plan.is_some() && facts.definitions.plan(record).is_none()
}

fn may_use_address(record: &Record, facts: &Facts<'_>) -> bool {
    let listed = |address| record.networks.iter().any(|network| network.contains(address));
    record.networks.is_empty() || facts.address.is_some_and(listed)
}

fn has_scopes(record: &Record, facts: &Facts<'_>) -> bool {
    let granted = |scope: &String| facts.definitions.grants(record, scope);
    match &facts.policy.scopes {
        ScopeNeed::None => true,
        ScopeNeed::All(scopes) => scopes.iter().all(granted),
        ScopeNeed::Any(scopes) => scopes.iter().any(granted),
    }
}

fn is_refilled(budget: Option<Budget>, now_s: u64) -> bool {
    budget.and_then(|budget| budget.resets_at_s).is_some_and(|at| now_s >= at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Per;

    use crate::definition::Definition;
    use crate::id::{KeyId, OwnerId};
    use crate::key::KeyKind;

    fn plain() -> Record {
        Record::plain(KeyId([1; 16]), OwnerId([2; 16]))
    }

    fn outcome(change: impl FnOnce(&mut Record)) -> Outcome {
        let mut record = plain();
        change(&mut record);
        decide(Presented::Key(&record), &Facts::at(1_000))
    }

    #[test]
    fn a_plain_key_is_allowed_and_no_key_or_a_strange_one_is_not() {
        assert_eq!(outcome(|_| ()), Outcome::Allowed);
        assert_eq!(decide(Presented::Missing, &Facts::at(0)), Outcome::Missing);
        assert_eq!(decide(Presented::Unknown, &Facts::at(0)), Outcome::Unknown);
    }

    #[test]
    fn each_fact_of_the_record_has_its_outcome() {
        assert_eq!(outcome(|r| r.flags = Flags::REVOKED), Outcome::Revoked);
        assert_eq!(outcome(|r| r.flags = Flags::DISABLED), Outcome::Disabled);
        assert_eq!(outcome(|r| r.flags = Flags::QUOTA_EXCEEDED), Outcome::QuotaExceeded);
        assert_eq!(outcome(|r| r.flags = Flags::CREDITS_EXHAUSTED), Outcome::CreditsExhausted);
        assert_eq!(outcome(|r| r.requires = Requires(1 << 31)), Outcome::Unsupported);
    }

    #[test]
    fn a_key_works_until_the_second_before_it_expires() {
        assert_eq!(outcome(|r| r.expires_at_s = Some(1_001)), Outcome::Allowed);
        assert_eq!(outcome(|r| r.expires_at_s = Some(1_000)), Outcome::Expired);
        assert_eq!(outcome(|r| r.expires_at_s = Some(0)), Outcome::Expired);
    }

    #[test]
    fn a_required_scope_must_be_among_those_granted() {
        let mut record = plain();
        record.scopes = vec!["sync".into(), "orders:read".into()];
        let asked = |need: fn(Vec<String>) -> ScopeNeed, scopes: &[&str]| {
            let scopes = need(scopes.iter().map(ToString::to_string).collect());
            let policy = Policy { scopes, ..Policy::default() };
            decide(Presented::Key(&record), &Facts { policy: &policy, ..Facts::at(0) })
        };
        assert_eq!(asked(ScopeNeed::All, &["sync"]), Outcome::Allowed);
        assert_eq!(asked(ScopeNeed::All, &["syn"]), Outcome::ScopeDenied);
        assert_eq!(asked(ScopeNeed::All, &["sync", "admin"]), Outcome::ScopeDenied);
        assert_eq!(asked(ScopeNeed::Any, &["sync", "admin"]), Outcome::Allowed);
        assert_eq!(asked(ScopeNeed::Any, &["admin"]), Outcome::ScopeDenied);
    }

    #[test]
    fn a_route_that_accepts_some_kinds_of_keys_refuses_others() {
        let outcome = |kinds: &[KeyKind], key: KeyNeed, kind: KeyKind| {
            let policy = Policy { kinds: kinds.to_vec(), key, ..Policy::default() };
            let record = Record { kind, ..plain() };
            decide(Presented::Key(&record), &Facts { policy: &policy, ..Facts::at(0) })
        };
        let (live, test) = (KeyKind::Live, KeyKind::Test);
        assert_eq!([live, test].map(|kind| outcome(&[], KeyNeed::Required, kind)), [Outcome::Allowed; 2]);
        assert_eq!([live, test].map(|kind| outcome(&[live, test], KeyNeed::Required, kind)), [Outcome::Allowed; 2]);
        assert_eq!(outcome(&[live], KeyNeed::Required, live), Outcome::Allowed);
        assert_eq!(outcome(&[live], KeyNeed::Required, test), Outcome::KindDenied);
        assert_eq!(outcome(&[live], KeyNeed::AnonymousAllowed, test), Outcome::KindDenied);
        assert_eq!(outcome(&[live], KeyNeed::Optional, test), Outcome::Anonymous);
    }

    #[test]
    fn a_key_bound_to_networks_works_from_there_only() {
        let mut record = plain();
        record.networks = vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        let from = |address: Option<&str>| {
            let address = address.map(|address| address.parse().unwrap());
            decide(Presented::Key(&record), &Facts { address, ..Facts::at(0) })
        };
        assert_eq!(from(Some("192.0.2.9")), Outcome::Allowed);
        assert_eq!(from(Some("2001:db8::9")), Outcome::Allowed);
        assert_eq!(from(Some("198.51.100.1")), Outcome::AddressDenied);
        assert_eq!(from(None), Outcome::AddressDenied);
    }

    #[test]
    fn a_route_may_let_requests_through_without_a_good_key() {
        let revoked = Record { flags: Flags::REVOKED, ..plain() };
        let exhausted = Record { flags: Flags::CREDITS_EXHAUSTED, ..plain() };
        let outcomes = |key| {
            let policy = Policy { key, ..Policy::default() };
            let facts = Facts { policy: &policy, ..Facts::at(0) };
            [Presented::Missing, Presented::Unknown, Presented::Key(&revoked), Presented::Key(&exhausted)]
                .map(|presented| decide(presented, &facts))
        };
        let [missing, unknown, revoked_, exhausted_] =
            [Outcome::Missing, Outcome::Unknown, Outcome::Revoked, Outcome::CreditsExhausted];
        assert_eq!(outcomes(KeyNeed::Required), [missing, unknown, revoked_, exhausted_]);
        assert_eq!(outcomes(KeyNeed::AnonymousAllowed), [Outcome::Anonymous, unknown, revoked_, exhausted_]);
        let none = Outcome::Anonymous;
        assert_eq!(outcomes(KeyNeed::Optional), [none, none, none, exhausted_]);
    }

    #[test]
    fn an_exhausted_budget_blocks_until_its_reset_and_free_routes_need_no_credits() {
        let mut record = Record { flags: Flags::QUOTA_EXCEEDED, ..plain() };
        record.quota = Some(Budget { fill: 1, resets_at_s: Some(1_000), per: Per::Key });
        assert_eq!(decide(Presented::Key(&record), &Facts::at(999)), Outcome::QuotaExceeded);
        assert_eq!(decide(Presented::Key(&record), &Facts::at(1_000)), Outcome::Allowed);
        let record = Record { flags: Flags::CREDITS_EXHAUSTED, ..plain() };
        let free = Policy { cost: Some(0), ..Policy::default() };
        assert_eq!(decide(Presented::Key(&record), &Facts { policy: &free, ..Facts::at(0) }), Outcome::Allowed);
        assert_eq!(decide(Presented::Key(&record), &Facts { metered: false, ..Facts::at(0) }), Outcome::Allowed);
    }

    #[test]
    fn a_key_whose_plan_has_not_arrived_is_refused() {
        let mut record = plain();
        record.plan = Some(4);
        assert_eq!(decide(Presented::Key(&record), &Facts::at(0)), Outcome::Unsupported);
        let definitions = Definitions::new([(4, Definition::default())].into());
        assert_eq!(
            decide(Presented::Key(&record), &Facts { definitions: &definitions, ..Facts::at(0) }),
            Outcome::Allowed
        );
    }

    #[test]
    fn every_check_describes_the_facts_it_used() {
        for check in Check::ALL {
            assert!(!check.detail(&plain(), &Facts::at(0)).is_empty() && !check.name().is_empty());
        }
    }

    #[test]
    fn a_revoked_key_is_refused_as_revoked_whatever_else_is_wrong() {
        let everything = |r: &mut Record| {
            r.flags = Flags::REVOKED.with(Flags::DISABLED, true).with(Flags::CREDITS_EXHAUSTED, true);
            r.expires_at_s = Some(0);
            r.requires = Requires(u32::MAX);
        };
        assert_eq!(outcome(everything), Outcome::Revoked);
    }
}
