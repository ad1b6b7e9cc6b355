//! Version 1 of the messages, to the byte, and their JSON. From the first release on, later versions must read these bytes.
//! Runs natively and as WebAssembly.

#[cfg(all(target_arch = "wasm32", target_os = "unknown"))]
use wasm_bindgen_test::wasm_bindgen_test as test;

use contract::codec::{Bytes, DecodeError, UPDATE, decode};
use contract::definition::Definition;
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId, ReporterId};
use contract::key::KeyKind;
use contract::policy::{KeyNeed, NamedPolicy, Policy, PolicyLimits, ScopeNeed};
use contract::record::{Attribute, Budget, Flags, Per, RateLimit, Record, UNDERSTOOD};
use contract::rules::{HeaderMatch, Match, PathMatch};
use contract::update::{Entry, Header, Part, Update, UpdateView, UpdateWriter};
use contract::usage::{Ack, Count, KeyRef, Report, Subject, read_reports, write_reports};

const PLAIN_RECORD: &str = concat!(
    "00",                                 // requires nothing
    "1011111111111111111111111111111111", // key id
    "1022222222222222222222222222222222", // owner id
    "01",                                 // generation
    "00",                                 // live
    "00",                                 // flags
    "00",                                 // no expiry
    "01",                                 // cost
    "000000",                             // no rate limits, scopes, roles
    "0000000000",                         // no plan, networks, quota, credits, attributes
);

const FULL_RECORD: &str = concat!(
    "07",                                     // requires plans, networks and budgets
    "1011111111111111111111111111111111",     // key id
    "1022222222222222222222222222222222",     // owner id
    "ac02",                                   // generation 300
    "01",                                     // test
    "05",                                     // flags: revoked, quota exceeded
    "0180aea5ea06",                           // expires at 1,833,522,944
    "0a",                                     // cost 10
    "010362757264901c140100",                 // one limit: "bur", 100 requests, 3,600 s, burst 20, shared, per key
    "02046c697374057772697465",               // scopes: list, write
    "0107",                                   // role 7
    "0103",                                   // plan 3
    "02",                                     // two networks
    "80848080fcff3f78",                       // 192.0.2.0 as ::ffff:192.0.2.0, prefix of 96 + 24 bits
    "8080808080808080808080808080ee86814020", // 2001:db8::, prefix of 32 bits
    "01020180aea2ea0601",                     // quota: filled twice, reset at 1,833,473,792, per owner
    "01010000",                               // credits: filled once, no reset
    "01",                                     // one attribute
    "0f6b65792e65787465726e616c5f6964",       // key.external_id
    "0461253230",                             // a%20
);

fn bytes(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}

fn plain() -> Record {
    Record::plain(KeyId([0x11; 16]), OwnerId([0x22; 16]))
}

fn limits() -> Vec<RateLimit> {
    vec![RateLimit { name: "bur".into(), requests: 100, window_s: 3_600, burst: 20, shared: true, per: Per::Key }]
}

fn full() -> Record {
    Record {
        requires: UNDERSTOOD,
        generation: 300,
        kind: KeyKind::Test,
        flags: Flags::REVOKED.with(Flags::QUOTA_EXCEEDED, true),
        expires_at_s: Some(1_833_522_944),
        cost: 10,
        rate_limits: limits(),
        scopes: vec!["list".into(), "write".into()],
        roles: vec![7],
        plan: Some(3),
        networks: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
        quota: Some(Budget { fill: 2, resets_at_s: Some(1_833_473_792), per: Per::Owner }),
        credits: Some(Budget { fill: 1, resets_at_s: None, per: Per::Key }),
        attributes: vec![Attribute { name: "key.external_id".into(), value: "a%20".into() }],
        ..plain()
    }
}

#[test]
fn a_record_is_encoded_and_decoded_to_the_byte() {
    for (text, record) in [(PLAIN_RECORD, plain()), (FULL_RECORD, full())] {
        assert_eq!(hex::encode(record.to_bytes().unwrap()), text);
        assert_eq!(Record::from_bytes(&bytes(text)), Ok(record));
    }
}

#[test]
fn fields_that_a_later_version_appends_to_a_record_are_ignored() {
    let mut later = bytes(FULL_RECORD);
    later.extend([1, 2, 3]);
    assert_eq!(Record::from_bytes(&later), Ok(full()));
}

#[test]
fn a_record_that_is_cut_short_is_refused() {
    let whole = bytes(FULL_RECORD);
    for length in 0..whole.len() {
        assert_eq!(Record::from_bytes(&whole[..length]), Err(DecodeError::Malformed), "{length}");
    }
}

