//! Applies reports in one transaction. Numbers and counts commit together, so each report is applied exactly once, to
//! whichever replicas it is sent. Quotas and credits are booked in the same transaction.
//!
//! Locks follow the order in `migrations/0001_schema.sql`. Pools come last, because requests wait for them. The keys of an
//! exhausted quota are marked afterwards, in a transaction of its own. Until then their pool is empty, so no Envoy is granted
//! more.

use std::collections::{BTreeMap, HashMap, HashSet};

use contract::id::{KeyId, ReporterId};
use contract::outcome::Outcome;
use contract::usage::{Count, KeyRef, Report};
use sqlx::error::DatabaseError;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tracing::warn;
use uuid::Uuid;

use super::booking::{Fresh, book};
use crate::change::transact;
use crate::quota::{self, QuotaId};

/// Reports of one reporter.
#[derive(Clone, Debug)]
pub struct Submission {
    pub reporter: ReporterId,
    /// The sync key of the request, or the one that signed the line of the log.
    pub sync_key: Option<Uuid>,
    /// Ascending by number.
    pub reports: Vec<Report>,
}

/// The result of a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The database has all reports up to this number.
    UpTo {
        seq: u64,
        /// Reports that were applied now. The others had been applied before.
        fresh: usize,
    },
    /// The reporter belongs to another sync key.
    Foreign,
    /// The reporter is new, and its key has had [`NEW_REPORTERS`] new ones within a day.
    TooMany,
}

/// Most new Envoys of one sync key in 24 hours. Each has a row for [`super::retention::REPORTER_DAYS`].
pub const NEW_REPORTERS: i64 = 10_000;

/// Applies submissions in one transaction. Foreign keys check that the database has the counted keys. Only if this fails, as
/// after a restore, a second attempt looks the keys up and leaves out counts of unknown ones.
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
    let Batch { results, gaps, exhausted } = applied?;
    for Gap { reporter, last, next } in gaps {
        metrics::counter!("portcullis_usage_gaps_total").increment(1);
        warn!(%reporter, last, next, "reports of an Envoy are missing: it may have dropped them");
    }
    // The reports are applied. If this fails, the next report of such a key marks it.
    if let Err(error) = quota::shut(pool, &exhausted).await {
        warn!(%error, "could not mark the keys of exhausted quotas");
    }
    Ok(results)
}

/// What a transaction has applied.
struct Batch {
    results: Vec<Applied>,
    gaps: Vec<Gap>,
    /// Quotas whose keys are to be marked.
    exhausted: Vec<QuotaId>,
}

/// Numbers between which reports of an Envoy are missing.
struct Gap {
    reporter: ReporterId,
    last: u64,
    next: u64,
}

async fn apply_once(
    connection: &mut PgConnection,
    submissions: &[Submission],
    some_are_unknown: bool,
) -> Result<Batch, sqlx::Error> {
    let mut positions = Positions::lock(connection, submissions).await?;
    let Sorted { results, gaps, mut sums, fresh } = positions.advance(submissions);
    positions.store(connection).await?;
    if some_are_unknown {
        sums.leave_out_unknown(connection).await?;
    }
    let keys = sums.keys();
    sums.write(connection).await?;
    let exhausted = book(connection, &fresh, &keys).await?;
    Ok(Batch { results, gaps, exhausted })
}

/// The number of the last applied report of each reporter, with its sync key. Their rows are locked.
struct Positions {
    last: HashMap<Uuid, (Option<Uuid>, u64)>,
}

/// Submissions, sorted into reports that were applied before and reports that are new.
struct Sorted<'a> {
    results: Vec<Applied>,
    gaps: Vec<Gap>,
    /// Counts of all new reports.
    sums: Sums,
    /// New reports by reporter.
    fresh: Vec<Fresh<'a>>,
}

