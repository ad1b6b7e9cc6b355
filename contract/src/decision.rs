//! The decision: what is known of the key, what is known of the request and the time come in, an [`Outcome`] goes out.
//!
//! It is a pure function and the only one that admits a key: the filter calls it for each request, the control plane for
//! its own callers, and `explain` for whoever wants to know why. Checks run from the cheapest fact that ends the matter to
//! the most particular, and the first that fails names the outcome. What needs a memory of its own comes after it, and only
//! for requests that it allowed: rate limits ([`crate::rate`]), and what is left of leases ([`crate::budget`]).

extern crate alloc;

use alloc::format;
use alloc::string::{String, ToString};
use core::net::IpAddr;

use crate::definition::Definitions;
use crate::outcome::Outcome;
use crate::policy::{KeyNeed, Policy, ScopeNeed};
use crate::record::{Budget, Flags, Record, Requires, UNDERSTOOD};

/// What came of looking for a key on the request and in the store.
#[derive(Clone, Copy, Debug)]
pub enum Presented<'a> {
    /// The request carries none.
    Nothing,
    /// It carries one that the store does not hold.
    Stranger,
    /// It carries one that the store holds.
    Key(&'a Record),
}

/// What is known of the request, beside its key.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Now, in seconds of Unix time.
    pub now_s: u64,
    /// What the host understands of what a record may require.
    pub understands: Requires,
    /// What the route asks for.
    pub policy: &'a Policy,
    /// What records refer to by number.
    pub definitions: &'a Definitions,
    /// The client's address, if it is known. Asked only if the key is bound to networks.
    pub address: Option<IpAddr>,
    /// Whether the request counts against quota and credits. Those of the control plane's own callers do not.
    pub metered: bool,
}

impl Facts<'_> {
    /// The facts of a request that asks for nothing but a good key.
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
        Presented::Nothing => keyless(facts.policy, Outcome::Missing),
        Presented::Stranger => keyless(facts.policy, Outcome::Unknown),
        Presented::Key(record) => {
            let refused = Check::ALL.into_iter().find_map(|check| check.refusal(record, facts));
            refused.map_or(Outcome::Allowed, |outcome| keyless(facts.policy, outcome))
        }
    }
}

/// What comes of a request whose key is missing or not good, where the policy may not insist on one.
const fn keyless(policy: &Policy, outcome: Outcome) -> Outcome {
    let lets_through = match outcome {
        Outcome::Missing => !matches!(policy.key, KeyNeed::Required),
        Outcome::Unknown | Outcome::Revoked | Outcome::Expired | Outcome::Disabled | Outcome::AddressDenied => {
            matches!(policy.key, KeyNeed::Optional)
        }
        _ => false,
    };
    if lets_through { Outcome::Anonymous } else { outcome }
}

/// Whether the decision on a key may depend on the time. If not, any time will do, and need not be asked for.
#[must_use]
pub const fn depends_on_time(record: &Record) -> bool {
    let used_up = Flags::QUOTA_EXCEEDED.0 | Flags::CREDITS_EXHAUSTED.0;
    record.expires_at_s.is_some() || record.flags.0 & used_up != 0
}

/// What a request of this key costs, in credits.
#[must_use]
pub fn cost(record: &Record, policy: &Policy) -> u32 {
    policy.cost.unwrap_or(record.cost)
}

/// One question that is asked of a key that the store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Was it revoked?
    Revocation,
    /// Is its time over?
    Expiry,
    /// Is it switched off?
    Switch,
    /// Does it carry a restriction that this version cannot judge?
    Support,
    /// May it be used from the client's address?
    Address,
    /// Has it the scopes that the route asks for?
    Scopes,
    /// Is its quota used up?
    Quota,
    /// Are its owner's credits used up?
    Credits,
}

impl Check {
    /// All of them, in the order in which they are asked.
    pub const ALL: [Self; 8] = [
        Self::Revocation,
        Self::Expiry,
        Self::Switch,
        Self::Support,
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
            Self::Address => "address",
            Self::Scopes => "scopes",
            Self::Quota => "quota",
            Self::Credits => "credits",
        }
    }

    /// The outcome, if the check fails.
    #[must_use]
    pub fn refusal(self, record: &Record, facts: &Facts<'_>) -> Option<Outcome> {
        let (fails, outcome) = match self {
            Self::Revocation => (record.flags.contains(Flags::REVOKED), Outcome::Revoked),
            Self::Expiry => (record.expires_at_s.is_some_and(|end| facts.now_s >= end), Outcome::Expired),
            Self::Switch => (record.flags.contains(Flags::DISABLED), Outcome::Disabled),
            Self::Support => {
                (!facts.understands.covers(record.requires) || lacks_plan(record, facts), Outcome::Unsupported)
            }
            Self::Address => (!is_listed(record, facts), Outcome::AddressDenied),
            Self::Scopes => (!has_scopes(record, facts), Outcome::ScopeDenied),
            Self::Quota => {
                let used_up = record.flags.contains(Flags::QUOTA_EXCEEDED);
                (facts.metered && used_up && !is_refilled(record.further.quota, facts.now_s), Outcome::QuotaExceeded)
            }
            Self::Credits => {
                let used_up = record.flags.contains(Flags::CREDITS_EXHAUSTED) && cost(record, facts.policy) > 0;
                (
                    facts.metered && used_up && !is_refilled(record.further.credits, facts.now_s),
                    Outcome::CreditsExhausted,
                )
            }
        };
        fails.then_some(outcome)
    }

    /// What the check looked at, in words.
    #[must_use]
    pub fn saw(self, record: &Record, facts: &Facts<'_>) -> String {
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
            Self::Support => match record.further.plan {
                Some(plan) if lacks_plan(record, facts) => format!("plan {plan} is not in the store"),
                _ => format!("the key requires {:#x}, {:#x} is understood", record.requires.0, facts.understands.0),
            },
            Self::Address => match facts.address {
                _ if record.further.networks.is_empty() && record.address_list.is_none() => {
                    "the key may be used from any address".to_string()
                }
                Some(address) => {
                    format!("the client's address is {address}, the key is bound to {}", list(&record.further.networks))
                }
                None => {
                    format!("the client's address is not known, the key is bound to {}", list(&record.further.networks))
                }
            },
            Self::Scopes => {
                let asked = match &facts.policy.scopes {
                    ScopeNeed::None => return "the route asks for none".to_string(),
                    ScopeNeed::All(scopes) => format!("all of {}", list(scopes)),
                    ScopeNeed::Any(scopes) => format!("one of {}", list(scopes)),
                };
                format!("the route asks for {asked}, the key has {}", list(&facts.definitions.scopes(record)))
            }
            Self::Quota => budget(Flags::QUOTA_EXCEEDED, record.further.quota),
            Self::Credits => {
                let cost = cost(record, facts.policy);
                format!("{}; the request costs {cost}", budget(Flags::CREDITS_EXHAUSTED, record.further.credits))
            }
        }
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    let items: alloc::vec::Vec<String> = items.iter().map(ToString::to_string).collect();
    if items.is_empty() { "none".to_string() } else { items.join(", ") }
}

