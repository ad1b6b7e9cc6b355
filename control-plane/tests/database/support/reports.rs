//! Envoys as the control plane sees them: they send reports and calls for allowances.

use contract::id::{KeyId, ReporterId};
use contract::key::Secret;
use contract::outcome::Outcome;
use contract::usage::{Ack, Count, KeyRef, Report, Subject, write_reports};
use contract::usage_log::LogKey;
use sqlx::PgPool;
use uuid::Uuid;

use super::{Fixture, Reply, request, scalar};

/// What Envoy puts before a message of the filter.
pub const ENVOY_PREFIX: &str = "[2026-11-24 02:44:59.439][1][warning][wasm] [source/extensions/common/wasm/context.cc:1195] \
                                wasm log portcullis portcullis: ";

/// One Envoy process.
pub struct Envoy {
    pub id: ReporterId,
    pub seq: u64,
    sync: Secret,
}

impl Envoy {
    pub fn new(number: u8, sync: &Secret) -> Self {
        Self { id: ReporterId([number; 16]), seq: 0, sync: Secret::from_presented(sync.reveal().into()) }
    }

    /// Sends the next report.
    pub async fn report(&mut self, fixture: &Fixture, counts: &[Count]) {
        self.seq += 1;
        self.again(fixture, counts).await;
    }

    /// Sends the last report once more.
    pub async fn again(&self, fixture: &Fixture, counts: &[Count]) {
        let report = Report { reporter: self.id, seq: self.seq, counts: counts.to_vec() };
        let reply = submit(fixture, &self.sync, &[report]).await;
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        let ack = Ack::read(&reply.body).unwrap();
        assert_eq!((ack.reporter, ack.seq), (self.id, self.seq));
    }
}

/// Sends reports of any Envoy under any key.
pub async fn submit(fixture: &Fixture, key: &Secret, reports: &[Report]) -> Reply {
    fixture.send(request("POST", "/sync/v1/usage", Some(key), write_reports(reports).unwrap())).await
}

/// Requests that were allowed with a key.
pub async fn allowed(pool: &PgPool, id: Uuid) -> i64 {
    scalar(pool, format!("select coalesce(sum(requests), 0)::bigint from key_usage where key_id = '{id}'")).await
}

/// The line that an Envoy with this sync key writes into its log, once the control plane knows how to verify it.
pub async fn logged(pool: &PgPool, sync: &Secret, reports: &[Report]) -> String {
    let of_key = "select count(*) from usage_log_keys l join api_keys k on k.id = l.key_id where k.hash = $1";
    while sqlx::query_scalar::<_, i64>(of_key).bind(&sync.hash().0[..]).fetch_one(pool).await.unwrap() == 0 {
        tokio::task::yield_now().await;
    }
    line(sync, reports)
}

/// The same, of any key.
pub fn line(sync: &Secret, reports: &[Report]) -> String {
    let line = LogKey::derive(sync.reveal().as_bytes()).line(&write_reports(reports).unwrap());
    format!("{ENVOY_PREFIX}{line}")
}

/// Requests that cost one credit each if they were allowed.
pub fn count(key: Uuid, outcome: Outcome, requests: u64) -> Count {
    let cost = if outcome == Outcome::Allowed { requests } else { 0 };
    coded(key, outcome.code(), requests, cost)
}

pub fn coded(key: Uuid, outcome: u8, requests: u64, cost: u64) -> Count {
    let key = Some(KeyRef { id: KeyId::from(key), generation: 1 });
    Count { of: Subject { key, outcome, hour: 490_000 }, requests, cost, last_ms: 1_764_000_000_000 }
}
