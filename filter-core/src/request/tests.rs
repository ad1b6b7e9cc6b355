//! Requests on a mock host: every decision, and in [`responses`] every response.

use std::net::IpAddr;

use contract::definition::Definition;
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId};
use contract::pepper::Pepper;
use contract::policy::NamedPolicy;
use contract::record::{Budget, Flags, Per, RateLimit, Record};
use contract::update::{Header, Part, Update, UpdateWriter};
use contract::usage::Count;
use serde_json::{Value, json};

use super::*;
use crate::limits::retry_after::Exceeded;
use crate::mock::{MockHost, MockStream, TestData};
use crate::shared::election::{NodeId, acquire};
use crate::shared::{CellKey, SharedData};
use crate::store::state::StoreState;
use crate::store::{CellStore, state};
use crate::usage::codec::read_counts;

mod responses;

const NOW_S: u64 = 1_800_000_000;
const ME: NodeId = NodeId(1);

/// One VM with a store of some keys.
struct Bench {
    vm: Vm<MockHost, CellStore<MockHost>>,
    config: Config,
    address: Option<IpAddr>,
}

impl Bench {
    fn new(plugin: Value, keys: &[(&str, Record)]) -> Self {
        Self::stored(plugin, keys.iter().map(|(key, record)| (KeyHash::of(key.as_bytes()), record)).collect())
    }

    /// With records under hashes that are not those of keys. The field `policies` of the plugin has the policies of the store.
    fn stored(mut plugin: Value, mut keys: Vec<(KeyHash, &Record)>) -> Self {
        let policies = plugin.as_object_mut().unwrap().remove("policies").unwrap_or_default();
        let bench = Self::empty(plugin);
        keys.sort_by_key(|(hash, _)| *hash);
        let mut writer = UpdateWriter::default();
        for ((name, fields), number) in policies.as_object().into_iter().flatten().zip(1..) {
            writer.define(number, &Definition::from(policy(name, fields)).to_bytes().unwrap());
        }
        for (hash, record) in keys {
            writer.put(&hash, &record.to_bytes().unwrap());
        }
        let (epoch, part) = (Epoch([1; 16]), Part::Snapshot { from: 0, to: BUCKETS });
        let update = writer.finish(&Header { epoch, revision: 1, total_keys: 1, part }).unwrap();
        crate::store::write(bench.data(), ME, &Update::read(&update).unwrap()).unwrap();
        bench.set_state(NOW_S * 1_000);
        bench
    }

    /// Before the first sync.
    fn empty(mut plugin: Value) -> Self {
        plugin["control_plane"] = json!({"cluster": "cp"});
        let host = MockHost::default();
        host.set_now_ms(NOW_S * 1_000);
        let data = SharedData::new(host, "cp", "default");
        assert!(acquire(&data, ME, 0));
        let vm = Vm::new(data.clone(), CellStore::new(data));
        let config = Config::parse(plugin.to_string().as_bytes()).unwrap();
        Self { vm, config, address: None }
    }

    fn set_state(&self, synced_ms: u64) {
        let state = StoreState { epoch: Epoch([1; 16]), revision: 1, keys: 1, synced_ms };
        state::set(self.data(), ME, &state).unwrap();
        self.vm.set_state(state);
    }

    fn data(&self) -> &TestData {
        &self.vm.data
    }

    fn host(&self) -> &MockHost {
        self.vm.host()
    }

    fn request<'a>(&self, headers: impl IntoIterator<Item = (&'a str, &'a str)>, policy: Option<&str>) -> MockStream {
        let mut stream = MockStream::with(headers);
        stream.policy = policy.map(str::to_owned);
        stream.address = self.address;
        stream
    }

    /// The verdict on a request, without the response.
    fn ask(&self, key: Option<&str>, policy: Option<&str>) -> Verdict {
        self.ask_with(key, policy).0
    }

    fn ask_with(&self, key: Option<&str>, policy: Option<&str>) -> (Verdict, MockStream) {
        let stream = self.request(key.map(|key| ("x-api-key", key)), policy);
        let time = RequestTime::new(self.host());
        let definitions = self.vm.keys.definitions();
        let (vm, config, waited) = (&self.vm, &self.config, Waited::default());
        let request = Request { vm, config, definitions: &definitions, time, waited };
        let (verdict, _) = request.verify(&stream).expect("no request waits here");
        (verdict, stream)
    }

    /// A request from its headers to the response.
    fn send<'a>(
        &self,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
        policy: Option<&str>,
    ) -> (Flow, MockStream) {
        let mut stream = self.request(headers, policy);
        let flow = handle(&self.vm, &self.config, &mut stream, Waited::default());
        (flow, stream)
    }

    fn outcomes(&self, times: usize, key: Option<&str>, policy: Option<&str>) -> Vec<Outcome> {
        (0..times).map(|_| self.ask(key, policy).outcome).collect()
    }

    /// Publishes the counts of the VM, and takes them.
    fn counts(&self) -> Vec<Count> {
        self.vm.tick(NOW_S * 1_000);
        let cell = self.data().get(CellKey::Usage(0)).unwrap();
        self.data().put(CellKey::Usage(0), &[], Some(cell.version)).unwrap();
        read_counts(&cell.value)
    }
}