impl Positions {
    /// Creates the rows of new reporters, and locks the rows of all in the order of their ids.
    async fn lock(connection: &mut PgConnection, submissions: &[Submission]) -> Result<Self, sqlx::Error> {
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
        let rows = sqlx::query!(
            "select reporter, sync_key_id, last_seq from usage_reporters where reporter = any($1) order by reporter for update",
            &ids
        )
        .fetch_all(connection)
        .await?;
        let last = rows.into_iter().map(|row| (row.reporter, (row.sync_key_id, row.last_seq.cast_unsigned())));
        Ok(Self { last: last.collect() })
    }

    /// Sorts submissions, and advances the reporters to the numbers of their last reports.
    fn advance<'a>(&mut self, submissions: &'a [Submission]) -> Sorted<'a> {
        let mut sums = Sums::default();
        let mut new: BTreeMap<Uuid, Fresh<'a>> = BTreeMap::new();
        let (mut results, mut gaps) = (Vec::with_capacity(submissions.len()), Vec::new());
        for submission in submissions {
            let reporter = submission.reporter.into();
            let Some((owner, seq)) = self.last.get_mut(&reporter) else {
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
                if report.seq <= *seq {
                    continue;
                }
                if *seq > 0 && report.seq != *seq + 1 {
                    gaps.push(Gap { reporter: submission.reporter, last: *seq, next: report.seq });
                }
                sums.add(&report.counts);
                *seq = report.seq;
                fresh += 1;
                let of = new.entry(reporter).or_insert_with(|| Fresh { reporter, reports: Vec::new() });
                of.reports.push(report);
            }
            results.push(Applied::UpTo { seq: *seq, fresh });
        }
        Sorted { results, gaps, sums, fresh: new.into_values().collect() }
    }

    async fn store(self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let (ids, rest): (Vec<Uuid>, Vec<(Option<Uuid>, u64)>) = self.last.into_iter().unzip();
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
        .execute(connection)
        .await?;
        Ok(())
    }
}

/// Sums of the counts of several reports, by the primary keys of the tables and in their order. An insert from `unnest` locks
/// rows in the order of the arrays, so all replicas lock them in one order.
#[derive(Default)]
struct Sums {
    totals: BTreeMap<KeyRef, (u64, u64)>,
    hourly: BTreeMap<(KeyId, u32, u8, u32), (u64, u64)>,
    keyless: BTreeMap<(u32, u8), u64>,
}

impl Sums {
    fn add(&mut self, counts: &[Count]) {
        for Count { of, requests, cost, last_ms } in counts {
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

    async fn write(self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        write_totals(connection, self.totals).await?;
        write_hourly(connection, self.hourly).await?;
        write_keyless(connection, self.keyless).await
    }
}

async fn write_totals(connection: &mut PgConnection, totals: BTreeMap<KeyRef, (u64, u64)>) -> Result<(), sqlx::Error> {
    let (keys, totals): (Vec<KeyRef>, Vec<(u64, u64)>) = totals.into_iter().unzip();
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
    .execute(connection)
    .await?;
    Ok(())
}

async fn write_hourly(
    connection: &mut PgConnection,
    hourly: BTreeMap<(KeyId, u32, u8, u32), (u64, u64)>,
) -> Result<(), sqlx::Error> {
    let rows = hourly.into_iter().map(|((id, hour, outcome, generation), (requests, cost))| {
        (parts(KeyRef { id, generation }), ((time_of_hour(hour), i16::from(outcome)), (signed(requests), signed(cost))))
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
    .execute(connection)
    .await?;
    Ok(())
}

async fn write_keyless(connection: &mut PgConnection, keyless: BTreeMap<(u32, u8), u64>) -> Result<(), sqlx::Error> {
    let rows = keyless
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
    .execute(connection)
    .await?;
    Ok(())
}

fn parts(key: KeyRef) -> (Uuid, i32) {
    (key.id.into(), key.generation.cast_signed())
}

/// A sum as PostgreSQL stores it. It saturates: a forged count must not stop the reports that are applied with it.
fn signed(sum: u64) -> i64 {
    i64::try_from(sum).unwrap_or(i64::MAX)
}

fn time_of_ms(ms: u64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH.saturating_add(time::Duration::milliseconds(ms.cast_signed()))
}

fn time_of_hour(hour: u32) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH.saturating_add(time::Duration::hours(i64::from(hour)))
}
