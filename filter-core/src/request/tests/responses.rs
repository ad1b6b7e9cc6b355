//! What the upstream, the client, the access log and the counts get of a request.

use contract::record::Attribute;

use super::*;

const KEY_ID: &str = "07070707-0707-0707-0707-070707070707";
const OWNER_ID: &str = "08080808-0808-0808-0808-080808080808";

fn state_of(stream: &MockStream) -> Vec<(&str, &str)> {
    stream.filter_state.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

fn scoped() -> Record {
    Record { scopes: vec!["read".into(), "write".into()], ..record() }
}

#[test]
fn an_allowed_request_carries_the_identity_of_its_key_in_place_of_the_clients_headers() {
    let plugin = json!({"rate_limit": null, "remove_headers": ["x-tenant"]});
    let bench = Bench::new(plugin, &[("k", scoped())]);
    let headers = [
        ("x-api-key", "k"),
        ("x-consumer-id", "forged"),
        ("x-credential-scopes", "admin"),
        ("x-portcullis-shadow", "forged"),
        ("x-tenant", "forged"),
        ("accept", "*/*"),
    ];
    let (flow, stream) = bench.send(headers, None);
    assert_eq!((flow, &stream.reply), (Flow::Continue, &None));
    let expected = [
        ("x-consumer-id", OWNER_ID),
        ("x-credential-scopes", "read write"),
        ("accept", "*/*"),
        ("x-credential-identifier", KEY_ID),
    ];
    assert_eq!(stream.headers(), expected);
    // A header shows the id to the access log.
    assert_eq!(state_of(&stream), []);
}

#[test]
fn an_allowed_request_carries_the_whole_identity_in_one_header_if_the_operator_wants_that() {
    let plugin = json!({"rate_limit": null, "identity_headers": {"packed": "x-identity"}});
    let plain = Record { key_id: KeyId([9; 16]), ..record() };
    let bench = Bench::new(plugin, &[("scoped", scoped()), ("plain", plain)]);
    let sent = |key| {
        let forged = ["x-identity", "x-consumer-id", "x-credential-identifier", "x-credential-scopes"];
        let (_, stream) = bench.send(forged.map(|name| (name, "forged")).into_iter().chain([("x-api-key", key)]), None);
        assert_eq!(state_of(&stream), []);
        stream.headers().iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>()
    };
    let scoped = format!("x-identity: consumer=\"{OWNER_ID}\", credential=\"{KEY_ID}\", scopes=\"read write\"");
    assert_eq!(sent("scoped"), [scoped]);
    let id = KEY_ID.replace('7', "9");
    assert_eq!(sent("plain"), [format!("x-identity: consumer=\"{OWNER_ID}\", credential=\"{id}\"")]);
    let (_, stream) = bench.send([("x-api-key", "stranger"), ("x-identity", "forged")], None);
    assert_eq!(stream.headers(), [("x-api-key", "stranger")]);
}

#[test]
fn where_envoy_removes_identity_headers_the_filter_does_so_only_without_a_good_key() {
    let plugin = json!({"rate_limit": null, "envoy_removes_identity_headers": true, "remove_headers": ["x-tenant"],
        "policies": {"open": {"key": "anonymous_allowed"}}});
    let bench = Bench::new(plugin, &[("k", record())]);
    // As if Envoy did not remove them.
    let client = ["x-consumer-id", "x-credential-identifier", "x-credential-scopes", "x-portcullis-shadow", "x-tenant"];
    let client = client.map(|name| (name, "client"));
    let (_, stream) = bench.send(client.into_iter().chain([("x-api-key", "k")]), None);
    let expected = [
        ("x-consumer-id", OWNER_ID),
        ("x-credential-identifier", KEY_ID),
        ("x-credential-scopes", "client"),
        ("x-portcullis-shadow", "client"),
    ];
    assert_eq!(stream.headers(), expected);
    let (flow, stream) = bench.send(client, Some("open"));
    assert_eq!((flow, stream.headers()), (Flow::Continue, vec![]));
}

#[test]
fn names_of_identity_headers_that_are_not_in_use_are_removed_too() {
    let identity = json!({"consumer": "x-who", "credential": "", "scopes": null});
    let mut plugin = json!({"rate_limit": null, "identity_headers": identity});
    let bench = Bench::new(plugin.clone(), &[("k", record())]);
    let forged = ["x-who", "x-consumer-id", "x-credential-identifier", "x-credential-scopes"];
    let (flow, stream) = bench.send(forged.map(|name| (name, "forged")).into_iter().chain([("x-api-key", "k")]), None);
    // The key has no scopes, so that header is removed as well.
    assert_eq!((flow, stream.headers()), (Flow::Continue, vec![("x-who", OWNER_ID)]));
    // No header shows the id of the key.
    assert_eq!(state_of(&stream), [(KEY_ID_STATE, KEY_ID)]);
    plugin["access_log_state"] = false.into();
    assert_eq!(state_of(&Bench::new(plugin, &[("k", record())]).send([("x-api-key", "k")], None).1), []);
}

#[test]
fn a_request_without_a_checked_key_has_no_identity() {
    let policies = json!({"open": {"key": "optional"}});
    let revoked = Record { flags: Flags::REVOKED, ..record() };
    let bench = Bench::new(json!({"policies": policies}), &[("revoked", revoked)]);
    for key in ["revoked", "unknown", ""] {
        let (flow, stream) = bench.send([("x-api-key", key), ("x-consumer-id", "forged")], Some("open"));
        assert_eq!((flow, stream.headers()), (Flow::Continue, vec![]), "{key}");
        // The access log shows the id of a known key that did not count.
        let known: &[_] = if key == "revoked" { &[(KEY_ID_STATE, KEY_ID)] } else { &[] };
        assert_eq!(state_of(&stream), known, "{key}");
    }
    let counts = bench.counts();
    assert!(counts.iter().all(|count| count.of.outcome == Outcome::Anonymous.code()));
    assert_eq!(counts.iter().map(|count| count.requests).sum::<u64>(), 3);
}

#[test]
fn the_key_stays_if_the_operator_wants_it() {
    let bench = Bench::new(json!({"strip_key": false, "rate_limit": null}), &[("k", record())]);
    let (flow, stream) = bench.send([("x-api-key", "k")], None);
    assert_eq!(flow, Flow::Continue);
    assert!(stream.headers().contains(&("x-api-key", "k")));
}

/// What a redirected request passes again: Envoy runs the filter on the headers that the first pass left.
#[test]
fn an_internal_redirect_finds_the_key_only_if_it_was_not_removed() {
    for (strip_key, expected) in [(true, Flow::Stop), (false, Flow::Continue)] {
        let bench = Bench::new(json!({"strip_key": strip_key, "rate_limit": null}), &[("k", record())]);
        let mut stream = bench.request([("x-api-key", "k")], None);
        assert_eq!(handle(&bench.vm, &bench.config, &mut stream, Waited::default()), Flow::Continue);
        assert_eq!(handle(&bench.vm, &bench.config, &mut stream, Waited::default()), expected);
        let status = stream.reply.map(|reply| reply.status);
        assert_eq!(status, (expected == Flow::Stop).then_some(401));
    }
}

#[test]
fn trailers_carry_no_identity_and_no_key() {
    let bench = Bench::new(json!({"remove_headers": ["x-tenant"]}), &[]);
    let mut stream = MockStream::default();
    let names = ["x-api-key", "x-consumer-id", "x-portcullis-shadow", "x-consumer-groups", "x-tenant", "grpc-status"];
    stream.trailers = names.map(str::to_owned).to_vec();
    assert_eq!(handle_trailers(&bench.config, &mut stream), Flow::Continue);
    assert_eq!(stream.trailers, ["grpc-status"]);
}

/// A key, its record, the policy of the route, and the outcome of a request.
type Case = (&'static str, Record, Option<&'static str>, Outcome);

/// A key for each refusal by the decision and the limits.
fn refusals() -> (Value, Vec<Case>) {
    let plugin = json!({"rate_limit": null, "limits": {"wait": "0s"}, "policies": {
        "narrow": {"scopes": {"all": ["admin"]}},
        "plain": {},
    }});
    let with = |number: u8, change: fn(&mut Record)| {
        let mut record = Record { key_id: KeyId([number; 16]), owner_id: OwnerId([number; 16]), ..record() };
        change(&mut record);
        record
    };
    let budget = Some(Budget { fill: 1, resets_at_s: None, per: Per::Key });
    let no_credits = Record { credits: budget, flags: Flags::CREDITS_EXHAUSTED, ..with(8, |_| ()) };
    let no_quota = Record { quota: budget, flags: Flags::QUOTA_EXCEEDED, ..with(9, |_| ()) };
    let not_asked = Record { quota: budget, ..with(11, |_| ()) };
    let keys = vec![
        ("revoked", with(1, |record| record.flags = Flags::REVOKED), Some("plain"), Outcome::Revoked),
        ("expired", with(2, |record| record.expires_at_s = Some(NOW_S)), Some("plain"), Outcome::Expired),
        ("disabled", with(3, |record| record.flags = Flags::DISABLED), Some("plain"), Outcome::Disabled),
        ("narrow", with(4, |_| ()), Some("narrow"), Outcome::ScopeDenied),
        (
            "bound",
            with(5, |record| record.networks = vec!["192.0.2.0/24".parse().unwrap()]),
            Some("plain"),
            Outcome::AddressDenied,
        ),
        ("planned", with(6, |record| record.plan = Some(7)), Some("plain"), Outcome::Unsupported),
        ("limited", with(7, |record| record.rate_limits = vec![limit("own", 1)]), Some("plain"), Outcome::RateLimited),
        ("no credits", no_credits, Some("plain"), Outcome::CreditsExhausted),
        ("no quota", no_quota, Some("plain"), Outcome::QuotaExceeded),
        ("not asked", not_asked, Some("plain"), Outcome::LimitsUnavailable),
        ("other policy", with(10, |_| ()), Some("missing"), Outcome::PolicyUnknown),
    ];
    (plugin, keys)
}

#[test]
fn every_refusal_answers_the_client_tells_the_access_log_and_is_counted() {
    let (plugin, keys) = refusals();
    let stored: Vec<_> = keys.iter().map(|(key, record, ..)| (*key, record.clone())).collect();
    let bench = Bench::new(plugin, &stored);
    assert_eq!(bench.ask(Some("limited"), Some("plain")).outcome, Outcome::Allowed);
    let others = [("", Some("plain"), Outcome::Missing), ("stranger", Some("plain"), Outcome::Unknown)];
    let known = keys.iter().map(|(key, _, policy, outcome)| (*key, *policy, *outcome));
    for (key, policy, outcome) in others.into_iter().chain(known) {
        let headers = [("x-api-key", key), ("x-consumer-id", "forged"), ("x-request-id", "id-1")];
        let (flow, stream) = bench.send(headers.into_iter().chain([("x-credential-identifier", "forged")]), policy);
        let reply = stream.reply.as_ref().unwrap();
        let refusal = outcome.refusal().unwrap();
        assert_eq!((flow, reply.status), (Flow::Stop, refusal.status), "{key}");
        let body: Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!((&body["code"], &body["request_id"]), (&outcome.name().into(), &"id-1".into()));
        let state = state_of(&stream);
        assert_eq!(state.last(), Some(&(REFUSED_STATE, outcome.name())), "{key}");
        let is_known = !matches!(outcome, Outcome::Missing | Outcome::Unknown | Outcome::PolicyUnknown);
        assert_eq!(state.len(), if is_known { 2 } else { 1 }, "{key}");
        // A refused request goes nowhere, so its headers are left as they are, but for the one that the access log shows.
        assert_eq!(stream.headers(), headers, "{key}");
        let counts = bench.counts();
        let [count] = &counts[..] else { panic!("{counts:?}") };
        assert_eq!((count.of.outcome, count.of.key.is_some(), count.requests), (outcome.code(), is_known, 1));
        assert_eq!(bench.host().metric(&format!("portcullis.decisions.{}_total", outcome.name())), 1);
    }
}

#[test]
fn in_shadow_mode_every_refusal_goes_upstream_with_its_reason_and_is_counted_apart() {
    let (mut plugin, keys) = refusals();
    plugin["shadow"] = true.into();
    let stored: Vec<_> = keys.iter().map(|(key, record, ..)| (*key, record.clone())).collect();
    let bench = Bench::new(plugin, &stored);
    assert_eq!(bench.ask(Some("limited"), Some("plain")).outcome, Outcome::Allowed);
    for (key, _, policy, outcome) in keys {
        let (flow, stream) = bench.send([("x-api-key", key), ("x-consumer-id", "forged")], policy);
        assert_eq!((flow, &stream.reply), (Flow::Continue, &None), "{key}");
        assert_eq!(stream.headers(), [("x-portcullis-shadow", outcome.name())], "{key}");
        assert_eq!(state_of(&stream).last(), Some(&(SHADOW_STATE, outcome.name())));
        let counts = bench.counts();
        assert_eq!(counts[0].of.outcome, outcome.code() | contract::usage::SHADOW);
        assert_eq!(bench.host().metric(&format!("portcullis.shadow_decisions.{}_total", outcome.name())), 1);
        assert_eq!(bench.host().metric(&format!("portcullis.decisions.{}_total", outcome.name())), 0);
    }
    bench.send([("x-api-key", "planned")], None);
    let quiet = Bench::new(json!({"shadow": true, "access_log_state": false}), &[]);
    assert_eq!(state_of(&quiet.send([("x-api-key", "k")], None).1), []);
}

#[test]
fn attributes_go_upstream_in_the_headers_that_the_operator_chose_and_never_from_a_client() {
    let attributes = json!({"x-customer": "owner.external_id", "x-project": "key.metadata.project"});
    let plugin = json!({
        "rate_limit": null, "envoy_removes_identity_headers": true,
        "identity_headers": {"consumer": "", "credential": "", "scopes": "", "attributes": attributes},
        "policies": {"default": {"key": "anonymous_allowed"}},
    });
    let attribute = |name: &str, value: &str| Attribute { name: name.into(), value: value.into() };
    let known = Record {
        attributes: vec![attribute("key.metadata.project", "search"), attribute("owner.external_id", "cus_1")],
        ..record()
    };
    let bench = Bench::new(plugin, &[("known", known), ("plain", record())]);
    let sent = |key: Option<&str>| {
        let forged = ["x-customer", "x-project"].map(|name| (name, "forged"));
        let (_, stream) = bench.send(forged.into_iter().chain(key.map(|key| ("x-api-key", key))), None);
        stream.headers().iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>()
    };
    assert_eq!(sent(Some("known")), ["x-customer: cus_1", "x-project: search"]);
    assert_eq!((sent(Some("plain")), sent(None)), (vec![], vec![]));
}

#[test]
fn what_is_left_of_the_limits_is_in_filter_state_if_the_operator_wants_that() {
    let policies = json!({"default": {"rate_limits": {"key": [limit("default.minute", 3)]}}});
    let plugin = json!({"rate_limit_state": true, "access_log_state": false, "policies": policies});
    let limited = Record { rate_limits: vec![limit("hour", 60)], ..record() };
    let bench = Bench::new(plugin, &[("limited", limited)]);
    let left = || {
        let (flow, stream) = bench.send([("x-api-key", "limited")], None);
        (flow, state_of(&stream).into_iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>())
    };
    let policy = r#"portcullis.ratelimit_policy: "hour";q=60;w=60, "default.minute";q=3;w=60"#;
    let expected = |left: &str| (Flow::Continue, vec![format!("portcullis.ratelimit: {left}"), policy.to_owned()]);
    assert_eq!(left(), expected(r#""hour";r=59;t=1, "default.minute";r=2;t=20"#));
    assert_eq!(left(), expected(r#""hour";r=58;t=2, "default.minute";r=1;t=40"#));
    assert_eq!(left(), expected(r#""hour";r=57;t=3, "default.minute";r=0;t=60"#));
    // A refusal has the headers itself.
    assert_eq!(left(), (Flow::Stop, vec![]));
    let unlimited = Bench::new(json!({"rate_limit": null, "rate_limit_state": true}), &[("k", record())]);
    assert_eq!(state_of(&unlimited.send([("x-api-key", "k")], None).1), []);
}

#[test]
fn only_a_policy_that_captures_notes_unknown_keys() {
    let policies = json!({
        "open": {"shadow": true, "capture_unknown": true}, "shadow": {"shadow": true},
        "optional": {"shadow": true, "capture_unknown": true, "key": "optional"},
    });
    let bench = Bench::new(json!({"rate_limit": null, "policies": policies}), &[("k", record())]);
    for (key, policy) in [("a", "shadow"), ("b", "optional"), ("k", "open"), ("stray", "open"), ("stray", "open")] {
        assert_eq!(bench.send([("x-api-key", key)], Some(policy)).0, Flow::Continue);
    }
    let message = bench.vm.seen.borrow_mut().due(NOW_S * 1_000).unwrap();
    assert_eq!(message.unknown_keys, [KeyHash::of(b"stray")]);
    assert_eq!(message.policies, ["shadow", "optional", "open"], "those that routes named");
}

#[test]
fn before_the_first_sync_and_with_a_stale_store_the_operator_chooses() {
    let not_ready = |choice: &str| Bench::empty(json!({"failure_mode": {"not_ready": choice}}));
    let stale = |choice: &str| {
        let plugin = json!({"max_staleness": "60s", "failure_mode": {"stale": choice}, "rate_limit": null});
        let bench = Bench::new(plugin, &[("k", record())]);
        bench.set_state((NOW_S - 61) * 1_000);
        bench
    };
    for (bench, outcome) in [(not_ready("deny"), Outcome::NotReady), (stale("deny"), Outcome::Stale)] {
        let (flow, stream) = bench.send([("x-api-key", "k")], None);
        let reply = stream.reply.unwrap();
        assert_eq!((flow, reply.status), (Flow::Stop, 503));
        assert!(reply.headers.contains(&("retry-after", "1".to_owned())));
        assert_eq!(bench.counts()[0].of.outcome, outcome.code());
    }
    for bench in [not_ready("allow"), stale("allow")] {
        let (flow, stream) = bench.send([("x-api-key", "k"), ("x-consumer-id", "forged")], None);
        assert_eq!((flow, stream.headers()), (Flow::Continue, vec![]));
        assert_eq!(bench.counts()[0].of.outcome, Outcome::FailedOpen.code());
    }
    // A store that is just not stale.
    let fresh = stale("deny");
    fresh.set_state((NOW_S - 60) * 1_000);
    assert_eq!(fresh.send([("x-api-key", "k")], None).0, Flow::Continue);
}

#[test]
fn a_vm_serves_as_soon_as_the_leader_has_loaded_the_store() {
    let bench = Bench::empty(json!({}));
    assert_eq!(bench.ask(Some("k"), None).outcome, Outcome::NotReady);
    // Another VM leads and writes the state. No tick in between.
    let state = StoreState { epoch: Epoch([1; 16]), revision: 1, keys: 0, synced_ms: 0 };
    state::set(bench.data(), ME, &state).unwrap();
    assert_eq!(bench.ask(Some("k"), None).outcome, Outcome::Unknown);
}

#[test]
fn the_access_log_sees_no_key_in_path_or_cookies_of_a_refused_request() {
    let plugin = json!({"key_sources": [{"query": "k"}, {"cookie": "k"}]});
    let bench = Bench::new(plugin, &[]);
    let (flow, stream) = bench.send([(":path", "/a?k=secret&b=1"), ("cookie", "k=secret; c=1")], None);
    assert_eq!(flow, Flow::Stop);
    assert_eq!(stream.headers(), [(":path", "/a?b=1"), ("cookie", "c=1")]);
}

#[test]
fn a_limit_answers_a_grpc_client_with_a_status_that_it_does_not_retry() {
    let mut own = record();
    own.rate_limits = vec![limit("own", 1)];
    let bench = Bench::new(json!({}), &[("k", own)]);
    let headers = [("x-api-key", "k"), ("content-type", "application/grpc")];
    assert_eq!(bench.send(headers, None).0, Flow::Continue);
    let (_, stream) = bench.send(headers, None);
    let reply = stream.reply.as_ref().unwrap();
    assert!(reply.headers.contains(&("grpc-status", "8".to_owned())), "{reply:?}");
    assert!(reply.headers.iter().any(|(name, _)| *name == "ratelimit-policy"));
    assert_eq!(stream.take_reads(), ["x-api-key", "x-request-id", "content-type"]);
}

#[test]
fn an_unknown_policy_is_logged_once_in_each_vm_and_only_the_first_hundred() {
    let bench = Bench::new(json!({"policies": {"a": {}}}), &[]);
    for _ in 0..3 {
        assert_eq!(bench.send([("x-api-key", "k")], Some("b")).0, Flow::Stop);
        assert_eq!(bench.send([("x-api-key", "k")], Some("")).0, Flow::Stop);
    }
    let log = bench.host().take_log();
    assert_eq!(log.iter().map(|(level, _)| *level).collect::<Vec<_>>(), ["error", "error"]);
    let start =
        "the metadata of a route names the policy \"b\", which does not exist: write it with PUT /v1/policies/b";
    assert!(log[0].1.starts_with(start), "{log:?}");
    assert!(log[1].1.starts_with("the metadata of a route has no policy name where one belongs"));
    for number in 0..200 {
        bench.send([], Some(&format!("unknown-{number}")));
    }
    assert_eq!(bench.host().take_log().len(), 98);
}

#[test]
fn counts_carry_the_time_of_the_next_tick_unless_the_request_needed_the_time() {
    let mut ends = record();
    ends.expires_at_s = Some(NOW_S + 1_000);
    let bench = Bench::new(json!({"rate_limit": null}), &[("k", record()), ("ends", ends)]);
    let last_ms = |key: &str| {
        bench.send([("x-api-key", key)], None);
        let before = bench.host().clock_reads();
        let counts = bench.counts();
        assert_eq!(bench.host().clock_reads(), before);
        counts[0].last_ms
    };
    // Before the first tick there is no other time than now.
    assert_eq!(last_ms("k"), NOW_S * 1_000);
    bench.host().set_now_ms(NOW_S * 1_000 + 7);
    let reads = bench.host().clock_reads();
    assert_eq!(last_ms("k"), NOW_S * 1_000 + crate::vm::TICK_MS);
    assert_eq!(bench.host().clock_reads(), reads);
    assert_eq!(last_ms("ends"), NOW_S * 1_000 + 7);
}

#[test]
fn a_request_is_counted_with_its_cost_if_the_owner_has_credits() {
    let budget = Some(Budget { fill: 1, resets_at_s: None, per: Per::Key });
    let metered = Record { cost: 3, generation: 2, credits: budget, ..record() };
    let free = Record { cost: 3, key_id: KeyId([9; 16]), ..record() };
    let plugin = json!({"rate_limit": null, "limits": {"wait": "0s"}, "on_limits_unreachable": {"credits": "allow"}});
    let bench = Bench::new(plugin, &[("metered", metered), ("free", free)]);
    for key in ["metered", "metered", "free"] {
        assert_eq!(bench.send([("x-api-key", key)], None).0, Flow::Continue);
    }
    let mut counts = bench.counts();
    counts.sort_by_key(|count| count.of);
    let seen: Vec<_> = counts.iter().map(|count| (count.requests, count.cost)).collect();
    assert_eq!(seen, [(2, 6), (1, 0)]);
    assert_eq!(counts[0].of.key, Some(KeyRef { id: KeyId([7; 16]), generation: 2 }));
}

/// The calls that return data cost most of a request in Envoy, so their number may not grow unnoticed.
#[test]
fn a_request_makes_these_calls_that_return_data_and_no_others() {
    let plugin = json!({"policies": {"a": {}}});
    let cached = Bench::new(plugin.clone(), &[("k", record())]);
    // An update begins the first generation; without it, the cache is not used.
    let update = |bench: &Bench| {
        let mut writer = UpdateWriter::default();
        writer.put(&KeyHash::of(b"k"), &record().to_bytes().unwrap());
        let header = Header { epoch: Epoch([1; 16]), revision: 2, total_keys: 1, part: Part::Changes { after: 1 } };
        let bytes = writer.finish(&header).unwrap();
        crate::keys::KeyStore::apply(&bench.vm.keys, ME, &Update::read(&bytes).unwrap()).unwrap();
    };
    update(&cached);
    let calls = |bench: &Bench, key: &str| {
        let before = bench.host().reads();
        let (_, stream) = bench.send([("x-api-key", key)], Some("a"));
        (stream.take_reads().join(", "), bench.host().reads() - before)
    };
    // The key, the policy of the route; the version of the policies and they themselves, the cells of the key and of its limit.
    assert_eq!(calls(&cached, "k"), ("x-api-key, policy".into(), 4));
    // The cached key; the cell of its limit.
    assert_eq!(calls(&cached, "k"), ("x-api-key, policy".into(), 1));
    // An unknown key; the reply names the request.
    assert_eq!(calls(&cached, "stranger"), ("x-api-key, policy, x-request-id".into(), 1));
    assert_eq!(calls(&cached, ""), ("x-api-key, policy, x-request-id".into(), 0));

    // With rules, the metadata of the route and of the virtual host; of the request what a rule needs.
    let matches = |hosts: &[&str], methods: &[&str]| json!({"hosts": hosts, "methods": methods, "path": {"prefix": "/a"}, "header": null});
    let by_rule = |rule: Value, sources: Value| {
        let policies = json!({"a": {"matches": [rule]}});
        let plugin = json!({"rate_limit": null, "policies": policies, "policy_sources": sources});
        let bench = Bench::new(plugin, &[("k", record())]);
        update(&bench);
        let headers = [("x-api-key", "k"), (":authority", "h"), (":path", "/a/b"), (":method", "GET")];
        bench.send(headers, None).1.take_reads().join(", ")
    };
    let all = json!(["route_metadata", "virtual_host_metadata", "rules"]);
    let expected = "x-api-key, policy, host policy, :path, :authority, :method";
    assert_eq!(by_rule(matches(&["h"], &["GET"]), all), expected);
    assert_eq!(by_rule(matches(&[], &[]), json!(["rules"])), "x-api-key, :path");

    let plain = Bench::new(json!({"rate_limit": null}), &[("k", record())]);
    update(&plain);
    assert_eq!(calls(&plain, "k"), ("x-api-key".into(), 3));
    assert_eq!(calls(&plain, "k"), ("x-api-key".into(), 0));
    let open = Bench::empty(json!({"failure_mode": {"not_ready": "allow"}}));
    assert_eq!(
        calls(&open, "k"),
        ("x-api-key".into(), 2),
        "the policies and the state of the store, while there is none"
    );
}

/// Each of these calls costs some tenths of a microsecond in Envoy.
#[test]
fn a_request_makes_this_number_of_calls_that_change_it() {
    let revoked = Record { key_id: KeyId([9; 16]), flags: Flags::REVOKED, ..record() };
    let calls = |fields: Value, key: &str| {
        let mut plugin = json!({"rate_limit": null});
        plugin.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let bench = Bench::new(plugin, &[("plain", record()), ("scoped", scoped()), ("revoked", revoked.clone())]);
        bench.send([("x-api-key", key)], None).1.writes
    };
    let packed = json!({"packed": "x-identity"});
    // Three identity headers, the header of shadow mode, and the key.
    assert_eq!((calls(json!({}), "plain"), calls(json!({}), "scoped")), (5, 5));
    assert_eq!(calls(json!({"envoy_removes_identity_headers": true}), "plain"), 3);
    assert_eq!(calls(json!({"envoy_removes_identity_headers": true}), "scoped"), 4);
    assert_eq!(calls(json!({"envoy_removes_identity_headers": true, "identity_headers": packed}), "scoped"), 2);
    assert_eq!(calls(json!({"identity_headers": packed}), "scoped"), 6);
    // The id of the key and the outcome for the access log, and the header by which the log shows the id of a good key.
    assert_eq!((calls(json!({}), "revoked"), calls(json!({}), "stranger")), (3, 2));
}
