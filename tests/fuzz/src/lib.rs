//! Entry points of untrusted bytes, as plain functions. Each takes any bytes, and panics if a promise does not hold.
//! cargo-fuzz calls them by their names, and `cargo test` on stable from `control-plane/tests/database/fuzz.rs`.

#![forbid(unsafe_code)]

use std::time::UNIX_EPOCH;

use contract::codec::{ACK, UPDATE, USAGE, encode, envelope};
use contract::definition::Definition;
use contract::id::{Epoch, ReporterId};
use contract::key::{self, Secret};
use contract::rate::Rate;
use contract::record::{Per, RateLimit, Record};
use contract::time::NS_PER_MS;
use contract::update::{Header, Part, Update};
use contract::usage::{Ack, read_reports, write_reports};
use contract::usage_log::LogKey;
use control_plane::domain::{Email, KeyName, Scopes};
use control_plane::keys::import::line;
use control_plane::metering::import::signed_usage;
use filter_core::config::Config;
use filter_core::extract::{cookie, query as path_query};
use limits::TICK_MS;
use limits::asking::Due;
use limits::contact::Contact;
use limits::holding::{Holding, Limited, Spent};
use limits::ledger::{OtherEnvoys, Pool};
use limits::message::{ANSWER, Answer, Ask, CALL, Call, Grant};
use limits::pool::{Kind, PoolId, Subject, Terms};
use serde_json::Value;

/// An entry point.
pub type Entrance = fn(&[u8]);

/// All of them, by the name of their corpus.
pub const ENTRANCES: [(&str, Entrance); 11] = [
    ("key", key),
    ("update", update),
    ("report", report),
    ("allowance_call", allowance_call),
    ("allowance_answer", allowance_answer),
    ("plugin_configuration", plugin_configuration),
    ("email_and_name", email_and_name),
    ("query", query),
    ("cookies", cookies),
    ("import_line", import_line),
    ("usage_line", usage_line),
];

/// What a client presents as its key.
pub fn key(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let judged = key::check(&text);
    let secret = Secret::from_presented(text.clone());
    assert_eq!(format!("{secret:?}"), "Secret(…)");
    let prefix = secret.display_prefix();
    assert_eq!(prefix.is_some(), judged.is_ok());
    if let Some(prefix) = prefix {
        // Six of thirty characters are shown, and the tag.
        assert!(prefix.len() == 9 && text.len() == key::KEY_CHARS && text.contains(&prefix[3..]));
    }
    if let Err(error) = judged {
        // What could be a key is not repeated. Shorter texts, and those with spaces, may be words of the error itself.
        let could_be_a_key = text.len() >= 20 && text.bytes().all(|byte| byte.is_ascii_graphic());
        assert!(!could_be_a_key || !error.to_string().contains(&text));
    }
}

/// What a filter takes for an update of the store.
pub fn update(bytes: &[u8]) {
    let _ = Record::from_bytes(bytes);
    let _ = Definition::from_bytes(bytes);
    let _ = Ack::read(bytes);
    let _ = Ack::read(&envelope(ACK, bytes));
    read_update(bytes);
    // A checksum does not keep an attacker out.
    read_update(&envelope(UPDATE, bytes));
    let header = Header { epoch: Epoch([0; 16]), revision: 1, total_keys: 1, part: Part::Changes { after: 0 } };
    if let Ok(message) = encode(UPDATE, &(header, bytes)) {
        read_update(&message);
    }
}

fn read_update(bytes: &[u8]) {
    let Ok(update) = Update::read(bytes) else { return };
    // Every entry has a readable form, down to the last record.
    assert_eq!(update.view().map(|view| view.entries.len()), Ok(update.entries().count()));
}

/// What the control plane takes for reports.
pub fn report(bytes: &[u8]) {
    read_report(bytes);
    read_report(&envelope(USAGE, bytes));
}

