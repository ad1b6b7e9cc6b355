//! Applies reports in one transaction: numbers and counts commit together, so a report is applied once however often it
//! is sent, and to however many replicas. What the counts draw from quotas and credits is booked with them.
//!
//! Locks are taken in one order, so that no two transactions wait for each other: the rows of the reporters, of users, of
//! `lease_locks` and of quotas' windows, each in the order of their ids; then, only if a stock is used up,
//! `store_state` (by a trigger) and rows of keys; then rows of the usage tables. Rotation, which holds `store_state` and then
//! a key's row, would wait in a circle with counts that refer to the key if those came first.

use std::collections::{BTreeMap, HashMap, HashSet};

use contract::id::{KeyId, ReporterId};
use contract::outcome::Outcome;
use contract::usage::{Count, Grant, KeyRef, Report};
use sqlx::error::DatabaseError;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tracing::warn;
use uuid::Uuid;

use super::draw::{Fresh, draw};
use super::lease;
use crate::change::transact;

/// Reports of one reporter, in ascending order, and the key that they came under.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Whose reports.
    pub reporter: ReporterId,
    /// The sync key that they came under, or that signed them in a log.
    pub sync_key: Option<Uuid>,
    /// Whether the Envoy itself sent them and takes the answer. Lines of a log are of Envoys that have ended.
    pub live: bool,
    /// Ascending by number.
    pub reports: Vec<Report>,
}

/// What became of a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Everything up to this number is in the database.
    UpTo {
        /// The last number that is applied.
        seq: u64,
        /// Reports of the submission that were applied now; the others had been before.
        fresh: usize,
        /// What the reporter is leased.
        grants: Vec<Grant>,
    },
    /// Another key reports for this reporter.
    Foreign,
    /// The reporter is new, and its key has had [`NEW_REPORTERS`] new ones within a day.
    TooMany,
}

/// Most new Envoys that report under one sync key within 24 hours. Each leaves a row for [`super::retention::REPORTER_DAYS`].
pub const NEW_REPORTERS: i64 = 10_000;

/// Applies submissions, of different reporters or of the same, in one transaction. That the database holds their keys is left
/// to its foreign keys: only if they object, as after a restore, keys are looked up, and counts of unknown ones left out.
///
/// # Errors
/// Those of the database; nothing is applied then.
pub async fn apply(pool: &PgPool, submissions: &[Submission]) -> Result<Vec<Applied>, sqlx::Error> {
    const OF_KEYS: [&str; 2] = ["key_usage_key_id_fkey", "usage_hourly_key_id_fkey"];
    let applied = match transact(pool, async |connection| apply_once(connection, submissions, false).await).await {
        Err(error) => match error.as_database_error().and_then(DatabaseError::constraint) {
            Some(constraint) if OF_KEYS.contains(&constraint) => {
                transact(pool, async |connection| apply_once(connection, submissions, true).await).await
            }
            _ => Err(error),
        },
        applied => applied,
    };
    let (applied, gaps) = applied?;
    for Gap { reporter, last, next } in gaps {
        metrics::counter!("portcullis_usage_gaps_total").increment(1);
        warn!(%reporter, last, next, "reports of an Envoy are missing: it may have dropped them");
    }
    Ok(applied)
}

/// Reports of an Envoy that never came: those between these numbers.
struct Gap {
    reporter: ReporterId,
    last: u64,
    next: u64,
}

