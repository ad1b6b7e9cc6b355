//! Bytes of every version, kept for ever: what was written once must be read by every later version, and the JSON and
//! the names must stay. Runs natively and as WebAssembly.

#[cfg(all(target_arch = "wasm32", target_os = "unknown"))]
use wasm_bindgen_test::wasm_bindgen_test as test;

use contract::budget::Stock;
use contract::codec::{DecodeError, PAGE, open};
use contract::definition::Definition;
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId, ReporterId};
use contract::page::{Entry, Header, Page, PageView, PageWriter, Part};
use contract::record::{Budget, Flags, Further, RateLimit, Record, Requires, UNDERSTOOD};
use contract::usage::{Ack, Count, Grant, KeyRef, Report, Subject, read_reports, write_reports};

const PLAIN_RECORD: &str = concat!(
    "00",                               // requires nothing
    "11111111111111111111111111111111", // key id
    "22222222222222222222222222222222", // owner id
    "01",                               // generation
    "00",                               // flags
    "00",                               // no expiry
    "01",                               // cost
    "00",                               // no rate limits
    "00",                               // no scopes
    "00",                               // no roles
    "00",                               // no address list
);

const FULL_RECORD: &str = concat!(
    "8080808008",                       // requires bit 31
    "11111111111111111111111111111111", // key id
    "22222222222222222222222222222222", // owner id
    "ac02",                             // generation 300
    "05",                               // flags: revoked, quota exceeded
    "0180aea5ea06",                     // expires at 1,833,522,944
    "0a",                               // cost 10
    "010362757264901c14",               // one limit: "bur", 100 requests, 3,600 s, burst 20
    "02046c697374057772697465",         // scopes: list, write
    "0107",                             // role 7
    "0109",                             // address list 9
);

fn bytes(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}

fn plain() -> Record {
    Record::plain(KeyId([0x11; 16]), OwnerId([0x22; 16]))
}

fn full() -> Record {
    Record {
        requires: Requires(1 << 31),
        generation: 300,
        flags: Flags::REVOKED.with(Flags::QUOTA_EXCEEDED, true),
        expires_at_s: Some(1_833_522_944),
        cost: 10,
        rate_limits: vec![RateLimit { name: "bur".into(), requests: 100, window_s: 3_600, burst: 20 }],
        scopes: vec!["list".into(), "write".into()],
        roles: vec![7],
        address_list: Some(9),
        ..plain()
    }
}

fn header() -> Header {
    Header { epoch: Epoch([0x33; 16]), revision: 1_000, total_keys: 2, part: Part::Changes { after: 998 }, filters: 0 }
}

#[test]
fn the_first_version_of_a_record_is_read_and_written_to_the_byte() {
    for (text, record) in [(PLAIN_RECORD, plain()), (FULL_RECORD, full())] {
        assert_eq!(hex::encode(record.to_bytes().unwrap()), hex::encode(bytes(text)));
        assert_eq!(Record::from_bytes(&bytes(text)), Ok(record));
    }
}

#[test]
fn fields_that_a_newer_version_appends_to_a_record_are_left_alone() {
    let mut newer = bytes(FURTHER_RECORD);
    newer.extend([1, 2, 3]);
    assert_eq!(Record::from_bytes(&newer), Ok(further()));
}

#[test]
fn a_record_that_is_cut_short_is_refused() {
    let whole = bytes(FULL_RECORD);
    for length in 0..whole.len() {
        assert_eq!(Record::from_bytes(&whole[..length]), Err(DecodeError::Malformed), "{length}");
    }
}

const PAGE_BYTES: &str = concat!(
    "504b5031",                         // mark
    "dfc084cb",                         // checksum
    "16",                               // header, 22 bytes
    "33333333333333333333333333333333", // epoch
    "e807",                             // revision 1,000
    "02",                               // keys
    "01e607",                           // changes after 998
    "8c01",                             // entries, 140 bytes
    "6900",                             // 105 bytes: put
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "80808080081111111111111111111111111111111122222222222222222222222222222222ac02050180aea5ea060a",
    "010362757264901c1402046c69737405777269746501070109",
    "2101", // 33 bytes: remove
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
);

fn page() -> Vec<u8> {
    let mut writer = PageWriter::new();
    writer.put(&KeyHash([0xaa; 32]), &full().to_bytes().unwrap());
    writer.remove(&KeyHash([0xbb; 32]));
    writer.finish(&header()).unwrap()
}