fn read_report(bytes: &[u8]) {
    let Ok(reports) = read_reports(bytes) else { return };
    let again = write_reports(&reports).and_then(|bytes| read_reports(&bytes));
    assert_eq!(again, Ok(reports));
}

/// What the control plane takes for a call for allowances: as a message, as the body of one, and as the numbers of asks.
pub fn allowance_call(bytes: &[u8]) {
    for message in [bytes, &envelope(CALL, bytes)] {
        let Ok(call) = Call::read(message) else { continue };
        assert_eq!(call.write().and_then(|bytes| Call::read(&bytes)).as_ref(), Ok(&call));
        answer(call.asks.iter().map(|ask| (call.reporter, *ask)));
    }
    let (asks, _) = bytes.as_chunks::<ASK_BYTES>();
    answer(asks.iter().map(numbers));
}

const ASK_BYTES: usize = 74;

/// The Envoy, the pool, and then each number of an ask.
fn numbers(bytes: &[u8; ASK_BYTES]) -> (ReporterId, Ask) {
    let [envoy, pool, numbers @ ..] = bytes;
    let (numbers, _) = numbers.as_chunks::<8>();
    let mut numbers = numbers.iter().map(|number| u64::from_le_bytes(*number));
    let mut next = || numbers.next().unwrap_or_default();
    let kind = Kind::from_code(pool % 3).unwrap_or(Kind::Rate);
    let ask = Ask {
        pool: PoolId { kind, subject: Subject([0; 16]), tag: (pool / 3).into() },
        session: next(),
        granted: next(),
        spent: next(),
        returned: next(),
        ahead_ns: next(),
        interval_ns: next(),
        need: next(),
        least: next(),
        want: next(),
    };
    (ReporterId([envoy % 4; 16]), ask)
}

/// Asks one pool after the other, at one time each tick. No pool grants more than it has room for.
fn answer(asks: impl Iterator<Item = (ReporterId, Ask)>) {
    let mut pools: Vec<(PoolId, Pool)> = Vec::new();
    let mut now_ns = 1_800_000_000_000 * NS_PER_MS;
    for (reporter, ask) in asks {
        now_ns += TICK_MS * NS_PER_MS;
        let place = pools.iter().position(|(id, _)| *id == ask.pool).unwrap_or_else(|| {
            pools.push((ask.pool, Pool::new(terms(&ask.pool))));
            pools.len() - 1
        });
        let pool = &mut pools[place].1;
        let known = pool.holders.iter().find(|holder| holder.reporter == reporter).copied();
        let grant = pool.answer(reporter, &ask, OtherEnvoys::Several, now_ns);
        if grant.session != ask.session {
            assert!(known.is_some_and(|known| known.session > ask.session));
            assert_eq!(grant, Grant { session: grant.session, ..Grant::default() });
            continue;
        }
        // What the Envoy says that it was granted, or has spent, is no new grant.
        let known = known.filter(|known| known.session == ask.session);
        let (granted, returned) = known.map_or((0, 0), |known| (known.granted, known.returned));
        let before = granted.max(ask.granted).max(ask.spent.saturating_add(returned.max(ask.returned)));
        assert!(grant.granted >= before, "sums only grow");
        if grant.granted > before {
            assert!(
                pool.held() <= pool.left(now_ns),
                "{pool:?} granted more than it had room for: {grant:?} to {ask:?}"
            );
            assert!(
                grant.granted - before <= ask.need.saturating_add(ask.want),
                "{grant:?} is more than asked: {ask:?}"
            );
        }
        assert_eq!(grant.left, pool.room(now_ns));
        assert!(grant.empty_ms > 0 || grant.left > 0);
        let refused =
            pool.clone().answer(ReporterId([9; 16]), &Ask { session: 1, ..ask }, OtherEnvoys::AnotherIsAlone, now_ns);
        assert_eq!((refused.left, refused.others), (0, u64::MAX));
    }
}

