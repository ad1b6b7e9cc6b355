//! Whole verdicts, on cells in memory.

use std::cell::Cell as Slot;

use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId};
use contract::page::{Header, Page, PageWriter, Part};
use contract::pepper::Pepper;
use contract::record::{Budget, Flags, RateLimit, Record};
use serde_json::{Value, json};

use super::*;
use crate::cells::memory::MemoryCells;
use crate::lease::{Holder, hold};
use crate::limiter::Refused;
use crate::store;

const NOW_S: u64 = 1_800_000_000;
const ME: Holder = Holder(1);

struct Bench {
    cells: MemoryCells,
    names: Names,
    config: Config,
    state: Option<State>,
    recent: Recent,
    slices: Slices,
    address: Option<IpAddr>,
    asked: Slot<u32>,
    timed: Slot<u32>,
}

impl Bench {
    fn new(plugin: Value, keys: &[(&str, Record)]) -> Self {
        Self::stored(plugin, keys.iter().map(|(key, record)| (KeyHash::of(key.as_bytes()), record)).collect())
    }

    /// With records under hashes that are not those of keys.
    fn stored(plugin: Value, mut keys: Vec<(KeyHash, &Record)>) -> Self {
        let mut plugin = plugin;
        plugin["control_plane"] = json!({"cluster": "cp"});
        let (cells, names) = (MemoryCells::default(), Names::of("cp", "default"));
        assert!(hold(&cells, &names, ME, 0));
        keys.sort_by_key(|(hash, _)| *hash);
        let mut writer = PageWriter::new();
        for (hash, record) in keys {
            writer.put(&hash, &record.to_bytes().unwrap());
        }
        let (epoch, part) = (Epoch([1; 16]), Part::Snapshot { from: 0, to: BUCKETS });
        let page = writer.finish(&Header { epoch, revision: 1, total_keys: 1, part, filters: 0 }).unwrap();
        store::apply(&cells, &names, ME, &Page::read(&page).unwrap()).unwrap();
        let state = Some(State { epoch, revision: 1, keys: 1, synced_ms: NOW_S * 1_000, filters: 4 });
        let config = Config::parse(plugin.to_string().as_bytes()).unwrap();
        Self {
            cells,
            names,
            config,
            state,
            recent: Recent::default(),
            slices: Slices::default(),
            address: None,
            asked: Slot::new(0),
            timed: Slot::new(0),
        }
    }

    fn ask(&self, key: Option<&str>, policy: Option<&str>) -> Verdict {
        let credential = key.map_or(Credential::Missing, |key| Credential::Presented(KeyHash::of(key.as_bytes())));
        let judge = Judge {
            cells: &self.cells,
            names: &self.names,
            config: &self.config,
            state: self.state,
            recent: &self.recent,
            slices: &self.slices,
            number: None,
            address: || {
                self.asked.set(self.asked.get() + 1);
                self.address
            },
            now_ns: || {
                self.timed.set(self.timed.get() + 1);
                NOW_S * 1_000_000_000
            },
        };
        judge.judge(credential, self.config.policies.find(policy))
    }

    fn outcomes(&self, times: usize, key: Option<&str>, policy: Option<&str>) -> Vec<Outcome> {
        (0..times).map(|_| self.ask(key, policy).outcome).collect()
    }
}

fn record() -> Record {
    Record::plain(KeyId([7; 16]), OwnerId([8; 16]))
}

fn limit(name: &str, requests: u32) -> RateLimit {
    RateLimit { name: name.into(), requests, window_s: 60, burst: requests }
}

fn admitted(outcomes: &[Outcome]) -> usize {
    outcomes.iter().filter(|outcome| outcome.goes_upstream()).count()
}

#[test]
fn a_plain_key_costs_two_reads_one_write_and_no_question() {
    let bench = Bench::new(json!({}), &[("k", record())]);
    let (reads, writes) = (bench.cells.reads.get(), bench.cells.writes.get());
    let verdict = bench.ask(Some("k"), None);
    assert_eq!(
        (verdict.outcome, verdict.shadowed, verdict.cost, verdict.wait),
        (Outcome::Allowed, false, 1, Wait::Usual)
    );
    // Its bucket and its limits.
    assert_eq!((bench.cells.reads.get() - reads, bench.cells.writes.get() - writes, bench.asked.get()), (2, 1, 0));
    assert_eq!(verdict.key.map(|key| key.record.clone()), Some(record()));
}

