//! A control plane for tests of behaviour that the real one never shows. It serves records and
//! definitions that a test sets and changes, to any number of filters, adds up the usage reports,
//! and keeps shared limits.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::header::AGE;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use contract::definition::{Definition, Definitions};
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, ReporterId};
use contract::outcome::Outcome;
use contract::record::Record;
use contract::update::{Header, Part, UpdateWriter};
use contract::usage::{Ack, Report, SHADOW, read_reports};
use limits::message::Call;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::demo::serve;
use crate::ports::LOCAL;

use crate::fake_limits::{FakeLimits, Mode};

const EPOCH: Epoch = Epoch([1; 16]);
const FIRST_REVISION: u64 = 5;
/// How long a poll is held that asks for changes, if there are none.
const HOLD: Duration = Duration::from_secs(25);

/// A running fake. It ends when dropped.
#[derive(Debug)]
pub struct FakeControlPlane {
    address: SocketAddr,
    shared: Arc<Shared>,
    _server: JoinSet<()>,
}

/// Faults that happen first, before everything works.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Number of poll responses to damage: a flipped byte, truncated, replaced by text, or an error, in turn.
    pub updates: u32,
    /// Number of usage reports whose acknowledgement is lost.
    pub acknowledgements: u32,
    /// The age of updates in seconds, as of a control plane that lost its database.
    pub age_s: u64,
    /// Number of poll responses that make the polling VM trap, if its filter can.
    pub traps: u32,
}

#[derive(Debug)]
struct Shared {
    store: watch::Sender<Store>,
    faults: Mutex<Faults>,
    usage: Mutex<Usage>,
    limits: Mutex<FakeLimits>,
}

/// The number of the first policy in the store, beyond those of roles and plans.
pub const FIRST_POLICY: u32 = 1_000;

/// The key store that filters receive.
#[derive(Clone, Debug)]
struct Store {
    revision: u64,
    records: BTreeMap<KeyHash, Record>,
    definitions: BTreeMap<u32, Definition>,
}

/// A change of the store.
#[derive(Clone, Debug)]
pub enum Change<'a> {
    /// Sets the record of a key.
    Key(&'a str, Box<Record>),
    /// Sets a role or a plan.
    Define(u32, Definition),
    /// Removes a role or a plan.
    Undefine(u32),
}

#[derive(Debug, Default)]
struct Usage {
    taken: BTreeMap<(ReporterId, u64), Report>,
    requests: BTreeMap<u8, u64>,
    cost: BTreeMap<u8, u64>,
    changed: u64,
    polls: Vec<BTreeMap<String, String>>,
}

