//! What is remembered, against what the store says, whatever happens in between.

use std::cell::Cell as Slot;

use contract::definition::Definition;
use contract::id::{Epoch, KeyId, OwnerId};
use contract::page::{Header, Page, PageWriter, Part};
use contract::record::Flags;
use proptest::prelude::*;

use super::*;
use crate::cells::memory::MemoryCells;
use crate::lease::{Holder, LEASE_MS, hold};
use crate::store::{Deposed, apply, publish};

const ME: Holder = Holder(1);

#[derive(Debug, Default)]
struct Number(Slot<u64>);

impl Writes for Number {
    fn number(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.0.get())
    }

    fn raise(&self) {
        self.0.set(self.0.get() + 1);
    }
}

struct Store {
    cells: MemoryCells,
    names: Names,
    writes: Number,
}

impl Store {
    fn new() -> Self {
        let (cells, names) = (MemoryCells::default(), Names::of("cp", "default"));
        assert!(hold(&cells, &names, ME, 0));
        Self { cells, names, writes: Number::default() }
    }

    fn publish(&self, bytes: &[u8]) {
        publish(&self.cells, &self.names, ME, &Page::read(bytes).unwrap(), &self.writes).unwrap();
    }

    fn find(&self, recent: &Recent, hash: &KeyHash) -> Option<Rc<Known>> {
        recent.find(&self.cells, &self.names, self.writes.number(), hash, None)
    }

    /// What a VM finds that remembers nothing.
    fn truth(&self, hash: &KeyHash) -> Option<Rc<Known>> {
        Recent::default().find(&self.cells, &self.names, None, hash, None)
    }

    fn reads(&self, act: impl FnOnce()) -> u32 {
        let before = self.cells.reads.get();
        act();
        self.cells.reads.get() - before
    }
}

/// Few sets and few buckets, so that keys meet.
fn hash(number: u8) -> KeyHash {
    let mut hash = [number; 32];
    [hash[0], hash[1], hash[2], hash[3]] = [0, number % 3, 0, number % 2];
    KeyHash(hash)
}

fn record(number: u8, flags: Flags) -> Record {
    let roles = if number.is_multiple_of(2) { vec![1] } else { Vec::new() };
    Record { flags, roles, ..Record::plain(KeyId([number; 16]), OwnerId([7; 16])) }
}

fn page(write: impl FnOnce(&mut PageWriter)) -> Vec<u8> {
    let mut writer = PageWriter::new();
    write(&mut writer);
    let part = Part::Changes { after: 0 };
    writer.finish(&Header { epoch: Epoch([9; 16]), revision: 1, total_keys: 1, part, filters: 0 }).unwrap()
}

fn put(number: u8, flags: Flags) -> Vec<u8> {
    page(|writer| writer.put(&hash(number), &record(number, flags).to_bytes().unwrap()))
}

fn role(scope: &str) -> Vec<u8> {
    let definition = Definition { scopes: vec![scope.into()], ..Definition::default() };
    page(|writer| writer.define(1, &definition.to_bytes().unwrap()))
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
    fn whoever_remembers_finds_what_the_store_says(steps in prop::collection::vec(step(), 1..200)) {
        let (store, vms) = (Store::new(), [Recent::default(), Recent::default(), Recent::default()]);
        for step in steps {
            match step {
                Step::Put(key, flags) => store.publish(&put(key, Flags(flags))),
                Step::Remove(key) => store.publish(&page(|writer| writer.remove(&hash(key)))),
                Step::Define(read) => store.publish(&role(if read { "read" } else { "write" })),
                Step::Find(vm, key) => {
                    let hash = hash(key);
                    prop_assert_eq!(store.find(&vms[vm], &hash), store.truth(&hash));
                }
            }
        }
    }
}

#[test]
fn a_key_that_is_remembered_is_not_looked_up_again_and_a_stranger_is() {
    let (store, recent) = (Store::new(), Recent::default());
    store.publish(&put(1, Flags(0)));
    assert_eq!(store.reads(|| drop(store.find(&recent, &hash(1)))), 1);
    assert_eq!(store.reads(|| drop(store.find(&recent, &hash(1)))), 0);
    for _ in 0..3 {
        assert_eq!(store.reads(|| drop(store.find(&recent, &hash(3)))), 1);
    }
}

#[test]
fn without_a_number_nothing_is_remembered() {
    let (store, recent) = (Store::new(), Recent::default());
    apply(&store.cells, &store.names, ME, &Page::read(&put(1, Flags(0))).unwrap()).unwrap();
    for _ in 0..3 {
        assert_eq!(store.reads(|| drop(store.find(&recent, &hash(1)))), 1);
    }
}

