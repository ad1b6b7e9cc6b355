use contract::id::{KeyId, OwnerId};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const NOW: u64 = 1_800_000_000_000_000_000;

fn pool(kind: Kind, number: u8, tag: u64) -> PoolId {
    PoolId { kind, subject: Subject([number; 16]), tag }
}

fn numbered(number: u64) -> Holding {
    Holding::from_words(std::array::from_fn(|place| number + place as u64))
}

#[test]
fn entries_are_read_as_they_were_written() {
    let mut entries = Entries::default();
    entries.set_arrival([1; 16], 5, NOW + 9);
    for (number, kind) in [Kind::Rate, Kind::Quota, Kind::Credits].into_iter().enumerate() {
        entries.set_holding(&pool(kind, 1, 5), numbered(number as u64));
    }
    let bytes = entries.write(NOW);
    assert_eq!(bytes.len(), 33 + 3 * 193);
    let entries = Entries::read(&bytes);
    assert_eq!(entries.arrival([1; 16], 5), Some(NOW + 9));
    assert_eq!((entries.arrival([2; 16], 5), entries.arrival([1; 16], 6)), (None, None));
    assert_eq!(entries.holding(&pool(Kind::Quota, 1, 5)), numbered(1));
    assert_eq!(entries.holding(&pool(Kind::Credits, 1, 5)), numbered(2));
    assert_eq!(entries.holding(&pool(Kind::Rate, 2, 5)), Holding::default());
    assert_eq!(entries.holding(&pool(Kind::Rate, 1, 6)), Holding::default());
}

#[test]
fn an_entry_is_replaced_or_removed_and_the_others_stay() {
    let mut entries = Entries::default();
    for number in [1, 2, 3] {
        entries.set_arrival([1; 16], 5, NOW + number);
        entries.set_holding(&pool(Kind::Rate, 1, 5), numbered(number));
    }
    entries.set_holding(&pool(Kind::Rate, 2, 5), numbered(7));
    entries.remove(&pool(Kind::Rate, 1, 5));
    let bytes = entries.write(NOW);
    assert_eq!(bytes.len(), 33 + 193);
    let entries = Entries::read(&bytes);
    assert_eq!((entries.arrival([1; 16], 5), entries.holding(&pool(Kind::Rate, 2, 5))), (Some(NOW + 3), numbered(7)));
}

#[test]
fn arrival_times_that_have_passed_are_not_written() {
    let mut entries = Entries::default();
    entries.set_arrival([1; 16], 5, NOW);
    assert!(entries.write(NOW).is_empty());
    assert_eq!(entries.write(NOW - 1).len(), 33);
}

#[test]
fn a_cell_of_addresses_is_bounded_and_keeps_those_that_are_furthest_ahead() {
    let mut entries = Entries::default();
    for number in 0..600_u64 {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        entries.set_arrival(id, 0, NOW + 1 + number);
    }
    entries.set_holding(&pool(Kind::Rate, 1, 5), numbered(1));
    entries.bound();
    let bytes = entries.write(NOW);
    assert_eq!(bytes.len(), (ADDRESS_ENTRIES - 1) * 33 + 193);
    let arrivals = Entries::read(&bytes).0;
    let least = arrivals.iter().filter_map(|entry| match entry.value {
        Value::Local(arrival_ns) => Some(arrival_ns),
        Value::Shared(..) => None,
    });
    assert_eq!(least.min(), Some(NOW + 600 - (ADDRESS_ENTRIES as u64 - 1) + 1));
}

#[test]
fn what_another_kind_of_filter_wrote_ends_the_cell() {
    let mut entries = Entries::default();
    entries.set_arrival([1; 16], 5, NOW + 9);
    entries.set_holding(&pool(Kind::Rate, 1, 5), numbered(1));
    let mut bytes = entries.write(NOW);
    bytes[33 + 16] = 77;
    assert_eq!(Entries::read(&bytes).write(NOW).len(), 33);
}

#[test]
fn keys_users_and_clients_have_cells_by_their_ids() {
    let id = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0xab, 0xcd];
    assert_eq!(cell_of(KeyId(id).into()), CellKey::Limits(0xabcd));
    assert_eq!(cell_of(OwnerId(id).into()), CellKey::Limits(0xabcd));
    let CellKey::ClientLimits(number) = cell_of_client(Client::UNKNOWN) else { panic!("another cell") };
    assert!(number < ADDRESS_CELLS);
}

proptest! {
    #[test]
    fn any_bytes_can_be_read(bytes in vec(any::<u8>(), 0..999)) {
        let entries = Entries::read(&bytes);
        prop_assert!(entries.write(0).len() <= bytes.len());
    }
}
