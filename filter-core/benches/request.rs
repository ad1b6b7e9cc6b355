//! What the steps of a request cost natively, with cells in memory in place of Envoy's: `cargo bench -p filter-core`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::num::NonZeroU64;

use contract::hash::KeyHash;
use contract::id::{Epoch, KeyId, OwnerId, ReporterId};
use contract::outcome::Outcome;
use contract::page::{Header, Page, PageWriter, Part};
use contract::rate::WHOLE;
use contract::record::{RateLimit, Record};
use contract::usage::{KeyRef, write_reports};
use divan::{Bencher, black_box};
use filter_core::cells::{Cell, Cells, Names, Raced};
use filter_core::config::Config;
use filter_core::credential::{self, Credential};
use filter_core::judge::Judge;
use filter_core::lease::{self, Holder};
use filter_core::limiter::{self, Limit, Refused, Subject, Tag};
use filter_core::recent::Recent;
use filter_core::reply::{Challenge, RequestFacts, Wait, reply};
use filter_core::slice::Slices;
use filter_core::source::Source;
use filter_core::store::{self, State};
use filter_core::usage::{self, Counts, Drawn, Freeze, Outbox};

/// Tells of the allocations of each step too.
#[global_allocator]
static ALLOCATOR: divan::AllocProfiler = divan::AllocProfiler::system();

fn main() {
    divan::main();
}

const KEY: &[u8] = b"sk_live_0123456789abcdefghijABCDEFGHIJ4Xy0zQ";
const NOW_NS: u64 = 1_800_000_000_000_000_000;

/// Cells like Envoy's, for one VM.
#[derive(Default)]
struct Memory(RefCell<HashMap<String, Cell>>);

impl Cells for Memory {
    fn get(&self, name: &str) -> Option<Cell> {
        self.0.borrow().get(name).cloned()
    }

    fn put(&self, name: &str, value: &[u8], seen: Option<u32>) -> Result<(), Raced> {
        let mut cells = self.0.borrow_mut();
        let version = cells.get(name).map(|cell| cell.version);
        if version != seen {
            return Err(Raced);
        }
        let cell = Cell { value: value.to_vec(), version: version.unwrap_or_default().wrapping_add(1) };
        cells.insert(name.to_owned(), cell);
        Ok(())
    }
}

fn names() -> Names {
    Names::of("cluster", "default")
}

#[divan::bench]
fn read_and_hash_the_header(bencher: Bencher<'_, '_>) {
    let sources = [Source::Header("x-api-key".into())];
    bencher.bench_local(|| credential::find(black_box(&sources), |_| Some(KEY.to_vec())).credential);
}

#[divan::bench]
fn name_a_cell(bencher: Bencher<'_, '_>) {
    let names = names();
    bencher.bench_local(|| names.records(black_box(0xabcd)));
}

/// Fills one cell of the store with such records.
fn fill(cells: &Memory, names: &Names, records: impl IntoIterator<Item = (KeyHash, Record)>) {
    assert!(lease::hold(cells, names, Holder(1), 0));
    let mut page = PageWriter::new();
    for (hash, record) in records {
        page.put(&hash, &record.to_bytes().expect("a record can be written"));
    }
    let part = Part::Changes { after: 0 };
    let header = Header { epoch: Epoch([1; 16]), revision: 1, total_keys: 1, part, filters: 1 };
    let bytes = page.finish(&header).expect("a page can be written");
    store::apply(cells, names, Holder(1), &Page::read(&bytes).expect("our own page")).expect("the lease is held");
}

/// In a cell with 1 key, with 31 (a million keys in all) and with 250 (eight million).
#[divan::bench(args = [1, 31, 250])]
fn find_a_record(bencher: Bencher<'_, '_>, keys: u8) {
    let (cells, names) = (Memory::default(), names());
    let hash = |number| {
        let mut hash = [number; 32];
        [hash[0], hash[1]] = [0xab, 0xcd];
        KeyHash(hash)
    };
    let record = |number| Record::plain(KeyId([number; 16]), OwnerId([0; 16]));
    fill(&cells, &names, (0..keys).map(|number| (hash(number), record(number))));
    let wanted = hash(keys.saturating_sub(1));
    bencher.bench_local(|| store::find(&cells, &names, black_box(&wanted)).is_some());
}

/// What comes before a request is judged: whether the VM remembers its key, and whether that has a limit.
#[derive(Clone, Copy, Debug)]
enum Of {
    Remembered,
    Forgotten,
    Limited,
}

