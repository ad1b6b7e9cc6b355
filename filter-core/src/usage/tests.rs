//! Counts from the VMs to the reports, on a mock host.

use contract::id::KeyId;

use super::collector::{acknowledge, collect, freeze, open as open_outbox, read};
use super::counter::{Counts, SLOTS, take_slot};
use super::outbox::{BATCH_REPORTS, Freeze};
use crate::mock::{TestData, new_data};
use contract::id::ReporterId;
use contract::outcome::Outcome;
use contract::usage::{KeyRef, REPORT_COUNTS, Report};

const REPORTER: ReporterId = ReporterId([5; 16]);
const NOW: u64 = 1_800_000_000_000;

fn key(number: u8) -> Option<KeyRef> {
    Some(KeyRef { id: KeyId([number; 16]), generation: 1 })
}

fn counted(requests: &[(Option<KeyRef>, Outcome)]) -> Counts {
    let mut counts = Counts::default();
    for (key, outcome) in requests {
        counts.add(*key, *outcome, false, 2, NOW);
    }
    counts
}

/// One request of each of this many keys.
fn of_many(keys: u32) -> Counts {
    let mut counts = Counts::default();
    for number in 0..keys {
        let mut id = KeyId([0; 16]);
        id.0[..4].copy_from_slice(&number.to_be_bytes());
        counts.add(Some(KeyRef { id, generation: 1 }), Outcome::Allowed, false, 1, NOW);
    }
    counts
}

fn open() -> TestData {
    let data = new_data();
    assert_eq!(open_outbox(&data, REPORTER), Some(REPORTER));
    data
}

fn requests(data: &TestData) -> u64 {
    read(data).unwrap().requests()
}

fn one_report(data: &TestData) -> Report {
    let [mut report] = freeze(data, Freeze::Pending).unwrap().reports().try_into().unwrap();
    report.counts.sort_by_key(|count| count.of);
    report
}

#[test]
fn counts_of_one_subject_merge_and_only_allowed_requests_cost() {
    let data = open();
    counted(&[(key(1), Outcome::Allowed), (key(1), Outcome::Allowed), (key(1), Outcome::RateLimited)])
        .publish(&data, 0);
    counted(&[(key(1), Outcome::Allowed), (None, Outcome::Unknown)]).publish(&data, 1);
    collect(&data);
    let report = one_report(&data);
    let seen: Vec<_> = report.counts.iter().map(|c| (c.of.key, c.of.outcome, c.requests, c.cost)).collect();
    assert_eq!(
        seen,
        [
            (None, Outcome::Unknown.code(), 1, 0),
            (key(1), Outcome::Allowed.code(), 3, 6),
            (key(1), Outcome::RateLimited.code(), 1, 0)
        ]
    );
}

#[test]
fn a_frozen_report_stays_the_same_until_it_is_acknowledged() {
    let data = open();
    counted(&[(key(1), Outcome::Allowed)]).publish(&data, 0);
    collect(&data);
    let first = one_report(&data);
    counted(&[(key(1), Outcome::Allowed)]).publish(&data, 0);
    collect(&data);
    assert_eq!(one_report(&data), first);

    acknowledge(&data, ReporterId([6; 16]), 1);
    acknowledge(&data, REPORTER, 0);
    assert_eq!(one_report(&data), first);

    acknowledge(&data, REPORTER, 1);
    let second = one_report(&data);
    assert_eq!((second.seq, second.counts.len()), (2, 1));
    acknowledge(&data, REPORTER, 2);
    assert_eq!(freeze(&data, Freeze::Pending).unwrap().reports(), []);
    assert_eq!(requests(&data), 0);
}

#[test]
fn a_new_leader_takes_the_outbox_over_as_it_is() {
    let data = open();
    counted(&[(key(1), Outcome::Allowed)]).publish(&data, 0);
    collect(&data);
    one_report(&data);
    assert_eq!(open_outbox(&data, ReporterId([6; 16])), Some(REPORTER));
    assert_eq!(requests(&data), 1);
}