fn record() -> Record {
    Record::plain(KeyId([7; 16]), OwnerId([8; 16]))
}

/// A policy that differs in these fields from one that requires a key and nothing else.
fn policy(name: &str, fields: &Value) -> NamedPolicy {
    fn overlay(value: &mut Value, fields: &Value) {
        match (value, fields) {
            (Value::Object(value), Value::Object(fields)) => {
                fields.iter().for_each(|(name, field)| overlay(&mut value[name], field));
            }
            (value, field) => *value = field.clone(),
        }
    }
    let mut value = serde_json::to_value(NamedPolicy { name: name.into(), ..NamedPolicy::default() }).unwrap();
    let own = ["matches", "from_annotation"];
    for (field, content) in fields.as_object().unwrap() {
        let part = if own.contains(&field.as_str()) { &mut value[field] } else { &mut value["policy"][field] };
        overlay(part, content);
    }
    serde_json::from_value(value).unwrap()
}

fn limit(name: &str, requests: u32) -> RateLimit {
    RateLimit { name: name.into(), requests, window_s: 60, burst: requests, shared: false, per: Per::Key }
}

fn admitted(outcomes: &[Outcome]) -> usize {
    outcomes.iter().filter(|outcome| outcome.goes_upstream()).count()
}

#[test]
fn a_plain_key_costs_three_reads_and_one_write_of_cells_if_the_host_keeps_no_generation() {
    let bench = Bench::new(json!({}), &[("k", record())]);
    bench.vm.keys.definitions();
    let (reads, writes) = (bench.host().reads(), bench.host().writes());
    let (verdict, stream) = bench.ask_with(Some("k"), None);
    assert_eq!(
        (verdict.outcome, verdict.shadowed, verdict.cost, verdict.wait),
        (Outcome::Allowed, false, 1, RetryAfter::Usual)
    );
    // The version of the policies, the key's bucket and its limits.
    assert_eq!((bench.host().reads() - reads, bench.host().writes() - writes), (3, 1));
    assert_eq!(stream.take_reads(), ["x-api-key"]);
    assert_eq!(verdict.key.map(|key| key.record.clone()), Some(record()));
}

#[test]
fn keys_without_limits_have_that_of_the_filter() {
    let mut own = record();
    own.rate_limits = vec![limit("first", 2), limit("second", 9)];
    let plain = Record { key_id: KeyId([9; 16]), ..record() };
    let bench = Bench::new(json!({"rate_limit": {"requests": 8, "window": "60s"}}), &[("k", own), ("d", plain)]);
    assert_eq!(admitted(&bench.outcomes(10, Some("k"), None)), 2);
    assert_eq!(admitted(&bench.outcomes(10, Some("d"), None)), 8);
    let RetryAfter::Limits(limits, Exceeded { limit, .. }) = bench.ask(Some("k"), None).wait else {
        panic!("no limits")
    };
    assert_eq!((limits.len(), limit), (2, 0));
}

#[test]
fn a_policy_adds_its_limit_and_its_cost() {
    let plugin = json!({"rate_limit": null, "policies": {
        "search": {"cost": 5, "rate_limits": {"key": [limit("search.minute", 3)]}},
        "free": {"cost": 0},
    }});
    let bench = Bench::new(plugin, &[("k", record())]);
    assert_eq!(bench.ask(Some("k"), Some("search")).cost, 5);
    assert_eq!(admitted(&bench.outcomes(10, Some("k"), Some("search"))), 2);
    assert_eq!(admitted(&bench.outcomes(10, Some("k"), Some("free"))), 10);
    assert_eq!(bench.ask(Some("k"), Some("free")).cost, 0);
    let RetryAfter::Limits(limits, _) = bench.ask(Some("k"), Some("search")).wait else { panic!("no limits") };
    assert_eq!(limits.iter().map(|limit| limit.name.as_str()).collect::<Vec<_>>(), ["search.minute"]);
}