#[test]
fn shared_limits_are_judged_by_this_envoys_part_and_the_others_whole() {
    let mut own = record();
    own.rate_limits = vec![limit("shared", 8), limit("alone", 8)];
    own.further.alone = 0b10;
    let bench = Bench::new(
        json!({"rate_limit": {"requests": 8, "window_seconds": 60}}),
        &[
            ("k", own),
            ("d", {
                let mut other = record();
                other.key_id = KeyId([9; 16]);
                other
            }),
        ],
    );
    // One of four Envoys.
    assert_eq!(admitted(&bench.outcomes(10, Some("k"), None)), 2);
    assert_eq!(admitted(&bench.outcomes(10, Some("d"), None)), 8);
    let Wait::Limits(limits, Refused { limit, .. }) = bench.ask(Some("k"), None).wait else { panic!("no limits") };
    assert_eq!((limits.len(), limit), (2, 0));
}

#[test]
fn a_policy_adds_its_limit_and_its_cost() {
    let plugin = json!({"rate_limit": null, "policies": {
        "search": {"cost": 5, "rate_limit": {"requests": 3, "window_seconds": 60}},
        "free": {"cost": 0},
    }});
    let bench = Bench::new(plugin, &[("k", record())]);
    assert_eq!(bench.ask(Some("k"), Some("search")).cost, 5);
    assert_eq!(admitted(&bench.outcomes(10, Some("k"), Some("search"))), 2);
    assert_eq!(admitted(&bench.outcomes(10, Some("k"), Some("free"))), 10);
    assert_eq!(bench.ask(Some("k"), Some("free")).cost, 0);
    let Wait::Limits(limits, _) = bench.ask(Some("k"), Some("search")).wait else { panic!("no limits") };
    assert_eq!(limits.iter().map(|limit| limit.name.as_str()).collect::<Vec<_>>(), ["search"]);
}

#[test]
fn requests_without_a_key_are_limited_by_address_where_the_policy_says_so() {
    let plugin = json!({"policies": {
        "open": {"key": "anonymous_allowed", "rate_limit": {"requests": 2, "window_seconds": 60}},
        "wide": {"key": "optional"},
    }});
    let mut bench = Bench::new(plugin, &[("k", record())]);
    bench.address = "192.0.2.1".parse().ok();
    let (anonymous, limited) = (Outcome::Anonymous, Outcome::RateLimited);
    assert_eq!(bench.outcomes(3, None, Some("open")), [anonymous, anonymous, limited]);
    assert_eq!(bench.ask(Some("stranger"), Some("open")).outcome, Outcome::Unknown);
    assert_eq!(bench.ask(Some("k"), Some("open")).outcome, Outcome::Allowed);
    bench.address = "192.0.2.2".parse().ok();
    assert_eq!(bench.outcomes(1, None, Some("open")), [anonymous]);
    let asked = bench.asked.get();
    assert_eq!(bench.outcomes(9, Some("stranger"), Some("wide")), [anonymous; 9]);
    assert_eq!(bench.asked.get(), asked);
}

#[test]
fn an_imported_key_is_found_under_its_peppered_hash_and_only_with_the_pepper() {
    let pepper = |digit: &str| Some(Pepper::parse(&digit.repeat(64)).unwrap());
    let stored = pepper("1").unwrap().hash(&KeyHash::of(b"legacy"));
    let mut bench = Bench::stored(json!({}), vec![(KeyHash::of(b"k"), &record()), (stored, &record())]);
    for (pepper, outcome) in
        [(None, Outcome::Unknown), (pepper("2"), Outcome::Unknown), (pepper("1"), Outcome::Allowed)]
    {
        bench.config.pepper = pepper;
        assert_eq!(bench.ask(Some("legacy"), None).outcome, outcome);
        assert_eq!(bench.ask(Some("k"), None).outcome, Outcome::Allowed);
    }
}

#[test]
fn a_key_bound_to_networks_asks_for_the_address() {
    let mut bound = record();
    bound.further.networks = vec!["192.0.2.0/24".parse().unwrap()];
    let mut bench = Bench::new(json!({}), &[("k", bound)]);
    assert_eq!(bench.ask(Some("k"), None).outcome, Outcome::AddressDenied);
    bench.address = "192.0.2.9".parse().ok();
    assert_eq!(bench.ask(Some("k"), None).outcome, Outcome::Allowed);
    assert_eq!(bench.asked.get(), 2);
}

#[test]
fn stocks_are_spent_only_by_requests_that_the_limits_let_through() {
    let mut metered = record();
    metered.rate_limits = vec![limit("own", 3)];
    metered.further.alone = 1;
    metered.further.quota = Some(Budget { starter: 2, turn: 1, resets_at_s: None });
    let bench = Bench::new(json!({}), &[("k", metered)]);
    let (allowed, quota, limited) = (Outcome::Allowed, Outcome::QuotaExceeded, Outcome::RateLimited);
    assert_eq!(bench.outcomes(5, Some("k"), None), [allowed, allowed, quota, limited, limited]);
    stock::grant(&bench.cells, &bench.names, contract::budget::Stock::Quota, &[7; 16], 3, 1).unwrap();
    assert_eq!(bench.ask(Some("k"), None).outcome, limited);
}

