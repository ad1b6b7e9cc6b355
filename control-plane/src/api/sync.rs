//! `/sync/v1`: the API of the filters. A poll is held until there is a change. Only keys with the scope `sync` are
//! admitted.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{ConnectInfo, Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::hash::BUCKETS;
use contract::id::{Epoch, ReporterId};
use contract::sightings::Sightings;
use contract::update::{Header, Part, Update, UpdateWriter};
use contract::usage::read_reports;
use limits::message::Call;
use serde::Deserialize;
use tokio::time::Instant;
use uuid::Uuid;

use crate::App;
use crate::allowances::CallError;
use crate::api::auth::SyncCaller;
use crate::api::extract::{Json, Query};
use crate::definitions::uses;
use crate::error::ApiError;
use crate::keys::unknown;
use crate::metering::{IngestError, NEW_REPORTERS};
use crate::net::connection::Peer;
use crate::sync::filters::SILENT;
use crate::sync::mirror::UpdateRequest;
use crate::sync::registry::{PollStatus, Registration};

/// The media type of an update.
const UPDATE_TYPE: &str = "application/vnd.portcullis.update";
/// The media type of an acknowledgement.
const ACK_TYPE: &str = "application/vnd.portcullis.ack";
/// The media type of an answer to a call for allowances.
const ALLOWANCES_TYPE: &str = "application/vnd.portcullis.allowances";

/// From where on a filter syncs: nothing for a new one; epoch and revision for the changes after it; epoch, cursor and the
/// least revision that the update must have for the next update of a snapshot. What a newer filter says beside that is left alone.
#[derive(Debug, Deserialize)]
pub struct Poll {
    epoch: Option<Uuid>,
    revision: Option<u64>,
    cursor: Option<u32>,
    wait: Option<u64>,
    /// Of these three, whatever does not make sense is left alone: they only tell the operator about the filter.
    reporter: Option<String>,
    version: Option<String>,
    pending: Option<String>,
}

/// Longest version that is shown, in bytes.
const VERSION_BYTES: usize = 64;

/// `GET /sync/v1/keys`: the next update for a filter.
///
/// # Errors
/// A refused key, a senseless query, or 503 before the mirror is loaded.
pub async fn poll(
    State(app): State<App>,
    SyncCaller(key): SyncCaller,
    peer: Option<Extension<ConnectInfo<Peer>>>,
    headers: HeaderMap,
    Query(poll): Query<Poll>,
) -> Result<Response, ApiError> {
    let _noted = note(&app, key, peer.map(|Extension(ConnectInfo(peer))| peer), &poll);
    let update = update_for(&app, &poll).await?;
    let json = headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"application/json"));
    if json {
        let malformed = |error| ApiError::Internal(format!("an update of our own: {error}"));
        let view = Update::read(&update).and_then(|update| update.view()).map_err(malformed)?;
        return Ok(Json(view).into_response());
    }
    metrics::counter!("portcullis_sync_updates_total").increment(1);
    // How old what the update tells may be (RFC 9111, section 5.1): seconds, if the database has not been reached for so
    // long. Filters that must not serve old keys count it in.
    let age = HeaderValue::from(app.store.age().unwrap_or_default().as_secs());
    let no_store = HeaderValue::from_static("no-store");
    let kind = HeaderValue::from_static(UPDATE_TYPE);
    let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, no_store), (header::AGE, age)];
    Ok((headers, update).into_response())
}

/// Notes what the filter says of itself. An Envoy beyond those that its sync key may have is not noted and gets the keys all
/// the same: otherwise a thief of the sync key could keep Envoys that start from serving. Its reports and its calls for
/// allowances are refused. Dropping the result notes that the filter was there until then.
fn note(app: &App, sync_key: Uuid, peer: Option<Peer>, poll: &Poll) -> Option<impl Drop + use<>> {
    let reporter = poll.reporter.as_deref().and_then(|text| text.parse::<ReporterId>().ok())?;
    let shown = |version: &&str| {
        (1..=VERSION_BYTES).contains(&version.len()) && version.bytes().all(|byte| byte.is_ascii_graphic())
    };
    let status = PollStatus {
        sync_key,
        address: peer.map(|Peer(address)| address.ip().to_canonical().to_string()),
        version: poll.version.as_deref().filter(shown).map(Into::into),
        // A filter that asks for the changes after a revision has all before. One that loads a snapshot has not confirmed any.
        holds: poll.epoch.zip(poll.revision).filter(|_| poll.cursor.is_none()).map(|(epoch, at)| (epoch.into(), at)),
        pending: poll.pending.as_deref().and_then(|pending| pending.parse().ok()),
    };
    if app.filters.polled(reporter, status) == Registration::TooMany {
        return None;
    }
    let filters = app.filters.clone();
    Some(Defer(move || {
        filters.held(reporter, sync_key);
    }))
}