/// The terms of a pool, by its tag: from tiny ones to the greatest.
fn terms(pool: &PoolId) -> Terms {
    let greatness = u32::try_from(pool.tag % 32).unwrap_or_default();
    if pool.kind == Kind::Rate {
        let requests = 1_u32 << greatness;
        let window_s = if pool.tag.is_multiple_of(2) { 1 } else { u32::MAX };
        let name = String::new();
        return Terms::Rate(Rate::of(&RateLimit {
            name,
            requests,
            window_s,
            burst: requests,
            shared: true,
            per: Per::Key,
        }));
    }
    let left = match greatness {
        0 => i64::MIN,
        1 => i64::MAX,
        _ => (1 << greatness) - 9,
    };
    Terms::Stock { left, renews_in_ms: pool.tag.is_multiple_of(3).then_some(u64::MAX >> greatness) }
}

/// What a filter takes for an answer to such a call. It never holds more than it was granted.
pub fn allowance_answer(bytes: &[u8]) {
    for message in [bytes, &envelope(ANSWER, bytes)] {
        let Ok(answer) = Answer::read(message) else { continue };
        assert_eq!(answer.write().and_then(|bytes| Answer::read(&bytes)).as_ref(), Ok(&answer));
        let (mut contact, mut holding) = (Contact::default(), Holding::default());
        let mut now_ms = 1_800_000_000_000;
        for grant in &answer.grants {
            now_ms += TICK_MS;
            let pool = PoolId { kind: Kind::Quota, subject: Subject([0; 16]), tag: 0 };
            holding.prepare(Limited::Stock { fill: 1 }, &contact, now_ms * NS_PER_MS);
            let due = Due { pool, need: 1, least: 1, is_unused: false };
            let ask = holding.ask(due, &contact, now_ms * NS_PER_MS);
            contact.answered(now_ms, now_ms, answer.live, answer.alone_ms);
            let before = holding;
            // Half of the answers are to this session.
            let session = if grant.session.is_multiple_of(2) { ask.session } else { grant.session };
            holding.apply(&Grant { session, ..*grant }, &contact, now_ms);
            assert!(holding.granted <= before.granted.max(grant.granted));
            let available = holding.available(&contact, now_ms);
            let cost = grant.held.max(1);
            if matches!(
                holding.spend(cost, Limited::Stock { fill: 1 }, 0, &contact, now_ms * NS_PER_MS),
                Spent::Yes { .. }
            ) {
                assert!(available >= cost || contact.alone_until_ms > 0, "{holding:?} after {grant:?}");
            }
            assert_eq!(Holding::from_words(holding.words()), holding);
        }
    }
}