impl FakeControlPlane {
    /// Starts it with the records of these keys.
    pub async fn start(keys: &[(&str, Record)], faults: Faults) -> Result<Self> {
        let records = keys.iter().map(|(key, record)| (KeyHash::of(key.as_bytes()), record.clone())).collect();
        let store = Store { revision: FIRST_REVISION, records, definitions: BTreeMap::new() };
        let (store, faults) = (watch::Sender::new(store), Mutex::new(faults));
        let shared = Arc::new(Shared { store, faults, usage: Mutex::default(), limits: Mutex::default() });
        let router = Router::new()
            .route("/sync/v1/keys", get(update))
            .route("/sync/v1/usage", post(usage))
            .route("/sync/v1/allowances", post(allowances))
            .route("/sync/v1/sightings", post(async || StatusCode::OK))
            .with_state(Arc::clone(&shared));
        let (address, _server) = serve(LOCAL, router).await?;
        Ok(Self { address, shared, _server })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the store, which answers held polls. Returns the new revision.
    pub fn change(&self, changes: &[Change<'_>]) -> u64 {
        self.shared.store.send_modify(|store| {
            store.revision += 1;
            for change in changes.iter().cloned() {
                match change {
                    Change::Key(key, record) => drop(store.records.insert(KeyHash::of(key.as_bytes()), *record)),
                    Change::Define(number, definition) => drop(store.definitions.insert(number, definition)),
                    Change::Undefine(number) => drop(store.definitions.remove(&number)),
                }
            }
        });
        self.shared.store.borrow().revision
    }

    /// The shared limits.
    pub fn limits(&self) -> MutexGuard<'_, FakeLimits> {
        self.shared.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many requests of an outcome have been reported.
    pub fn reported(&self, outcome: Outcome) -> u64 {
        self.usage().requests.get(&outcome.code()).copied().unwrap_or_default()
    }

    /// How many requests were reported as allowed by shadow mode in place of this outcome.
    pub fn reported_in_shadow(&self, outcome: Outcome) -> u64 {
        self.usage().requests.get(&(outcome.code() | SHADOW)).copied().unwrap_or_default()
    }

    /// The cost of all reported requests of an outcome, including those that were not charged.
    pub fn reported_cost(&self, outcome: Outcome) -> u64 {
        self.usage().cost.get(&outcome.code()).copied().unwrap_or_default()
    }

    /// The number of counts in each report, in their order.
    pub fn report_sizes(&self) -> Vec<usize> {
        self.usage().taken.values().map(|report| report.counts.len()).collect()
    }

    /// The query parameters of all polls, in their order.
    pub fn polls(&self) -> Vec<BTreeMap<String, String>> {
        self.usage().polls.clone()
    }

    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.shared.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports that were repeated with other counts under the same number. There must be none.
    pub fn changed_reports(&self) -> u64 {
        self.usage().changed
    }

    /// The remaining faults.
    pub fn faults(&self) -> Faults {
        *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the faults.
    pub fn disturb(&self, faults: Faults) {
        *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }
}

impl Store {
    /// The whole store, as a snapshot or as changes after a revision. Sending everything again does no harm.
    fn update(&self, after: Option<u64>) -> Option<Vec<u8>> {
        let mut update = UpdateWriter::default();
        if after.is_none_or(|after| after < self.revision) {
            for (number, definition) in &self.definitions {
                update.define(*number, &definition.to_bytes().ok()?);
            }
            // Removed definitions. Tests use few numbers.
            let numbers = (0..16).chain(FIRST_POLICY..FIRST_POLICY + 16);
            for number in numbers.filter(|number| after.is_some() && !self.definitions.contains_key(number)) {
                update.undefine(number);
            }
            for (hash, record) in &self.records {
                update.put(hash, &record.to_bytes().ok()?);
            }
        }
        let part = after.map_or(Part::Snapshot { from: 0, to: BUCKETS }, |after| Part::Changes { after });
        let total_keys = self.records.len().try_into().unwrap_or(u64::MAX);
        let header = Header { epoch: EPOCH, revision: self.revision, total_keys, part };
        update.finish(&header).ok()
    }
}

async fn update(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<(HeaderMap, Vec<u8>), StatusCode> {
    shared.usage.lock().unwrap_or_else(PoisonError::into_inner).polls.push(query.clone());
    let changes = query.get("revision").filter(|_| !query.contains_key("cursor"));
    let after = changes.and_then(|revision| revision.parse().ok());
    let waits = query.get("wait").is_none_or(|wait| wait != "0");
    if let Some(after) = after.filter(|_| waits) {
        let mut store = shared.store.subscribe();
        // After a time-out, there are no changes.
        let _ = tokio::time::timeout(HOLD, store.wait_for(|store| store.revision > after)).await;
    }
    let store = shared.store.borrow().clone();
    let mut bytes = store.update(after).ok_or(StatusCode::INTERNAL_SERVER_ERROR)?;
    let mut faults = shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
    let mut headers = HeaderMap::from_iter([(AGE, faults.age_s.into())]);
    if let Some(left) = faults.traps.checked_sub(1) {
        faults.traps = left;
        headers.insert("x-portcullis-trap", 1.into());
    }
    let Some(left) = faults.updates.checked_sub(1) else { return Ok((headers, bytes)) };
    faults.updates = left;
    match left % 4 {
        0 => bytes.iter_mut().rev().take(1).for_each(|byte| *byte ^= 1),
        1 => bytes.truncate(bytes.len() / 2),
        2 => bytes = b"<html>a proxy's idea of an error</html>".to_vec(),
        _ => return Err(StatusCode::BAD_GATEWAY),
    }
    Ok((headers, bytes))
}

async fn usage(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Vec<u8>, StatusCode> {
    let reports = read_reports(&body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let mut usage = shared.usage.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ack = None;
    for report in reports {
        ack = Some(Ack { reporter: report.reporter, seq: report.seq });
        match usage.taken.get(&(report.reporter, report.seq)) {
            Some(before) if *before == report => {}
            Some(_) => usage.changed += 1,
            None => {
                for count in &report.counts {
                    *usage.requests.entry(count.of.outcome).or_default() += count.requests;
                    *usage.cost.entry(count.of.outcome).or_default() += count.cost;
                }
                let store = shared.store.borrow().clone();
                let mut limits = shared.limits.lock().unwrap_or_else(PoisonError::into_inner);
                limits.book(&report, &store.records.values().collect::<Vec<_>>());
                usage.taken.insert((report.reporter, report.seq), report);
            }
        }
    }
    let mut faults = shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(left) = faults.acknowledgements.checked_sub(1) {
        faults.acknowledgements = left;
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    }
    ack.and_then(|ack| ack.write().ok()).ok_or(StatusCode::BAD_REQUEST)
}

async fn allowances(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Vec<u8>, StatusCode> {
    let call = Call::read(&body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let mode = shared.limits.lock().unwrap_or_else(PoisonError::into_inner).mode;
    match mode {
        Mode::Answer => {}
        Mode::Refuse => return Err(StatusCode::SERVICE_UNAVAILABLE),
        Mode::Hang => std::future::pending().await,
    }
    let store = shared.store.borrow().clone();
    let mut limits = shared.limits.lock().unwrap_or_else(PoisonError::into_inner);
    limits
        .answer(call, &store.records.values().collect::<Vec<_>>(), &Definitions::new(store.definitions))
        .write()
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