#[test]
fn who_is_refused_for_a_stock_is_told_when_to_come_back() {
    let budget = Some(Budget { starter: 0, turn: 1, resets_at_s: Some(NOW_S + 500) });
    let (mut spent, mut renewing) = (record(), record());
    spent.flags = Flags::QUOTA_EXCEEDED;
    spent.further.quota = budget;
    renewing.further.credits = budget;
    let bench = Bench::new(json!({}), &[("spent", spent), ("renewing", renewing)]);
    let verdict = bench.ask(Some("spent"), None);
    assert_eq!((verdict.outcome, verdict.wait), (Outcome::QuotaExceeded, Wait::Seconds(500)));
    let verdict = bench.ask(Some("renewing"), None);
    assert_eq!((verdict.outcome, verdict.wait), (Outcome::CreditsExhausted, Wait::Renewal));
}

#[test]
fn in_shadow_the_outcome_is_the_same_and_nothing_is_refused() {
    let revoked = Record { flags: Flags::REVOKED, ..record() };
    let policies = json!({"dark": {"shadow": true}, "light": {}});
    let keys = [("k", record()), ("revoked", revoked)];
    let seen = |bench: &Bench, key, policy| {
        let verdict = bench.ask(key, policy);
        (verdict.outcome, verdict.shadowed)
    };
    let mut bench = Bench::new(json!({"policies": policies}), &keys);
    assert_eq!(seen(&bench, Some("revoked"), Some("dark")), (Outcome::Revoked, true));
    assert_eq!(seen(&bench, Some("revoked"), Some("light")), (Outcome::Revoked, false));
    assert_eq!(seen(&bench, Some("k"), Some("dark")), (Outcome::Allowed, false));
    assert_eq!(seen(&bench, None, Some("drak")), (Outcome::PolicyUnknown, false));
    bench.state = None;
    assert_eq!(seen(&bench, Some("k"), Some("dark")), (Outcome::NotReady, true));
    assert_eq!(seen(&bench, Some("k"), Some("light")), (Outcome::NotReady, false));

    let mut bench = Bench::new(json!({"policies": policies, "shadow": true, "max_staleness_seconds": 60}), &keys);
    assert_eq!(seen(&bench, None, Some("drak")), (Outcome::PolicyUnknown, true));
    assert_eq!(seen(&bench, None, None), (Outcome::Missing, true));
    bench.state = bench.state.map(|state| State { synced_ms: 0, ..state });
    assert_eq!(seen(&bench, Some("k"), None), (Outcome::Stale, true));
}

#[test]
fn an_unknown_policy_is_refused_even_where_requests_without_keys_in_store_are_let_in() {
    let mut bench = Bench::new(json!({"on_not_ready": "allow", "policies": {"a": {}}}), &[]);
    bench.state = None;
    assert_eq!(bench.ask(None, Some("b")).outcome, Outcome::PolicyUnknown);
    assert_eq!(bench.ask(None, Some("a")).outcome, Outcome::FailedOpen);
}

#[test]
fn with_one_envoy_the_share_is_the_whole() {
    let mut own = record();
    own.rate_limits = vec![limit("shared", 8)];
    let mut bench = Bench::new(json!({}), &[("k", own)]);
    bench.state = bench.state.map(|state| State { filters: 1, ..state });
    assert_eq!(bench.state.map(|state| state.default_share()), Some(WHOLE));
    assert_eq!(admitted(&bench.outcomes(10, Some("k"), None)), 8);
}

#[test]
fn the_time_is_asked_for_only_where_it_matters() {
    let with = |number: u8, change: fn(&mut Record)| {
        let mut record = Record { key_id: KeyId([number; 16]), ..record() };
        change(&mut record);
        record
    };
    let ended = with(1, |record| record.expires_at_s = Some(NOW_S));
    let ends = with(2, |record| record.expires_at_s = Some(NOW_S + 1));
    let limited = with(3, |record| record.rate_limits = vec![limit("own", 1)]);
    let keys = [("plain", with(0, |_| ())), ("ended", ended), ("ends", ends), ("limited", limited)];
    let bench = Bench::new(json!({"rate_limit": null}), &keys);
    let asks = |key| {
        let before = bench.timed.get();
        (bench.ask(key, None).outcome, bench.timed.get() > before)
    };
    assert_eq!(asks(Some("plain")), (Outcome::Allowed, false));
    assert_eq!(asks(Some("stranger")), (Outcome::Unknown, false));
    assert_eq!(asks(None), (Outcome::Missing, false));
    assert_eq!(asks(Some("ended")), (Outcome::Expired, true));
    assert_eq!(asks(Some("ends")), (Outcome::Allowed, true));
    assert_eq!(asks(Some("limited")), (Outcome::Allowed, true));
}
