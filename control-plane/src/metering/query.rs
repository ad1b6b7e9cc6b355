//! Usage by whatever people ask for: filters, groups and an interval come in, one page of sums goes out.
//!
//! Sums run over hours and over the days that hours became (see [`super::retention`]). Plan and scopes are those that a key
//! has now. A key with several scopes counts under each of them.

use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

/// What usage is grouped by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one switch of the statement")]
pub struct Groups {
    /// The key.
    pub key: bool,
    /// Its owner.
    pub user: bool,
    /// Its plan.
    pub plan: bool,
    /// Each of its scopes.
    pub scope: bool,
    /// What came of the requests.
    pub outcome: bool,
}

/// How long the spans of time are that usage is summed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    /// Hours.
    Hour,
    /// Days, in UTC.
    Day,
    /// Months, in UTC.
    Month,
    /// All of it.
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

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// What usage is grouped by.
    pub groups: Groups,
    /// Spans of time.
    pub interval: Interval,
    /// From when on.
    pub from: OffsetDateTime,
    /// Until before when.
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
    /// After which row.
    pub after: Option<Place>,
    /// How many rows.
    pub limit: i64,
}

/// The place of a row among all: what it is grouped by, with the least value of its type for what there is none of. Rows are
/// in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The start of the span, in seconds of Unix time.
    pub start: i64,
    /// The key.
    pub key_id: Uuid,
    /// The owner.
    pub email: String,
    /// The plan.
    pub plan: String,
    /// The scope.
    pub scope: String,
    /// The code of the outcome.
    pub outcome: i16,
}

/// One sum.
#[derive(Clone, Debug)]
pub struct Sum {
    /// What it is the sum of.
    pub of: Place,
    /// What people call the key, if there is one.
    pub key_name: Option<String>,
    /// How many requests.
    pub requests: i64,
    /// Credits that they cost together.
    pub cost: i64,
}

struct Row {
    start: OffsetDateTime,
    key_id: Uuid,
    email: String,
    plan: String,
    scope: String,
    outcome: i16,
    name: Option<String>,
    requests: i64,
    cost: i64,
}

/// Reads one page of sums.
pub async fn sums(pool: &PgPool, question: &Question) -> Result<Vec<Sum>, sqlx::Error> {
    let Question { groups, interval, from, to, key_id, email, plan, scope, outcome, keyless, after, limit } = question;
    let after_start = after
        .as_ref()
        .map(|after| OffsetDateTime::from_unix_timestamp(after.start).unwrap_or(OffsetDateTime::UNIX_EPOCH));
    let rows = sqlx::query_as!(
        Row,
        r#"with counted as (
            select key_id, date_trunc($1, at, 'UTC') as start, case when $2 then outcome end as outcome,
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
            ) s on $9 or $10::text is not null
            where ($11::text is null or d.name = $11) and ($10::text is null or s.scope = $10)
        ),
        placed as (
            select coalesce(start, 'epoch'::timestamptz) as start,
                coalesce(case when $12 then key_id end, '00000000-0000-0000-0000-000000000000') as key_id,
                coalesce(case when $13 then email end, '') collate "C" as email,
                coalesce(case when $14 then plan end, '') collate "C" as plan,
                coalesce(case when $9 then scope end, '') collate "C" as scope,
                coalesce(outcome, -1) as outcome, case when $12 then name end as name, requests, cost
            from described
        )
        select start as "start!", key_id as "key_id!", email as "email!", plan as "plan!", scope as "scope!",
            outcome::smallint as "outcome!", max(name) as name, saturate(sum(requests)) as "requests!",
            saturate(sum(cost)) as "cost!"
        from placed
        where $15::timestamptz is null
            or (start, key_id, email, plan, scope, outcome) > ($15, $16::uuid, $17::text, $18::text, $19::text, $20::int)
        group by 1, 2, 3, 4, 5, 6
        order by 1, 2, 3, 4, 5, 6
        limit $21"#,
        interval.unit(),
        groups.outcome,
        *from,
        *to,
        *keyless,
        *key_id,
        *outcome,
        email.as_deref(),
        groups.scope,
        scope.as_deref(),
        plan.as_deref(),
        groups.key,
        groups.user,
        groups.plan,
        after_start,
        after.as_ref().map(|after| after.key_id),
        after.as_ref().map(|after| after.email.as_str()),
        after.as_ref().map(|after| after.plan.as_str()),
        after.as_ref().map(|after| after.scope.as_str()),
        after.as_ref().map(|after| i32::from(after.outcome)),
        limit
    )
    .fetch_all(pool)
    .await?;
    let sum = |row| {
        let Row { start, key_id, email, plan, scope, outcome, name, requests, cost } = row;
        let of = Place { start: start.unix_timestamp(), key_id, email, plan, scope, outcome };
        Sum { of, key_name: name, requests, cost }
    };
    Ok(rows.into_iter().map(sum).collect())
}
