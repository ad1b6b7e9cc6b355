//! Random lives of keys, decided twice: by the decision, from records that travelled in updates, and by a reference that is as
//! simple as it can be. In 100,000 steps they never differ.

#![cfg(not(target_family = "wasm"))]

mod reference;

use std::collections::BTreeMap;
use std::net::IpAddr;

use contract::decision::{Facts, Presented, decide};
use contract::definition::{Definition, Definitions};
use contract::hash::KeyHash;
use contract::id::{Epoch, KeyId, OwnerId};
use contract::key::KeyKind;
use contract::outcome::Outcome;
use contract::policy::{KeyNeed, Policy, ScopeNeed};
use contract::rate::Rate;
use contract::record::{Budget, Flags, Per, RateLimit, Record, Requires};
use contract::update::{Entry, Header, Part, Update, UpdateWriter};

use reference::Reference;

const STEPS: usize = 100_000;
const OWNERS: usize = 4;
const KEYS: usize = 12;
const SCOPES: [&str; 4] = ["orders:read", "orders:write", "orders:*", "stock:read"];
const ADDRESSES: [&str; 4] = ["192.0.2.7", "198.51.100.7", "2001:db8::7", "2001:db9::7"];
const NETWORKS: [(&str, [bool; 4]); 3] = [
    ("192.0.2.0/24", [true, false, false, false]),
    ("198.51.100.7", [false, true, false, false]),
    ("2001:db8::/32", [false, false, true, false]),
];

/// xorshift64*: enough for drawing steps, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % bound
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn some_of<T: Clone>(&mut self, all: &[T]) -> Vec<T> {
        all.iter().filter(|_| self.once_in(3)).cloned().collect()
    }
}

/// What is true of a key. Both sides start from this.
#[derive(Clone, Default)]
struct Key {
    owner: usize,
    is_test: bool,
    /// The secrets, the present one last, with the end of those that were retired.
    secrets: Vec<(String, Option<u64>)>,
    revoked: bool,
    disabled: bool,
    expires_at_s: Option<u64>,
    scopes: Vec<&'static str>,
    role: bool,
    plan: bool,
    /// Places in [`NETWORKS`].
    networks: Vec<usize>,
    limits: Vec<RateLimit>,
    cost: u32,
    quota: Option<Fill>,
}

/// What is true of a quota or a balance.
#[derive(Clone, Copy, Default)]
struct Fill {
    fill: u32,
    used_up: bool,
    resets_at_s: Option<u64>,
}

#[derive(Default)]
struct Truth {
    now_ns: u64,
    keys: Vec<Key>,
    credits: [Option<Fill>; OWNERS],
    role_scopes: Vec<&'static str>,
    plan_limits: Vec<RateLimit>,
    /// Secrets that are not known any longer, since the last change.
    forgotten: Vec<String>,
}

impl Truth {
    fn now_s(&self) -> u64 {
        self.now_ns / 1_000_000_000
    }
}

/// Judges from records, as a filter does.
#[derive(Default)]
struct Filter {
    records: BTreeMap<KeyHash, Vec<u8>>,
    definitions: Definitions,
    arrivals: BTreeMap<(KeyId, String), u64>,
}

fn key_id(number: usize) -> KeyId {
    KeyId([u8::try_from(number).unwrap() + 1; 16])
}

fn owner_id(number: usize) -> OwnerId {
    OwnerId([u8::try_from(number).unwrap() + 101; 16])
}

