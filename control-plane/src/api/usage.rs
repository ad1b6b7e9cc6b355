//! `GET /v1/usage`: sums of usage by key, user, plan, scope and outcome, as JSON or CSV. A query spans at most 366
//! days, by the hour 31 days.

use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::csv;
use super::openapi::NotFound;
use super::pagination::{List, Page, PageQuery};
use crate::App;
use crate::api::auth::Caller;
use crate::api::call::Call;
use crate::api::extract::Json;
use crate::domain::quota::OWNER;
use crate::domain::{Email, TimeRange, Timestamp};
use crate::error::ApiError;
use crate::keys::read::get;
use crate::metering::outcome;
use crate::metering::query::{Groups, Place, Question, Sum, sums};
use crate::metering::spans::Interval;
use crate::users;
use crate::users::lock::find_user;

/// The hour more is for a month in which clocks go back.
const LONGEST_BY_HOUR: Duration = Duration::hours(31 * 24 + 1);
/// Longest name of a plan or scope that is looked for, in bytes.
const NAME_BYTES: usize = 256;

/// The sums that a caller asks for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct SumsQuery {
    /// Groups: any of `key`, `user`, `plan`, `scope` and `outcome`, with commas between. A key with several scopes
    /// counts under each. Plan and scopes (its own, those of its roles and of its plan) are those that a key has now.
    #[param(example = "key,outcome")]
    group_by: Option<String>,
    /// Spans of time to sum over: `hour`, `day`, `week`, `month` or `total`; `total` unless given. Days, weeks and months are
    /// those of `time_zone`, and weeks begin on Mondays. Usage is stored by the hour of UTC, and after a while (90 days,
    /// unless the operator chose otherwise) by the day of UTC: a query that would cut such an hour or day is answered with 400.
    #[param(example = "day")]
    interval: Option<String>,
    /// The time zone in which days, weeks and months begin, and that of `from` and `to` without an offset: a name of the IANA
    /// database, or `owner` with `email`; `UTC` unless given. Days, weeks and months need one whose offset is whole hours.
    #[param(example = "Europe/Berlin")]
    time_zone: Option<String>,
    /// Only this key.
    key_id: Option<Uuid>,
    /// Only this user's keys. Callers without the scope `admin` see only their own anyway.
    #[param(example = "user@example.com")]
    email: Option<String>,
    /// Only keys with this plan, by its name.
    plan: Option<String>,
    /// Only keys with this very scope.
    scope: Option<String>,
    /// Only this outcome, as `allowed` or `shadow:rate_limited`.
    outcome: Option<String>,
    /// From when on: a date, which means its start, or a date and time. Without an offset it is of `time_zone`. It must be the
    /// start of an hour of UTC; seven days before `to` unless given.
    #[param(example = "2026-05-01")]
    from: Option<String>,
    /// Until before when, in the form of `from`; until now unless given. At most 366 days after `from`, 31 by the hour.
    #[param(example = "2026-06-01T00:00:00Z")]
    to: Option<String>,
    /// `json` or `csv`; by default as the header `accept` demands.
    format: Option<String>,
}

/// One sum. It has those fields that were asked for with `group_by` and `interval`; they are null for requests without a
/// known key, for users without a plan and for keys without a scope.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageRow {
    /// The start of the span, with the offset of the time zone; not there with the interval `total`. The first and the last
    /// span count only from `from` and until `to`.
    #[serde(skip_serializing_if = "Option::is_none")]
    start: Option<Timestamp>,
    /// The key.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Uuid>)]
    key_id: Option<Option<Uuid>>,
    /// A name for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "Production Key")]
    key_name: Option<Option<String>>,
    /// Its owner.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "user@example.com")]
    email: Option<Option<String>>,
    /// Its plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    plan: Option<Option<String>>,
    /// One of its scopes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    scope: Option<Option<String>>,
    /// The outcome of the requests. With `shadow:` before it, the outcome that shadow mode did not enforce.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "allowed")]
    outcome: Option<String>,
    /// Number of requests: `allowed`, `refused` and `other` together.
    requests: i64,
    /// Number of requests that were allowed. Only these cost credits.
    allowed: i64,
    /// Number of requests that Envoy refused.
    refused: i64,
    /// Number of requests that went upstream without being allowed: refusals that shadow mode did not enforce, anonymous
    /// ones, and those that a filter without current keys let through. Outcomes that only a newer version knows count here.
    other: i64,
    /// Credits that the allowed requests cost together.
    cost: i64,
}

