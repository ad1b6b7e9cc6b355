//! Whatever is written is read back, and whatever bytes arrive, reading them ends in a value or an error.

#![cfg(not(target_family = "wasm"))]

use contract::codec::{ACK, DecodeError, UPDATE, USAGE, encode, envelope};
use contract::decision::{Check, Facts, Presented, decide, depends_on_time};
use contract::definition::Definition;
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId, ReporterId};
use contract::key::{self, FormError, KeyKind, Secret};
use contract::network::Network;
use contract::outcome::Outcome;
use contract::record::{Attribute, Budget, Flags, Per, RateLimit, Record, Requires, UNDERSTOOD};
use contract::update::{Entry, Header, Part, Update, UpdateView, UpdateWriter};
use contract::usage::{Ack, Count, KeyRef, Report, Subject, read_reports, write_reports};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

prop_compose! {
    fn rate_limit()(
        name in "[a-z]{0,8}", requests in any::<u32>(), window_s in any::<u32>(), burst in any::<u32>(),
        shared in any::<bool>(), all in any::<bool>(),
    ) -> RateLimit {
        RateLimit { name, requests, window_s, burst, shared, per: per(all) }
    }
}

const fn per(all: bool) -> Per {
    if all { Per::Owner } else { Per::Key }
}

fn budget() -> impl Strategy<Value = Option<Budget>> {
    let fields = (any::<u32>(), option::of(any::<u64>()), any::<bool>());
    option::of(fields.prop_map(|(fill, resets_at_s, all)| Budget { fill, resets_at_s, per: per(all) }))
}

fn network() -> impl Strategy<Value = Network> {
    let text = prop_oneof![
        (any::<u32>(), 0..=32_u32).prop_map(|(bits, prefix)| {
            let bits = bits & u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            format!("{}/{prefix}", std::net::Ipv4Addr::from_bits(bits))
        }),
        (any::<u128>(), 0..=128_u32).prop_map(|(bits, prefix)| {
            let bits = bits & u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
            format!("{}/{prefix}", std::net::Ipv6Addr::from_bits(bits))
        }),
    ];
    text.prop_map(|text| text.parse().unwrap())
}

prop_compose! {
    fn definition()(scopes in vec("[a-z:*]{1,12}", 0..4), rate_limits in vec(rate_limit(), 0..4)) -> Definition {
        Definition { scopes, rate_limits, policy: None }
    }
}

prop_compose! {
    /// A record without restrictions by address, plan, quota or credits.
    fn unrestricted()(
        requires in any::<u32>(), key_id in any::<[u8; 16]>(), owner_id in any::<[u8; 16]>(), generation in any::<u32>(),
        flags in any::<u32>(), expires_at_s in option::of(any::<u64>()), cost in any::<u32>(),
        rate_limits in vec(rate_limit(), 0..4), scopes in vec("[a-z:*é]{0,12}", 0..4), roles in vec(any::<u32>(), 0..4),
    ) -> Record {
        Record {
            requires: Requires(requires), generation, flags: Flags(flags), expires_at_s, cost, rate_limits, scopes, roles,
            ..Record::plain(KeyId(key_id), OwnerId(owner_id))
        }
    }
}

prop_compose! {
    fn attribute()(name in "[a-z.]{1,12}", value in "[ -~]{0,12}") -> Attribute {
        Attribute { name, value }
    }
}

prop_compose! {
    fn restricted()(
        record in unrestricted(), plan in option::of(any::<u32>()), networks in vec(network(), 0..4), quota in budget(),
        credits in budget(), is_test in any::<bool>(), attributes in vec(attribute(), 0..4),
    ) -> Record {
        let kind = if is_test { KeyKind::Test } else { KeyKind::Live };
        Record { plan, networks, quota, credits, kind, attributes, ..record }
    }
}

fn record() -> impl Strategy<Value = Record> {
    prop_oneof![unrestricted(), restricted()]
}

