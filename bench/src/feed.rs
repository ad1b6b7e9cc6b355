//! A control plane with any number of keys and no database. It serves updates that it made at the
//! start to every filter that polls, and discards usage.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use contract::definition::Definition;
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, KeyId, OwnerId};
use contract::policy::NamedPolicy;
use contract::record::Record;
use contract::update::{Header, Part, UPDATE_BYTES, UpdateWriter};
use contract::usage::{Ack, read_reports};
use limits::message::{Answer, Call, Grant};
use portcullis_harness::demo::serve;
use portcullis_harness::dice::Dice;
use portcullis_harness::ports::LOCAL;
use tokio::task::JoinSet;

const EPOCH: Epoch = Epoch([7; 16]);
const REVISION: u64 = 1;
/// How long a poll for changes is held: there are none.
const HOLD: Duration = Duration::from_secs(25);

/// Key number n, as clients present it: 44 characters, as our own keys have.
pub(crate) fn key(number: u64) -> String {
    let mut random = Dice::new(number);
    let mut text = String::from("sk_live_");
    while text.len() < 44 {
        let letter = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz".get(random.below(62));
        text.push(char::from(letter.copied().unwrap_or_default()));
    }
    text
}

/// The record of key number n, before a suite changes it.
fn record(number: u64) -> Record {
    let mut random = Dice::new(!number);
    let mut name = || (u128::from(random.number()) << 64 | u128::from(random.number())).to_le_bytes();
    Record::plain(KeyId(name()), OwnerId(name()))
}

/// A running feed. It ends when dropped.
#[derive(Debug)]
pub(crate) struct Feed {
    pub(crate) address: SocketAddr,
    _server: JoinSet<()>,
}

#[derive(Debug)]
struct Updates {
    total: u64,
    /// By their first bucket.
    snapshot: BTreeMap<u32, Bytes>,
}

impl Feed {
    /// Starts it with the keys `0..keys`, each changed by `change`, and with these policies.
    pub(crate) async fn start(keys: u64, change: impl Fn(&mut Record), policies: &[NamedPolicy]) -> Result<Self> {
        let updates = Arc::new(Updates::write(keys, change, policies)?);
        let router = Router::new()
            .route("/sync/v1/keys", get(update))
            .route("/sync/v1/usage", post(usage))
            .route("/sync/v1/allowances", post(allowances))
            .route("/sync/v1/sightings", post(async || StatusCode::OK))
            .with_state(updates);
        let (address, _server) = serve(LOCAL, router).await?;
        Ok(Self { address, _server })
    }
}

impl Updates {
    fn write(keys: u64, change: impl Fn(&mut Record), policies: &[NamedPolicy]) -> Result<Self> {
        let mut hashes: Vec<(KeyHash, u64)> =
            (0..keys).map(|number| (KeyHash::of(key(number).as_bytes()), number)).collect();
        hashes.sort_unstable();
        let mut updates = Self { total: keys, snapshot: BTreeMap::new() };
        let (mut writer, mut from, mut bucket) = (UpdateWriter::default(), 0, 0);
        for (policy, number) in policies.iter().zip(1..) {
            writer.define(number, &Definition::from(policy.clone()).to_bytes()?);
        }
        for (hash, number) in hashes {
            let next = u32::from(hash.bucket());
            // An update ends before a bucket, never within one.
            if next != bucket && writer.bytes() >= UPDATE_BYTES {
                updates.close(&writer, from, next)?;
                (writer, from) = (UpdateWriter::default(), next);
            }
            bucket = next;
            let mut record = record(number);
            change(&mut record);
            writer.put(&hash, &record.to_bytes()?);
        }
        updates.close(&writer, from, BUCKETS)?;
        Ok(updates)
    }

    fn close(&mut self, writer: &UpdateWriter, from: u32, to: u32) -> Result<()> {
        let part = Part::Snapshot { from, to };
        self.snapshot.insert(from, writer.finish(&self.header(part))?.into());
        Ok(())
    }

    const fn header(&self, part: Part) -> Header {
        Header { epoch: EPOCH, revision: REVISION, total_keys: self.total, part }
    }
}

async fn update(
    State(updates): State<Arc<Updates>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Bytes, StatusCode> {
    let number = |name: &str| query.get(name).and_then(|text| text.parse::<u64>().ok());
    if let (Some(after), None) = (number("revision"), number("cursor")) {
        if number("wait") != Some(0) {
            tokio::time::sleep(HOLD).await;
        }
        let unchanged = UpdateWriter::default().finish(&updates.header(Part::Changes { after }));
        return unchanged.map(Bytes::from).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR);
    }
    let cursor = u32::try_from(number("cursor").unwrap_or_default()).unwrap_or(u32::MAX);
    updates.snapshot.get(&cursor).cloned().ok_or(StatusCode::BAD_REQUEST)
}

async fn usage(body: Bytes) -> Result<Vec<u8>, StatusCode> {
    let acknowledged = || {
        let reports = read_reports(&body).ok()?;
        let last = reports.last()?;
        Ack { reporter: last.reporter, seq: last.seq }.write().ok()
    };
    acknowledged().context("no reports").map_err(|_| StatusCode::BAD_REQUEST)
}

/// Grants all that is asked for, as a limit that is never reached does. The Envoy is not alone, so it spends allowances.
async fn allowances(body: Bytes) -> Result<Vec<u8>, StatusCode> {
    let granted = || {
        let call = Call::read(&body).ok()?;
        let grants = call.asks.iter().map(|ask| {
            let granted = ask.granted.max(ask.spent.saturating_add(ask.returned));
            let granted = granted.saturating_add(ask.need).saturating_add(ask.want);
            Grant { session: ask.session, granted, left: u64::from(u32::MAX), ..Grant::default() }
        });
        Answer { live: 2, alone_ms: 0, grants: grants.collect(), recalls: Vec::new() }.write().ok()
    };
    granted().context("no call").map_err(|_| StatusCode::BAD_REQUEST)
}