/// A page of sums.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsagePage {
    /// From when on, with the offset of the time zone.
    from: Timestamp,
    /// Until before when. Unless given, the end of the present hour.
    to: Timestamp,
    /// The time zone in which days, weeks and months begin.
    #[schema(example = "Europe/Berlin")]
    time_zone: String,
    /// The sums, ordered by span, key, email, plan, scope and outcome. Where there were no requests there is no row.
    usage: Vec<UsageRow>,
    /// The `cursor` for the next page, with this `from` and `to`; null on the last page.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Sum up usage.
///
/// Admins also see requests without a known key, unless the query selects keys. In sums by key, the key of these requests
/// is null.
#[utoipa::path(
    operation_id = "getUsage",
    get, path = "/v1/usage", tag = "insight", params(SumsQuery, PageQuery),
    responses(
        NotFound,
        (status = 200, description = "A page of sums; as CSV with a line of names before the rows",
            content((UsagePage = "application/json"), (String = "text/csv"))),
    )
)]
pub async fn usage(
    Call { app, caller, .. }: Call,
    headers: HeaderMap,
    List { query, mut page }: List<SumsQuery, Place>,
) -> Result<Response, ApiError> {
    let as_csv = wants_csv(query.format.as_deref(), &headers)?;
    let question = question(&app, &caller, &query, &page).await?;
    let mut found = sums(&app.pool, &question).await?;
    // The next page is of the same span of time and of the same form.
    page.set("from", Timestamp::from(question.range.from).to_string());
    page.set("to", Timestamp::from(question.range.to).to_string());
    page.set("format", if as_csv { "csv" } else { "json" }.to_owned());
    let next = page.cut(&mut found, |sum| sum.of.clone());
    let mut response = if as_csv {
        let headers =
            [(header::CONTENT_TYPE, "text/csv; charset=utf-8; header=present"), (header::CACHE_CONTROL, "no-store")];
        (headers, table(&question, &found)).into_response()
    } else {
        let range = &question.range;
        let (from, to, time_zone) = (range.show(range.from), range.show(range.to), range.zone.name().to_owned());
        let usage = found.into_iter().map(|sum| row(&question, sum)).collect();
        Json(UsagePage { from, to, time_zone, usage, next_cursor: next.cursor }).into_response()
    };
    if let Some(link) = next.link {
        response.headers_mut().insert(header::LINK, link);
    }
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    Ok(response)
}

fn wants_csv(format: Option<&str>, headers: &HeaderMap) -> Result<bool, ApiError> {
    match format {
        Some("csv") => Ok(true),
        Some("json") => Ok(false),
        Some(_) => Err(ApiError::invalid("format", "must be json or csv")),
        None => Ok(headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().starts_with(b"text/csv"))),
    }
}

async fn question(app: &App, caller: &Caller, query: &SumsQuery, page: &Page<Place>) -> Result<Question, ApiError> {
    let asked = query.email.as_deref().map(Email::parse).transpose()?;
    match &asked {
        Some(email) => caller.require_owner_or_admin(email)?,
        None => caller.require_manager()?,
    }
    let interval = Interval::named(query.interval.as_deref().unwrap_or("total"))
        .ok_or_else(|| ApiError::invalid("interval", "must be hour, day, week, month or total"))?;
    let SumsQuery { from, to, time_zone, .. } = query;
    let now = OffsetDateTime::now_utc();
    let time_zone = match time_zone.as_deref() {
        Some(OWNER) => Some(zone_of_owner(app, caller, asked.as_ref()).await?),
        given => given.map(str::to_owned),
    };
    let range = TimeRange::parse(from.as_deref(), to.as_deref(), time_zone.as_deref(), now)?;
    if interval == Interval::Hour && range.to - range.from > LONGEST_BY_HOUR {
        return Err(ApiError::invalid("from", "must lie at most 31 days before to, by the hour"));
    }
    let outcome = query.outcome.as_deref().map(|name| {
        let detail = "must be the name of an outcome, as allowed or shadow:rate_limited";
        outcome::code(name).ok_or_else(|| ApiError::invalid("outcome", detail))
    });
    if let Some(id) = query.key_id {
        let key = get(&app.pool, id).await?.filter(|key| caller.manages(key.owner_id));
        key.ok_or_else(|| ApiError::NotFound(format!("There is no key {id}.")))?;
    }
    let email =
        if caller.is_admin() { asked.map(|email| email.as_str().to_owned()) } else { Some(caller.email.clone()) };
    let (plan, scope) = (named("plan", query.plan.as_deref())?, named("scope", query.scope.as_deref())?);
    let keyless = query.key_id.is_none() && email.is_none() && plan.is_none() && scope.is_none();
    Ok(Question {
        groups: groups(query.group_by.as_deref())?,
        range,
        interval,
        key_id: query.key_id,
        email,
        plan,
        scope,
        outcome: outcome.transpose()?,
        keyless,
        after: page.after.clone(),
        limit: page.read(),
    })
}