/// More Envoys under a sync key than it may have.
fn too_many(app: &App) -> ApiError {
    let detail = format!(
        "This sync key has {} live Envoys, which is as many as it may have. Give each zone a sync key of its own, raise \
         --envoys-per-sync-key, or revoke the key if it was stolen.",
        app.filters.per_sync_key()
    );
    ApiError::BoundReached { detail, retry_after_s: SILENT.as_secs() }
}

async fn update_for(app: &App, poll: &Poll) -> Result<Bytes, ApiError> {
    let deadline =
        Instant::now() + poll.wait.map_or(app.long_poll, |wait| app.long_poll.min(Duration::from_secs(wait)));
    let (epoch, revision) = match (poll.epoch, poll.revision, poll.cursor) {
        (Some(epoch), least, Some(cursor)) => {
            if cursor >= BUCKETS {
                return Err(ApiError::invalid(
                    "cursor",
                    format!("must be below {BUCKETS}: take it from the last update"),
                ));
            }
            let (epoch, least) = (Epoch::from(epoch), least.unwrap_or(0));
            if !up_to_date(app, epoch, least, deadline).await {
                return Err(ApiError::Unavailable("This replica does not have that revision yet. Try again."));
            }
            // An update of an older state than those before it could bring revoked keys back. Where the database itself is
            // behind, it was restored: the snapshot starts over.
            let continues = app.store.position().is_some_and(|(ours, at)| ours == epoch && at >= least);
            return encode_update(app, UpdateRequest::Snapshot(if continues { cursor } else { 0 }));
        }
        (None, _, Some(_)) => {
            return Err(ApiError::invalid("epoch", "a cursor goes with the epoch of the last update"));
        }
        (None, Some(_), None) => {
            return Err(ApiError::invalid("epoch", "a revision goes with the epoch of the last update"));
        }
        (Some(_), None, None) | (None, None, None) => return encode_update(app, UpdateRequest::Snapshot(0)),
        (Some(epoch), Some(revision), None) => (Epoch::from(epoch), revision),
    };
    let mut positions = app.store.positions();
    let held = metrics::gauge!("portcullis_sync_polls_in_flight");
    held.increment(1);
    let _held = Defer(|| held.decrement(1));
    let mut stopping = app.stopping.clone();
    let may_judge = up_to_date(app, epoch, revision, deadline).await;
    loop {
        let now = *positions.borrow_and_update();
        let (ours, at) = now.ok_or(ApiError::Unavailable("The key store is not loaded yet. Try again shortly."))?;
        let in_step = ours == epoch && at == revision;
        let elsewhere = ours != epoch || at < revision;
        if !in_step && (may_judge || !elsewhere) {
            return encode_update(app, UpdateRequest::Changes(if ours == epoch { revision } else { u64::MAX }));
        }
        tokio::select! {
            _ = positions.changed() => {}
            () = tokio::time::sleep_until(deadline) => return unchanged(app, epoch, revision),
            _ = stopping.wait_for(|stopping| *stopping) => return unchanged(app, epoch, revision),
        }
    }
}

/// Whether the mirror is recent enough to answer a reader. A reader with another epoch, or ahead of this replica, got its state
/// from another replica, or before the database was restored. The mirror is then refreshed first: an older snapshot could bring
/// revoked keys back. False if the database cannot be reached.
async fn up_to_date(app: &App, epoch: Epoch, revision: u64, deadline: Instant) -> bool {
    if app.store.position().is_none_or(|(ours, at)| ours == epoch && revision <= at) {
        return true;
    }
    let mut stopping = app.stopping.clone();
    tokio::select! {
        looked = tokio::time::timeout_at(deadline, app.feed.refresh(Some((epoch, revision)))) => matches!(looked, Ok(Ok(()))),
        _ = stopping.wait_for(|stopping| *stopping) => false,
    }
}

fn encode_update(app: &App, wanted: UpdateRequest) -> Result<Bytes, ApiError> {
    match app.store.write_update(wanted) {
        None => Err(ApiError::Unavailable("The key store is not loaded yet. Try again shortly.")),
        Some(update) => update.map_err(|error| ApiError::Internal(format!("an update cannot be encoded: {error}"))),
    }
}

/// The update that has no news.
fn unchanged(app: &App, epoch: Epoch, revision: u64) -> Result<Bytes, ApiError> {
    let header = Header { epoch, revision, total_keys: app.store.keys(), part: Part::Changes { after: revision } };
    let update = UpdateWriter::default().finish(&header);
    update.map(Bytes::from).map_err(|error| ApiError::Internal(format!("an update cannot be encoded: {error}")))
}