async fn apply_once(
    connection: &mut PgConnection,
    submissions: &[Submission],
    some_are_unknown: bool,
) -> Result<(Vec<Applied>, Vec<Gap>), sqlx::Error> {
    // The rows of all reporters, locked in one order by all replicas.
    let mut reporters: Vec<(Uuid, Option<Uuid>)> =
        submissions.iter().map(|submission| (submission.reporter.into(), submission.sync_key)).collect();
    reporters.sort_unstable();
    reporters.dedup_by_key(|(reporter, _)| *reporter);
    let (ids, keys): (Vec<Uuid>, Vec<Option<Uuid>>) = reporters.into_iter().unzip();
    sqlx::query!(
        "insert into usage_reporters (reporter, sync_key_id, last_seq)
        select reporter, sync_key_id, 0 from unnest($1::uuid[], $2::uuid[]) as new (reporter, sync_key_id)
        where not exists (select from usage_reporters r where r.reporter = new.reporter)
            and (new.sync_key_id is null or (
                select count(*) from usage_reporters r
                where r.sync_key_id = new.sync_key_id and r.created_at > now() - interval '1 day'
            ) < $3)
        order by reporter on conflict (reporter) do nothing",
        &ids,
        &keys as &[Option<Uuid>],
        NEW_REPORTERS
    )
    .execute(&mut *connection)
    .await?;
    let known = sqlx::query!(
        r#"select reporter, sync_key_id, last_seq, now() as "now!",
            case when last_seq > 0 then extract(epoch from now() - reported_at)::double precision end as since_last_s
        from usage_reporters where reporter = any($1) order by reporter for update"#,
        &ids
    )
    .fetch_all(&mut *connection)
    .await?;
    let now = known.first().map_or_else(OffsetDateTime::now_utc, |row| row.now);
    let elapsed: HashMap<Uuid, f64> =
        known.iter().map(|row| (row.reporter, lease::elapsed_s(row.since_last_s))).collect();
    let mut last: HashMap<Uuid, (Option<Uuid>, u64)> =
        known.into_iter().map(|row| (row.reporter, (row.sync_key_id, row.last_seq.cast_unsigned()))).collect();

    let mut sums = Sums::default();
    let mut drawn: BTreeMap<Uuid, Fresh<'_>> = BTreeMap::new();
    let mut repeated = Vec::new();
    let mut results = Vec::with_capacity(submissions.len());
    let mut gaps = Vec::new();
    for submission in submissions {
        let Some((owner, seq)) = last.get_mut(&submission.reporter.into()) else {
            results.push(Applied::TooMany);
            continue;
        };
        if submission.sync_key.is_some() {
            // A reporter belongs to the first key that reports for it.
            *owner = owner.or(submission.sync_key);
            if *owner != submission.sync_key {
                results.push(Applied::Foreign);
                continue;
            }
        }
        let mut fresh = 0;
        for report in &submission.reports {
            if report.seq > *seq {
                if *seq > 0 && report.seq != *seq + 1 {
                    gaps.push(Gap { reporter: submission.reporter, last: *seq, next: report.seq });
                }
                sums.add(&report.counts);
                *seq = report.seq;
                fresh += 1;
                let reporter = submission.reporter.into();
                let of = drawn.entry(reporter).or_insert_with(|| Fresh {
                    reporter,
                    seq: 0,
                    elapsed_s: elapsed.get(&reporter).copied().unwrap_or_else(|| lease::elapsed_s(None)),
                    hears: false,
                    reports: Vec::new(),
                });
                of.seq = report.seq;
                of.hears |= submission.live;
                of.reports.push(report);
            }
        }
        if fresh == 0 {
            repeated.push((submission.reporter.into(), *seq));
        }
        results.push(Applied::UpTo { seq: *seq, fresh, grants: Vec::new() });
    }
    repeated.retain(|(reporter, _)| !drawn.contains_key(reporter));
    repeated.sort_unstable();
    repeated.dedup();

    let (ids, rest): (Vec<Uuid>, Vec<(Option<Uuid>, u64)>) = last.into_iter().unzip();
    let (keys, seqs): (Vec<Option<Uuid>>, Vec<i64>) =
        rest.into_iter().map(|(key, seq)| (key, seq.cast_signed())).unzip();
    sqlx::query!(
        "update usage_reporters set last_seq = new.last_seq, sync_key_id = new.sync_key_id, reported_at = now()
        from unnest($1::uuid[], $2::uuid[], $3::bigint[]) as new (reporter, sync_key_id, last_seq)
        where usage_reporters.reporter = new.reporter",
        &ids,
        &keys as &[Option<Uuid>],
        &seqs
    )
    .execute(&mut *connection)
    .await?;
    let fresh: Vec<Fresh<'_>> = drawn.into_values().collect();
    if some_are_unknown {
        sums.leave_out_unknown(connection).await?;
    }
    let drawing = sums.drawing(connection).await?;
    let told = draw(connection, &fresh, &drawing, &repeated, now).await?;
    sums.write(connection).await?;
    for (submission, result) in submissions.iter().zip(&mut results) {
        if let (Applied::UpTo { grants, .. }, Some(told)) = (result, told.get(&submission.reporter.into())) {
            grants.clone_from(told);
        }
    }
    Ok((results, gaps))
}

/// Counts of several reports, added up by the rows of the tables, in the order of their primary keys. An insert from
/// `unnest` takes rows in the order of the arrays, so replicas lock rows in one order.
#[derive(Default)]
struct Sums {
    totals: BTreeMap<KeyRef, (u64, u64)>,
    hourly: BTreeMap<(KeyId, u32, u8, u32), (u64, u64)>,
    keyless: BTreeMap<(u32, u8), u64>,
}

impl Sums {
    fn add(&mut self, counts: &[Count]) {
        for Count { of, requests, cost, last_ms, .. } in counts {
            let Some(key) = of.key else {
                let sum = self.keyless.entry((of.hour, of.outcome)).or_default();
                *sum = sum.saturating_add(*requests);
                continue;
            };
            let hourly = self.hourly.entry((key.id, of.hour, of.outcome, key.generation)).or_default();
            hourly.0 = hourly.0.saturating_add(*requests);
            // What refused requests would have cost was not spent.
            if of.outcome == Outcome::Allowed.code() {
                hourly.1 = hourly.1.saturating_add(*cost);
                let total = self.totals.entry(key).or_default();
                *total = (total.0.saturating_add(*requests), total.1.max(*last_ms));
            }
        }
    }

    fn keys(&self) -> Vec<Uuid> {
        let mut ids: Vec<Uuid> = self.hourly.keys().map(|(id, ..)| (*id).into()).collect();
        ids.dedup();
        ids
    }

