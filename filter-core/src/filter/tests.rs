//! The callbacks of a shell, on a mock host.

use std::collections::BTreeMap;
use std::sync::Arc;

use contract::definition::Definitions;
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId};
use contract::pepper::Pepper;
use contract::record::Record;
use contract::update::{Entry, Header, Part, Update, UpdateWriter};
use contract::usage::read_reports;

use super::*;
use crate::keys::{KeyLookup, StoredKey};
use crate::mock::{MockHost, MockResponse, MockStream};
use crate::shared::fenced::NotLeader;

const NOW: u64 = 1_800_000_000_000;

fn setup(fields: &str, sync_key: &str) -> Setup {
    let json = format!(r#"{{"control_plane": {{"cluster": "cp"}}{fields}}}"#);
    Setup { config: Config::parse(json.as_bytes()).unwrap(), sync_key: sync_key.into() }
}

fn filter(host: &MockHost, setup: &Setup) -> Filter<MockHost, CellStore<MockHost>> {
    host.set_now_ms(NOW);
    Filter::new(host.clone(), &setup.config).unwrap()
}

fn snapshot() -> MockResponse {
    let mut writer = UpdateWriter::default();
    let record = Record::plain(KeyId([7; 16]), OwnerId([8; 16]));
    writer.put(&KeyHash::of(b"k"), &record.to_bytes().unwrap());
    let part = Part::Snapshot { from: 0, to: BUCKETS };
    let header = Header { epoch: Epoch([1; 16]), revision: 7, total_keys: 1, part };
    MockResponse::ok(writer.finish(&header).unwrap())
}

#[test]
fn from_the_first_tick_to_the_last_report() {
    let (host, setup) = (MockHost::default(), setup("", "first"));
    let filter = filter(&host, &setup);
    let ask = || {
        let mut stream = MockStream::with([("x-api-key", "k")]);
        let flow = filter.on_request_headers(&setup.config, &mut stream);
        (flow, stream.reply.map(|reply| reply.status))
    };
    assert_eq!(ask(), (Flow::Stop, Some(503)));
    assert_eq!(host.take_calls(), [], "nothing happens before the first tick");

    filter.on_tick(&setup, |_| ());
    let poll = host.take_calls().remove(0);
    filter.on_call_response(&setup, poll.token, &snapshot(), |_| ());
    assert_eq!(ask(), (Flow::Continue, None));
    let mut stream = MockStream::default();
    stream.trailers = vec!["x-api-key".into(), "grpc-status".into()];
    assert_eq!(filter.on_request_trailers(&setup.config, &mut stream), Flow::Continue);
    assert_eq!(stream.trailers, ["grpc-status"]);

    host.take_calls();
    filter.on_end(&setup, false);
    let last = host.take_calls();
    let paths: Vec<_> = last.iter().map(|call| call.header(":path")).collect();
    assert_eq!(paths, ["/sync/v1/usage", "/sync/v1/allowances"]);
    let reports = read_reports(&last[0].body).unwrap();
    assert_eq!(reports.iter().flat_map(|report| &report.counts).map(|count| count.requests).sum::<u64>(), 2);
    assert_eq!(host.metric("portcullis.decisions.allowed_total"), 1);
    assert_eq!(host.metric("portcullis.decisions.not_ready_total"), 1);
}

#[test]
fn during_a_configuration_update_both_configurations_share_the_calls_and_the_counts() {
    let host = MockHost::default();
    let (old, new) = (setup("", "old"), setup(r#", "key_header": "x-key""#, "new"));
    let filter = filter(&host, &old);
    assert!(filter.is_of(&new.config) && !filter.is_of(&setup(r#", "store": "second""#, "old").config));
    filter.on_tick(&old, |_| ());
    let poll = host.take_calls().remove(0);
    assert_eq!(poll.header("x-api-key"), "old");
    // The response comes to the root context of the new configuration, whose key the next poll carries.
    filter.on_call_response(&new, poll.token, &snapshot(), |_| ());
    assert_eq!(host.take_calls().remove(0).header("x-api-key"), "new");
    for (setup, header) in [(&old, "x-api-key"), (&new, "x-key")] {
        let mut stream = MockStream::with([(header, "k")]);
        assert_eq!(filter.on_request_headers(&setup.config, &mut stream), Flow::Continue);
    }
    host.set_now_ms(NOW + 250);
    filter.on_tick(&new, |_| ());
    let report = read_reports(&host.take_calls().remove(0).body).unwrap().remove(0);
    assert_eq!(report.counts.iter().map(|count| count.requests).collect::<Vec<_>>(), [2]);
    // The old root context ends: what it counted is reported, and the filter goes on for the new one.
    filter.on_end(&old, true);
    assert!(!host.take_calls().is_empty());
    host.set_now_ms(NOW + 500);
    filter.on_tick(&new, |_| ());
    assert!(!host.take_calls().is_empty(), "it leads again");
}

#[test]
fn without_randomness_there_is_no_filter() {
    let host = MockHost::default();
    host.without_randomness(true);
    assert_eq!(Filter::new(host, &setup("", "").config).err().unwrap(), "the system has no randomness");
}

/// A table in memory, as a host has it whose VMs share memory.
#[derive(Default)]
struct Table(RefCell<BTreeMap<KeyHash, Arc<StoredKey>>>);

impl KeyLookup for Table {
    fn definitions(&self) -> Arc<Definitions> {
        Arc::default()
    }

    fn find(&self, hash: &KeyHash, _pepper: Option<&Pepper>) -> Option<Arc<StoredKey>> {
        self.0.borrow().get(hash).cloned()
    }
}

impl KeyStore for Table {
    fn apply(&self, _me: NodeId, update: &Update<'_>) -> Result<(), NotLeader> {
        for entry in update.entries() {
            if let Entry::Put { hash, record } = entry {
                let key = StoredKey::new(Record::from_bytes(&record).unwrap(), Arc::new(Definitions::default()));
                self.0.borrow_mut().insert(hash, Arc::new(key));
            }
        }
        Ok(())
    }
}

#[test]
fn a_shell_may_have_a_key_store_of_its_own() {
    let (host, setup) = (MockHost::default(), setup("", "key"));
    host.set_now_ms(NOW);
    let data = SharedData::new(host.clone(), &setup.config.cluster, &setup.config.store);
    let filter = Filter::with_keys(data, Table::default()).unwrap();
    filter.on_tick(&setup, |_| ());
    let poll = host.take_calls().remove(0);
    filter.on_call_response(&setup, poll.token, &snapshot(), |_| ());
    for (key, flow) in [("k", Flow::Continue), ("stranger", Flow::Stop)] {
        let mut stream = MockStream::with([("x-api-key", key)]);
        assert_eq!(filter.on_request_headers(&setup.config, &mut stream), flow);
    }
    assert!(host.cell_names().iter().all(|name| !name.contains(":b")), "no records in cells");
}