/// `POST /sync/v1/usage`: takes reports and acknowledges them once they are committed.
///
/// # Errors
/// A refused key, reports that do not make sense or are another's, 503 if they cannot be taken now.
pub async fn report(State(app): State<App>, SyncCaller(key): SyncCaller, body: Bytes) -> Result<Response, ApiError> {
    let reports = read_reports(&body).map_err(|error| ApiError::Invalid { field: None, detail: error.to_string() });
    let reports = reports.inspect_err(|_| rejected())?;
    if let Some(first) = reports.first()
        && app.filters.held(first.reporter, key) == Registration::TooMany
    {
        rejected();
        return Err(too_many(&app));
    }
    let ack = app.usage.submit(reports, key).await.map_err(|error| match error {
        IngestError::Senseless(detail) => {
            rejected();
            ApiError::Invalid { field: None, detail }
        }
        IngestError::Foreign => {
            rejected();
            foreign()
        }
        IngestError::TooMany => {
            rejected();
            let detail = format!(
                "Reports of {NEW_REPORTERS} new Envoys came under this sync key within 24 hours, which is as many as it may \
                 have. Give each zone a sync key of its own, or revoke the key if it was stolen."
            );
            ApiError::BoundReached { detail, retry_after_s: 3_600 }
        }
        IngestError::Full => ApiError::Unavailable("Too many usage reports are queued. Send the report again."),
        IngestError::Database(error) => {
            tracing::warn!(%error, "could not commit usage reports");
            ApiError::Unavailable("The database is not available. Send the report again.")
        }
    })?;
    app.filters.reported(ack.reporter, key);
    let body = ack.write().map_err(|error| ApiError::Internal(format!("an acknowledgement: {error}")))?;
    Ok((StatusCode::OK, [(header::CONTENT_TYPE, ACK_TYPE)], body).into_response())
}

/// `POST /sync/v1/allowances`: answers an Envoy's call for allowances of limits, quotas and credits.
///
/// # Errors
/// A refused key, an invalid call, a reporter of another sync key, or 503 if the control plane cannot answer now.
pub async fn allowances(
    State(app): State<App>,
    SyncCaller(key): SyncCaller,
    body: Bytes,
) -> Result<Response, ApiError> {
    let rejected = || metrics::counter!("portcullis_allowance_calls_total", "result" => "rejected").increment(1);
    let call = Call::read(&body).map_err(|error| ApiError::Invalid { field: None, detail: error.to_string() });
    let call = call.inspect_err(|_| rejected())?;
    if app.filters.held(call.reporter, key) == Registration::TooMany {
        rejected();
        return Err(too_many(&app));
    }
    let answer = app.allowances.call(call, key).await.map_err(|error| match error {
        CallError::Senseless(detail) => {
            rejected();
            ApiError::Invalid { field: None, detail }
        }
        CallError::Foreign => foreign(),
        CallError::Full => ApiError::Unavailable("Too many calls for allowances are queued. Call again."),
        CallError::Database(error) => {
            tracing::warn!(%error, "could not answer a call for allowances");
            ApiError::Unavailable("The database is not available. Call again.")
        }
    })?;
    let body = answer.write().map_err(|error| ApiError::Internal(format!("an answer: {error}")))?;
    Ok((StatusCode::OK, [(header::CONTENT_TYPE, ALLOWANCES_TYPE)], body).into_response())
}

/// `POST /sync/v1/sightings`: takes the keys that an Envoy does not know, and the policies that its routes name.
///
/// # Errors
/// A refused key, an invalid message, or 503 if the database is not available.
pub async fn store_sightings(
    State(app): State<App>,
    SyncCaller(_): SyncCaller,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let Sightings { unknown_keys, policies } =
        Sightings::read(&body).map_err(|error| ApiError::Invalid { field: None, detail: error.to_string() })?;
    uses::store(&app.pool, &policies).await?;
    unknown::store(&app.pool, app.pepper.as_ref(), unknown_keys).await?;
    Ok(StatusCode::OK)
}

/// A reporter that belongs to another sync key.
fn foreign() -> ApiError {
    ApiError::Forbidden("This reporter belongs to another sync key. Restart Envoy after changing its key.".into())
}

fn rejected() {
    metrics::counter!("portcullis_usage_reports_total", "result" => "rejected").increment(1);
}

/// Does something when it is dropped, however the future that holds it ends.
struct Defer<F: FnMut()>(F);

impl<F: FnMut()> Drop for Defer<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