#[test]
fn the_first_version_of_a_page_is_read_and_written_to_the_byte() {
    assert_eq!(hex::encode(page()), PAGE_BYTES);
    let bytes = bytes(PAGE_BYTES);
    let page = Page::read(&bytes).unwrap();
    assert_eq!(page.header, header());
    let record = full().to_bytes().unwrap();
    let expected =
        [Entry::Put { hash: KeyHash([0xaa; 32]), record: &record }, Entry::Remove { hash: KeyHash([0xbb; 32]) }];
    assert_eq!(page.entries().collect::<Vec<_>>(), expected);
}

#[test]
fn entries_of_a_kind_that_a_newer_version_brought_are_stepped_over() {
    // As above, with an entry of kind 9 in front: length 3, kind, two bytes.
    let body = bytes(&PAGE_BYTES[16..]);
    let header_end = 1 + usize::from(body[0]);
    let (length_bytes, entries) = body[header_end..].split_at(2);
    let old = usize::from(length_bytes[0] & 0x7f) | usize::from(length_bytes[1]) << 7;
    assert_eq!(old, entries.len());
    let new = old + 4;
    let mut newer = body[..header_end].to_vec();
    newer.extend([(new & 0x7f) as u8 | 0x80, (new >> 7) as u8, 3, 9, 1, 2]);
    newer.extend(entries);
    let mut sealed = PAGE.0.to_vec();
    sealed.extend(crc32fast::hash(&newer).to_le_bytes());
    sealed.extend(newer);
    let page = Page::read(&sealed).unwrap();
    assert_eq!(page.entries().next(), Some(Entry::Newer));
    assert_eq!(page.entries().count(), 3);
}

#[test]
fn a_page_with_any_bit_flipped_or_any_byte_missing_is_refused() {
    let whole = page();
    for place in 0..whole.len() {
        for bit in 0..8 {
            let mut damaged = whole.clone();
            damaged[place] ^= 1 << bit;
            assert!(Page::read(&damaged).is_err(), "byte {place}, bit {bit}");
        }
        assert!(Page::read(&whole[..place]).is_err(), "cut at {place}");
    }
}

#[test]
fn a_snapshot_page_with_keys_outside_its_buckets_or_out_of_order_is_refused() {
    let page = |hashes: &[KeyHash], from, to| {
        let mut writer = PageWriter::new();
        for hash in hashes {
            writer.put(hash, &plain().to_bytes().unwrap());
        }
        let bytes = writer.finish(&Header { part: Part::Snapshot { from, to }, ..header() }).unwrap();
        Page::read(&bytes).map(|page| page.entries().count())
    };
    let (low, high) = (KeyHash([0x10; 32]), KeyHash([0x20; 32]));
    assert_eq!(page(&[low, high], 0, BUCKETS), Ok(2));
    assert_eq!(page(&[low, high], 0x1010, 0x2021), Ok(2));
    for refused in [
        page(&[high, low], 0, BUCKETS),
        page(&[low, high], 0x1011, BUCKETS),
        page(&[low, high], 0, 0x2020),
        page(&[], 5, 5),
        page(&[], 0, BUCKETS + 1),
    ] {
        assert_eq!(refused, Err(DecodeError::Malformed));
    }
}

#[test]
fn a_page_reads_the_same_in_json() {
    let bytes = page();
    let view = PageView::of(&Page::read(&bytes).unwrap()).unwrap();
    let json = serde_json::to_value(&view).unwrap();
    let aa = "aa".repeat(32);
    let expected = serde_json::json!({
        "epoch": "33333333-3333-3333-3333-333333333333", "revision": 1000, "total_keys": 2,
        "part": {"changes": {"after": 998}},
        "entries": [
            {"put": {"hash": aa, "record": {
                "requires": 2_147_483_648_u32,
                "key_id": "11111111-1111-1111-1111-111111111111", "owner_id": "22222222-2222-2222-2222-222222222222",
                "generation": 300, "flags": 5, "expires_at_s": 1_833_522_944, "cost": 10,
                "rate_limits": [{"name": "bur", "requests": 100, "window_s": 3600, "burst": 20}],
                "scopes": ["list", "write"], "roles": [7], "address_list": 9
            }}},
            {"remove": {"hash": "bb".repeat(32)}}
        ]
    });
    assert_eq!(json, expected);
    assert_eq!(serde_json::from_value::<PageView>(json).unwrap(), view);
}

