//! Sums of usage by filters, groups and intervals, page by page.
//!
//! Sums run over hours and over the days that hours became (see [`super::retention`]). Plan and scopes are those that a key
//! has now. A key with several scopes counts under each of them.

use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

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

/// The time span of each sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    Hour,
    /// In UTC.
    Day,
    /// In UTC.
    Month,
    /// The whole range.
    Total,
}

impl Interval {
    const fn unit(self) -> Option<&'static str> {
        match self {
            Self::Hour => Some("hour"),
            Self::Day => Some("day"),
            Self::Month => Some("month"),
            Self::Total => None,
        }
    }
}

/// A query for sums.
#[derive(Clone, Debug)]
pub struct Question {
    pub groups: Groups,
    pub interval: Interval,
    pub from: OffsetDateTime,
    /// Exclusive.
    pub to: OffsetDateTime,
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
    /// The start of the span, in seconds of Unix time.
    pub start: i64,
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
    /// The name of the key, if sums are grouped by key.
    pub key_name: Option<String>,
    pub requests: i64,
    /// Credits.
    pub cost: i64,
}

struct Row {
    start: i64,
    key_id: Uuid,
    email: String,
    plan: String,
    scope: String,
    outcome: i16,
    name: Option<String>,
    requests: i64,
    cost: i64,
}

impl Groups {
    /// The names by which the statement knows them.
    fn names(self) -> Vec<String> {
        let Self { key, user, plan, scope, outcome } = self;
        let all = [("key", key), ("user", user), ("plan", plan), ("scope", scope), ("outcome", outcome)];
        all.into_iter().filter(|(_, grouped)| *grouped).map(|(name, _)| name.to_owned()).collect()
    }
}

/// Reads one page of sums. The function is long because of its one statement, whose phases are the named queries in it.
pub async fn sums(pool: &PgPool, question: &Question) -> Result<Vec<Sum>, sqlx::Error> {
    let Question { groups, interval, from, to, key_id, email, plan, scope, outcome, keyless, after, limit } = question;
    let rows = sqlx::query_as!(
        Row,
        r#"with counted as (
            select key_id, date_trunc($1, at, 'UTC') as start, case when 'outcome' = any($2) then outcome end as outcome,
                sum(requests) as requests, sum(cost) as cost
            from (
                select key_id, hour as at, outcome, requests, cost from usage_hourly where hour >= $3 and hour < $4
                union all
                select key_id, day, outcome, requests, cost from usage_daily where day >= $3 and day < $4
                union all
                select null, hour, outcome, requests, 0 from usage_keyless_hourly
                where $5 and hour >= $3 and hour < $4
                union all
                select null, day, outcome, requests, 0 from usage_keyless_daily where $5 and day >= $3 and day < $4
            ) all_of_it
            where ($6::uuid is null or key_id = $6) and ($7::smallint is null or outcome = $7)
                and ($8::text is null or key_id in (
                    select k.id from api_keys k join user_preferences p on p.id = k.owner_id where p.email = $8
                ))
            group by 1, 2, 3
        ),
        described as (
            select c.start, c.outcome, c.requests, c.cost, c.key_id, k.name, p.email, d.name as plan, s.scope
            from counted c
            left join api_keys k on k.id = c.key_id
            left join user_preferences p on p.id = k.owner_id
            left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
            left join lateral (
                select unnest(k.scopes) as scope
                union
                select unnest(r.scopes) from definitions r
                where not r.removed and (r.number = any(k.role_numbers) or r.number = d.number)
            ) s on 'scope' = any($2) or $9::text is not null
            where ($10::text is null or d.name = $10) and ($9::text is null or s.scope = $9)
        ),
        placed as (
            select coalesce(extract(epoch from start), 0)::bigint as start,
                coalesce(case when 'key' = any($2) then key_id end, '00000000-0000-0000-0000-000000000000') as key_id,
                coalesce(case when 'user' = any($2) then email end, '') collate "C" as email,
                coalesce(case when 'plan' = any($2) then plan end, '') collate "C" as plan,
                coalesce(case when 'scope' = any($2) then scope end, '') collate "C" as scope,
                coalesce(outcome, -1) as outcome, case when 'key' = any($2) then name end as name, requests, cost
            from described
        )
        select start as "start!", key_id as "key_id!", email as "email!", plan as "plan!", scope as "scope!",
            outcome::smallint as "outcome!", max(name) as name, saturate(sum(requests)) as "requests!",
            saturate(sum(cost)) as "cost!"
        from placed
        where $11::jsonb is null or (start, key_id, email, plan, scope, outcome) > (
            select a.start, a.key_id, a.email, a.plan, a.scope, a.outcome from jsonb_to_record($11)
                as a (start bigint, key_id uuid, email text, plan text, scope text, outcome integer)
        )
        group by 1, 2, 3, 4, 5, 6
        order by 1, 2, 3, 4, 5, 6
        limit $12"#,
        interval.unit(),
        &groups.names(),
        *from,
        *to,
        *keyless,
        *key_id,
        *outcome,
        email.as_deref(),
        scope.as_deref(),
        plan.as_deref(),
        after.as_ref().map(Json) as _,
        limit
    )
    .fetch_all(pool)
    .await?;
    let sum = |row| {
        let Row { start, key_id, email, plan, scope, outcome, name, requests, cost } = row;
        let of = Place { start, key_id, email, plan, scope, outcome };
        Sum { of, key_name: name, requests, cost }
    };
    Ok(rows.into_iter().map(sum).collect())
}