fn record(truth: &Truth, number: usize, generation: usize) -> Record {
    let key = &truth.keys[number];
    let (credits, quota) = (truth.credits[key.owner], key.quota);
    let budget = |fill: Fill| Budget { fill: fill.fill, resets_at_s: fill.resets_at_s, per: Per::Key };
    let used_up = |fill: Option<Fill>| fill.is_some_and(|fill| fill.used_up);
    let mut record = Record::plain(key_id(number), owner_id(key.owner));
    record.requires = Requires(
        u32::from(key.plan) * Requires::PLAN.0
            + u32::from(!key.networks.is_empty()) * Requires::NETWORKS.0
            + u32::from(quota.is_some() || credits.is_some()) * Requires::BUDGETS.0,
    );
    record.generation = u32::try_from(generation).unwrap() + 1;
    record.flags = Flags::default()
        .with(Flags::REVOKED, key.revoked)
        .with(Flags::DISABLED, key.disabled)
        .with(Flags::QUOTA_EXCEEDED, used_up(quota))
        .with(Flags::CREDITS_EXHAUSTED, used_up(credits));
    record.expires_at_s = [key.expires_at_s, key.secrets[generation].1].into_iter().flatten().min();
    record.kind = if key.is_test { KeyKind::Test } else { KeyKind::Live };
    record.cost = key.cost;
    record.rate_limits.clone_from(&key.limits);
    record.scopes = key.scopes.iter().map(ToString::to_string).collect();
    record.roles = if key.role { vec![1] } else { vec![] };
    record.plan = key.plan.then_some(2);
    record.networks = key.networks.iter().map(|place| NETWORKS[*place].0.parse().unwrap()).collect();
    record.quota = quota.map(budget);
    record.credits = credits.map(budget);
    record
}

impl Filter {
    /// An update of all that there is, and back.
    fn sync(&mut self, truth: &Truth) {
        let mut update = UpdateWriter::default();
        let scopes = truth.role_scopes.iter().map(ToString::to_string).collect();
        let role = Definition { scopes, ..Definition::default() };
        let plan = Definition { rate_limits: truth.plan_limits.clone(), ..Definition::default() };
        update.define(1, &role.to_bytes().unwrap());
        update.define(2, &plan.to_bytes().unwrap());
        for (number, key) in truth.keys.iter().enumerate() {
            for (generation, (secret, _)) in key.secrets.iter().enumerate() {
                let record = record(truth, number, generation).to_bytes().unwrap();
                update.put(&KeyHash::of(secret.as_bytes()), &record);
            }
        }
        for secret in &truth.forgotten {
            update.remove(&KeyHash::of(secret.as_bytes()));
        }
        let part = Part::Changes { after: 0 };
        let header = Header { epoch: Epoch([0; 16]), revision: 1, total_keys: 0, part };
        let bytes = update.finish(&header).unwrap();
        let mut definitions = self.definitions.by_number().clone();
        for entry in Update::read(&bytes).unwrap().entries() {
            match entry {
                Entry::Put { hash, record } => drop(self.records.insert(hash, record.to_vec())),
                Entry::Define { number, definition } => {
                    drop(definitions.insert(number, Definition::from_bytes(&definition).unwrap()));
                }
                Entry::Remove { hash } => drop(self.records.remove(&hash)),
                Entry::Undefine { number } => panic!("definition {number} was never removed"),
            }
        }
        self.definitions = Definitions::new(definitions);
    }

    fn judge(&mut self, secret: Option<&str>, policy: &Policy, address: IpAddr, now_ns: u64) -> Outcome {
        let bytes = secret.and_then(|secret| self.records.get(&KeyHash::of(secret.as_bytes())));
        let record = bytes.map(|bytes| Record::from_bytes(bytes).unwrap());
        let presented = match (secret, &record) {
            (None, _) => Presented::Missing,
            (Some(_), None) => Presented::Unknown,
            (Some(_), Some(record)) => Presented::Key(record),
        };
        let now_s = now_ns / 1_000_000_000;
        let facts = Facts { policy, definitions: &self.definitions, address: Some(address), ..Facts::at(now_s) };
        let outcome = decide(presented, &facts);
        let Some(record) = record.filter(|_| outcome == Outcome::Allowed) else { return outcome };
        let limits = self.definitions.rate_limits(&record);
        let mut taken = Vec::new();
        for limit in limits.iter().chain(&policy.rate_limits.key) {
            let of = (record.key_id, limit.name.clone());
            match Rate::of(limit).take(self.arrivals.get(&of).copied(), now_ns) {
                Ok(arrival) => taken.push((of, arrival)),
                Err(_) => return Outcome::RateLimited,
            }
        }
        self.arrivals.extend(taken);
        Outcome::Allowed
    }
}

/// One run: the two sides, what is true, and the dice.
struct Run {
    dice: Dice,
    truth: Truth,
    filter: Filter,
    reference: Reference,
    secrets: usize,
}

