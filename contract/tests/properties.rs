//! Whatever is written is read back, and whatever bytes arrive, reading them ends in a value or an error.

#![cfg(not(target_family = "wasm"))]

use contract::codec::{DecodeError, PAGE, USAGE, seal};
use contract::decision::{Facts, Presented, decide};
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId, ReporterId};
use contract::key::{self, FormError, Secret};
use contract::outcome::Outcome;
use contract::page::{Entry, EntryView, Header, Page, PageView, PageWriter, Part};
use contract::record::{Flags, RateLimit, Record, Requires};
use contract::usage::{Ack, Count, KeyRef, Report, Subject, read_reports, write_reports};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

prop_compose! {
    fn rate_limit()(name in "[a-z]{0,8}", requests in any::<u32>(), window_s in any::<u32>(), burst in any::<u32>()) -> RateLimit {
        RateLimit { name, requests, window_s, burst }
    }
}

prop_compose! {
    fn record()(
        requires in any::<u32>(), key_id in any::<[u8; 16]>(), owner_id in any::<[u8; 16]>(), generation in any::<u32>(),
        flags in any::<u32>(), expires_at_s in option::of(any::<u64>()), cost in any::<u32>(),
        rate_limits in vec(rate_limit(), 0..4), scopes in vec("[a-z:*é]{0,12}", 0..4), roles in vec(any::<u32>(), 0..4),
        address_list in option::of(any::<u32>()),
    ) -> Record {
        Record {
            requires: Requires(requires), key_id: KeyId(key_id), owner_id: OwnerId(owner_id), generation,
            flags: Flags(flags), expires_at_s, cost, rate_limits, scopes, roles, address_list,
        }
    }
}

fn entry() -> impl Strategy<Value = EntryView> {
    let hash = any::<[u8; 32]>().prop_map(KeyHash);
    prop_oneof![
        (hash.clone(), record()).prop_map(|(hash, record)| EntryView::Put { hash, record }),
        hash.prop_map(|hash| EntryView::Remove { hash }),
    ]
}

prop_compose! {
    fn count()(
        key in option::of((any::<[u8; 16]>(), any::<u32>())), outcome in any::<u8>(), hour in any::<u32>(),
        requests in any::<u64>(), cost in any::<u64>(), last_ms in any::<u64>(),
    ) -> Count {
        let key = key.map(|(id, generation)| KeyRef { id: KeyId(id), generation });
        Count { of: Subject { key, outcome, hour }, requests, cost, last_ms }
    }
}

