//! What the pure steps of a request cost natively: `cargo bench -p contract`.

use contract::decision::{Facts, Presented, decide};
use contract::hash::KeyHash;
use contract::id::{Epoch, KeyId, OwnerId};
use contract::key;
use contract::policy::{Policy, ScopeNeed};
use contract::record::{Per, RateLimit, Record};
use contract::update::{Header, Part, Update, UpdateWriter};
use divan::{Bencher, black_box};

/// Tells of the allocations of each step too.
#[global_allocator]
static ALLOCATOR: divan::AllocProfiler = divan::AllocProfiler::system();

fn main() {
    divan::main();
}

const KEY: &str = "sk_live_0123456789abcdefghijABCDEFGHIJ4Xy0zQ";

fn plain() -> Record {
    Record::plain(KeyId([1; 16]), OwnerId([2; 16]))
}

fn rich() -> Record {
    let limit = |name: &str| RateLimit {
        name: name.into(),
        requests: 100,
        window_s: 1,
        burst: 200,
        shared: true,
        per: Per::Key,
    };
    Record {
        rate_limits: vec![limit("second"), limit("minute")],
        scopes: vec!["orders:read".into(), "orders:write".into(), "invoices:read".into()],
        ..plain()
    }
}

#[divan::bench]
fn hash_a_key() -> KeyHash {
    KeyHash::of(black_box(KEY.as_bytes()))
}

#[divan::bench]
fn check_the_form_of_a_key() -> bool {
    key::check(black_box(KEY)).is_ok()
}

#[divan::bench]
fn decode_a_plain_record(bencher: Bencher<'_, '_>) {
    let bytes = plain().to_bytes().expect("a record can be written");
    bencher.bench_local(|| Record::from_bytes(black_box(&bytes)));
}

#[divan::bench]
fn decode_a_record_with_limits_and_scopes(bencher: Bencher<'_, '_>) {
    let bytes = rich().to_bytes().expect("a record can be written");
    bencher.bench_local(|| Record::from_bytes(black_box(&bytes)));
}

#[divan::bench]
fn decide_on_a_record(bencher: Bencher<'_, '_>) {
    let record = rich();
    let scopes = ScopeNeed::All(vec!["invoices:read".into()]);
    let policy = Policy { scopes, ..Policy::default() };
    let facts = Facts { policy: &policy, ..Facts::at(1_000) };
    bencher.bench_local(|| decide(black_box(Presented::Key(&record)), black_box(&facts)));
}

#[divan::bench]
fn read_an_update_of_ten_thousand_keys(bencher: Bencher<'_, '_>) {
    let mut writer = UpdateWriter::default();
    let record = plain().to_bytes().expect("a record can be written");
    for number in 0..10_000_u32 {
        writer.put(&KeyHash::of(&number.to_le_bytes()), &record);
    }
    let part = Part::Changes { after: 0 };
    let header = Header { epoch: Epoch([1; 16]), revision: 1, total_keys: 10_000, part };
    let update = writer.finish(&header).expect("an update can be written");
    bencher.bench_local(|| Update::read(black_box(&update)).is_ok());
}