#[test]
fn what_was_read_while_the_leader_wrote_does_not_outlive_the_change() {
    let (store, recent) = (Store::new(), Recent::default());
    store.publish(&put(1, Flags(0)));
    // A worker has read the number and is held up; or it reads the bucket just before it is written.
    let early = store.writes.number();
    let before = recent.find(&store.cells, &store.names, early, &hash(1), None).unwrap();
    apply(&store.cells, &store.names, ME, &Page::read(&put(1, Flags::REVOKED)).unwrap()).unwrap();
    // Written, not yet said to be done: old or new, both are true.
    assert_eq!(store.find(&recent, &hash(1)), Some(before));
    store.writes.raise();
    assert_eq!(store.find(&recent, &hash(1)).unwrap().record.flags, Flags::REVOKED);
    // The one that was held up remembers under the old number, which counts for nobody.
    assert_eq!(recent.find(&store.cells, &store.names, early, &hash(1), None).unwrap().record.flags, Flags::REVOKED);
    assert_eq!(store.find(&recent, &hash(1)).unwrap().record.flags, Flags::REVOKED);
}

#[test]
fn a_leader_that_is_deposed_halfway_raises_the_number_all_the_same() {
    let store = Store::new();
    store.publish(&put(1, Flags(0)));
    let before = store.writes.number();
    assert!(hold(&store.cells, &store.names, Holder(2), LEASE_MS));
    let bytes = put(1, Flags::REVOKED);
    let page = Page::read(&bytes).unwrap();
    assert_eq!(publish(&store.cells, &store.names, ME, &page, &store.writes), Err(Deposed));
    assert_ne!(store.writes.number(), before);
}

#[test]
fn no_more_keys_are_remembered_than_stated_and_none_with_endless_scopes() {
    let (store, recent) = (Store::new(), Recent::default());
    store.publish(&put(1, Flags(0)));
    let number = store.writes.number().unwrap();
    let known = store.find(&recent, &hash(1)).unwrap();
    for number_of_key in 0..20_000_u32 {
        let hash = KeyHash::of(&number_of_key.to_le_bytes());
        recent.remember(Entry { hash, number, known: Rc::clone(&known) });
    }
    let held = recent.sets.borrow().iter().flat_map(|set| set.entries.iter().flatten()).count();
    assert!(held <= REMEMBERED && held > REMEMBERED / 2, "{held}");

    let mut talkative = record(3, Flags(0));
    talkative.scopes = (0..200).map(|number| format!("orders:{number}")).collect();
    store.publish(&page(|writer| writer.put(&hash(3), &talkative.to_bytes().unwrap())));
    for _ in 0..3 {
        assert_eq!(store.reads(|| drop(store.find(&recent, &hash(3)))), 1);
    }
}

#[test]
fn keys_that_come_in_turn_and_are_more_than_fit_are_not_all_forgotten() {
    let (store, recent) = (Store::new(), Recent::default());
    // All in one set, which has room for half of them.
    let keys: Vec<KeyHash> = (0..2 * WAYS as u8).map(|number| hash(2 * number + 1)).collect();
    (0..2 * WAYS as u8).for_each(|number| store.publish(&put(2 * number + 1, Flags(0))));
    let ask = |keys: &[KeyHash]| keys.iter().for_each(|key| drop(store.find(&recent, key)));
    let reads = store.reads(|| (0..100).for_each(|_| ask(&keys)));
    assert!(reads < 100 * 6, "{reads} of 800");
    // Those that come alone from now on have their place before long.
    let newcomers = &keys[WAYS..];
    (0..2 * WAYS * STAY).for_each(|_| ask(newcomers));
    assert_eq!(store.reads(|| ask(newcomers)), 0);
}

#[test]
fn definitions_that_were_replaced_are_let_go() {
    let (store, recent) = (Store::new(), Recent::default());
    store.publish(&role("old"));
    (1..9).for_each(|number| store.publish(&put(number * 2, Flags(0))));
    let finds = || (1..9).map(|number| store.find(&recent, &hash(number * 2)).unwrap()).collect::<Vec<_>>();
    let old = Rc::downgrade(&finds()[0].definitions);
    assert!(old.upgrade().is_some());
    store.publish(&role("new"));
    assert_eq!(store.find(&recent, &hash(2)).unwrap().scopes.as_deref(), Some("new"));
    assert!(old.upgrade().is_none());
    assert!(finds().iter().all(|known| known.scopes.as_deref() == Some("new")));
}
