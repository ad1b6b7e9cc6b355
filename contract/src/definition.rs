//! Roles, plans and policies. Records reference roles and plans by number, so a change takes effect for all keys immediately.
//! Routes name policies.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::codec::{self, DecodeError};
use crate::policy::{DEFAULT_NAME, NamedPolicy, Policy};
use crate::record::{Per, RateLimit, Record};
use crate::rules::Rules;

/// A role, a plan or a policy. A role has scopes only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// The scopes that it grants.
    pub scopes: Vec<String>,
    /// Limits of keys that have none of their own.
    pub rate_limits: Vec<RateLimit>,
    /// The policy. Then the rest is empty.
    pub policy: Option<Box<NamedPolicy>>,
}

impl Definition {
    /// The encoded form, as updates carry it.
    ///
    /// # Errors
    /// None in practice: see [`codec::encode`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        codec::append(self, Vec::new())
    }

    /// Decodes a definition and ignores fields that a later version appended.
    ///
    /// # Errors
    /// [`DecodeError::Malformed`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode_prefix(bytes).map(|(definition, _newer)| definition)
    }
}

impl From<NamedPolicy> for Definition {
    fn from(policy: NamedPolicy) -> Self {
        Self { policy: Some(policy.into()), ..Self::default() }
    }
}

/// All definitions of a store, ready for look-ups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Definitions {
    by_number: BTreeMap<u32, Definition>,
    /// The numbers of policies.
    by_name: BTreeMap<String, u32>,
    rules: Rules,
}

impl Definitions {
    /// No definitions.
    pub const NONE: &'static Self = &Self { by_number: BTreeMap::new(), by_name: BTreeMap::new(), rules: Rules::NONE };

    /// These definitions, by number.
    #[must_use]
    pub fn new(by_number: BTreeMap<u32, Definition>) -> Self {
        let policies =
            by_number.iter().filter_map(|(number, definition)| Some((number, definition.policy.as_deref()?)));
        let by_name = policies.clone().map(|(number, policy)| (policy.name.clone(), *number)).collect();
        let rules = Rules::new(policies.map(|(_, policy)| policy));
        Self { by_number, by_name, rules }
    }

    /// The definitions by number.
    #[must_use]
    pub const fn by_number(&self) -> &BTreeMap<u32, Definition> {
        &self.by_number
    }

