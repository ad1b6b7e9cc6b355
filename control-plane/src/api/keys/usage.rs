//! `GET /v1/keys/{id}/usage`: hourly counts of at most 366 days.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};

use super::{ById, managed};
use crate::api::call::Call;
use crate::api::extract::{Json, Query};
use crate::domain::quota::OWNER;
use crate::domain::{TimeRange, Timestamp};
use crate::error::ApiError;
use crate::metering::hourly::{Hour, hourly};
use crate::metering::outcome;
use crate::users;

/// Which span of time.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UsageQuery {
    /// From when on: a date, which means its start, or a date and time. Without an offset it is of `time_zone`. It must be the
    /// start of an hour of UTC; seven days before `to` unless given.
    #[param(example = "2026-05-01")]
    from: Option<String>,
    /// Until before when, in the form of `from`; until now unless given. At most 366 days after `from`.
    #[param(example = "2026-06-01T00:00:00Z")]
    to: Option<String>,
    /// That of `from` and `to` without an offset: a name of the IANA time zone database, or `owner` for that of
    /// the owner; `UTC` unless given.
    #[param(example = "Europe/Berlin")]
    time_zone: Option<String>,
}

/// Counts of one hour.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageHour {
    /// The start of the hour, with the offset of the time zone; of the day of UTC, for usage that was rolled up to days.
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
    /// From when on, with the offset of the time zone.
    from: Timestamp,
    /// Until before when. Unless given, the end of the present hour.
    to: Timestamp,
    /// The time zone of the query.
    #[schema(example = "Europe/Berlin")]
    time_zone: String,
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
    let UsageQuery { from, to, time_zone } = query;
    let now = OffsetDateTime::now_utc();
    let key = managed(&app, &caller, path.id).await?;
    let time_zone = match time_zone.as_deref() {
        Some(OWNER) => Some(users::time_zone(&app.pool, key.owner_id).await?),
        _ => time_zone,
    };
    let range = TimeRange::parse(from.as_deref(), to.as_deref(), time_zone.as_deref(), now)?;
    let mut hours = Vec::new();
    let mut totals = BTreeMap::<String, UsageTotal>::new();
    let mut sum = UsageSum::default();
    for row in hourly(&app.pool, key.id, &range).await? {
        sum.add(&row);
        let outcome = outcome::name(row.outcome);
        let total = totals.entry(outcome.clone()).or_default();
        total.requests = total.requests.saturating_add(row.requests);
        total.cost = total.cost.saturating_add(row.cost);
        hours.push(UsageHour { hour: range.show(row.hour), outcome, requests: row.requests, cost: row.cost });
    }
    let (from, to, time_zone) = (range.show(range.from), range.show(range.to), range.zone.name().to_owned());
    Ok(Json(UsageView { from, to, time_zone, hours, totals, sum }))
}
