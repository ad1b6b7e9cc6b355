//! Look-ups of several VMs compared with the content of the cells, whatever the leader writes in between.

use contract::definition::Definition;
use contract::id::{Epoch, KeyId, OwnerId};
use contract::record::{Flags, Record};
use contract::update::{Header, Part, Update, UpdateWriter};
use proptest::prelude::*;

use super::cache::{CACHED_KEYS, EVICTION, WAYS};
use super::*;
use crate::mock::{MockHost, TestData, new_data};
use crate::shared::election::{TERM_MS, acquire};

const ME: NodeId = NodeId(1);

type TestStore = CellStore<MockHost>;

/// The cells, and the VM that leads.
struct Store {
    data: TestData,
    leader: TestStore,
}

impl Store {
    fn new() -> Self {
        let data = new_data();
        assert!(acquire(&data, ME, 0));
        Self { leader: CellStore::new(data.clone()), data }
    }

    /// Another VM.
    fn vm(&self) -> TestStore {
        CellStore::new(self.data.clone())
    }

    fn apply(&self, bytes: &[u8]) {
        self.leader.apply(ME, &Update::read(bytes).unwrap()).unwrap();
    }

    /// Writes an update, but does not begin a generation yet.
    fn write(&self, bytes: &[u8]) {
        write(&self.data, ME, &Update::read(bytes).unwrap()).unwrap();
    }

    /// What a VM without a cache finds.
    fn truth(&self, hash: &KeyHash) -> Option<Arc<StoredKey>> {
        self.vm().find_as_of(None, hash, None)
    }

    fn reads(&self, act: impl FnOnce()) -> u32 {
        let before = self.data.host().reads();
        act();
        self.data.host().reads() - before
    }
}

/// Few sets and few buckets, so that keys share them.
fn hash(number: u8) -> KeyHash {
    let mut hash = [number; 32];
    [hash[0], hash[1], hash[2], hash[3]] = [0, number % 3, 0, number % 2];
    KeyHash(hash)
}

fn record(number: u8, flags: Flags) -> Record {
    let roles = if number.is_multiple_of(2) { vec![1] } else { Vec::new() };
    Record { flags, roles, ..Record::plain(KeyId([number; 16]), OwnerId([7; 16])) }
}

fn update(write: impl FnOnce(&mut UpdateWriter)) -> Vec<u8> {
    let mut writer = UpdateWriter::default();
    write(&mut writer);
    let part = Part::Changes { after: 0 };
    writer.finish(&Header { epoch: Epoch([9; 16]), revision: 1, total_keys: 1, part }).unwrap()
}

fn put(number: u8, flags: Flags) -> Vec<u8> {
    update(|writer| writer.put(&hash(number), &record(number, flags).to_bytes().unwrap()))
}

fn role(scope: &str) -> Vec<u8> {
    let definition = Definition { scopes: vec![scope.into()], ..Definition::default() };
    update(|writer| writer.define(1, &definition.to_bytes().unwrap()))
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u32),
    Remove(u8),
    Define(bool),
    Find(usize, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0_u8..20, 0_u32..4).prop_map(|(key, flags)| Step::Put(key, flags)),
        1 => (0_u8..20).prop_map(Step::Remove),
        1 => any::<bool>().prop_map(Step::Define),
        8 => (0_usize..3, 0_u8..20).prop_map(|(vm, key)| Step::Find(vm, key)),
    ]
}

proptest! {
    #[test]
    fn every_look_up_finds_what_the_cells_say(steps in prop::collection::vec(step(), 1..200)) {
        let store = Store::new();
        let vms = [store.vm(), store.vm(), store.vm()];
        for step in steps {
            match step {
                Step::Put(key, flags) => store.apply(&put(key, Flags(flags))),
                Step::Remove(key) => store.apply(&update(|writer| writer.remove(&hash(key)))),
                Step::Define(read) => store.apply(&role(if read { "read" } else { "write" })),
                Step::Find(vm, key) => {
                    let hash = hash(key);
                    prop_assert_eq!(vms[vm].find(&hash, None), store.truth(&hash));
                }
            }
        }
    }
}

#[test]
fn a_cached_key_is_not_read_again_and_an_unknown_key_is() {
    let store = Store::new();
    let vm = store.vm();
    store.apply(&put(1, Flags(0)));
    assert_eq!(store.reads(|| drop(vm.find(&hash(1), None))), 1);
    assert_eq!(store.reads(|| drop(vm.find(&hash(1), None))), 0);
    for _ in 0..3 {
        assert_eq!(store.reads(|| drop(vm.find(&hash(3), None))), 1);
    }
}