/// From the hash of the key to the verdict.
#[divan::bench(args = [Of::Remembered, Of::Forgotten, Of::Limited])]
fn judge_a_request(bencher: Bencher<'_, '_>, of: Of) {
    let (cells, names, hash) = (Memory::default(), names(), KeyHash::of(KEY));
    let mut record = Record::plain(KeyId([7; 16]), OwnerId([0; 16]));
    if matches!(of, Of::Limited) {
        record.rate_limits = vec![RateLimit { name: "own".into(), requests: u32::MAX, window_s: 1, burst: u32::MAX }];
    }
    fill(&cells, &names, [(hash, record)]);
    let config = br#"{"control_plane": {"cluster": "portcullis"}, "rate_limit": null}"#;
    let config = Config::parse(config).expect("a configuration");
    let state = State { epoch: Epoch([1; 16]), revision: 1, keys: 1, synced_ms: NOW_NS / 1_000_000, filters: 1 };
    let (recent, slices) = (Recent::default(), Slices::default());
    let judge = Judge {
        cells: &cells,
        names: &names,
        config: &config,
        state: Some(state),
        recent: &recent,
        slices: &slices,
        number: NonZeroU64::new(1).filter(|_| !matches!(of, Of::Forgotten)),
        address: || None,
        now_ns: || NOW_NS,
    };
    let policy = config.policies.find(None).expect("the policy of routes that name none");
    let judged = || judge.judge(Credential::Presented(black_box(hash)), Some(policy));
    assert_eq!(judged().outcome, Outcome::Allowed);
    bencher.bench_local(judged);
}

#[divan::bench]
fn take_from_a_limit(bencher: Bencher<'_, '_>) {
    let (cells, names) = (Memory::default(), names());
    let limit = RateLimit { name: "own".into(), requests: u32::MAX, window_s: 1, burst: u32::MAX };
    let limits = [Limit { limit: &limit, tag: Tag::of_key(&limit.name), shared: true }];
    let subject = Subject::Key(KeyId([7; 16]));
    bencher.bench_local(|| limiter::take(&cells, &names, black_box(subject), &limits, 1, WHOLE, NOW_NS));
}

#[divan::bench]
fn count_a_request(bencher: Bencher<'_, '_>) {
    let mut counts = Counts::default();
    let key = Some(KeyRef { id: KeyId([7; 16]), generation: 1 });
    bencher.bench_local(|| counts.add(black_box(key), Outcome::Allowed, false, Drawn::default(), 1_800_000_000_000));
}

/// What a quarter of a second leaves to do that saw so many keys: their counts go from the VM to the leader, out, and away.
#[divan::bench(args = [1, 4_000])]
fn report_keys(bencher: Bencher<'_, '_>, keys: u16) {
    let (cells, names, reporter) = (Memory::default(), names(), ReporterId([1; 16]));
    Outbox::open(&cells, &names, reporter).expect("an outbox");
    let counted = || {
        let mut counts = Counts::default();
        for number in 0..keys {
            let mut id = [7; 16];
            [id[0], id[1]] = number.to_be_bytes();
            let key = Some(KeyRef { id: KeyId(id), generation: 1 });
            counts.add(key, Outcome::Allowed, false, Drawn::default(), 1_800_000_000_000);
        }
        counts
    };
    bencher.with_inputs(counted).bench_local_values(|mut counts| {
        counts.publish(&cells, &names, 0);
        usage::collect(&cells, &names);
        let outbox = usage::freeze(&cells, &names, Freeze::Pending).expect("an outbox");
        let bytes = write_reports(&outbox.reports()).expect("a report can be written");
        usage::acknowledge(&cells, &names, reporter, outbox.frozen_seq);
        bytes
    });
}

#[divan::bench]
fn refuse_an_unknown_key(bencher: Bencher<'_, '_>) {
    let challenge = Challenge::new("portcullis", &[Source::Header("x-api-key".into())]).expect("a plain realm");
    bencher.bench_local(|| reply(black_box(Outcome::Unknown), &challenge, &Wait::Usual, |_| RequestFacts::default()));
}

#[divan::bench]
fn refuse_by_a_limit(bencher: Bencher<'_, '_>) {
    let challenge = Challenge::new("portcullis", &[Source::Header("x-api-key".into())]).expect("a plain realm");
    let limit = RateLimit { name: "own".into(), requests: 100, window_s: 1, burst: 100 };
    let wait = Wait::Limits(vec![limit], Refused { limit: 0, retry_after_s: 7 });
    bencher.bench_local(|| reply(black_box(Outcome::RateLimited), &challenge, &wait, |_| RequestFacts::default()));
}