/// The limits of a plan that is not there cannot be judged. It comes with the next page.
fn lacks_plan(record: &Record, facts: &Facts<'_>) -> bool {
    record.further.plan.is_some() && facts.definitions.plan(record).is_none()
}

fn is_listed(record: &Record, facts: &Facts<'_>) -> bool {
    let networks = &record.further.networks;
    let listed = |address| networks.iter().any(|network| network.contains(address));
    record.address_list.is_none() && (networks.is_empty() || facts.address.is_some_and(listed))
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
    use alloc::vec::Vec;

    use crate::definition::Definition;
    use crate::id::{KeyId, OwnerId};

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
        assert_eq!(decide(Presented::Nothing, &Facts::at(0)), Outcome::Missing);
        assert_eq!(decide(Presented::Stranger, &Facts::at(0)), Outcome::Unknown);
    }

    #[test]
    fn each_fact_of_the_record_has_its_outcome() {
        assert_eq!(outcome(|r| r.flags = Flags::REVOKED), Outcome::Revoked);
        assert_eq!(outcome(|r| r.flags = Flags::DISABLED), Outcome::Disabled);
        assert_eq!(outcome(|r| r.flags = Flags::QUOTA_EXCEEDED), Outcome::QuotaExceeded);
        assert_eq!(outcome(|r| r.flags = Flags::CREDITS_EXHAUSTED), Outcome::CreditsExhausted);
        assert_eq!(outcome(|r| r.address_list = Some(1)), Outcome::AddressDenied);
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
        record.scopes = alloc::vec!["sync".into(), "orders:read".into()];
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
    fn a_key_bound_to_networks_works_from_there_only() {
        let mut record = plain();
        record.further.networks = alloc::vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
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
            [Presented::Nothing, Presented::Stranger, Presented::Key(&revoked), Presented::Key(&exhausted)]
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
    fn a_stock_that_is_used_up_is_filled_anew_by_itself_and_free_routes_need_none() {
        let mut record = Record { flags: Flags::QUOTA_EXCEEDED, ..plain() };
        record.further.quota = Some(Budget { starter: 1, turn: 1, resets_at_s: Some(1_000) });
        assert_eq!(decide(Presented::Key(&record), &Facts::at(999)), Outcome::QuotaExceeded);
        assert_eq!(decide(Presented::Key(&record), &Facts::at(1_000)), Outcome::Allowed);
        let record = Record { flags: Flags::CREDITS_EXHAUSTED, ..plain() };
        let free = Policy { cost: Some(0), ..Policy::default() };
        assert_eq!(decide(Presented::Key(&record), &Facts { policy: &free, ..Facts::at(0) }), Outcome::Allowed);
        assert_eq!(decide(Presented::Key(&record), &Facts { metered: false, ..Facts::at(0) }), Outcome::Allowed);
    }

    #[test]
    fn a_key_whose_plan_is_not_there_yet_is_not_let_in_without_limits() {
        let mut record = plain();
        record.further.plan = Some(4);
        assert_eq!(decide(Presented::Key(&record), &Facts::at(0)), Outcome::Unsupported);
        let definitions = Definitions([(4, Definition::default())].into());
        assert_eq!(
            decide(Presented::Key(&record), &Facts { definitions: &definitions, ..Facts::at(0) }),
            Outcome::Allowed
        );
    }

    #[test]
    fn every_check_says_what_it_saw() {
        for check in Check::ALL {
            assert!(!check.saw(&plain(), &Facts::at(0)).is_empty() && !check.name().is_empty());
        }
    }

    #[test]
    fn revocation_is_told_before_anything_else() {
        let everything = |r: &mut Record| {
            r.flags = Flags::REVOKED.with(Flags::DISABLED, true).with(Flags::CREDITS_EXHAUSTED, true);
            r.expires_at_s = Some(0);
            r.requires = Requires(u32::MAX);
        };
        assert_eq!(outcome(everything), Outcome::Revoked);
    }
}