    /// Leaves out keys that the database does not hold.
    async fn leave_out_unknown(&mut self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let ids = self.keys();
        let known =
            sqlx::query_scalar!("select id from api_keys where id = any($1)", &ids).fetch_all(connection).await?;
        if known.len() < ids.len() {
            metrics::counter!("portcullis_usage_unknown_keys_total").increment(1);
            warn!("reports count requests of keys that this database does not hold; those are left out");
            let known: HashSet<Uuid> = known.into_iter().collect();
            self.hourly.retain(|(id, ..), _| known.contains(&(*id).into()));
            self.totals.retain(|key, _| known.contains(&key.id.into()));
        }
        Ok(())
    }

    /// The keys that may draw from a stock. An index has them and no others, so that to ask costs little where there are few.
    async fn drawing(&self, connection: &mut PgConnection) -> Result<Vec<Uuid>, sqlx::Error> {
        let ids = self.keys();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        sqlx::query_scalar!(
            "select id from api_keys where id = any($1) and (
                rate_limits <> '[]' or quota is not null or credits_starter is not null
                or coalesce(plan_number, owner_plan_number) is not null
            )",
            &ids
        )
        .fetch_all(connection)
        .await
    }

    async fn write(self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let (keys, totals): (Vec<KeyRef>, Vec<(u64, u64)>) = self.totals.into_iter().unzip();
        let (requests, last): (Vec<i64>, Vec<OffsetDateTime>) =
            totals.into_iter().map(|(requests, last_ms)| (signed(requests), time_of_ms(last_ms))).unzip();
        let (ids, generations): (Vec<Uuid>, Vec<i32>) = keys.into_iter().map(parts).unzip();
        sqlx::query!(
            "insert into key_usage (key_id, generation, requests, last_used_at)
            select * from unnest($1::uuid[], $2::int[], $3::bigint[], $4::timestamptz[])
                as new (key_id, generation, requests, last_used_at)
            on conflict (key_id, generation) do update set
                requests = saturating_add(key_usage.requests, excluded.requests),
                last_used_at = greatest(key_usage.last_used_at, excluded.last_used_at)",
            &ids,
            &generations,
            &requests,
            &last
        )
        .execute(&mut *connection)
        .await?;

        let rows = self.hourly.into_iter().map(|((id, hour, outcome, generation), (requests, cost))| {
            (
                parts(KeyRef { id, generation }),
                ((time_of_hour(hour), i16::from(outcome)), (signed(requests), signed(cost))),
            )
        });
        let (keys, rest): (Vec<_>, Vec<_>) = rows.unzip();
        let (ids, generations): (Vec<Uuid>, Vec<i32>) = keys.into_iter().unzip();
        let (when, sums): (Vec<_>, Vec<_>) = rest.into_iter().unzip();
        let (hours, outcomes): (Vec<OffsetDateTime>, Vec<i16>) = when.into_iter().unzip();
        let (requests, costs): (Vec<i64>, Vec<i64>) = sums.into_iter().unzip();
        sqlx::query!(
            "insert into usage_hourly (key_id, generation, hour, outcome, requests, cost)
            select * from
                unnest($1::uuid[], $2::int[], $3::timestamptz[], $4::smallint[], $5::bigint[], $6::bigint[])
                as new (key_id, generation, hour, outcome, requests, cost)
            on conflict (key_id, hour, outcome, generation) do update set
                requests = saturating_add(usage_hourly.requests, excluded.requests),
                cost = saturating_add(usage_hourly.cost, excluded.cost)",
            &ids,
            &generations,
            &hours,
            &outcomes,
            &requests,
            &costs
        )
        .execute(&mut *connection)
        .await?;

        let rows = self
            .keyless
            .into_iter()
            .map(|((hour, outcome), requests)| ((time_of_hour(hour), i16::from(outcome)), signed(requests)));
        let (when, requests): (Vec<_>, Vec<i64>) = rows.unzip();
        let (hours, outcomes): (Vec<OffsetDateTime>, Vec<i16>) = when.into_iter().unzip();
        sqlx::query!(
            "insert into usage_keyless_hourly (hour, outcome, requests)
            select * from unnest($1::timestamptz[], $2::smallint[], $3::bigint[]) as new (hour, outcome, requests)
            on conflict (hour, outcome) do update set
                requests = saturating_add(usage_keyless_hourly.requests, excluded.requests)",
            &hours,
            &outcomes,
            &requests
        )
        .execute(&mut *connection)
        .await?;
        Ok(())
    }
}

fn parts(key: KeyRef) -> (Uuid, i32) {
    (key.id.into(), key.generation.cast_signed())
}

/// A sum as PostgreSQL holds it. Sums end at the largest number: no honest count comes near, and a forged one must not
/// stop those that wait with it.
fn signed(sum: u64) -> i64 {
    i64::try_from(sum).unwrap_or(i64::MAX)
}

fn time_of_ms(ms: u64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH.saturating_add(time::Duration::milliseconds(ms.cast_signed()))
}

fn time_of_hour(hour: u32) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH.saturating_add(time::Duration::hours(i64::from(hour)))
}