#[test]
fn a_worker_that_publishes_while_its_cell_is_taken_loses_nothing() {
    let data = open();
    counted(&[(key(1), Outcome::Allowed)]).publish(&data, 3);
    let other = data.clone();
    data.host().before_next_put(move || counted(&[(key(1), Outcome::Allowed)]).publish(&other, 3));
    collect(&data);
    assert_eq!(requests(&data), 0);
    collect(&data);
    assert_eq!(requests(&data), 2);
}

#[test]
fn counts_wait_until_there_is_an_outbox() {
    let data = new_data();
    counted(&[(key(1), Outcome::Allowed)]).publish(&data, 3);
    collect(&data);
    assert_eq!(open_outbox(&data, REPORTER), Some(REPORTER));
    collect(&data);
    assert_eq!(requests(&data), 1);
}

#[test]
fn a_large_backlog_leaves_in_several_reports_of_bounded_size() {
    let data = open();
    of_many(REPORT_COUNTS as u32 + 5).publish(&data, 0);
    collect(&data);
    assert_eq!(one_report(&data).counts.len(), REPORT_COUNTS);
    acknowledge(&data, REPORTER, 1);
    let second = one_report(&data);
    assert_eq!((second.seq, second.counts.len()), (2, 5));
}

#[test]
fn a_last_report_of_any_length_leaves_in_batches() {
    let data = open();
    let keys = (REPORT_COUNTS * 5 + 1) as u32;
    of_many(keys).publish(&data, 0);
    collect(&data);
    let outbox = freeze(&data, Freeze::All).unwrap();
    let batches: Vec<Vec<Report>> = outbox.batches().collect();
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [BATCH_REPORTS, 2]);
    let numbers: Vec<u64> = batches.iter().flatten().map(|report| report.seq).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    assert_eq!(batches.iter().flatten().map(|report| report.counts.len()).sum::<usize>(), keys as usize);
}

#[test]
fn a_last_report_freezes_all_counts_and_later_counts_get_new_numbers() {
    let data = open();
    counted(&[(key(1), Outcome::Allowed)]).publish(&data, 0);
    collect(&data);
    let first = one_report(&data);
    counted(&[(key(2), Outcome::Allowed)]).publish(&data, 0);
    collect(&data);
    let last = freeze(&data, Freeze::All).unwrap().reports();
    assert_eq!(last.iter().map(|report| report.seq).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(last[0], first);

    counted(&[(key(2), Outcome::Allowed)]).publish(&data, 0);
    collect(&data);
    let later = freeze(&data, Freeze::All).unwrap().reports();
    assert_eq!(later[..2], last);
    assert_eq!(later[2].seq, 3);
    acknowledge(&data, REPORTER, 2);
    assert_eq!(one_report(&data), later[2]);
}

#[test]
fn hours_are_kept_apart_and_the_last_time_is_the_latest() {
    let data = open();
    let mut counts = Counts::default();
    for minutes in [0, 10, 70, 30] {
        counts.add(key(1), Outcome::Allowed, false, 1, NOW + minutes * 60_000);
    }
    counts.publish(&data, 0);
    collect(&data);
    let report = one_report(&data);
    let seen: Vec<_> = report.counts.iter().map(|count| (count.of.hour, count.requests, count.last_ms)).collect();
    assert_eq!(seen, [(500_000, 3, NOW + 30 * 60_000), (500_001, 1, NOW + 70 * 60_000)]);
}

#[test]
fn shadowed_requests_are_counted_apart_and_cost_nothing() {
    let mut counts = Counts::default();
    for outcome in [Outcome::Expired, Outcome::CreditsExhausted] {
        counts.add(key(1), outcome, false, 1, NOW);
        counts.add(key(1), outcome, true, 1, NOW);
    }
    let mut seen: Vec<_> = counts.counts.values().map(|count| (count.of.outcome, count.cost)).collect();
    seen.sort_unstable();
    assert_eq!(seen, [(4, 0), (10, 0), (132, 0), (138, 0)]);
}

#[test]
fn slots_are_taken_in_turn() {
    let data = new_data();
    let taken: Vec<_> = (0..=SLOTS).map(|_| take_slot(&data)).collect();
    assert_eq!(taken.first(), Some(&0));
    assert_eq!(taken.last(), Some(&0));
    assert_eq!(taken[1], 1);
}