const UPDATE_BYTES: &str = concat!(
    "504b5331",                             // magic
    "c5b9c24b",                             // checksum
    "1033333333333333333333333333333333",   // epoch
    "e807",                                 // revision 1,000
    "02",                                   // keys
    "01e607",                               // changes after 998
    "8b01",                                 // entries, 139 bytes
    "0203",                                 // define number 3
    "110103613a2a010362757264901c14010000", // 17 bytes: the scope a:*, one limit, no policy
    "00",                                   // put
    "20aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "30", // 48 bytes: the plain record
    "001011111111111111111111111111111111102222222222222222222222222222222201000000010000000000000000",
    "0304", // undefine number 4
    "01",   // remove
    "20bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
);

fn header() -> Header {
    Header { epoch: Epoch([0x33; 16]), revision: 1_000, total_keys: 2, part: Part::Changes { after: 998 } }
}

fn plan() -> Definition {
    Definition { scopes: vec!["a:*".into()], rate_limits: limits(), policy: None }
}

fn update() -> Vec<u8> {
    let mut writer = UpdateWriter::default();
    writer.define(3, &plan().to_bytes().unwrap());
    writer.put(&KeyHash([0xaa; 32]), &plain().to_bytes().unwrap());
    writer.undefine(4);
    writer.remove(&KeyHash([0xbb; 32]));
    writer.finish(&header()).unwrap()
}

#[test]
fn an_update_is_encoded_and_decoded_to_the_byte() {
    assert_eq!(hex::encode(update()), UPDATE_BYTES);
    let bytes = bytes(UPDATE_BYTES);
    let update = Update::read(&bytes).unwrap();
    assert_eq!(update.header, header());
    let (record, definition) = (plain().to_bytes().unwrap(), plan().to_bytes().unwrap());
    let expected = [
        Entry::Define { number: 3, definition: Bytes(&definition) },
        Entry::Put { hash: KeyHash([0xaa; 32]), record: Bytes(&record) },
        Entry::Undefine { number: 4 },
        Entry::Remove { hash: KeyHash([0xbb; 32]) },
    ];
    assert_eq!(update.entries().collect::<Vec<_>>(), expected);
}

#[test]
fn an_update_with_any_bit_flipped_or_any_byte_missing_is_refused() {
    let whole = update();
    for place in 0..whole.len() {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[place] ^= 1 << bit;
            assert!(Update::read(&damaged).is_err(), "byte {place}, bit {bit}");
        }
        assert!(Update::read(&whole[..place]).is_err(), "cut at {place}");
    }
}

#[test]
fn a_snapshot_with_keys_outside_its_buckets_or_out_of_order_is_refused() {
    let read = |hashes: &[KeyHash], from, to| {
        let mut writer = UpdateWriter::default();
        for hash in hashes {
            writer.put(hash, &plain().to_bytes().unwrap());
        }
        let bytes = writer.finish(&Header { part: Part::Snapshot { from, to }, ..header() }).unwrap();
        Update::read(&bytes).map(|update| update.entries().count())
    };
    let (low, high) = (KeyHash([0x10; 32]), KeyHash([0x20; 32]));
    assert_eq!(read(&[low, high], 0, BUCKETS), Ok(2));
    assert_eq!(read(&[low, high], 0x1010, 0x2021), Ok(2));
    for refused in [
        read(&[high, low], 0, BUCKETS),
        read(&[low, high], 0x1011, BUCKETS),
        read(&[low, high], 0, 0x2020),
        read(&[], 5, 5),
        read(&[], 0, BUCKETS + 1),
    ] {
        assert_eq!(refused, Err(DecodeError::Malformed));
    }
}

#[test]
fn an_update_has_a_readable_form_in_json() {
    let mut writer = UpdateWriter::default();
    writer.put(&KeyHash([0xaa; 32]), &full().to_bytes().unwrap());
    writer.remove(&KeyHash([0xbb; 32]));
    writer.define(3, &plan().to_bytes().unwrap());
    writer.undefine(4);
    let bytes = writer.finish(&header()).unwrap();
    let view = Update::read(&bytes).unwrap().view().unwrap();
    let json = serde_json::to_value(&view).unwrap();
    let limits = serde_json::json!([
        {"name": "bur", "requests": 100, "window_s": 3600, "burst": 20, "shared": true, "per": "key"}
    ]);
    let expected = serde_json::json!({
        "epoch": "33333333-3333-3333-3333-333333333333", "revision": 1000, "total_keys": 2,
        "part": {"changes": {"after": 998}},
        "entries": [
            {"put": {"hash": "aa".repeat(32), "record": {
                "requires": 7,
                "key_id": "11111111-1111-1111-1111-111111111111", "owner_id": "22222222-2222-2222-2222-222222222222",
                "generation": 300, "kind": "test", "flags": 5, "expires_at_s": 1_833_522_944, "cost": 10,
                "rate_limits": limits, "scopes": ["list", "write"], "roles": [7],
                "plan": 3, "networks": ["192.0.2.0/24", "2001:db8::/32"],
                "quota": {"fill": 2, "resets_at_s": 1_833_473_792, "per": "owner"},
                "credits": {"fill": 1, "resets_at_s": null, "per": "key"},
                "attributes": [{"name": "key.external_id", "value": "a%20"}]
            }}},
            {"remove": {"hash": "bb".repeat(32)}},
            {"define": {"number": 3, "definition": {"scopes": ["a:*"], "rate_limits": limits, "policy": null}}},
            {"undefine": {"number": 4}}
        ]
    });
    assert_eq!(json, expected);
    assert_eq!(serde_json::from_value::<UpdateView>(json).unwrap(), view);
}

