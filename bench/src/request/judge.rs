//! The figures of suite `request`, and whether they meet their targets.

use super::{
    AUTHZ_GRPC, AUTHZ_HTTP, CREDITS, EMPTY, KNOWN_UP, LIMITED, LOCAL, LUA, MILLION, NATIVE, NOTHING, NOTHING_UP, PLAIN,
    POLICY, POLICY_UP, QUOTA, RULES, RULES_ONLY, RULES_UP, SUITE, UNIT, UNKNOWN, UNKNOWN_UP, WHOLE,
};
use crate::report::{Bound, Report};
use crate::stats::{Estimate, Samples};

/// Adds figures and targets to the report.
pub(super) fn judge(subjects: &[(&str, Samples)], report: &mut Report) {
    let samples = |name: &str| subjects.iter().find(|(other, _)| *other == name).map(|(_, samples)| samples);
    let Some(nothing) = samples(NOTHING) else { return };
    let added = |name: &str| samples(name).map(|of| Estimate::of([of, nothing], |[of, nothing]| of - nothing));
    let ratio = |over: &str, under: &str| {
        let (over, under) = (samples(over)?, samples(under)?);
        Some(Estimate::of([over, under, nothing], |[over, under, nothing]| {
            // Noise can make the divisor 0 or negative.
            if under > nothing { (over - nothing) / (under - nothing) } else { f64::NAN }
        }))
    };
    for (name, _) in subjects.iter().filter(|(name, _)| !name.contains("upstream") && !name.contains("same route")) {
        let Some(found) = added(name).filter(|_| *name != NOTHING) else { continue };
        report.compared(SUITE, *name, UNIT, found, ratio(name, EMPTY).map(|ratio| (ratio, "empty")));
    }
    for name in
        [NOTHING, NOTHING_UP, PLAIN, POLICY, RULES, RULES_ONLY, KNOWN_UP, POLICY_UP, RULES_UP, UNKNOWN, UNKNOWN_UP]
    {
        let Some(whole) = samples(name) else { continue };
        report.figure(WHOLE, name, UNIT, Estimate::plain(whole));
    }

    let mut target = |name, most, found: Option<Estimate>| report.target(name, Bound::AtMost(most), "", found);
    target("Portcullis plain, 1,000 keys ÷ empty SDK filter", 1.0, ratio(PLAIN, EMPTY));
    target("÷ Lua table", 0.7, ratio(PLAIN, LUA));
    let fastest = [AUTHZ_HTTP, AUTHZ_GRPC].into_iter().filter_map(|name| ratio(PLAIN, name));
    target("÷ ext_authz, fastest authorizer", 0.10, fastest.max_by(|a, b| a.judged.total_cmp(&b.judged)));
    target("÷ api_key_auth with forwarding", 2.0, ratio(PLAIN, NATIVE));
    target("a rate limit over all Envoys ÷ one of each Envoy", 1.25, ratio(LIMITED, LOCAL));
    target("a quota ÷ a rate limit of each Envoy", 1.25, ratio(QUOTA, LOCAL));
    target("credits ÷ a rate limit of each Envoy", 1.25, ratio(CREDITS, LOCAL));
    let whole = |over: &str, under: &str| {
        let both = samples(over).zip(samples(under));
        both.map(|(over, under)| Estimate::of([over, under], |[over, under]| over / under))
    };
    target("a route that names a policy ÷ one that names none, added CPU", 1.25, ratio(POLICY, PLAIN));
    target("one of 1,000 rules ÷ no rules, added CPU", 1.2, ratio(RULES, PLAIN));
    target("a route that names a policy ÷ plain, whole request to an upstream", 1.25, whole(POLICY_UP, KNOWN_UP));
    target("one of 1,000 rules ÷ plain, whole request to an upstream", 1.2, whole(RULES_UP, KNOWN_UP));
    target("unknown key ÷ known key, whole request", 1.0, whole(UNKNOWN_UP, KNOWN_UP));
    target("1,000,000 keys ÷ 1,000 keys", 1.10, ratio(MILLION, PLAIN));
}