const REPORT_BYTES: &str = concat!(
    "504b5531",                           // mark
    "3eb37a06",                           // checksum
    "02",                                 // two reports
    "1144444444444444444444444444444444", // header, 17 bytes: reporter
    "07",                                 // number
    "02",                                 // two counts
    "22",                                 // 34 bytes
    "0111111111111111111111111111111111", // of a key
    "02",                                 // generation
    "00",                                 // allowed
    "a0c21e",                             // hour 500,000
    "a09c01",                             // 20,000 requests
    "c09a0c",                             // cost 200,000
    "fba0f1c2b134",                       // last at 1,800,000,000,123
    "0d0002a0c21e031efba0f1c2b134",       // 13 bytes: of no key, unknown, the same hour, 3 requests
    "114444444444444444444444444444444408",
    "00", // no counts
);

fn reports() -> Vec<Report> {
    let key = Some(KeyRef { id: KeyId([0x11; 16]), generation: 2 });
    let count = |key, outcome, requests| Count {
        of: Subject { key, outcome, hour: 500_000 },
        requests,
        cost: requests * 10,
        drawn: if requests > 1_000 { 19_000 } else { 0 },
        last_ms: 1_800_000_000_123,
    };
    let reporter = ReporterId([0x44; 16]);
    vec![
        Report { reporter, seq: 7, counts: vec![count(key, 0, 20_000), count(None, 2, 3)] },
        Report { reporter, seq: 8, counts: vec![] },
    ]
}

#[test]
fn the_first_version_of_usage_reports_is_read() {
    let mut first = reports();
    for count in first.iter_mut().flat_map(|report| &mut report.counts) {
        count.drawn = count.requests;
    }
    assert_eq!(read_reports(&bytes(REPORT_BYTES)), Ok(first));
}

const SECOND_REPORT_BYTES: &str = concat!(
    "504b5531",                           // mark
    "a5f6ef91",                           // checksum
    "02",                                 // two reports
    "1144444444444444444444444444444444", // header, 17 bytes: reporter
    "07",                                 // number
    "02",                                 // two counts
    "25",                                 // 37 bytes
    "0111111111111111111111111111111111", // of a key
    "0200a0c21ea09c01c09a0cfba0f1c2b134", // as in the first version
    "b89401",                             // 19,000 drew from a quota
    "0e0002a0c21e031efba0f1c2b13400",     // 14 bytes: of no key, none drew
    "114444444444444444444444444444444408",
    "00", // no counts
);

#[test]
fn usage_reports_are_read_and_written_to_the_byte() {
    assert_eq!(hex::encode(write_reports(&reports()).unwrap()), SECOND_REPORT_BYTES);
    assert_eq!(read_reports(&bytes(SECOND_REPORT_BYTES)), Ok(reports()));
}

#[test]
fn damaged_reports_are_refused() {
    let whole = bytes(SECOND_REPORT_BYTES);
    for place in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[place] ^= 0x10;
        assert!(read_reports(&damaged).is_err(), "byte {place}");
        assert!(read_reports(&whole[..place]).is_err(), "cut at {place}");
    }
}

#[test]
fn reports_to_which_a_newer_version_appends_fields_and_outcomes_are_read_for_what_is_known_of_them() {
    // As above; from its end: the second count's outcome is number 99, two bytes more in the first count and the first header.
    let mut newer = bytes(&SECOND_REPORT_BYTES[16..]);
    assert_eq!((newer[1], newer[20], newer[60]), (17, 37, 2));
    newer[60] = 99;
    newer.splice(58..58, [7, 7]);
    newer[20] += 2;
    newer.splice(19..19, [7, 7]);
    newer[1] += 2;
    let mut sealed = bytes(&SECOND_REPORT_BYTES[..8]);
    sealed.extend(crc32fast::hash(&newer).to_le_bytes());
    sealed.extend(newer);
    let mut expected = reports();
    expected[0].counts[1].of.outcome = 99;
    assert_eq!(read_reports(&sealed), Ok(expected));
}

const ACK_BYTES: &str = "504b4131a64d328d44444444444444444444444444444444ac02";

#[test]
fn the_first_version_of_an_acknowledgement_is_read_and_written_to_the_byte() {
    let ack = Ack { reporter: ReporterId([0x44; 16]), seq: 300, grants: vec![] };
    assert_eq!(hex::encode(ack.write().unwrap()), ACK_BYTES);
    assert_eq!(Ack::read(&bytes(ACK_BYTES)), Ok(ack));
}

const FURTHER_RECORD: &str = concat!(
    "07",                               // requires plans, networks and budgets
    "11111111111111111111111111111111", // key id
    "22222222222222222222222222222222", // owner id
    "0100000100000000",                 // as the plain record
    "0103",                             // plan 3
    "02",                               // two networks
    "180180848080",                     // a prefix of 24 bits, IPv4: 192.0.2.0
    "0c00",                             // not IPv6
    "200001",                           // a prefix of 32 bits, not IPv4, IPv6:
    "8080808080808080808080808080ee86", // 2001:db8::
    "8140",                             //
    "01e80702",                         // a quota: starter 1,000, turn 2,
    "0180aea2ea06",                     // filled anew at 1,833,473,792
    "01050100",                         // credits: starter 5, turn 1
    "02",                               // the second limit is each Envoy's own
);