const POLICY_BYTES: &str = concat!(
    "0000",                   // no scopes, no limits of keys
    "01",                     // a policy
    "046f70656e",             // open
    "01",                     // anonymous allowed
    "0101",                   // test keys only
    "020103613a62",           // any of the scopes a:b
    "010a",                   // cost 10
    "0000",                   // no limits for keys and owners
    "010362757264901c140100", // for addresses the limit `bur`
    "01",                     // in shadow
    "01",                     // captures unknown keys
    "01",                     // one match
    "01052a2e612e62",         // hosts: *.a.b
    "0102072f612f7b69647d",   // the template /a/{id}
    "0103474554",             // GET
    "01017802792a",           // the header x: y*
    "01",                     // from annotations
);

#[test]
fn a_policy_is_encoded_and_decoded_to_the_byte() {
    let policy = Policy {
        key: KeyNeed::AnonymousAllowed,
        kinds: vec![KeyKind::Test],
        scopes: ScopeNeed::Any(vec!["a:b".into()]),
        cost: Some(10),
        rate_limits: PolicyLimits { address: limits(), ..PolicyLimits::default() },
        shadow: true,
        capture_unknown: true,
    };
    let matches = vec![Match {
        hosts: vec!["*.a.b".into()],
        path: Some(PathMatch::Template("/a/{id}".into())),
        methods: vec!["GET".into()],
        header: Some(HeaderMatch { name: "x".into(), value: "y*".into() }),
    }];
    let definition = Definition::from(NamedPolicy { name: "open".into(), policy, matches, from_annotation: true });
    let bytes = definition.to_bytes().unwrap();
    assert_eq!(hex::encode(&bytes), POLICY_BYTES);
    assert_eq!(Definition::from_bytes(&bytes), Ok(definition));
}

const REPORT_BYTES: &str = concat!(
    "504b5531",                             // magic
    "ceb4bd52",                             // checksum
    "02",                                   // two reports
    "1044444444444444444444444444444444",   // reporter
    "07",                                   // number
    "02",                                   // two counts
    "011011111111111111111111111111111111", // of a key
    "02",                                   // generation
    "00",                                   // allowed
    "a0c21e",                               // hour 500,000
    "a09c01",                               // 20,000 requests
    "c09a0c",                               // cost 200,000
    "fba0f1c2b134",                         // last at 1,800,000,000,123
    "0063a0c21e031efba0f1c2b134",           // of no key, outcome 99, the same hour, 3 requests, cost 30
    "1044444444444444444444444444444444",
    "0800", // number 8, no counts
);

fn reports() -> Vec<Report> {
    let count = |key, outcome, requests| Count {
        of: Subject { key, outcome, hour: 500_000 },
        requests,
        cost: requests * 10,
        last_ms: 1_800_000_000_123,
    };
    let key = KeyRef { id: KeyId([0x11; 16]), generation: 2 };
    let (reporter, counts) = (ReporterId([0x44; 16]), vec![count(Some(key), 0, 20_000), count(None, 99, 3)]);
    vec![Report { reporter, seq: 7, counts }, Report { reporter, seq: 8, counts: vec![] }]
}

#[test]
fn reports_are_encoded_and_decoded_to_the_byte() {
    assert_eq!(hex::encode(write_reports(&reports()).unwrap()), REPORT_BYTES);
    assert_eq!(read_reports(&bytes(REPORT_BYTES)), Ok(reports()));
}

#[test]
fn damaged_reports_are_refused() {
    let whole = bytes(REPORT_BYTES);
    for place in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[place] ^= 0x10;
        assert!(read_reports(&damaged).is_err(), "byte {place}");
        assert!(read_reports(&whole[..place]).is_err(), "cut at {place}");
    }
}

const ACK_BYTES: &str = concat!(
    "504b4131",                               // magic
    "8e706323",                               // checksum
    "1044444444444444444444444444444444ac02", // reporter, number 300
);

#[test]
fn an_acknowledgement_is_encoded_and_decoded_to_the_byte() {
    let ack = Ack { reporter: ReporterId([0x44; 16]), seq: 300 };
    assert_eq!(hex::encode(ack.write().unwrap()), ACK_BYTES);
    assert_eq!(Ack::read(&bytes(ACK_BYTES)), Ok(ack));
}

#[test]
fn a_message_of_another_kind_is_refused() {
    assert_eq!(Ack::read(&update()), Err(DecodeError::Magic));
    assert_eq!(read_reports(&update()), Err(DecodeError::Magic));
    assert_eq!(decode::<u8>(UPDATE, b"PKS1"), Err(DecodeError::Short));
}