proptest! {
    #[test]
    fn records_come_back_as_they_were_and_so_do_their_json_forms(record in record()) {
        prop_assert_eq!(Record::from_bytes(&record.to_bytes().unwrap()), Ok(record.clone()));
        let json = serde_json::to_string(&record).unwrap();
        prop_assert_eq!(serde_json::from_str::<Record>(&json).unwrap(), record);
    }

    #[test]
    fn pages_come_back_as_they_were(entries in vec(entry(), 0..40), epoch in any::<[u8; 16]>(), after in any::<u64>()) {
        let mut writer = PageWriter::new();
        for entry in &entries {
            match entry {
                EntryView::Put { hash, record } => writer.put(hash, &record.to_bytes().unwrap()),
                EntryView::Remove { hash } => writer.remove(hash),
            }
        }
        let header = Header { epoch: Epoch(epoch), revision: after, total_keys: 1, part: Part::Changes { after } };
        let bytes = writer.finish(&header).unwrap();
        let page = Page::read(&bytes).unwrap();
        prop_assert_eq!(PageView::of(&page).unwrap(), PageView { header, entries });
    }

    #[test]
    fn a_snapshot_page_holds_its_keys_in_order_of_their_buckets(mut hashes in vec(any::<[u8; 32]>(), 0..40)) {
        hashes.sort_unstable();
        let record = Record::plain(KeyId([0; 16]), OwnerId([0; 16])).to_bytes().unwrap();
        let mut writer = PageWriter::new();
        for hash in &hashes {
            writer.put(&KeyHash(*hash), &record);
        }
        let part = Part::Snapshot { from: 0, to: BUCKETS };
        let bytes = writer.finish(&Header { epoch: Epoch([0; 16]), revision: 1, total_keys: 1, part }).unwrap();
        let read: Vec<_> = Page::read(&bytes).unwrap().entries().map(|entry| match entry {
            Entry::Put { hash, .. } | Entry::Remove { hash } => hash.0,
            Entry::Newer => [0; 32],
        }).collect();
        prop_assert_eq!(read, hashes);
    }

    #[test]
    fn reports_come_back_as_they_were(counts in vec(count(), 0..40), reporter in any::<[u8; 16]>(), seq in any::<u64>()) {
        let reports = vec![Report { reporter: ReporterId(reporter), seq, counts }];
        prop_assert_eq!(read_reports(&write_reports(&reports).unwrap()), Ok(reports.clone()));
        let json = serde_json::to_string(&reports).unwrap();
        prop_assert_eq!(serde_json::from_str::<Vec<Report>>(&json).unwrap(), reports);
    }

    #[test]
    fn arbitrary_bytes_are_read_to_a_value_or_an_error(bytes in vec(any::<u8>(), 0..400)) {
        let _ = Record::from_bytes(&bytes);
        prop_assert!(Page::read(&bytes).is_err());
        prop_assert!(read_reports(&bytes).is_err());
        prop_assert!(Ack::read(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_under_a_good_seal_are_read_to_a_value_or_an_error(header in vec(any::<u8>(), 0..60), entries in vec(any::<u8>(), 0..400)) {
        if let Ok(page) = Page::read(&seal(PAGE, &(header.clone(), entries.clone())).unwrap()) {
            prop_assert!(PageView::of(&page).is_ok());
        }
        let _ = read_reports(&seal(USAGE, &vec![(header, vec![entries])]).unwrap());
    }

    #[test]
    fn any_text_is_judged_and_only_our_keys_pass(text in "(sk_(live|test)_)?[a-zA-Z0-9_é]{0,44}") {
        // The chance of a random text with a matching checksum is 2⁻³².
        prop_assert!(key::check(&text).is_err());
        let _ = Secret::from_presented(text).display_prefix();
    }

    #[test]
    fn a_generated_key_passes_and_fails_with_any_other_character_in_it(position in 0_usize..44, other in "[!-~]") {
        let secret = Secret::generate(key::KeyKind::Live, &mut getrandom::SysRng).unwrap();
        prop_assert!(key::check(secret.reveal()).is_ok());
        let mut changed = secret.reveal().to_owned();
        changed.replace_range(position..=position, &other);
        let expected_ok = changed == secret.reveal();
        let verdict = key::check(&changed);
        prop_assert_eq!(verdict.is_ok(), expected_ok);
        prop_assert_ne!(verdict, Err(FormError::Length));
    }

    #[test]
    fn nothing_but_a_clean_record_in_time_is_allowed(record in record(), now_s in any::<u64>(), listed in any::<bool>()) {
        let facts = Facts { address_listed: listed, ..Facts::at(now_s) };
        let allowed = decide(Presented::Key(&record), &facts) == Outcome::Allowed;
        let blocking = Flags::REVOKED.0 | Flags::DISABLED.0 | Flags::QUOTA_EXCEEDED.0 | Flags::CREDITS_EXHAUSTED.0;
        let clean = record.flags.0 & blocking == 0
            && record.requires.0 == 0
            && record.expires_at_s.is_none_or(|end| now_s < end)
            && (record.address_list.is_none() || listed);
        prop_assert_eq!(allowed, clean);
    }
}

#[test]
fn a_seal_over_nothing_is_no_page() {
    assert_eq!(Page::read(&seal(PAGE, &()).unwrap()).unwrap_err(), DecodeError::Malformed);
}
