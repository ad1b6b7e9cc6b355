//! Health checks and metrics for the platform. They need no key.

use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use sqlx::PgPool;
use tokio::sync::Mutex;
use utoipa::ToSchema;

use crate::App;
use crate::api::extract::Json;

/// How long the last answer of the database is reused. Probes need no key and are not limited by address, since a load
/// balancer shares its address with all of its clients: so they must cost nothing.
const FRESH: Duration = Duration::from_millis(500);

/// Whether the database answers: asked once for all who want to know at a time.
#[derive(Debug, Default)]
pub struct DatabaseCheck(Mutex<Option<(Instant, bool)>>);

impl DatabaseCheck {
    async fn answers(&self, pool: &PgPool) -> bool {
        let mut last = self.0.lock().await;
        if let Some((asked, answered)) = *last
            && asked.elapsed() < FRESH
        {
            return answered;
        }
        let answers = sqlx::query_scalar!("select 1").fetch_one(pool).await.is_ok();
        *last = Some((Instant::now(), answers));
        answers
    }
}

/// Dependencies of the process.
#[derive(Debug, Serialize, ToSchema)]
pub struct Readiness {
    /// Whether the database answers.
    pub database: bool,
    /// Whether the keys are loaded.
    pub mirror: bool,
}

/// Check that the process runs.
#[utoipa::path(
    operation_id = "getHealth",
    get, path = "/healthz", tag = "platform",
    responses((status = 200, description = "The process runs", body = String)),
)]
pub async fn alive() -> &'static str {
    "ok\n"
}

/// Check that the process can do all of its work.
#[utoipa::path(
    operation_id = "getReadiness",
    get, path = "/readyz", tag = "platform",
    responses(
        (status = 200, description = "Database and mirror are available", body = Readiness),
        (status = 503, description = "The database, the mirror or both are not available", body = Readiness),
    )
)]
pub async fn ready(State(app): State<App>) -> Response {
    let readiness =
        Readiness { database: app.database.answers(&app.pool).await, mirror: app.store.position().is_some() };
    let status = if readiness.database && readiness.mirror { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness)).into_response()
}

/// Metrics in the text format of Prometheus.
pub async fn metrics(app: App, metrics: Option<PrometheusHandle>) -> Response {
    let Some(metrics) = metrics else { return StatusCode::NOT_FOUND.into_response() };
    metrics::gauge!("portcullis_mirror_revision")
        .set(app.store.position().map_or(0.0, |(_, revision)| revision as f64));
    metrics::gauge!("portcullis_mirror_keys").set(app.store.keys() as f64);
    if let Some(age) = app.store.age() {
        metrics::gauge!("portcullis_mirror_age_seconds").set(age.as_secs_f64());
    }
    metrics::gauge!("portcullis_database_connections").set(f64::from(app.pool.size()));
    metrics::gauge!("portcullis_database_connections_idle").set(app.pool.num_idle() as f64);
    metrics.run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
}
