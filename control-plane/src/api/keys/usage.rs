//! `GET /v1/keys/{id}/usage`: hourly counts of at most 366 days.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use utoipa::{IntoParams, ToSchema};

use super::{ById, managed};
use crate::api::call::Call;
use crate::api::extract::{Json, Query};
use crate::domain::{Timestamp, parse_time};
use crate::error::ApiError;
use crate::metering::hourly::{Hour, hourly};
use crate::metering::outcome;

const SPAN: Duration = Duration::days(7);
/// Longest span: bounds the reply to some 9,000 hours of each outcome.
const LONGEST_SPAN: Duration = Duration::days(366);

/// Which span of time.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UsageQuery {
    /// From when on (RFC 3339); seven days before `to` unless given.
    #[param(example = "2026-05-01T00:00:00Z")]
    from: Option<String>,
    /// Until before when (RFC 3339); now unless given.
    #[param(example = "2026-05-08T00:00:00Z")]
    to: Option<String>,
}

/// Counts of one hour.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageHour {
    /// The start of the hour; of the day, for usage that was rolled up to days.
    hour: Timestamp,
    /// The outcome of the requests. With `shadow:` before it, the outcome that shadow mode did not enforce.
    #[schema(example = "allowed")]
    outcome: String,
    /// Number of requests.
    requests: i64,
    /// Credits that they cost together.
    cost: i64,
}

/// Sums of one outcome over the whole span.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct UsageTotal {
    /// Number of requests.
    requests: i64,
    /// Credits that they cost together.
    cost: i64,
}

/// Sums over the whole span and all outcomes.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct UsageSum {
    /// Number of requests: `allowed`, `refused` and `other` together.
    requests: i64,
    /// Number of requests that were allowed. Only these cost credits.
    allowed: i64,
    /// Number of requests that Envoy refused.
    refused: i64,
    /// Number of requests that went upstream without being allowed, as in `GET /v1/usage`.
    other: i64,
    /// Credits that the allowed requests cost together.
    cost: i64,
}

impl UsageSum {
    fn add(&mut self, hour: &Hour) {
        let of_kind = match hour.outcome {
            outcome::ALLOWED => &mut self.allowed,
            code if outcome::is_refusal(code) => &mut self.refused,
            _ => &mut self.other,
        };
        *of_kind = of_kind.saturating_add(hour.requests);
        self.requests = self.requests.saturating_add(hour.requests);
        self.cost = self.cost.saturating_add(hour.cost);
    }
}

/// Counts of a key.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageView {
    /// From when on.
    from: Timestamp,
    /// Until before when.
    to: Timestamp,
    /// The hours that start within the span and have requests, the oldest first.
    hours: Vec<UsageHour>,
    /// Sums by outcome.
    totals: BTreeMap<String, UsageTotal>,
    /// Sums over all outcomes.
    sum: UsageSum,
}

/// Get the usage of a key by hour and outcome.
#[utoipa::path(
    operation_id = "getKeyUsage",
    get, path = "/v1/keys/{id}/usage", tag = "keys", params(ById, UsageQuery),
    responses((status = 200, description = "The usage of the key", body = UsageView))
)]
pub async fn usage(
    Call { app, caller, path }: Call<ById>,
    Query(query): Query<UsageQuery>,
) -> Result<Json<UsageView>, ApiError> {
    let (from, to) = span(query.from.as_deref(), query.to.as_deref(), OffsetDateTime::now_utc())?;
    let key = managed(&app, &caller, path.id).await?;
    let mut hours = Vec::new();
    let mut totals = BTreeMap::<String, UsageTotal>::new();
    let mut sum = UsageSum::default();
    for row in hourly(&app.pool, key.id, from, to).await? {
        sum.add(&row);
        let outcome = outcome::name(row.outcome);
        let total = totals.entry(outcome.clone()).or_default();
        total.requests = total.requests.saturating_add(row.requests);
        total.cost = total.cost.saturating_add(row.cost);
        hours.push(UsageHour { hour: row.hour.into(), outcome, requests: row.requests, cost: row.cost });
    }
    Ok(Json(UsageView { from: from.into(), to: to.into(), hours, totals, sum }))
}

/// Parses a span of time: the last seven days unless given.
pub(in crate::api) fn span(
    from: Option<&str>,
    to: Option<&str>,
    now: OffsetDateTime,
) -> Result<(OffsetDateTime, OffsetDateTime), ApiError> {
    let to = to.map_or(Ok(now), |text| parse_time("to", text))?;
    let from = match from {
        Some(text) => parse_time("from", text)?,
        None => to.checked_sub(SPAN).ok_or_else(|| ApiError::invalid("to", "lies too far back"))?,
    };
    if from >= to {
        return Err(ApiError::invalid("from", "must lie before to"));
    }
    if to - from > LONGEST_SPAN {
        return Err(ApiError::invalid("from", "must lie at most 366 days before to"));
    }
    Ok((from, to))
}