impl Run {
    fn secret(&mut self) -> String {
        self.secrets += 1;
        format!("secret {}", self.secrets)
    }

    fn limits(&mut self) -> Vec<RateLimit> {
        // Intervals that are whole nanoseconds, so that both sides count in the same unit.
        let all = [("second", 10, 1, 2), ("minute", 30, 60, 3), ("hour", 100, 3_600, 10)];
        let all = all.map(|(name, requests, window_s, burst)| RateLimit {
            name: name.into(),
            requests,
            window_s,
            burst,
            shared: true,
            per: Per::Key,
        });
        self.dice.some_of(&all)
    }

    fn create(&mut self) {
        let secret = self.secret();
        let key = Key {
            owner: self.dice.below(OWNERS),
            is_test: self.dice.once_in(3),
            secrets: vec![(secret, None)],
            scopes: self.dice.some_of(&SCOPES),
            role: self.dice.once_in(3),
            plan: self.dice.once_in(3),
            networks: if self.dice.once_in(3) { self.dice.some_of(&[0, 1, 2]) } else { vec![] },
            limits: self.limits(),
            cost: u32::try_from(self.dice.below(4)).unwrap(),
            quota: self.dice.once_in(3).then_some(Fill { fill: 1, ..Fill::default() }),
            expires_at_s: self.dice.once_in(4).then(|| self.truth.now_s() + 600),
            ..Key::default()
        };
        self.truth.keys.push(key);
    }

    fn change(&mut self) {
        let now_s = self.truth.now_s();
        if self.truth.keys.len() < KEYS && self.dice.once_in(2) {
            return self.create();
        }
        let number = self.dice.below(self.truth.keys.len().max(1));
        let owner = self.dice.below(OWNERS);
        match self.dice.below(14) {
            0 if self.truth.keys[number].secrets.len() < 6 => {
                let grace_s = self.dice.below(60) as u64;
                let next = self.secret();
                let secrets = &mut self.truth.keys[number].secrets;
                secrets.last_mut().unwrap().1 = Some(now_s + grace_s);
                secrets.push((next, None));
            }
            1 => self.truth.keys[number].disabled ^= true,
            2 if self.dice.once_in(8) => self.truth.keys[number].revoked = true,
            3 if self.dice.once_in(20) => {
                self.truth.keys.iter_mut().filter(|key| key.owner == owner).for_each(|key| key.revoked = true);
            }
            4 => self.truth.role_scopes = self.dice.some_of(&SCOPES),
            5 => self.truth.plan_limits = self.limits(),
            6 => self.truth.keys[number].limits = self.limits(),
            // A top-up.
            7 => {
                let fill = self.truth.credits[owner].map_or(1, |fill| fill.fill + 1);
                self.truth.credits[owner] = Some(Fill { fill, ..Fill::default() });
            }
            8 => {
                let resets_at_s = self.dice.once_in(2).then_some(now_s + 5);
                for fill in [&mut self.truth.keys[number].quota, &mut self.truth.credits[owner]].into_iter().flatten() {
                    (fill.used_up, fill.resets_at_s) = (true, resets_at_s);
                }
            }
            9 => {
                if let Some(fill) = &mut self.truth.keys[number].quota {
                    *fill = Fill { fill: fill.fill + 1, ..Fill::default() };
                }
            }
            10 => self.truth.keys[number].expires_at_s = self.dice.once_in(2).then_some(now_s + 30),
            // Keys end, and others take their places: here under the same id, which remembers what was used.
            11 | 12 => {
                let secret = self.secret();
                for key in self.truth.keys.iter_mut().filter(|key| key.revoked) {
                    (key.revoked, key.disabled, key.expires_at_s) = (false, false, None);
                }
                let secrets = &mut self.truth.keys[number].secrets;
                secrets.push((secret, None));
                // The oldest are forgotten, as filters forget what ended long ago.
                let forgotten = secrets.drain(..secrets.len().saturating_sub(6)).map(|(secret, _)| secret);
                self.truth.forgotten = forgotten.collect();
            }
            _ => self.truth.keys[number].networks = self.dice.some_of(&[0, 1, 2]),
        }
    }