#[test]
fn requests_without_a_key_are_limited_by_address_if_the_policy_has_a_limit() {
    let plugin = json!({"policies": {
        "open": {"key": "anonymous_allowed", "rate_limits": {"address": [limit("open.minute", 2)]}},
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
    let (verdict, stream) = bench.ask_with(Some("stranger"), Some("wide"));
    assert_eq!((verdict.outcome, stream.take_reads()), (anonymous, vec!["x-api-key".into(), "policy".into()]));
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
fn only_a_key_bound_to_networks_needs_the_address() {
    let mut bound = record();
    bound.networks = vec!["192.0.2.0/24".parse().unwrap()];
    let mut bench = Bench::new(json!({}), &[("k", bound)]);
    assert_eq!(bench.ask(Some("k"), None).outcome, Outcome::AddressDenied);
    bench.address = "192.0.2.9".parse().ok();
    let (verdict, stream) = bench.ask_with(Some("k"), None);
    assert_eq!((verdict.outcome, stream.take_reads()), (Outcome::Allowed, vec!["x-api-key".into(), "address".into()]));
}

#[test]
fn a_refusal_by_the_record_for_quota_or_credits_says_when_to_retry() {
    let budget = |resets_at_s| Some(Budget { fill: 1, resets_at_s, per: Per::Key });
    let of = |number: u8, flags| Record { key_id: KeyId([number; 16]), flags, ..record() };
    let quota = Record { quota: budget(Some(NOW_S + 500)), ..of(1, Flags::QUOTA_EXCEEDED) };
    let credits = Record { credits: budget(Some(NOW_S + 7)), ..of(2, Flags::CREDITS_EXHAUSTED) };
    let for_good = Record { credits: budget(None), ..of(3, Flags::CREDITS_EXHAUSTED) };
    let bench = Bench::new(json!({}), &[("quota", quota), ("credits", credits), ("for good", for_good)]);
    for (key, outcome, wait) in [
        ("quota", Outcome::QuotaExceeded, RetryAfter::Seconds(500)),
        ("credits", Outcome::CreditsExhausted, RetryAfter::Seconds(7)),
        ("for good", Outcome::CreditsExhausted, RetryAfter::Usual),
    ] {
        let verdict = bench.ask(Some(key), None);
        assert_eq!((verdict.outcome, verdict.wait), (outcome, wait));
    }
}

#[test]
fn shadow_mode_keeps_the_outcome_and_refuses_nothing() {
    let revoked = Record { flags: Flags::REVOKED, ..record() };
    let policies = json!({"dark": {"shadow": true}, "light": {}});
    let keys = [("k", record()), ("revoked", revoked)];
    let seen = |bench: &Bench, key, policy| {
        let verdict = bench.ask(key, policy);
        (verdict.outcome, verdict.shadowed)
    };
    let bench = Bench::new(json!({"policies": policies}), &keys);
    assert_eq!(seen(&bench, Some("revoked"), Some("dark")), (Outcome::Revoked, true));
    assert_eq!(seen(&bench, Some("revoked"), Some("light")), (Outcome::Revoked, false));
    assert_eq!(seen(&bench, Some("k"), Some("dark")), (Outcome::Allowed, false));
    assert_eq!(seen(&bench, None, Some("drak")), (Outcome::PolicyUnknown, false));
    // Before the first sync no policy is known.
    let bench = Bench::empty(json!({}));
    assert_eq!(seen(&bench, Some("k"), Some("dark")), (Outcome::NotReady, false));

    let bench = Bench::new(json!({"policies": policies, "shadow": true, "max_staleness": "60s"}), &keys);
    assert_eq!(seen(&bench, None, Some("drak")), (Outcome::PolicyUnknown, true));
    assert_eq!(seen(&bench, None, None), (Outcome::Missing, true));
    bench.set_state(0);
    assert_eq!(seen(&bench, Some("k"), None), (Outcome::Stale, true));
}

#[test]
fn an_unknown_policy_is_refused_even_if_the_failure_mode_allows_requests() {
    let plugin = json!({"failure_mode": {"stale": "allow"}, "max_staleness": "60s", "policies": {"a": {}}});
    let bench = Bench::new(plugin, &[]);
    bench.set_state(0);
    assert_eq!(bench.ask(None, Some("b")).outcome, Outcome::PolicyUnknown);
    assert_eq!(bench.ask(None, Some("a")).outcome, Outcome::FailedOpen);
}

#[test]
fn the_first_source_that_names_a_policy_decides() {
    let plugin = |sources: Value| {
        json!({"policy_sources": sources, "policies": {
            "a": {"cost": 1}, "b": {"cost": 2}, "platform": {"cost": 3}, "team": {"cost": 4, "from_annotation": true},
            "rule": {"cost": 5, "matches": [{"hosts": [], "path": {"prefix": "/rule"}, "methods": [], "header": null}]},
            "default": {"cost": 9},
        }})
    };
    let keys = [("k", record())];
    let cost = |sources: Value, change: &dyn Fn(&mut MockStream)| {
        let bench = Bench::new(plugin(sources), &keys);
        let mut stream = bench.request([("x-api-key", "k"), (":path", "/rule/1"), (":authority", "h")], None);
        change(&mut stream);
        let definitions = bench.vm.keys.definitions();
        let time = RequestTime::new(bench.host());
        let request = Request {
            vm: &bench.vm,
            config: &bench.config,
            definitions: &definitions,
            time,
            waited: Waited::default(),
        };
        let (verdict, _) = request.verify(&stream).unwrap();
        (verdict.outcome != Outcome::PolicyUnknown).then_some(verdict.cost)
    };
    let all = json!(["route_metadata", "virtual_host_metadata", {"annotation": "p"}, {"route_name_prefix": "p:"},
        "route_name", "rules"]);
    let name = |text: &str| Some(text.to_owned());
    for (expected, change) in [
        (Some(5), &(|_: &mut MockStream| ()) as &dyn Fn(&mut MockStream)),
        (Some(1), &|s| (s.policy, s.host_policy) = (name("a"), name("b"))),
        (Some(2), &|s| s.host_policy = name("b")),
        (None, &|s| (s.policy, s.host_policy) = (name("x"), name("b"))),
        (Some(4), &|s| s.annotation = name("team")),
        (None, &|s| s.annotation = name("platform")),
        (None, &|s| s.annotation = name("none")),
        (None, &|s| s.route_name = name("p:platform")),
        (Some(4), &|s| s.route_name = name("p:team")),
        (None, &|s| s.route_name = name("p:none")),
        (None, &|s| s.route_name = name("platform")),
        (Some(4), &|s| s.route_name = name("team")),
        // Every route may have a name.
        (Some(5), &|s| s.route_name = name("none")),
    ] {
        assert_eq!(cost(all.clone(), change), expected);
    }
    assert_eq!(cost(json!([]), &|s| s.policy = name("a")), Some(9));
    // A path that can be read in several ways.
    assert_eq!(cost(json!(["rules"]), &|s| s.push(":path", b"/rule/..;/x")), Some(5), "the first line counts");
    assert_eq!(cost(json!(["route_name"]), &|s| s.policy = name("a")), Some(9));
}

#[test]
fn without_policies_no_source_is_asked_and_rules_ask_only_for_what_they_look_at() {
    let reads = |policies: Value| {
        let sources = json!(["rules"]);
        let plugin = if policies.as_object().is_some_and(serde_json::Map::is_empty) {
            json!({})
        } else {
            json!({"policies": policies, "policy_sources": sources})
        };
        let bench = Bench::new(plugin, &[("k", record())]);
        let stream =
            bench.request([("x-api-key", "k"), (":path", "/a"), (":method", "GET"), (":authority", "a.b")], Some("a"));
        let definitions = bench.vm.keys.definitions();
        let time = RequestTime::new(bench.host());
        let waited = Waited::default();
        Request { vm: &bench.vm, config: &bench.config, definitions: &definitions, time, waited }.verify(&stream);
        stream.take_reads().join(" ")
    };
    let rule = |hosts: &[&str], methods: &[&str], header: Value| {
        let path = json!({"exact": "/a"});
        json!({"a": {"matches": [{"hosts": hosts, "path": path, "methods": methods, "header": header}]}})
    };
    assert_eq!(reads(json!({})), "x-api-key");
    assert_eq!(reads(json!({"a": {}})), "x-api-key");
    assert_eq!(reads(rule(&[], &[], Value::Null)), "x-api-key :path");
    let all = rule(&["a.b"], &["GET"], json!({"name": "x-model", "value": "m"}));
    // What only rules for other hosts and paths look at is not read.
    assert_eq!(reads(rule(&["x.y"], &["GET"], json!({"name": "x-model", "value": "m"}))), "x-api-key :path :authority");
    assert_eq!(reads(all), "x-api-key :path :authority :method x-model");
}

#[test]
fn the_clock_is_read_only_for_keys_that_depend_on_time() {
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
        let before = bench.host().clock_reads();
        (bench.ask(key, None).outcome, bench.host().clock_reads() > before)
    };
    assert_eq!(asks(Some("plain")), (Outcome::Allowed, false));
    assert_eq!(asks(Some("stranger")), (Outcome::Unknown, false));
    assert_eq!(asks(None), (Outcome::Missing, false));
    assert_eq!(asks(Some("ended")), (Outcome::Expired, true));
    assert_eq!(asks(Some("ends")), (Outcome::Allowed, true));
    assert_eq!(asks(Some("limited")), (Outcome::Allowed, true));
}