    /// Whether there is no policy, not even a default one.
    #[must_use]
    pub fn has_no_policies(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The policy of this name.
    #[must_use]
    pub fn policy(&self, name: &str) -> Option<&NamedPolicy> {
        self.by_number.get(self.by_name.get(name)?)?.policy.as_deref()
    }

    /// The policy of requests for which no other is named or picked.
    #[must_use]
    pub fn default_policy(&self) -> &Policy {
        self.policy(DEFAULT_NAME).map_or(Policy::PLAIN, |default| &default.policy)
    }

    /// The rules that pick policies.
    #[must_use]
    pub const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// All scopes of a key, each once: its own, then those of its roles, then those of its plan.
    #[must_use]
    pub fn scopes<'a>(&'a self, record: &'a Record) -> Vec<&'a str> {
        let mut all = Vec::new();
        for scope in self.each_scope(record) {
            if !all.contains(&scope) {
                all.push(scope);
            }
        }
        all
    }

    /// Whether one of the key's scopes [covers] the required one.
    #[must_use]
    pub fn grants(&self, record: &Record, required: &str) -> bool {
        self.each_scope(record).any(|granted| covers(granted, required))
    }

    /// The limits of a key: its own, else those of its plan. The plan's limits that all keys of a user share apply in any case.
    /// Empty: the default of the filter applies.
    #[must_use]
    pub fn rate_limits<'a>(&'a self, record: &'a Record) -> Cow<'a, [RateLimit]> {
        let own = record.rate_limits.as_slice();
        let of_plan = self.plan(record).map_or(&[][..], |plan| &plan.rate_limits);
        let mut of_owner = of_plan.iter().filter(|limit| limit.per == Per::Owner).peekable();
        if own.is_empty() {
            of_plan.into()
        } else if of_owner.peek().is_none() {
            own.into()
        } else {
            own.iter().chain(of_owner).cloned().collect()
        }
    }

    /// The plan of a key. `None` if it has no plan, or the store does not have the plan yet.
    #[must_use]
    pub fn plan(&self, record: &Record) -> Option<&Definition> {
        self.by_number.get(&record.plan?)
    }

    fn each_scope<'a>(&'a self, record: &'a Record) -> impl Iterator<Item = &'a str> {
        let roles = record.roles.iter().filter_map(|role| self.by_number.get(role));
        let sets = roles.chain(self.plan(record)).flat_map(|definition| &definition.scopes);
        record.scopes.iter().chain(sets).map(String::as_str)
    }
}

/// Whether a granted scope covers a required one: `orders:read` covers itself, `orders:*` every longer scope that starts with
/// `orders:`. Anywhere else a star is an ordinary character, so no scope grants everything.
#[must_use]
pub fn covers(granted: &str, required: &str) -> bool {
    granted == required
        || granted
            .strip_suffix('*')
            .filter(|prefix| prefix.ends_with(':'))
            .and_then(|prefix| required.strip_prefix(prefix))
            .is_some_and(|rest| !rest.is_empty())
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::id::{KeyId, OwnerId};
    use crate::record::Per;

    #[test]
    fn a_star_behind_a_colon_covers_what_is_below_and_nothing_else() {
        for (granted, required, expected) in [
            ("orders:read", "orders:read", true),
            ("orders:*", "orders:read", true),
            ("orders:*", "orders:lines:read", true),
            ("orders:*", "orders:*", true),
            ("orders:*", "orders:", false),
            ("orders:*", "orders", false),
            ("orders:*", "orders_old:read", false),
            ("orders*", "orders:read", false),
            ("*", "admin", false),
            ("orders:read", "orders:*", false),
            ("orders:r*", "orders:read", false),
        ] {
            assert_eq!(covers(granted, required), expected, "{granted} {required}");
        }
    }

    #[test]
    fn a_key_has_the_scopes_of_its_roles_and_plan_and_its_own_limits_before_those_of_the_plan() {
        let limit = |name: &str| RateLimit {
            name: name.into(),
            requests: 1,
            window_s: 1,
            burst: 1,
            shared: true,
            per: Per::Key,
        };
        let role = Definition { scopes: vec!["a:*".into(), "b".into()], ..Definition::default() };
        let plan = Definition { scopes: vec!["b".into(), "c".into()], rate_limits: vec![limit("plan")], policy: None };
        let definitions = Definitions::new([(1, role), (2, plan)].into());
        let mut record = Record::plain(KeyId([1; 16]), OwnerId([2; 16]));
        assert_eq!(definitions.scopes(&record), Vec::<&str>::new());
        record.scopes = vec!["own".into()];
        record.roles = vec![1, 7];
        record.plan = Some(2);
        assert_eq!(definitions.scopes(&record), ["own", "a:*", "b", "c"]);
        assert!(definitions.grants(&record, "a:x") && definitions.grants(&record, "c"));
        assert!(!definitions.grants(&record, "d") && !Definitions::NONE.grants(&record, "c"));
        assert_eq!(*definitions.rate_limits(&record), [limit("plan")]);
        record.rate_limits = vec![limit("own")];
        assert_eq!(*definitions.rate_limits(&record), [limit("own")]);
    }

    #[test]
    fn the_limits_of_a_key_come_on_top_of_those_that_its_plan_has_for_the_owner() {
        let limit =
            |name: &str, per| RateLimit { name: name.into(), requests: 1, window_s: 1, burst: 1, shared: true, per };
        let of_plan = vec![limit("each", Per::Key), limit("team", Per::Owner)];
        let plan = Definition { rate_limits: of_plan.clone(), ..Definition::default() };
        let definitions = Definitions::new([(2, plan)].into());
        let mut record = Record { plan: Some(2), ..Record::plain(KeyId([1; 16]), OwnerId([2; 16])) };
        assert_eq!(*definitions.rate_limits(&record), of_plan);
        record.rate_limits = vec![limit("own", Per::Key)];
        assert_eq!(*definitions.rate_limits(&record), [limit("own", Per::Key), limit("team", Per::Owner)]);
    }

    #[test]
    fn a_definition_is_decoded_as_it_was_and_appended_fields_are_ignored() {
        let definition = Definition { scopes: vec!["a".into()], ..Definition::default() };
        let mut bytes = definition.to_bytes().unwrap();
        bytes.push(7);
        assert_eq!(Definition::from_bytes(&bytes), Ok(definition));
        assert_eq!(Definition::from_bytes(&bytes[..1]), Err(DecodeError::Malformed));
    }

    #[test]
    fn policies_are_found_by_name_and_the_default_requires_a_key() {
        let named = |name: &str| NamedPolicy {
            name: name.into(),
            policy: Policy { shadow: true, ..Policy::default() },
            ..NamedPolicy::default()
        };
        let none = Definitions::NONE;
        assert!(none.has_no_policies() && none.policy("a").is_none() && none.default_policy() == Policy::PLAIN);
        let some = Definitions::new([(1, named("a").into()), (2, Definition::default())].into());
        assert!(!some.has_no_policies() && some.policy("b").is_none() && some.default_policy() == Policy::PLAIN);
        assert_eq!(some.policy("a"), Some(&named("a")));
        let default = Definitions::new([(7, named("default").into())].into());
        assert!(default.default_policy().shadow);
    }
}