#[test]
fn without_a_generation_the_cache_is_not_used() {
    let store = Store::new();
    let vm = store.vm();
    store.write(&put(1, Flags(0)));
    for _ in 0..3 {
        assert_eq!(store.reads(|| drop(vm.find(&hash(1), None))), 1);
    }
}

#[test]
fn a_key_that_was_read_during_a_write_is_read_again_after_it() {
    let store = Store::new();
    let vm = store.vm();
    store.apply(&put(1, Flags(0)));
    // A worker has read the generation and is suspended; or it reads the cell just before the write.
    let early = store.leader.generation();
    let before = vm.find_as_of(early, &hash(1), None).unwrap();
    store.write(&put(1, Flags::REVOKED));
    // Written, but not reported as done: the old and the new record are both correct.
    assert_eq!(vm.find(&hash(1), None), Some(before));
    store.leader.generation.raise();
    assert_eq!(vm.find(&hash(1), None).unwrap().record.flags, Flags::REVOKED);
    // The suspended worker caches under the old generation, which no look-up accepts.
    assert_eq!(vm.find_as_of(early, &hash(1), None).unwrap().record.flags, Flags::REVOKED);
    assert_eq!(vm.find(&hash(1), None).unwrap().record.flags, Flags::REVOKED);
}

#[test]
fn a_leader_that_loses_its_term_halfway_begins_a_generation_all_the_same() {
    let store = Store::new();
    store.apply(&put(1, Flags(0)));
    let before = store.leader.generation();
    assert!(acquire(&store.data, NodeId(2), TERM_MS));
    let bytes = put(1, Flags::REVOKED);
    let update = Update::read(&bytes).unwrap();
    assert_eq!(store.leader.apply(ME, &update), Err(NotLeader));
    assert_ne!(store.leader.generation(), before);
}

#[test]
fn the_cache_is_bounded_and_takes_no_key_with_very_long_scopes() {
    let store = Store::new();
    let vm = store.vm();
    store.apply(&put(1, Flags(0)));
    let generation = store.leader.generation().unwrap();
    let key = vm.find(&hash(1), None).unwrap();
    for number_of_key in 0..20_000_u32 {
        let hash = KeyHash::of(&number_of_key.to_le_bytes());
        vm.cache.insert(generation, hash, &key);
    }
    let cached = vm.cache.len();
    assert!(cached <= CACHED_KEYS && cached > CACHED_KEYS / 2, "{cached}");

    let mut long = record(3, Flags(0));
    long.scopes = (0..200).map(|number| format!("orders:{number}")).collect();
    store.apply(&update(|writer| writer.put(&hash(3), &long.to_bytes().unwrap())));
    for _ in 0..3 {
        assert_eq!(store.reads(|| drop(vm.find(&hash(3), None))), 1);
    }
}

#[test]
fn a_cyclic_pattern_larger_than_the_cache_does_not_empty_it() {
    let store = Store::new();
    let vm = store.vm();
    // All are in one set, which has room for half of them.
    let keys: Vec<KeyHash> = (0..2 * WAYS as u8).map(|number| hash(2 * number + 1)).collect();
    (0..2 * WAYS as u8).for_each(|number| store.apply(&put(2 * number + 1, Flags(0))));
    let ask = |keys: &[KeyHash]| keys.iter().for_each(|key| drop(vm.find(key, None)));
    let reads = store.reads(|| (0..100).for_each(|_| ask(&keys)));
    assert!(reads < 100 * 6, "{reads} of 800");
    // Keys that are the only ones from now on are cached soon.
    let newcomers = &keys[WAYS..];
    (0..2 * WAYS * EVICTION).for_each(|_| ask(newcomers));
    assert_eq!(store.reads(|| ask(newcomers)), 0);
}

#[test]
fn replaced_definitions_leave_memory() {
    let store = Store::new();
    let vm = store.vm();
    store.apply(&role("old"));
    (1..9).for_each(|number| store.apply(&put(number * 2, Flags(0))));
    let finds = || (1..9).map(|number| vm.find(&hash(number * 2), None).unwrap()).collect::<Vec<_>>();
    let old = Arc::downgrade(&finds()[0].definitions);
    assert!(old.upgrade().is_some());
    store.apply(&role("new"));
    assert_eq!(vm.find(&hash(2), None).unwrap().scopes.as_deref(), Some("new"));
    assert!(old.upgrade().is_none());
    assert!(finds().iter().all(|key| key.scopes.as_deref() == Some("new")));
}
