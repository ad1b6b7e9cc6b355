//! The leader of VMs that share a mock host: election, sync, reports, and its end.

use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId};
use contract::outcome::Outcome;
use contract::record::Record;
use contract::update::{Part, UpdateWriter};
use contract::usage::{Count, KeyRef, read_reports};
use contract::usage_log::LogKey;

use super::*;
use crate::config::Config;
use crate::keys::KeyLookup;
use crate::mock::{MockHost, MockResponse, SentCall};
use crate::shared::SharedData;
use crate::shared::election::TERM_MS;
use crate::store::CellStore;
use crate::vm::TICK_MS;

const NOW: u64 = 1_800_000_000_000;
const EPOCH: Epoch = Epoch([1; 16]);
const POLL: &str = "/sync/v1/keys?";

fn setup() -> Setup {
    let config = Config::parse(br#"{"control_plane": {"cluster": "cp", "authority": "keys"}}"#).unwrap();
    Setup { config, sync_key: "sk_live_sync".into() }
}

/// One VM of the host.
struct Node {
    host: MockHost,
    vm: Vm<MockHost, CellStore<MockHost>>,
    leader: Leader,
    setup: Setup,
}

impl Node {
    fn on(host: &MockHost, number: u64) -> Self {
        let data = SharedData::new(host.clone(), "cp", "default");
        let vm = Vm::new(data.clone(), CellStore::new(data));
        Self { host: host.clone(), vm, leader: Leader::new(NodeId(number)), setup: setup() }
    }

    fn new() -> Self {
        Self::on(&MockHost::default(), 1)
    }

    /// Ticks at a time, and gives the calls.
    fn tick(&mut self, now_ms: u64) -> Vec<SentCall> {
        self.host.set_now_ms(now_ms);
        self.vm.tick(now_ms);
        self.leader.tick(&self.vm, &self.setup, now_ms);
        self.host.take_calls()
    }

    /// Gives a response to a call, and gives the calls that follow.
    fn respond(&mut self, call: &SentCall, response: &MockResponse) -> Vec<SentCall> {
        self.leader.on_response(&self.vm, &self.setup, call.token, response);
        self.host.take_calls()
    }

    /// A VM that has loaded a store with one key, and its poll in flight.
    fn synced() -> (Self, SentCall) {
        let mut node = Self::new();
        let poll = one(node.tick(NOW));
        let update = update(7, Part::Snapshot { from: 0, to: BUCKETS }, &[b"k"]);
        let next = one(node.respond(&poll, &MockResponse::ok(update)));
        node.host.take_log();
        (node, next)
    }

    fn count(&self, key: u8, requests: usize) {
        let key = Some(KeyRef { id: KeyId([key; 16]), generation: 1 });
        for _ in 0..requests {
            self.vm.counts.borrow_mut().add(key, Outcome::Allowed, false, 1, NOW);
        }
    }

    fn knows(&self, key: &[u8]) -> bool {
        self.vm.keys.find(&KeyHash::of(key), None).is_some()
    }

    fn log(&self) -> Vec<String> {
        self.host.take_log().into_iter().map(|(level, line)| format!("{level}: {line}")).collect()
    }
}

fn one<T: std::fmt::Debug>(mut items: Vec<T>) -> T {
    assert_eq!(items.len(), 1, "{items:?}");
    items.remove(0)
}

/// The poll among the calls. A new leader also sends a report without counts, to acknowledge grants.
fn poll_in(calls: Vec<SentCall>) -> SentCall {
    one(calls.into_iter().filter(|call| call.header(":method") == "GET").collect())
}

fn update(revision: u64, part: Part, keys: &[&[u8]]) -> Vec<u8> {
    update_of(EPOCH, revision, part, keys)
}

fn update_of(epoch: Epoch, revision: u64, part: Part, keys: &[&[u8]]) -> Vec<u8> {
    let mut hashes: Vec<KeyHash> = keys.iter().map(|key| KeyHash::of(key)).collect();
    hashes.sort();
    let mut writer = UpdateWriter::default();
    for hash in hashes {
        writer.put(&hash, &Record::plain(KeyId([7; 16]), OwnerId([8; 16])).to_bytes().unwrap());
    }
    writer.finish(&Header { epoch, revision, total_keys: 3, part }).unwrap()
}

fn changes(after: u64, revision: u64, keys: &[&[u8]]) -> MockResponse {
    MockResponse::ok(update(revision, Part::Changes { after }, keys))
}

fn path(call: &SentCall) -> &str {
    call.header(":path")
}

fn reports_in(call: &SentCall) -> Vec<Report> {
    assert_eq!((call.header(":method"), path(call)), ("POST", "/sync/v1/usage"));
    read_reports(&call.body).unwrap()
}

fn ack(report: &Report) -> MockResponse {
    MockResponse::ok(Ack { reporter: report.reporter, seq: report.seq }.write().unwrap())
}

fn requests(reports: &[Report]) -> u64 {
    reports.iter().flat_map(|report| &report.counts).map(|count: &Count| count.requests).sum()
}

#[test]
fn the_first_vm_that_ticks_leads_and_polls_and_the_others_wait() {
    let host = MockHost::default();
    let (mut main, mut worker) = (Node::on(&host, 1), Node::on(&host, 2));
    let poll = one(main.tick(NOW));
    assert_eq!((poll.cluster.as_str(), poll.timeout.as_millis(), poll.body.len()), ("cp", 40_000, 0));
    let reporter = main.leader.term.as_ref().unwrap().id;
    let path = format!("{POLL}reporter={reporter}&version={}&pending=0", env!("CARGO_PKG_VERSION"));
    let expected = [
        (":method", "GET"),
        (":path", &path),
        (":authority", "keys"),
        (":scheme", "http"),
        ("x-api-key", "sk_live_sync"),
    ];
    assert_eq!(poll.headers, expected.map(|(name, value)| (name, value.to_owned())));
    assert_eq!((worker.tick(NOW), main.tick(NOW + TICK_MS)), (vec![], vec![]));
    // The leader is gone: once its term has ended, another VM takes over, under the same reporter.
    let poll = poll_in(worker.tick(NOW + TICK_MS + TERM_MS));
    assert!(self::path(&poll).contains(&format!("reporter={reporter}")));
    assert!(main.tick(NOW + TICK_MS + TERM_MS).is_empty() && main.leader.term.is_none());
}

#[test]
fn a_snapshot_is_loaded_update_by_update_and_then_changes_follow() {
    let mut node = Node::new();
    let poll = one(node.tick(NOW));
    let first = update(9, Part::Snapshot { from: 0, to: 0x8000 }, &[]);
    let poll = one(node.respond(&poll, &MockResponse::ok(first)));
    assert!(path(&poll).contains("&cursor=32768&revision=9&"), "{}", path(&poll));
    assert_eq!((state::read(&node.vm.data), node.host.metric("portcullis.store.keys"), node.log()), (None, 0, vec![]));

    let hash = KeyHash::of(b"k");
    let from = u32::from(hash.bucket()).min(0x8000);
    let last = update(9, Part::Snapshot { from: 0x8000, to: BUCKETS }, if from < 0x8000 { &[] } else { &[b"k"] });
    let poll = one(node.respond(&poll, &MockResponse::ok(last)));
    assert!(path(&poll).contains("&revision=9&reporter="), "{}", path(&poll));
    let state = state::read(&node.vm.data).unwrap();
    assert_eq!((state.revision, state.keys, state.synced_ms), (9, 3, NOW));
    assert_eq!(node.log(), ["info: 3 keys loaded, revision 9"]);
    assert_eq!((node.host.metric("portcullis.store.revision"), node.host.metric("portcullis.store.keys")), (9, 3));

    assert!(!node.knows(b"new"));
    node.host.set_now_ms(NOW + 5_000);
    let poll = one(node.respond(&poll, &changes(9, 11, &[b"new"])));
    assert!(path(&poll).contains("&revision=11&reporter=") && node.knows(b"new"));
    assert_eq!((node.log(), node.vm.state().unwrap().synced_ms), (vec![], NOW + 5_000));
    // The workers see it on their next tick, and its age.
    assert_eq!(node.tick(NOW + 9_000), vec![]);
    assert_eq!(node.host.metric("portcullis.sync.age_seconds"), 4);
}

#[test]
fn a_failed_poll_is_logged_with_its_remedy_counted_and_tried_again_after_a_pause() {
    let cases = [
        (MockResponse::default(), "the control plane did not answer"),
        (
            MockResponse::of_status(401),
            "the control plane does not know the sync key (401): check the environment variable that holds it",
        ),
        (
            MockResponse::of_status(403),
            "the sync key may not sync (403): it needs the scope sync, and a reporter of its own",
        ),
        (MockResponse::of_status(500), "the control plane answered 500"),
        (MockResponse::ok(b"<html>".to_vec()), "the update is not readable: "),
        (changes(3, 4, &[]), "the update does not continue the store: starting over"),
    ];
    for (response, why) in cases {
        let (mut node, poll) = Node::synced();
        assert_eq!(node.respond(&poll, &response), vec![], "{why}");
        let line = one(node.log());
        assert!(line.starts_with("warn: sync failed, next try in ") && line.contains(&format!(" ms: {why}")), "{line}");
        assert_eq!(node.host.metric("portcullis.sync.failures_total"), 1);
        let again = one(node.tick(NOW + 5_000));
        let starts_over = why.ends_with("starting over");
        assert_eq!(path(&again).contains("&cursor=0&revision=7&"), starts_over, "{}", path(&again));
        assert_eq!(path(&again).contains("&wait=0&"), !starts_over);
        assert!(node.knows(b"k"), "the store keeps serving");
    }
}

#[test]
fn without_the_cluster_the_log_says_what_to_check() {
    let mut node = Node::new();
    node.host.without_cluster(true);
    assert_eq!(node.tick(NOW), vec![]);
    assert_eq!(node.log(), ["warn: Envoy has no usable cluster \"cp\": check control_plane.cluster"]);
    assert_eq!(node.host.metric("portcullis.sync.failures_total"), 1);
    node.host.without_cluster(false);
    one(node.tick(NOW + 5_000));
}

#[test]
fn an_answer_without_the_database_is_as_old_as_it_says() {
    let (mut node, poll) = Node::synced();
    let response = MockResponse { age_s: Some(60), ..changes(7, 7, &[]) };
    one(node.respond(&poll, &response));
    assert_eq!(node.vm.state().unwrap().synced_ms, NOW - 60_000);
    node.tick(NOW + 1_000);
    assert_eq!(node.host.metric("portcullis.sync.age_seconds"), 61);
}

#[test]
fn before_an_older_update_the_state_is_set_back_for_a_vm_that_takes_over_in_between() {
    let (mut node, poll) = Node::synced();
    // The first update of a snapshot, from a replica at an older revision.
    let older = update(5, Part::Snapshot { from: 0, to: 0x8000 }, &[]);
    one(node.respond(&poll, &MockResponse::ok(older)));
    assert_eq!(state::read(&node.vm.data).unwrap().revision, 5);
    let mut successor = Node::on(&node.host, 2);
    let poll = poll_in(successor.tick(NOW + TERM_MS));
    assert!(path(&poll).contains("&revision=5&wait=0&"), "{}", path(&poll));
}

#[test]
fn a_new_database_replaces_the_store() {
    let (mut node, poll) = Node::synced();
    let other = update_of(Epoch([2; 16]), 1, Part::Snapshot { from: 0, to: BUCKETS }, &[b"other"]);
    one(node.respond(&poll, &MockResponse::ok(other)));
    assert!(node.knows(b"other") && !node.knows(b"k"));
    assert_eq!(node.vm.state().map(|state| (state.epoch, state.revision)), Some((Epoch([2; 16]), 1)));
}

#[test]
fn a_leader_that_was_suspended_writes_nothing_and_stops() {
    let (mut node, poll) = Node::synced();
    let mut successor = Node::on(&node.host, 2);
    poll_in(successor.tick(NOW + TERM_MS));
    // The response comes to the former leader before its next tick.
    assert_eq!(node.respond(&poll, &changes(7, 8, &[b"new"])), vec![]);
    assert!(node.leader.term.is_none() && !node.knows(b"new"));
    assert_eq!(state::read(&node.vm.data).unwrap().revision, 7);
    // A response to a VM that does not lead is not handled.
    assert_eq!(node.respond(&poll, &changes(7, 8, &[b"new"])), vec![]);
    assert!(!node.knows(b"new") && node.log().is_empty());
}

#[test]
fn a_leader_that_loses_its_term_while_it_writes_the_state_stops() {
    for response in [changes(7, 8, &[b"new"]), MockResponse::ok(update(5, Part::Snapshot { from: 0, to: 0x8000 }, &[]))]
    {
        let (mut node, poll) = Node::synced();
        let data = node.vm.data.clone();
        node.host.before_put_of(":state", move || {
            assert!(acquire(&data, NodeId(2), NOW + TERM_MS));
            let state = StoreState { synced_ms: 1, ..state::read(&data).unwrap() };
            state::set(&data, NodeId(2), &state).unwrap();
        });
        assert_eq!(node.respond(&poll, &response), vec![]);
        assert!(node.leader.term.is_none());
        let left = state::read(&node.vm.data).map(|state| (state.revision, state.synced_ms));
        assert_eq!(left, Some((7, 1)), "what the new leader wrote");
    }
}

#[test]
fn only_the_response_to_a_call_of_this_term_counts() {
    let (mut node, poll) = Node::synced();
    let stranger = SentCall { token: poll.token + 1, ..poll.clone() };
    assert_eq!(node.respond(&stranger, &changes(7, 8, &[b"new"])), vec![]);
    assert!(!node.knows(b"new"));
    one(node.respond(&poll, &changes(7, 8, &[b"new"])));
    assert!(node.knows(b"new"));
}

#[test]
fn without_randomness_no_vm_leads() {
    let mut node = Node::new();
    node.host.without_randomness(true);
    assert_eq!(node.tick(NOW), vec![]);
    node.host.without_randomness(false);
    one(node.tick(NOW + TICK_MS));
}

#[test]
fn counts_of_all_vms_leave_in_one_report_until_it_is_acknowledged() {
    let (mut node, poll) = Node::synced();
    let mut worker = Node::on(&node.host, 2);
    node.count(1, 2);
    worker.count(1, 3);
    assert_eq!(worker.tick(NOW), vec![]);
    let call = one(node.tick(NOW + TICK_MS));
    assert_eq!((call.timeout.as_millis(), call.header("content-type")), (10_000, "application/vnd.portcullis.usage"));
    let report = one(reports_in(&call));
    assert_eq!((report.seq, requests(std::slice::from_ref(&report))), (1, 5));
    assert_eq!(node.host.metric("portcullis.usage.pending_requests"), 5);

    // One report is in flight at a time. Polls carry the number of requests that wait.
    node.count(1, 1);
    assert_eq!(node.tick(NOW + 2 * TICK_MS), vec![]);
    let poll = one(node.respond(&poll, &changes(7, 8, &[])));
    assert!(path(&poll).ends_with("&pending=6"), "{}", path(&poll));
    assert_eq!(node.respond(&call, &ack(&report)), vec![]);
    let next = one(reports_in(&one(node.tick(NOW + 3 * TICK_MS))));
    assert_eq!((next.seq, requests(std::slice::from_ref(&next))), (2, 1));
    assert_eq!(node.host.metric("portcullis.usage.pending_requests"), 1);
}

#[test]
fn a_report_that_fails_is_logged_counted_and_repeated_unchanged() {
    for (response, why) in [
        (MockResponse::default(), "the control plane did not answer"),
        (
            MockResponse::of_status(403),
            "the sync key may not report usage (403): it needs the scope sync, and a reporter of its own",
        ),
        (MockResponse::of_status(503), "the control plane answered 503"),
        (MockResponse::ok(b"?".to_vec()), ""),
    ] {
        let (mut node, _) = Node::synced();
        node.count(1, 2);
        let call = one(node.tick(NOW));
        node.count(1, 1);
        assert_eq!(node.respond(&call, &response), vec![]);
        let line = one(node.log());
        assert!(line.starts_with(&format!("warn: usage report failed, next try in 250 ms: {why}")), "{line}");
        assert_eq!(node.host.metric("portcullis.usage.report_failures_total"), 1);
        assert_eq!(node.tick(NOW + 249), vec![]);
        let again = one(node.tick(NOW + 250));
        assert_eq!(again.body, call.body);
    }
}

#[test]
fn a_report_that_is_refused_for_good_goes_to_the_log_and_blocks_nothing() {
    for status in [400, 413] {
        let (mut node, _) = Node::synced();
        node.count(1, 2);
        let call = one(node.tick(NOW));
        node.count(1, 1);
        node.respond(&call, &MockResponse::of_status(status));
        let explained =
            format!("error: usage reports were refused for good: the control plane answered {status}; they follow");
        let signed = format!("warn: {}", LogKey::derive(b"sk_live_sync").line(&call.body));
        assert_eq!(node.log(), [explained, signed]);
        assert_eq!(node.host.metric("portcullis.usage.report_failures_total"), 1);
        let next = one(reports_in(&one(node.tick(NOW + TICK_MS))));
        assert_eq!((next.seq, requests(&[next])), (2, 1));
    }
}

#[test]
fn a_refusal_of_a_report_that_is_no_longer_there_is_a_failure() {
    let (mut node, _) = Node::synced();
    node.count(1, 2);
    let call = one(node.tick(NOW));
    let report = one(reports_in(&call));
    // Another leader has got the acknowledgement meanwhile.
    acknowledge(&node.vm.data, report.reporter, report.seq);
    node.respond(&call, &MockResponse::of_status(400));
    let expected = "warn: usage report failed, next try in 250 ms: the control plane refused an empty batch";
    assert_eq!(node.log(), [expected]);
}

#[test]
fn an_acknowledgement_of_another_reporter_counts_for_nothing() {
    let (mut node, _) = Node::synced();
    node.count(1, 1);
    let call = one(node.tick(NOW));
    let report = Report { reporter: ReporterId([9; 16]), ..one(reports_in(&call)) };
    node.respond(&call, &ack(&report));
    assert_eq!(pending_requests(&node.vm.data), 1);
}

#[test]
fn a_successor_repeats_the_report_in_flight() {
    let (mut node, _) = Node::synced();
    node.count(1, 2);
    let call = one(node.tick(NOW));
    let mut successor = Node::on(&node.host, 2);
    let calls = successor.tick(NOW + TERM_MS);
    let [poll, again] = &calls[..] else { panic!("{calls:?}") };
    assert!(path(poll).starts_with(POLL));
    assert_eq!(again.body, call.body);
    let report = one(reports_in(again));
    successor.respond(again, &ack(&report));
    assert_eq!((pending_requests(&successor.vm.data), successor.tick(NOW + TERM_MS + TICK_MS)), (0, vec![]));
}

#[test]
fn at_its_end_the_leader_sends_and_logs_all_that_is_left_and_resigns() {
    let (mut node, _) = Node::synced();
    let mut worker = Node::on(&node.host, 2);
    node.count(1, 2);
    let call = one(node.tick(NOW));
    worker.count(2, 3);
    worker.vm.end();
    worker.leader.end(&worker.vm, &worker.setup);
    assert_eq!(node.host.take_calls(), vec![], "a worker leaves its counts to the leader");

    node.vm.end();
    node.leader.end(&node.vm, &node.setup);
    let last = one(node.host.take_calls());
    let reports = reports_in(&last);
    assert_eq!(reports.iter().map(|report| report.seq).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((reports[0].clone(), requests(&reports)), (one(reports_in(&call)), 5));
    assert_eq!(node.log(), [format!("warn: {}", LogKey::derive(b"sk_live_sync").line(&last.body))]);
    assert!(node.leader.term.is_none());
    // The next VM leads at once.
    assert!(acquire(&node.vm.data, NodeId(3), NOW));
}

#[test]
fn a_vm_that_ends_without_any_leader_reports_for_all() {
    let mut node = Node::new();
    node.count(1, 2);
    node.host.set_now_ms(NOW);
    node.vm.end();
    node.leader.end(&node.vm, &node.setup);
    assert_eq!(requests(&reports_in(&one(node.host.take_calls()))), 2);
    // An Envoy that has counted nothing says nothing.
    let mut idle = Node::new();
    idle.vm.end();
    idle.leader.end(&idle.vm, &idle.setup);
    assert_eq!((idle.host.take_calls(), idle.log()), (vec![], vec![]));
}
