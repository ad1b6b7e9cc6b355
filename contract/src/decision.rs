//! The decision: what is known of the key, what is known of the request and the time come in, an [`Outcome`] goes out.
//!
//! It is a pure function and the only one that admits a key: the filter calls it for each request, the control plane for
//! its own callers. Checks run from the cheapest fact that ends the matter to the most particular, and the first that
//! fails names the outcome. What needs a memory of its own, the rate limit, comes after it and only for requests that it
//! allowed.

use crate::outcome::Outcome;
use crate::record::{Flags, Record, Requires};

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
    /// A scope that the key must have, if any.
    pub required_scope: Option<&'a str>,
    /// Whether the client's address is on the key's list. Asked only if the key has one.
    pub address_listed: bool,
}

impl Facts<'_> {
    /// The facts of a request that asks for nothing but a good key.
    #[must_use]
    pub const fn at(now_s: u64) -> Self {
        Self { now_s, understands: crate::record::UNDERSTOOD, required_scope: None, address_listed: false }
    }
}

/// Decides one request.
#[must_use]
pub fn decide(presented: Presented<'_>, facts: &Facts<'_>) -> Outcome {
    let record = match presented {
        Presented::Nothing => return Outcome::Missing,
        Presented::Stranger => return Outcome::Unknown,
        Presented::Key(record) => record,
    };
    if record.flags.contains(Flags::REVOKED) {
        Outcome::Revoked
    } else if record.expires_at_s.is_some_and(|end| facts.now_s >= end) {
        Outcome::Expired
    } else if record.flags.contains(Flags::DISABLED) {
        Outcome::Disabled
    } else if !facts.understands.covers(record.requires) {
        Outcome::Unsupported
    } else if record.address_list.is_some() && !facts.address_listed {
        Outcome::AddressDenied
    } else if facts.required_scope.is_some_and(|scope| !record.scopes.iter().any(|granted| granted == scope)) {
        Outcome::ScopeDenied
    } else if record.flags.contains(Flags::QUOTA_EXCEEDED) {
        Outcome::QuotaExceeded
    } else if record.flags.contains(Flags::CREDITS_EXHAUSTED) {
        Outcome::CreditsExhausted
    } else {
        Outcome::Allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{KeyId, OwnerId};

    extern crate alloc;

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
        let facts = |scope| Facts { required_scope: Some(scope), ..Facts::at(0) };
        assert_eq!(decide(Presented::Key(&record), &facts("sync")), Outcome::Allowed);
        assert_eq!(decide(Presented::Key(&record), &facts("syn")), Outcome::ScopeDenied);
        assert_eq!(decide(Presented::Key(&record), &facts("admin")), Outcome::ScopeDenied);
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