/// The time zone of the user whose usage is asked for.
async fn zone_of_owner(app: &App, caller: &Caller, email: Option<&Email>) -> Result<String, ApiError> {
    let id = match email {
        Some(email) if caller.is_admin() => {
            let mut connection = app.pool.acquire().await?;
            find_user(&mut connection, email).await?
        }
        None if caller.is_admin() => {
            return Err(ApiError::invalid("time_zone", "owner goes with email, which names the owner"));
        }
        _ => Some(caller.owner_id),
    };
    users::time_zone(&app.pool, id.unwrap_or_default()).await
}

fn named(field: &'static str, name: Option<&str>) -> Result<Option<String>, ApiError> {
    let sane = |name: &str| (1..=NAME_BYTES).contains(&name.len()) && !name.chars().any(char::is_control);
    match name {
        Some(name) if !sane(name) => Err(ApiError::invalid(field, format!("must have 1 to {NAME_BYTES} characters"))),
        name => Ok(name.map(Into::into)),
    }
}

fn groups(text: Option<&str>) -> Result<Groups, ApiError> {
    let mut groups = Groups::default();
    for group in text.into_iter().flat_map(|text| text.split(',')).map(str::trim) {
        match group {
            "key" => groups.key = true,
            "user" => groups.user = true,
            "plan" => groups.plan = true,
            "scope" => groups.scope = true,
            "outcome" => groups.outcome = true,
            _ => {
                let detail = "must be any of key, user, plan, scope and outcome, with commas between";
                return Err(ApiError::invalid("group_by", detail));
            }
        }
    }
    Ok(groups)
}

fn row(question: &Question, sum: Sum) -> UsageRow {
    let other = sum.other();
    let Sum { of, start, key_name, requests, allowed, refused, cost } = sum;
    let Groups { key, user, plan, scope, outcome } = question.groups;
    let text = |wanted: bool, text: String| wanted.then(|| Some(text).filter(|text| !text.is_empty()));
    UsageRow {
        start: shown_start(question, start),
        key_id: key.then(|| Some(of.key_id).filter(|id| !id.is_nil())),
        key_name: key.then_some(key_name),
        email: text(user, of.email),
        plan: text(plan, of.plan),
        scope: text(scope, of.scope),
        outcome: outcome.then(|| outcome::name(of.outcome)),
        requests,
        allowed,
        refused,
        other,
        cost,
    }
}

fn shown_start(question: &Question, start: OffsetDateTime) -> Option<Timestamp> {
    (question.interval != Interval::Total).then(|| question.range.show(start))
}

fn table(question: &Question, sums: &[Sum]) -> String {
    let Groups { key, user, plan, scope, outcome } = question.groups;
    let start = question.interval != Interval::Total;
    let columns = [
        (start, "start"),
        (key, "key_id"),
        (key, "key_name"),
        (user, "email"),
        (plan, "plan"),
        (scope, "scope"),
        (outcome, "outcome"),
        (true, "requests"),
        (true, "allowed"),
        (true, "refused"),
        (true, "other"),
        (true, "cost"),
    ];
    let mut out = String::new();
    csv::line(&mut out, columns.iter().filter(|(wanted, _)| *wanted).map(|(_, name)| *name));
    for sum in sums {
        let of = &sum.of;
        let fields = [
            shown_start(question, sum.start).map(|start| start.to_string()).unwrap_or_default(),
            if of.key_id.is_nil() { String::new() } else { of.key_id.to_string() },
            sum.key_name.clone().unwrap_or_default(),
            of.email.clone(),
            of.plan.clone(),
            of.scope.clone(),
            outcome::name(of.outcome),
            sum.requests.to_string(),
            sum.allowed.to_string(),
            sum.refused.to_string(),
            sum.other().to_string(),
            sum.cost.to_string(),
        ];
        let wanted = columns.iter().zip(&fields).filter(|((wanted, _), _)| *wanted);
        csv::line(&mut out, wanted.map(|(_, field)| field.as_str()));
    }
    out
}
