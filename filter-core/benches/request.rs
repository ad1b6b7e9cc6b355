//! The cost of the steps of a request natively, on a host in memory: `cargo bench -p filter-core`.

use std::cell::{Cell as Slot, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;

use contract::hash::KeyHash;
use contract::id::{Epoch, KeyId, OwnerId, ReporterId};
use contract::outcome::Outcome;
use contract::policy::PolicyLimits;
use contract::record::{Per, RateLimit, Record};
use contract::update::{Header, Part, Update, UpdateWriter};
use contract::usage::{KeyRef, write_reports};
use divan::{Bencher, black_box};
use filter_core::config::{Config, LimitModes};
use filter_core::extract;
use filter_core::extract::source::Source;
use filter_core::host::{Call, Clock, Cluster, Flow, Log, MetricId, PolicyPlace, Random, Reply, Stats, Stream, Wake};
use filter_core::keys::KeyStore;
use filter_core::limits::allowances::Allowances;
use filter_core::limits::charge::{Attempt, Limits, charge};
use filter_core::limits::retry_after::{Exceeded, RetryAfter};
use filter_core::reply::{Challenge, RequestFacts, reply};
use filter_core::request::{Waited, handle};
use filter_core::shared::election::{NodeId, acquire};
use filter_core::shared::{Cell, CellKey, Cells, Conflict, SharedData};
use filter_core::store::state::StoreState;
use filter_core::store::{self, CellStore, records};
use filter_core::usage::collector;
use filter_core::usage::counter::Counts;
use filter_core::usage::outbox::Freeze;
use filter_core::vm::Vm;

/// Shows the allocations of each step too.
#[global_allocator]
static ALLOCATOR: divan::AllocProfiler = divan::AllocProfiler::system();

fn main() {
    divan::main();
}

const KEY: &[u8] = b"sk_live_0123456789abcdefghijABCDEFGHIJ4Xy0zQ";
const NOW_NS: u64 = 1_800_000_000_000_000_000;

/// A host in memory, with one gauge.
#[derive(Clone, Default)]
struct Memory {
    cells: Rc<RefCell<HashMap<String, Cell>>>,
    gauge: Rc<Slot<u64>>,
}

impl Cells for Memory {
    fn get(&self, name: &str) -> Option<Cell> {
        self.cells.borrow().get(name).cloned()
    }

    fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Conflict> {
        let mut cells = self.cells.borrow_mut();
        let version = cells.get(name).map(|cell| cell.version);
        if version != seen {
            return Err(Conflict);
        }
        let cell = Cell { value: value.to_vec(), version: version.unwrap_or_default().wrapping_add(1) };
        cells.insert(name.to_owned(), cell);
        Ok(())
    }
}

impl Clock for Memory {
    fn now_ns(&self) -> u64 {
        NOW_NS
    }
}

impl Wake for Memory {
    fn wake(&self) {}
}

impl Random for Memory {
    fn fill(&self, bytes: &mut [u8]) -> bool {
        bytes.fill(1);
        true
    }
}

impl Log for Memory {
    fn info(&self, _message: &str) {}
    fn warn(&self, _message: &str) {}
    fn error(&self, _message: &str) {}
}

impl Stats for Memory {
    fn define_counter(&self, _name: &str) -> Option<MetricId> {
        None
    }

    fn define_gauge(&self, name: &str) -> Option<MetricId> {
        (name == "portcullis.internal.store_generation").then_some(MetricId(0))
    }

    fn add(&self, _metric: MetricId, more: u64) {
        self.gauge.set(self.gauge.get().wrapping_add(more));
    }

    fn set(&self, _metric: MetricId, _value: u64) {}

    fn value(&self, _metric: MetricId) -> u64 {
        self.gauge.get()
    }
}

impl Cluster for Memory {
    fn dispatch(&self, _call: &Call<'_>) -> Option<u32> {
        None
    }
}

/// A request with a key in `x-api-key`.
struct Request;

impl Stream for Request {
    fn header(&self, name: &str) -> Option<Vec<u8>> {
        (name == "x-api-key").then(|| KEY.to_vec())
    }

    fn header_lines(&self, name: &str) -> Option<Vec<u8>> {
        self.header(name)
    }

    fn named_policy(&self, _place: PolicyPlace<'_>) -> Option<String> {
        None
    }

    fn client_address(&self) -> Option<IpAddr> {
        None
    }

    fn set_header(&mut self, name: &str, value: &[u8]) {
        black_box((name, value));
    }

    fn remove_header(&mut self, name: &str) {
        black_box(name);
    }

    fn remove_trailer(&mut self, _name: &str) {}
    fn set_filter_state(&mut self, _name: &str, _value: &str) {}
    fn send_reply(&mut self, _reply: &Reply) {}
    fn resume(&mut self) {}
}

const ME: NodeId = NodeId(1);

fn data() -> SharedData<Memory> {
    SharedData::new(Memory::default(), "cluster", "default")
}

#[divan::bench]
fn read_and_hash_the_header(bencher: Bencher<'_, '_>) {
    let sources = [Source::Header("x-api-key".into())];
    bencher.bench_local(|| extract::find_and_hash(black_box(&sources), &Request).credential);
}

#[divan::bench]
fn read_an_absent_cell(bencher: Bencher<'_, '_>) {
    let data = data();
    bencher.bench_local(|| data.get(black_box(CellKey::Records(0xabcd))));
}

/// An update with these records, for one cell of the store.
fn update(records: impl IntoIterator<Item = (KeyHash, Record)>) -> Vec<u8> {
    let mut update = UpdateWriter::default();
    for (hash, record) in records {
        update.put(&hash, &record.to_bytes().expect("a record can be written"));
    }
    let part = Part::Changes { after: 0 };
    let header = Header { epoch: Epoch([1; 16]), revision: 1, total_keys: 1, part };
    update.finish(&header).expect("an update can be written")
}

/// In a cell with 1 key, with 31 (a million keys in all) and with 250 (eight million).
#[divan::bench(args = [1, 31, 250])]
fn find_a_record(bencher: Bencher<'_, '_>, keys: u8) {
    let data = data();
    assert!(acquire(&data, ME, 0));
    let hash = |number| {
        let mut hash = [number; 32];
        [hash[0], hash[1]] = [0xab, 0xcd];
        KeyHash(hash)
    };
    let record = |number| Record::plain(KeyId([number; 16]), OwnerId([0; 16]));
    let bytes = update((0..keys).map(|number| (hash(number), record(number))));
    store::write(&data, ME, &Update::read(&bytes).expect("our own update")).expect("this VM leads");
    let wanted = hash(keys.saturating_sub(1));
    bencher.bench_local(|| records::find(&data, black_box(&wanted)).is_some());
}

fn unlimited() -> RateLimit {
    RateLimit { name: "own".into(), requests: u32::MAX, window_s: 1, burst: u32::MAX, shared: false, per: Per::Key }
}

/// The key of a request: whether the VM caches it, and whether it has a limit.
#[derive(Clone, Copy, Debug)]
enum Of {
    Cached,
    NotCached,
    Limited,
}

/// From the headers to the count.
#[divan::bench(args = [Of::Cached, Of::NotCached, Of::Limited])]
fn handle_a_request(bencher: Bencher<'_, '_>, of: Of) {
    let data = data();
    assert!(acquire(&data, ME, 0));
    let mut record = Record::plain(KeyId([7; 16]), OwnerId([0; 16]));
    if matches!(of, Of::Limited) {
        record.rate_limits = vec![unlimited()];
    }
    let vm = Vm::new(data.clone(), CellStore::new(data.clone()));
    let bytes = update([(KeyHash::of(KEY), record)]);
    vm.keys.apply(ME, &Update::read(&bytes).expect("our own update")).expect("this VM leads");
    if matches!(of, Of::NotCached) {
        // Without a generation the cache is not used.
        data.host().gauge.set(0);
    }
    let synced_ms = NOW_NS / 1_000_000;
    vm.set_state(StoreState { epoch: Epoch([1; 16]), revision: 1, keys: 1, synced_ms });
    let config = br#"{"control_plane": {"cluster": "portcullis"}, "rate_limit": null}"#;
    let config = Config::parse(config).expect("a configuration");
    let handled = || handle(&vm, &config, &mut Request, Waited::default());
    assert_eq!(handled(), Flow::Continue);
    bencher.bench_local(handled);
}

#[divan::bench]
fn take_from_a_limit(bencher: Bencher<'_, '_>) {
    let (data, allowances) = (data(), Allowances::default());
    let (record, own) = (Record::plain(KeyId([7; 16]), OwnerId([0; 16])), [unlimited()]);
    let limits = Limits { record: &record, own: &own, route: PolicyLimits::NONE, cost: 1 };
    let attempt = Attempt { modes: LimitModes::default(), is_unreachable: false, waited_ms: 0, reports_left: false };
    bencher.bench_local(|| charge(&data, &allowances, black_box(&limits), attempt, || NOW_NS));
}

#[divan::bench]
fn count_a_request(bencher: Bencher<'_, '_>) {
    let mut counts = Counts::default();
    let key = Some(KeyRef { id: KeyId([7; 16]), generation: 1 });
    bencher.bench_local(|| counts.add(black_box(key), Outcome::Allowed, false, 1, 1_800_000_000_000));
}

/// The work on usage for one tick in which this many keys were used: publish, collect, freeze, write, acknowledge.
#[divan::bench(args = [1, 4_000])]
fn report_keys(bencher: Bencher<'_, '_>, keys: u16) {
    let (data, reporter) = (data(), ReporterId([1; 16]));
    collector::open(&data, reporter).expect("an outbox");
    let counted = || {
        let mut counts = Counts::default();
        for number in 0..keys {
            let mut id = [7; 16];
            [id[0], id[1]] = number.to_be_bytes();
            let key = Some(KeyRef { id: KeyId(id), generation: 1 });
            counts.add(key, Outcome::Allowed, false, 1, 1_800_000_000_000);
        }
        counts
    };
    bencher.with_inputs(counted).bench_local_values(|mut counts| {
        counts.publish(&data, 0);
        collector::collect(&data);
        let outbox = collector::freeze(&data, Freeze::Pending).expect("an outbox");
        let bytes = write_reports(&outbox.reports()).expect("a report can be written");
        collector::acknowledge(&data, reporter, outbox.frozen_seq);
        bytes
    });
}

#[divan::bench]
fn refuse_an_unknown_key(bencher: Bencher<'_, '_>) {
    let challenge = Challenge::new("portcullis", &[Source::Header("x-api-key".into())]).expect("a plain realm");
    bencher.bench_local(|| {
        reply(black_box(Outcome::Unknown), &challenge, &RetryAfter::Usual, |_| RequestFacts::default())
    });
}

#[divan::bench]
fn refuse_by_a_limit(bencher: Bencher<'_, '_>) {
    let challenge = Challenge::new("portcullis", &[Source::Header("x-api-key".into())]).expect("a plain realm");
    let limit = RateLimit { name: "own".into(), requests: 100, window_s: 1, burst: 100, shared: true, per: Per::Key };
    let wait = RetryAfter::Limits(vec![limit], Exceeded { limit: 0, retry_after_s: 7 });
    bencher.bench_local(|| reply(black_box(Outcome::RateLimited), &challenge, &wait, |_| RequestFacts::default()));
}
