//! What records refer to by number: roles and plans, which the store holds beside the records, so that a change of one
//! reaches every key that refers to it at once.

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::codec::{self, DecodeError};
use crate::record::{RateLimit, Record};

/// A role, which has scopes, or a plan, which may have both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Scopes that it grants.
    pub scopes: Vec<String>,
    /// Limits of keys that have none of their own.
    pub rate_limits: Vec<RateLimit>,
    /// Those of the limits that each Envoy judges alone: see [`Further::alone`](crate::record::Further::alone).
    pub alone: u32,
}

impl Definition {
    /// The binary form, as pages carry it.
    ///
    /// # Errors
    /// Never for a definition that fits in memory; the codec's signature has the error.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        codec::grown(self)
    }

    /// Reads the binary form. Bytes after the known fields belong to a newer version and are left alone.
    ///
    /// # Errors
    /// [`DecodeError::Malformed`] if the known fields do not stand there.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::part(bytes)
    }
}

/// All definitions of a store, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definitions(pub BTreeMap<u32, Definition>);

impl Definitions {
    /// None at all.
    pub const NONE: &'static Self = &Self(BTreeMap::new());

    /// All scopes of a key: its own, its roles' and its plan's, each once, in that order.
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

    /// Whether a key is granted a scope, by name or by a wider one.
    #[must_use]
    pub fn grants(&self, record: &Record, required: &str) -> bool {
        self.each_scope(record).any(|granted| covers(granted, required))
    }

    /// The limits of a key, its own or those of its plan, and which of them each Envoy judges alone. None: the default of
    /// the filter applies.
    #[must_use]
    pub fn rate_limits<'a>(&'a self, record: &'a Record) -> (&'a [RateLimit], u32) {
        if !record.rate_limits.is_empty() {
            return (&record.rate_limits, record.further.alone);
        }
        self.plan(record).map_or((&[], 0), |plan| (&plan.rate_limits, plan.alone))
    }

    /// The plan of a key, if it has one and the store holds it.
    #[must_use]
    pub fn plan(&self, record: &Record) -> Option<&Definition> {
        self.0.get(&record.further.plan?)
    }

    fn each_scope<'a>(&'a self, record: &'a Record) -> impl Iterator<Item = &'a str> {
        let roles = record.roles.iter().filter_map(|role| self.0.get(role));
        let sets = roles.chain(self.plan(record)).flat_map(|definition| &definition.scopes);
        record.scopes.iter().chain(sets).map(String::as_str)
    }
}

/// Whether a granted scope covers a required one: `orders:read` covers itself, `orders:*` all that starts with `orders:`.
/// A star anywhere else is a character like others, so that no scope grants everything.
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
    use alloc::vec;

    use super::*;
    use crate::id::{KeyId, OwnerId};

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
        let limit = |name: &str| RateLimit { name: name.into(), requests: 1, window_s: 1, burst: 1 };
        let role = Definition { scopes: vec!["a:*".into(), "b".into()], ..Definition::default() };
        let plan = Definition { scopes: vec!["b".into(), "c".into()], rate_limits: vec![limit("plan")], alone: 1 };
        let definitions = Definitions([(1, role), (2, plan)].into());
        let mut record = Record::plain(KeyId([1; 16]), OwnerId([2; 16]));
        assert_eq!(definitions.scopes(&record), Vec::<&str>::new());
        record.scopes = vec!["own".into()];
        record.roles = vec![1, 7];
        record.further.plan = Some(2);
        assert_eq!(definitions.scopes(&record), ["own", "a:*", "b", "c"]);
        assert!(definitions.grants(&record, "a:x") && definitions.grants(&record, "c"));
        assert!(!definitions.grants(&record, "d") && !Definitions::NONE.grants(&record, "c"));
        assert_eq!(definitions.rate_limits(&record), (&[limit("plan")][..], 1));
        record.rate_limits = vec![limit("own")];
        assert_eq!(definitions.rate_limits(&record), (&[limit("own")][..], 0));
    }

    #[test]
    fn the_bytes_lead_back_and_may_grow() {
        let definition = Definition { scopes: vec!["a".into()], rate_limits: vec![], alone: 0 };
        let mut bytes = definition.to_bytes().unwrap();
        bytes.push(7);
        assert_eq!(Definition::from_bytes(&bytes), Ok(definition));
        assert_eq!(Definition::from_bytes(&bytes[..1]), Err(DecodeError::Malformed));
    }
}