fn further() -> Record {
    let mut record = plain();
    record.requires = UNDERSTOOD;
    record.further = Further {
        plan: Some(3),
        networks: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
        quota: Some(Budget { starter: 1_000, turn: 2, resets_at_s: Some(1_833_473_792) }),
        credits: Some(Budget { starter: 5, turn: 1, resets_at_s: None }),
        alone: 2,
    };
    record
}

#[test]
fn the_second_version_of_a_record_is_read_and_written_to_the_byte() {
    assert_eq!(hex::encode(further().to_bytes().unwrap()), FURTHER_RECORD);
    assert_eq!(Record::from_bytes(&bytes(FURTHER_RECORD)), Ok(further()));
    let json = serde_json::to_value(further()).unwrap();
    let expected = serde_json::json!({
        "plan": 3, "networks": ["192.0.2.0/24", "2001:db8::/32"],
        "quota": {"starter": 1000, "turn": 2, "resets_at_s": 1_833_473_792},
        "credits": {"starter": 5, "turn": 1, "resets_at_s": null}, "alone": 2
    });
    assert_eq!(json["further"], expected);
}

const DEFINING_PAGE: &str = concat!(
    "504b5031",                         // mark
    "9c77cd68",                         // checksum
    "17",                               // header, 23 bytes
    "33333333333333333333333333333333", // epoch
    "e8070201e607",                     // revision 1,000, keys, changes after 998
    "08",                               // eight Envoys
    "1b",                               // entries, 27 bytes
    "1402",                             // 20 bytes: define
    "03000000",                         // number 3
    "0103613a2a",                       // one scope: a:*
    "010362757264901c14",               // one limit, as above
    "01",                               // which each Envoy judges alone
    "0503",                             // 5 bytes: undefine
    "04000000",                         // number 4
);

#[test]
fn the_second_version_of_a_page_is_read_and_written_to_the_byte() {
    let definition = Definition { scopes: vec!["a:*".into()], rate_limits: full().rate_limits, alone: 1 };
    let mut writer = PageWriter::new();
    writer.define(3, &definition.to_bytes().unwrap());
    writer.undefine(4);
    let header = Header { filters: 8, ..header() };
    let written = writer.finish(&header).unwrap();
    assert_eq!(hex::encode(&written), DEFINING_PAGE);
    let page = Page::read(&written).unwrap();
    assert_eq!(page.header, header);
    let definition = definition.to_bytes().unwrap();
    let expected = [Entry::Define { number: 3, definition: &definition }, Entry::Undefine { number: 4 }];
    assert_eq!(page.entries().collect::<Vec<_>>(), expected);
    let view = PageView::of(&page).unwrap();
    assert_eq!(serde_json::from_value::<PageView>(serde_json::to_value(&view).unwrap()).unwrap(), view);
}

const GRANTING_ACK: &str = concat!(
    "504b4131",                             // mark
    "abf311f7",                             // checksum
    "44444444444444444444444444444444ac02", // reporter, number 300
    "02",                                   // two grants
    "1500",                                 // 21 bytes: a share
    "11111111111111111111111111111111",     // of a key
    "95ac1400",                             // 333,333 parts per million, turn 0
    "1502",                                 // 21 bytes: credits
    "11111111111111111111111111111111",     // of an owner
    "f0a20402",                             // 70,000 in all, turn 2
);

#[test]
fn the_second_version_of_an_acknowledgement_is_read_and_written_to_the_byte() {
    let grant = |stock: Stock, amount, turn| Grant { stock: stock.code(), of: [0x11; 16], amount, turn };
    let grants = vec![grant(Stock::Share, 333_333, 0), grant(Stock::Credits, 70_000, 2)];
    let ack = Ack { reporter: ReporterId([0x44; 16]), seq: 300, grants };
    assert_eq!(hex::encode(ack.write().unwrap()), GRANTING_ACK);
    assert_eq!(Ack::read(&ack.write().unwrap()), Ok(ack));
}

#[test]
fn one_kind_of_message_is_not_taken_for_another() {
    assert_eq!(Ack::read(&page()), Err(DecodeError::Mark));
    assert_eq!(read_reports(&page()), Err(DecodeError::Mark));
    assert_eq!(open::<u8>(PAGE, b"PKP1"), Err(DecodeError::Short));
}