/// What an operator writes into Envoy's configuration.
pub fn plugin_configuration(bytes: &[u8]) {
    let config = match Config::parse(bytes) {
        Ok(config) => config,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(!config.cluster.is_empty() && !config.key_sources.is_empty());
    let identity = [&config.identity.consumer, &config.identity.credential, &config.identity.scopes];
    let identity = identity.into_iter().flatten().map(String::as_str);
    // A key in the query stands in the path, which is the one source with a name of Envoy's own.
    let sources =
        config.key_sources.iter().map(filter_core::extract::source::Source::header).filter(|name| *name != ":path");
    for name in identity.chain(sources) {
        assert!(
            !name.starts_with(':') && name.bytes().all(|byte| byte.is_ascii_graphic() && !byte.is_ascii_uppercase())
        );
    }
}

/// What a client of the REST API calls people and keys.
pub fn email_and_name(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(email) = Email::parse(&text) {
        assert_eq!(Email::parse(email.as_str()).ok(), Some(email.clone()), "{email}");
        assert_eq!(Email::start(&text), email.as_str());
        assert!(email.as_str().chars().count() <= 254 && !email.as_str().chars().any(char::is_control));
        // No other domain name looks like this one, and the database compares ASCII letters only.
        let domain = email.as_str().rsplit_once('@').map_or("", |(_, domain)| domain);
        assert!(domain.is_ascii() && !email.as_str().bytes().any(|byte| byte.is_ascii_uppercase()), "{email}");
        // The case of ASCII letters makes no difference.
        assert!(!text.is_ascii() || Email::parse(&text.to_ascii_uppercase()).ok().as_ref() == Some(&email), "{email}");
    }
    if let Ok(name) = KeyName::parse("name", &text) {
        assert_eq!(KeyName::parse("name", name.as_str()).ok(), Some(name.clone()));
        assert!((1..=100).contains(&name.as_str().chars().count()) && !name.as_str().chars().any(char::is_control));
    }
    if let Ok(scopes) = Scopes::parse(text.split(' ').map(str::to_owned).collect()) {
        assert!(scopes.as_slice().iter().all(|scope| scope.is_ascii() && scope.len() <= 64));
    }
}

/// A path in whose query a key may stand: the name of the parameter, as long as the first byte says, then the path.
pub fn query(bytes: &[u8]) {
    let (name, path) = divided(bytes);
    let none = |path: &[u8]| path_query::values(path, name).all(|value| value.is_empty());
    match path_query::without(path, name) {
        None => assert!(none(path)),
        Some(rest) => {
            // Nothing of the key goes upstream, and nothing else is lost.
            assert!(path_query::without(&rest, name).is_none() && none(&rest));
            assert!(rest.len() < path.len());
        }
    }
}

/// A header with cookies, one of which may be a key: its name, as long as the first byte says, then the header.
pub fn cookies(bytes: &[u8]) {
    let (name, header) = divided(bytes);
    let none = |header: &[u8]| cookie::values(header, name).all(<[u8]>::is_empty);
    match cookie::without(header, name) {
        None => assert!(none(header)),
        Some(rest) => assert!(cookie::without(&rest, name).is_none() && none(&rest)),
    }
}

/// A line of an import of keys.
pub fn import_line(bytes: &[u8]) {
    let Err(reason) = line::parse(bytes, UNIX_EPOCH.into()) else { return };
    assert!(!reason.is_empty());
    // The reason has nothing of the key, wherever it stands.
    let body: Value = serde_json::from_slice(bytes).unwrap_or_default();
    for field in ["key", "hash"] {
        let key = body[field].as_str().unwrap_or_default();
        let could_be_a_key = key.len() >= 20 && key.bytes().all(|byte| byte.is_ascii_graphic());
        assert!(!could_be_a_key || !reason.contains(key), "{reason}");
    }
}

/// A line of Envoy's log; and the same bytes as reports that a filter signed, of which the last byte is changed.
pub fn usage_line(bytes: &[u8]) {
    let (ours, other) = (LogKey::derive(b"ours"), LogKey::derive(b"other"));
    if let Ok(Some(signed)) = signed_usage(bytes) {
        assert!(bytes.starts_with(b"[") || bytes.starts_with(b"{"));
        assert!(!other.has_signed(&signed));
        let _ = read_reports(&signed.reports);
    }
    let line = format!("[2026-11-24 02:44:59.439][1][warning][wasm] [source/a.cc:1] wasm log x: {}", ours.line(bytes));
    let mut line = line.into_bytes();
    let read = |line: &[u8]| signed_usage(line).ok().flatten();
    let signed = read(&line);
    assert!(
        signed.is_some_and(|signed| ours.has_signed(&signed) && !other.has_signed(&signed) && signed.reports == bytes)
    );
    if let Some(last) = line.last_mut().filter(|_| !bytes.is_empty()) {
        *last = if *last == b'0' { b'1' } else { b'0' };
        assert!(!read(&line).is_some_and(|signed| ours.has_signed(&signed)));
    }
}

/// A header, as long as the first byte says, and the rest.
fn divided(bytes: &[u8]) -> (&[u8], &[u8]) {
    let Some((&length, rest)) = bytes.split_first() else { return (&[], &[]) };
    rest.split_at_checked(usize::from(length)).unwrap_or((rest, &[]))
}
