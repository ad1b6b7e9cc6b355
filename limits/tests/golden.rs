//! Version 1 of the messages about allowances, to the byte. From the first release on, later versions must read these bytes.

use contract::codec::DecodeError;
use contract::id::ReporterId;
use limits::message::{Answer, Ask, Call, Grant};
use limits::pool::{Kind, PoolId, Subject};

const CALL_BYTES: &str = concat!(
    "504b4331",                               // magic
    "90b25e8a",                               // checksum
    "1044444444444444444444444444444444",     // reporter
    "01",                                     // the Envoy ends
    "02",                                     // two asks
    "001011111111111111111111111111111111",   // a rate limit of 1111…
    "ac02",                                   // tag 300
    "fba0f1c2b134",                           // session 1,800,000,000,123
    "0c0a01",                                 // granted 12, spent 10, returned 1
    "8827",                                   // 5,000 ns ahead
    "808c8d9e02",                             // interval of 600,000,000 ns
    "0201c801",                               // needs 2, at least 1, wants 200
    "02101111111111111111111111111111111100", // credits of 1111…, tag 0
    "010000000000000000",                     // session 1, zeros
);

fn pool(kind: Kind, tag: u64) -> PoolId {
    PoolId { kind, subject: Subject([0x11; 16]), tag }
}

fn call() -> Call {
    let first = Ask {
        pool: pool(Kind::Rate, 300),
        session: 1_800_000_000_123,
        granted: 12,
        spent: 10,
        returned: 1,
        ahead_ns: 5_000,
        interval_ns: 600_000_000,
        need: 2,
        least: 1,
        want: 200,
    };
    let zeros = Ask::new(pool(Kind::Credits, 0), 1);
    Call { reporter: ReporterId([0x44; 16]), is_last: true, asks: vec![first, zeros] }
}

const ANSWER_BYTES: &str = concat!(
    "504b4731",                               // magic
    "60cd4060",                               // checksum
    "03",                                     // three live Envoys
    "9003",                                   // alone for 400 ms
    "02",                                     // two grants
    "fba0f1c2b134",                           // session 1,800,000,000,123
    "140a09",                                 // granted 20, spent 10, holds 9
    "ac0207",                                 // 300 are left, others hold 7
    "ffffffff0f",                             // no token comes by itself
    "64",                                     // certain for 100 ms
    "8827e0d403",                             // 5,000 ns ahead, with an interval of 60,000 ns
    "04",                                     // four Envoys use it
    "0000000000000000000000",                 // zeros
    "01",                                     // one recall
    "01101111111111111111111111111111111103", // the quota of 1111…, tag 3
);

fn answer() -> Answer {
    let grant = Grant {
        session: 1_800_000_000_123,
        granted: 20,
        spent: 10,
        held: 9,
        left: 300,
        others: 7,
        empty_ms: u32::MAX,
        known_ms: 100,
        ahead_ns: 5_000,
        interval_ns: 60_000,
        users: 4,
    };
    Answer { live: 3, alone_ms: 400, grants: vec![grant, Grant::default()], recalls: vec![pool(Kind::Quota, 3)] }
}

#[test]
fn a_call_is_encoded_and_decoded_to_the_byte() {
    assert_eq!(hex::encode(call().write().unwrap()), CALL_BYTES);
    assert_eq!(Call::read(&hex::decode(CALL_BYTES).unwrap()), Ok(call()));
}

#[test]
fn an_answer_is_encoded_and_decoded_to_the_byte() {
    assert_eq!(hex::encode(answer().write().unwrap()), ANSWER_BYTES);
    assert_eq!(Answer::read(&hex::decode(ANSWER_BYTES).unwrap()), Ok(answer()));
}

#[test]
fn a_damaged_message_or_one_of_another_kind_is_refused() {
    let (call, answer) = (call().write().unwrap(), answer().write().unwrap());
    for place in 0..call.len() {
        let mut damaged = call.clone();
        damaged[place] ^= 0x10;
        assert!(Call::read(&damaged).is_err() && Call::read(&call[..place]).is_err(), "byte {place}");
    }
    for place in 0..answer.len() {
        let mut damaged = answer.clone();
        damaged[place] ^= 0x10;
        assert!(Answer::read(&damaged).is_err() && Answer::read(&answer[..place]).is_err(), "byte {place}");
    }
    assert_eq!((Call::read(&answer), Answer::read(&call)), (Err(DecodeError::Magic), Err(DecodeError::Magic)));
}
