//! The records and policies of the rows of the suite `request`.

use contract::policy::{NamedPolicy, Policy, ScopeNeed};
use contract::record::{Budget, Per, RateLimit, Record};
use contract::rules::{Match, PathMatch};

pub(crate) fn limited(record: &mut Record) {
    record.rate_limits = vec![RateLimit {
        name: "own".into(),
        requests: 1_000_000,
        window_s: 1,
        burst: 1_000_000,
        shared: true,
        per: Per::Key,
    }];
}

pub(crate) fn limited_by_each(record: &mut Record) {
    limited(record);
    record.rate_limits.iter_mut().for_each(|limit| limit.shared = false);
}

/// The policy of the row with a route that names one.
pub(crate) fn orders() -> NamedPolicy {
    let scopes = ScopeNeed::All(vec!["orders:read".into()]);
    NamedPolicy { name: "orders".into(), policy: Policy { scopes, ..Policy::default() }, ..NamedPolicy::default() }
}

/// Policies with one rule each, by host, path and method.
pub(crate) fn by_rules() -> Vec<NamedPolicy> {
    let of = |number: u32| {
        let base = if number == FORWARDED { "/up" } else { "/api" };
        let path = PathMatch::Template(format!("{base}/v1/service-{number}/{{id}}/items"));
        let hosts = if number.is_multiple_of(2) { vec![] } else { vec!["*.example.com".into()] };
        let matches = vec![Match { hosts, path: Some(path), methods: vec!["GET".into()], header: None }];
        NamedPolicy { name: format!("policy-{number}"), matches, ..NamedPolicy::default() }
    };
    (0..1_000).map(of).collect()
}

/// The rule whose requests go to an upstream.
const FORWARDED: u32 = 998;

/// A path that one of these rules matches.
pub(crate) const RULED_PATH: &str = "/api/v1/service-500/7/items";

/// The same, of requests that go to an upstream.
pub(crate) const FORWARDED_PATH: &str = "/up/v1/service-998/7/items";

pub(crate) fn with_quota(record: &mut Record) {
    record.quota = Some(Budget::default());
}

pub(crate) fn with_credits(record: &mut Record) {
    (record.credits, record.cost) = (Some(Budget { per: Per::Owner, ..Budget::default() }), 1);
}
