//! The reference: as simple as it can be, and slow.

use super::*;

/// Judges from what is true, in the plainest way.
#[derive(Default)]
pub(super) struct Reference {
    /// By key and limit: nanoseconds of work that are owed, and since when.
    pub(super) debts: BTreeMap<(usize, String), (u64, u64)>,
}

impl Reference {
    pub(super) fn judge(&mut self, truth: &Truth, secret: Option<&str>, policy: &Policy, address: usize) -> Outcome {
        let anonymous = |allowed: bool, outcome| if allowed { Outcome::Anonymous } else { outcome };
        let Some(secret) = secret else {
            return anonymous(policy.key != KeyNeed::Required, Outcome::Missing);
        };
        let optional = policy.key == KeyNeed::Optional;
        let of = |key: &Key| key.secrets.iter().position(|(text, _)| text == secret);
        let found = truth.keys.iter().enumerate().find_map(|(number, key)| Some((number, key, of(key)?)));
        let Some((number, key, generation)) = found else { return anonymous(optional, Outcome::Unknown) };
        let now_s = truth.now_s();
        let passed = |end: Option<u64>| end.is_some_and(|end| end <= now_s);
        if key.revoked {
            return anonymous(optional, Outcome::Revoked);
        }
        if passed(key.expires_at_s) || passed(key.secrets[generation].1) {
            return anonymous(optional, Outcome::Expired);
        }
        if key.disabled {
            return anonymous(optional, Outcome::Disabled);
        }
        let kind = if key.is_test { KeyKind::Test } else { KeyKind::Live };
        if !policy.kinds.is_empty() && policy.kinds != [kind] {
            return anonymous(optional, Outcome::KindDenied);
        }
        if !key.networks.is_empty() && !key.networks.iter().any(|place| NETWORKS[*place].1[address]) {
            return anonymous(optional, Outcome::AddressDenied);
        }
        let role: &[&str] = if key.role { &truth.role_scopes } else { &[] };
        let has = |wanted: &String| {
            let star =
                wanted.starts_with("orders:") && (key.scopes.contains(&"orders:*") || role.contains(&"orders:*"));
            star || key.scopes.contains(&wanted.as_str()) || role.contains(&wanted.as_str())
        };
        let scopes = match &policy.scopes {
            ScopeNeed::None => true,
            ScopeNeed::All(wanted) => wanted.iter().filter(|scope| has(scope)).count() == wanted.len(),
            ScopeNeed::Any(wanted) => wanted.iter().filter(|scope| has(scope)).count() > 0,
        };
        if !scopes {
            return Outcome::ScopeDenied;
        }
        let price = policy.cost.unwrap_or(key.cost);
        let shut = |fill: &Fill| fill.used_up && !passed(fill.resets_at_s);
        if key.quota.as_ref().is_some_and(shut) {
            return Outcome::QuotaExceeded;
        }
        if price > 0 && truth.credits[key.owner].as_ref().is_some_and(shut) {
            return Outcome::CreditsExhausted;
        }
        let own = if key.limits.is_empty() && key.plan { &truth.plan_limits } else { &key.limits };
        let mut debts = Vec::new();
        for limit in own.iter().chain(&policy.rate_limits.key) {
            let each = u64::from(limit.window_s) * 1_000_000_000 / u64::from(limit.requests);
            let most = each * u64::from(limit.burst);
            let of = (number, limit.name.clone());
            let (owed, since) = self.debts.get(&of).copied().unwrap_or((0, truth.now_ns));
            let owed = owed.saturating_sub(truth.now_ns - since).min(most);
            if owed + each > most {
                return Outcome::RateLimited;
            }
            debts.push((of, (owed + each, truth.now_ns)));
        }
        self.debts.extend(debts);
        Outcome::Allowed
    }
}
