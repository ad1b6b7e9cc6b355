//! Sums of usage by filters, groups and intervals, page by page.
//!
//! Sums run over hours and over the days that hours became (see [`super::retention`]). A query that cuts such a day is refused
//! (see [`super::spans`]). Plan and scopes are those that a key has now. A key with several scopes counts under each of them.

use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::outcome;
use super::spans::{Interval, Spans, refuse_cut};
use crate::domain::TimeRange;
use crate::error::ApiError;

/// What usage is grouped by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one switch of the statement")]
pub struct Groups {
    pub key: bool,
    pub user: bool,
    pub plan: bool,
    /// Each scope of the key.
    pub scope: bool,
    pub outcome: bool,
}

/// A query for sums.
#[derive(Clone, Debug)]
pub struct Question {
    pub groups: Groups,
    pub range: TimeRange,
    pub interval: Interval,
    /// Only this key.
    pub key_id: Option<Uuid>,
    /// Only keys of this user.
    pub email: Option<String>,
    /// Only keys with this plan.
    pub plan: Option<String>,
    /// Only keys with this scope.
    pub scope: Option<String>,
    /// Only this outcome, by its code.
    pub outcome: Option<i16>,
    /// Whether requests without a known key count.
    pub keyless: bool,
    /// The last row of the previous page.
    pub after: Option<Place>,
    /// Most rows.
    pub limit: i64,
}

/// The group of a row, by which rows are sorted. A field that is not grouped by has the least value of its type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The number of the span, from 1.
    pub span: i32,
    pub key_id: Uuid,
    pub email: String,
    pub plan: String,
    pub scope: String,
    /// The code of the outcome.
    pub outcome: i16,
}

/// One sum.
#[derive(Clone, Debug)]
pub struct Sum {
    pub of: Place,
    /// The start of the span.
    pub start: OffsetDateTime,
    /// The name of the key, if sums are grouped by key.
    pub key_name: Option<String>,
    pub requests: i64,
    /// How many of them were allowed.
    pub allowed: i64,
    /// How many of them Envoy refused.
    pub refused: i64,
    /// Credits.
    pub cost: i64,
}

impl Sum {
    /// How many went upstream without being allowed: in shadow mode, without a key, or unchecked. Outcomes that this version
    /// does not know count here too.
    pub const fn other(&self) -> i64 {
        self.requests.saturating_sub(self.allowed).saturating_sub(self.refused)
    }
}

struct Row {
    span: i32,
    key_id: Uuid,
    email: String,
    plan: String,
    scope: String,
    outcome: i16,
    name: Option<String>,
    requests: i64,
    allowed: i64,
    refused: i64,
    cost: i64,
    cut_day: Option<OffsetDateTime>,
}

impl Groups {
    /// The names by which the statement knows them.
    fn names(self) -> Vec<String> {
        let Self { key, user, plan, scope, outcome } = self;
        let all = [("key", key), ("user", user), ("plan", plan), ("scope", scope), ("outcome", outcome)];
        all.into_iter().filter(|(_, grouped)| *grouped).map(|(name, _)| name.to_owned()).collect()
    }
}

/// Reads one page of sums.
///
/// # Errors
/// The spans cut usage that is stored as a whole, or the database fails.
pub async fn sums(pool: &PgPool, question: &Question) -> Result<Vec<Sum>, ApiError> {
    let Question { groups, range, interval, key_id, email, plan, scope, outcome, keyless, after, limit } = question;
    let spans = Spans::new(*interval, range)?;
    let rows = sqlx::query_file_as!(
        Row,
        "src/metering/query.sql",
        &spans.cuts,
        &groups.names(),
        range.from,
        range.to,
        *keyless,
        *key_id,
        *outcome,
        email.as_deref(),
        scope.as_deref(),
        plan.as_deref(),
        after.as_ref().map(Json) as _,
        limit,
        outcome::ALLOWED,
        &outcome::refusals()
    )
    .fetch_all(pool)
    .await?;
    if let Some(day) = rows.first().and_then(|row| row.cut_day) {
        return Err(refuse_cut(day, *interval, range));
    }
    let sum = |row| {
        let Row { span, key_id, email, plan, scope, outcome, name, requests, allowed, refused, cost, cut_day: _ } = row;
        let start = spans.start(span).unwrap_or(range.from);
        let of = Place { span, key_id, email, plan, scope, outcome };
        Sum { of, start, key_name: name, requests, allowed, refused, cost }
    };
    Ok(rows.into_iter().map(sum).collect())
}