fn entry() -> impl Strategy<Value = Entry<Box<Record>, Definition>> {
    let hash = any::<[u8; 32]>().prop_map(KeyHash);
    prop_oneof![
        (hash.clone(), record()).prop_map(|(hash, record)| Entry::Put { hash, record: Box::new(record) }),
        hash.prop_map(|hash| Entry::Remove { hash }),
        (any::<u32>(), definition()).prop_map(|(number, definition)| Entry::Define { number, definition }),
        any::<u32>().prop_map(|number| Entry::Undefine { number }),
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
    fn a_decision_that_does_not_depend_on_the_time_is_the_same_at_any(
        record in record(), flags in 0..16_u32, one in any::<u64>(), other in any::<u64>(),
    ) {
        let record = Record { requires: Requires(0), flags: Flags(flags), ..record };
        let at = |now_s| decide(Presented::Key(&record), &Facts::at(now_s));
        prop_assert!(depends_on_time(&record) || at(one) == at(other));
    }

    #[test]
    fn updates_come_back_as_they_were(entries in vec(entry(), 0..40), epoch in any::<[u8; 16]>(), after in any::<u64>()) {
        let mut writer = UpdateWriter::default();
        for entry in &entries {
            match entry {
                Entry::Put { hash, record } => writer.put(hash, &record.to_bytes().unwrap()),
                Entry::Remove { hash } => writer.remove(hash),
                Entry::Define { number, definition } => writer.define(*number, &definition.to_bytes().unwrap()),
                Entry::Undefine { number } => writer.undefine(*number),
            }
        }
        let header = Header { epoch: Epoch(epoch), revision: after, total_keys: 1, part: Part::Changes { after } };
        let bytes = writer.finish(&header).unwrap();
        prop_assert_eq!(Update::read(&bytes).unwrap().view().unwrap(), UpdateView { header, entries });
    }

    #[test]
    fn a_snapshot_has_its_keys_in_the_order_of_buckets(mut hashes in vec(any::<[u8; 32]>(), 0..40)) {
        hashes.sort_unstable();
        let record = Record::plain(KeyId([0; 16]), OwnerId([0; 16])).to_bytes().unwrap();
        let mut writer = UpdateWriter::default();
        for hash in &hashes {
            writer.put(&KeyHash(*hash), &record);
        }
        let part = Part::Snapshot { from: 0, to: BUCKETS };
        let bytes = writer.finish(&Header { epoch: Epoch([0; 16]), revision: 1, total_keys: 1, part }).unwrap();
        let read: Vec<_> = Update::read(&bytes).unwrap().entries().map(|entry| match entry {
            Entry::Put { hash, .. } | Entry::Remove { hash } => hash.0,
            Entry::Define { .. } | Entry::Undefine { .. } => [0; 32],
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
        prop_assert!(Update::read(&bytes).is_err());
        prop_assert!(read_reports(&bytes).is_err());
        prop_assert!(Ack::read(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_in_a_good_envelope_are_read_to_a_value_or_an_error(bytes in vec(any::<u8>(), 0..400), after in any::<u64>()) {
        let part = Part::Changes { after };
        let header = Header { epoch: Epoch([0; 16]), revision: 1, total_keys: 1, part };
        for update in [envelope(UPDATE, &bytes), encode(UPDATE, &(header, bytes.clone())).unwrap()] {
            if let Ok(update) = Update::read(&update) {
                prop_assert!(update.view().is_ok());
            }
        }
        let _ = read_reports(&envelope(USAGE, &bytes));
        let _ = Ack::read(&envelope(ACK, &bytes));
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
    fn nothing_but_a_clean_record_in_time_and_place_is_allowed(record in record(), now_s in any::<u64>(), address in option::of(any::<std::net::IpAddr>())) {
        let facts = Facts { address, ..Facts::at(now_s) };
        let allowed = decide(Presented::Key(&record), &facts) == Outcome::Allowed;
        let has = |flag: Flags| record.flags.contains(flag);
        let used_up = |flag, budget: Option<Budget>| {
            has(flag) && budget.and_then(|budget| budget.resets_at_s).is_none_or(|at| now_s < at)
        };
        let listed = |address| record.networks.iter().any(|network| network.contains(address));
        let costs = record.cost > 0;
        let blocked = has(Flags::REVOKED)
            || has(Flags::DISABLED)
            || used_up(Flags::QUOTA_EXCEEDED, record.quota)
            || (costs && used_up(Flags::CREDITS_EXHAUSTED, record.credits));
        let clean = !blocked
            && record.requires.0 & !UNDERSTOOD.0 == 0
            && record.expires_at_s.is_none_or(|end| now_s < end)
            && record.plan.is_none()
            && (record.networks.is_empty() || address.is_some_and(listed));
        prop_assert_eq!(allowed, clean);
        // What `explain` shows is what decided.
        let refusals: Vec<Outcome> = Check::ALL.into_iter().filter_map(|check| check.refusal(&record, &facts)).collect();
        prop_assert_eq!(decide(Presented::Key(&record), &facts), refusals.first().copied().unwrap_or(Outcome::Allowed));
    }
}

#[test]
fn an_empty_body_is_refused() {
    assert_eq!(Update::read(&envelope(UPDATE, &[])).unwrap_err(), DecodeError::Malformed);
}
