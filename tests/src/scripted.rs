//! A control plane that plays a script, for what the real one never does: it serves the records that a test gives it, to
//! one filter or many, and adds up the usage reports.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use contract::hash::{BUCKETS, KeyHash};
use contract::id::{Epoch, ReporterId};
use contract::outcome::Outcome;
use contract::page::{Header, PageWriter, Part};
use contract::record::Record;
use contract::usage::{Ack, Report, read_reports};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const EPOCH: Epoch = Epoch([1; 16]);
const REVISION: u64 = 5;
/// How long a poll is held that asks for changes: there are none.
const HOLD: Duration = Duration::from_secs(25);

/// A running script. It ends when dropped.
#[derive(Debug)]
pub struct Scripted {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

/// What goes wrong before all goes well.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// So many answers to polls are damaged: a byte flipped, cut short, replaced by text, or an error, in turn.
    pub pages: u32,
    /// So many reports are taken, and the answer that says so is lost.
    pub acknowledgements: u32,
    /// Pages are so old, in seconds, as those of a control plane that has lost its database.
    pub age_s: u64,
}

#[derive(Debug)]
struct Shared {
    records: Vec<(KeyHash, Record)>,
    faults: Mutex<Faults>,
    usage: Mutex<Usage>,
}

#[derive(Debug, Default)]
struct Usage {
    taken: BTreeMap<(ReporterId, u64), Report>,
    requests: BTreeMap<u8, u64>,
    changed: u64,
}

impl Scripted {
    /// Starts it with the records of these keys.
    ///
    /// # Errors
    /// If there is no free port.
    pub async fn start(keys: &[(&str, Record)], faults: Faults) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let mut records: Vec<_> =
            keys.iter().map(|(key, record)| (KeyHash::of(key.as_bytes()), record.clone())).collect();
        records.sort_by_key(|(hash, _)| *hash);
        let shared = Arc::new(Shared { records, faults: Mutex::new(faults), usage: Mutex::default() });
        let router = Router::new()
            .route("/sync/v1/keys", get(page))
            .route("/sync/v1/usage", post(usage))
            .with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            // Ends with the task only.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, shared, server })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many requests of an outcome have been reported.
    #[must_use]
    pub fn reported(&self, outcome: Outcome) -> u64 {
        let usage = self.shared.usage.lock().unwrap_or_else(PoisonError::into_inner);
        usage.requests.get(&outcome.code()).copied().unwrap_or_default()
    }

    /// Reports that came again with other counts than before under their number. There must be none.
    #[must_use]
    pub fn changed_reports(&self) -> u64 {
        self.shared.usage.lock().unwrap_or_else(PoisonError::into_inner).changed
    }

    /// What is still to go wrong.
    #[must_use]
    pub fn faults(&self) -> Faults {
        *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn page(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<([(&'static str, String); 1], Vec<u8>), StatusCode> {
    let total_keys = shared.records.len().try_into().unwrap_or(u64::MAX);
    let mut page = PageWriter::new();
    let changes = query.get("revision").filter(|_| !query.contains_key("cursor"));
    let part = match changes.and_then(|revision| revision.parse().ok()) {
        Some(after) => {
            if query.get("wait").is_none_or(|wait| wait != "0") {
                tokio::time::sleep(HOLD).await;
            }
            Part::Changes { after }
        }
        None => {
            for (hash, record) in &shared.records {
                page.put(hash, &record.to_bytes().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?);
            }
            Part::Snapshot { from: 0, to: BUCKETS }
        }
    };
    let header = Header { epoch: EPOCH, revision: REVISION, total_keys, part, filters: 0 };
    let mut bytes = page.finish(&header).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    let mut faults = shared.faults.lock().unwrap_or_else(PoisonError::into_inner);
    let age = [("age", faults.age_s.to_string())];
    let Some(left) = faults.pages.checked_sub(1) else { return Ok((age, bytes)) };
    faults.pages = left;
    match left % 4 {
        0 => bytes.iter_mut().rev().take(1).for_each(|byte| *byte ^= 1),
        1 => bytes.truncate(bytes.len() / 2),
        2 => bytes = b"<html>a proxy's idea of an error</html>".to_vec(),
        _ => return Err(StatusCode::BAD_GATEWAY),
    }
    Ok((age, bytes))
}

async fn usage(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Vec<u8>, StatusCode> {
    let reports = read_reports(&body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let mut usage = shared.usage.lock().unwrap_or_else(PoisonError::into_inner);
    let mut ack = None;
    for report in reports {
        ack = Some(Ack { reporter: report.reporter, seq: report.seq, grants: Vec::new() });
        match usage.taken.get(&(report.reporter, report.seq)) {
            Some(before) if *before == report => {}
            Some(_) => usage.changed += 1,
            None => {
                for count in &report.counts {
                    *usage.requests.entry(count.of.outcome).or_default() += count.requests;
                }
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
