//! `GET /v1/usage/events`: usage as a feed of events for other systems (CloudEvents 1.0, JSON batches). An event never
//! changes. The feed has no last page: a reader continues after the number of the last event that it stored.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::pagination;
use crate::App;
use crate::api::call::Call;
use crate::api::extract::Query;
use crate::api::problem::Problem;
use crate::domain::Timestamp;
use crate::error::ApiError;
use crate::metering::events::{Event, after, bounds};
use crate::metering::outcome;

const BATCH_TYPE: &str = "application/cloudevents-batch+json";
/// The header with the number of the last event of the reply.
const CURSOR: HeaderName = HeaderName::from_static("portcullis-cursor");

const LONGEST_WAIT_S: u64 = 25;
/// How often a reader that waits is looked after. Events come every minute or so.
const LOOK: Duration = Duration::from_millis(500);

/// Which events.
#[derive(Debug, Deserialize, Serialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Those after this one: `portcullis-cursor` of the reply before. From the oldest that is kept, unless given.
    #[param(minimum = 0)]
    after: Option<i64>,
    /// How many at most; 100 unless given.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
    /// For how many seconds to wait if there are none; not at all unless given.
    #[param(maximum = 25)]
    wait: Option<u64>,
}

/// One event (CloudEvents 1.0). `source` and `id` together name it for good.
#[derive(Debug, Serialize, ToSchema)]
pub struct CloudEvent {
    /// The version of CloudEvents.
    #[schema(value_type = String, example = "1.0")]
    specversion: &'static str,
    /// Names the event for good.
    id: Uuid,
    /// Always the same.
    #[schema(value_type = String, example = "/v1/usage/events")]
    source: &'static str,
    /// What kind of event it is.
    #[schema(value_type = String, example = "dev.portcullis.usage.v1")]
    r#type: &'static str,
    /// The key.
    subject: Uuid,
    /// When the event was written.
    time: Timestamp,
    /// The place in the stream, with leading zeros.
    #[schema(example = "0000000000000000042")]
    sequence: String,
    /// The type of `data`.
    #[schema(value_type = String, example = "application/json")]
    datacontenttype: &'static str,
    /// What was counted.
    data: UsageData,
}

/// What was counted of one key, hour and outcome since the event before of the same. Sums over events are usage.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageData {
    /// The key.
    key_id: Uuid,
    /// Whom it belonged to.
    owner_id: Uuid,
    /// The start of the hour in which the requests came.
    hour: Timestamp,
    /// Their outcome. With `shadow:` before it, the outcome that shadow mode did not enforce.
    #[schema(example = "allowed")]
    outcome: String,
    /// How many.
    requests: i64,
    /// Credits that they cost together.
    cost: i64,
}

impl From<Event> for CloudEvent {
    fn from(event: Event) -> Self {
        let Event { seq, id, key_id, owner_id, hour, outcome, requests, cost, created_at } = event;
        let outcome = outcome::name(outcome);
        Self {
            specversion: "1.0",
            id,
            source: "/v1/usage/events",
            r#type: "dev.portcullis.usage.v1",
            subject: key_id,
            time: created_at.into(),
            sequence: format!("{seq:019}"),
            datacontenttype: "application/json",
            data: UsageData { key_id, owner_id, hour: hour.into(), outcome, requests, cost },
        }
    }
}

/// Read usage as events.
///
/// Each event is delivered in one place of the stream and never changes.
#[utoipa::path(
    operation_id = "listUsageEvents",
    get, path = "/v1/usage/events", tag = "insight", params(EventsQuery),
    responses(
        (status = 200, description = "Events in order; none if there are no newer ones", body = Vec<CloudEvent>,
            content_type = "application/cloudevents-batch+json",
            headers(
                ("portcullis-cursor" = String, description = "What to send as `after` the next time"),
                ("link" = String, description = "The events after these (RFC 8288)"),
            )),
        (status = 409, description = "The database is older than the reader", body = Problem, content_type = "application/problem+json"),
        (status = 410, description = "Events after this one are no longer kept", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn events(Call { app, caller, .. }: Call, Query(query): Query<EventsQuery>) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let limit = pagination::within(query.limit)?;
    let wait = query.wait.unwrap_or(0);
    if wait > LONGEST_WAIT_S {
        return Err(ApiError::invalid("wait", format!("must be a number from 0 to {LONGEST_WAIT_S}")));
    }
    if query.after.is_some_and(|after| after < 0) {
        return Err(ApiError::invalid("after", "must be 0 or the number of an event"));
    }
    let deadline = Instant::now() + Duration::from_secs(wait);
    let mut stopping = app.stopping.clone();
    loop {
        let from = start(&app, query.after).await?;
        let events = after(&app.pool, from, limit).await?;
        if events.first().is_some_and(|event| event.seq != from + 1) {
            // The oldest were forgotten between the two looks: look again, and say so.
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if !events.is_empty() || left.is_zero() || *stopping.borrow() {
            return reply(events, from, limit);
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK.min(left)) => {}
            _ = stopping.wait_for(|stopping| *stopping) => {}
        }
    }
}

/// After which event to read on, if those that follow it are all there.
async fn start(app: &App, after: Option<i64>) -> Result<i64, ApiError> {
    let (oldest, newest) = bounds(&app.pool).await?.unwrap_or((1, 0));
    let Some(after) = after else { return Ok(oldest - 1) };
    if after > newest {
        let detail = format!(
            "after: the newest event is {newest}. The database was restored to an earlier state. Continue from that event, \
             and discard the events after it."
        );
        return Err(ApiError::Conflict(detail));
    }
    if after < oldest - 1 {
        let detail = format!(
            "after: the oldest stored event is {oldest}. Read the missing usage from GET /v1/usage, and continue without \
             `after`."
        );
        return Err(ApiError::Gone(detail));
    }
    Ok(after)
}

fn reply(events: Vec<Event>, from: i64, limit: i64) -> Result<Response, ApiError> {
    let last = events.last().map_or(from, |event| event.seq);
    let events: Vec<CloudEvent> = events.into_iter().map(Into::into).collect();
    let body = serde_json::to_vec(&events).map_err(|error| ApiError::Internal(format!("events: {error}")))?;
    let link =
        pagination::next_link("/v1/usage/events", &EventsQuery { after: Some(last), limit: Some(limit), wait: None });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(BATCH_TYPE)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (header::LINK, link),
        (CURSOR, HeaderValue::from(last)),
    ];
    Ok((headers, body).into_response())
}