    fn policy(&mut self) -> Policy {
        let mut policy = Policy::default();
        match self.dice.below(9) {
            0 => policy.key = KeyNeed::AnonymousAllowed,
            1 => policy.key = KeyNeed::Optional,
            2 => policy.scopes = ScopeNeed::All(self.wanted()),
            3 => policy.scopes = ScopeNeed::Any(self.wanted()),
            4 => policy.cost = Some(u32::try_from(self.dice.below(3)).unwrap()),
            5 => {
                let limit = RateLimit {
                    name: "route".into(),
                    requests: 2,
                    window_s: 1,
                    burst: 2,
                    shared: false,
                    per: Per::Key,
                };
                policy.rate_limits.key = vec![limit];
            }
            6 => policy.kinds = vec![if self.dice.once_in(2) { KeyKind::Live } else { KeyKind::Test }],
            _ => {}
        }
        if policy.key == KeyNeed::Optional && self.dice.once_in(4) {
            policy.kinds = vec![KeyKind::Live];
        }
        policy
    }

    fn wanted(&mut self) -> Vec<String> {
        let wanted = self.dice.some_of(&["orders:read", "orders:write", "stock:read"]);
        if wanted.is_empty() { vec!["orders:read".into()] } else { wanted.into_iter().map(Into::into).collect() }
    }

    fn request(&mut self) -> (Outcome, Outcome) {
        let key = &self.truth.keys[self.dice.below(self.truth.keys.len())];
        let secret = match self.dice.below(20) {
            0 => None,
            1 => Some("nobody's".to_owned()),
            // Mostly the newest secrets: the others have all ended long ago.
            _ => key.secrets.iter().rev().nth(self.dice.below(4).min(self.dice.below(3))).map(|(text, _)| text.clone()),
        };
        let (policy, address) = (self.policy(), self.dice.below(ADDRESSES.len()));
        let client = ADDRESSES[address].parse().unwrap();
        let judged = self.filter.judge(secret.as_deref(), &policy, client, self.truth.now_ns);
        (judged, self.reference.judge(&self.truth, secret.as_deref(), &policy, address))
    }
}

fn run(seed: u64) -> BTreeMap<Outcome, usize> {
    let truth = Truth { now_ns: 1_800_000_000_000_000_000, ..Truth::default() };
    let mut run =
        Run { dice: Dice(seed), truth, filter: Filter::default(), reference: Reference::default(), secrets: 0 };
    let mut outcomes = BTreeMap::new();
    run.create();
    run.filter.sync(&run.truth);
    for step in 0..STEPS {
        run.truth.now_ns += match run.dice.below(40) {
            0 if run.dice.once_in(8) => 20_000_000_000,
            1..4 => 300_000_000,
            _ => 1_000_000 * run.dice.below(20) as u64,
        };
        match run.dice.below(20) {
            0 => {
                run.truth.forgotten.clear();
                run.change();
                run.filter.sync(&run.truth);
            }
            _ => {
                let (judged, expected) = run.request();
                assert_eq!(judged, expected, "step {step} of seed {seed}");
                *outcomes.entry(judged).or_default() += 1;
            }
        }
    }
    outcomes
}

#[test]
fn decision_and_reference_agree_in_a_hundred_thousand_steps_and_meet_every_outcome() {
    // A new seed each time, and one that stays.
    let fresh = std::time::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs() | 1);
    for seed in [0x5eed, fresh] {
        let outcomes = run(seed);
        let met: Vec<Outcome> = outcomes.keys().copied().collect();
        let expected = [
            Outcome::Allowed,
            Outcome::Missing,
            Outcome::Unknown,
            Outcome::Revoked,
            Outcome::Expired,
            Outcome::Disabled,
            Outcome::ScopeDenied,
            Outcome::AddressDenied,
            Outcome::RateLimited,
            Outcome::QuotaExceeded,
            Outcome::CreditsExhausted,
            Outcome::Anonymous,
            Outcome::KindDenied,
        ];
        assert_eq!(met, expected, "seed {seed}: {outcomes:?}");
        // Not one of them is rare.
        assert!(outcomes.values().all(|count| *count > 100), "seed {seed}: {outcomes:?}");
    }
}
