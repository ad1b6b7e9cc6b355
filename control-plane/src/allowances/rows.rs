//! The rows of pools and allowances.

use std::collections::{BTreeMap, BTreeSet};

use contract::id::ReporterId;
use limits::EXPIRES_AFTER_MS;
use limits::ledger::{Holder, Pool};
use limits::message::POOLS;
use limits::pool::{Kind, PoolId, Subject};
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::terms::{Allowed, Stocks};
use super::{PoolColumns, signed};

/// Locks pools in their order, and inserts those that are not there.
pub(crate) async fn lock(connection: &mut PgConnection, pools: &BTreeSet<PoolId>) -> Result<(), sqlx::Error> {
    if pools.is_empty() {
        return Ok(());
    }
    let PoolColumns { kinds, subjects, tags } = PoolColumns::of(pools.iter().copied());
    // A row that is there is locked, although the condition never holds.
    sqlx::query!(
        "insert into pools (kind, subject, tag)
        select kind, subject, tag from unnest($1::smallint[], $2::uuid[], $3::bigint[]) as new (kind, subject, tag)
        order by kind, subject, tag
        on conflict (kind, subject, tag) do update set tag = excluded.tag where false",
        &kinds,
        &subjects,
        &tags
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Books usage of quotas and balances on what Envoys hold of them, as [`Holder::book`] does. The caller has locked the pools.
pub(crate) async fn book(
    connection: &mut PgConnection,
    used: &BTreeMap<(PoolId, Uuid), u64>,
) -> Result<(), sqlx::Error> {
    if used.is_empty() {
        return Ok(());
    }
    let PoolColumns { kinds, subjects, tags } = PoolColumns::of(used.keys().map(|(pool, _)| *pool));
    let reporters: Vec<Uuid> = used.keys().map(|(_, reporter)| *reporter).collect();
    let tokens: Vec<i64> = used.values().map(|tokens| signed(*tokens)).collect();
    sqlx::query!(
        "update allowances a set spent = saturating_add(a.spent, new.tokens),
            granted = greatest(a.granted, saturating_add(saturating_add(a.spent, new.tokens), a.returned))
        from unnest($1::smallint[], $2::uuid[], $3::bigint[], $4::uuid[], $5::bigint[])
            as new (kind, subject, tag, reporter, tokens)
        where a.kind = new.kind and a.subject = new.subject and a.tag = new.tag and a.reporter = new.reporter",
        &kinds,
        &subjects,
        &tags,
        &reporters,
        &tokens
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Pools that are locked, and the time of the database at which they were read.
pub(super) struct Locked {
    pub(super) pools: BTreeMap<PoolId, Pool>,
    pub(super) now_ns: u64,
}

/// Locks pools and reads them. Allowances of Envoys that have been silent for [`EXPIRES_AFTER_MS`] are left out.
pub(super) async fn read(
    connection: &mut PgConnection,
    allowed: &BTreeMap<PoolId, Allowed>,
) -> Result<Locked, sqlx::Error> {
    lock(connection, &allowed.keys().copied().collect()).await?;
    let stocks = Stocks::read(connection, allowed).await?;
    let PoolColumns { kinds, subjects, tags } = PoolColumns::of(allowed.keys().copied());
    // This is a separate statement, so it sees what others committed while `lock` waited.
    let rows = sqlx::query!(
        r#"select p.kind, p.subject, p.tag, p.arrival_ns, p.interval_ns, a.reporter as "reporter?", a.session as "session?",
            a.granted as "granted?", a.spent as "spent?", a.returned as "returned?", a.recalled as "recalled?",
            (extract(epoch from a.used_at) * 1000)::bigint as used_ms,
            (extract(epoch from c.heard_at) * 1000)::bigint as heard_ms, c.ended_at is not null as "has_ended!",
            (select clock_timestamp()) as "now!"
        from unnest($1::smallint[], $2::uuid[], $3::bigint[]) as of (kind, subject, tag)
        join pools p on p.kind = of.kind and p.subject = of.subject and p.tag = of.tag
        left join allowances a on a.kind = p.kind and a.subject = p.subject and a.tag = p.tag
        left join allowance_callers c on c.reporter = a.reporter"#,
        &kinds,
        &subjects,
        &tags
    )
    .fetch_all(connection)
    .await?;
    let now = rows.first().map_or(OffsetDateTime::UNIX_EPOCH, |row| row.now);
    let now_ns = u64::try_from(now.unix_timestamp_nanos()).unwrap_or_default();
    let now_ms = now_ns / 1_000_000;
    let mut pools = BTreeMap::new();
    for row in rows {
        let Some(id) = pool_id(row.kind, row.subject, row.tag) else { continue };
        let Some(allowed) = allowed.get(&id) else { continue };
        let pool = pools.entry(id).or_insert_with(|| Pool {
            terms: stocks.terms(allowed, now),
            arrival_ns: row.arrival_ns.cast_unsigned(),
            interval_ns: row.interval_ns.cast_unsigned(),
            holders: Vec::new(),
        });
        let heard_ms = row.heard_ms.unwrap_or_default().cast_unsigned();
        let Some(reporter) = row.reporter.filter(|_| now_ms.saturating_sub(heard_ms) < EXPIRES_AFTER_MS) else {
            continue;
        };
        let count = |count: Option<i64>| count.unwrap_or_default().cast_unsigned();
        pool.holders.push(Holder {
            reporter: ReporterId(reporter.into_bytes()),
            session: count(row.session),
            granted: count(row.granted),
            spent: count(row.spent),
            returned: count(row.returned),
            used_ms: count(row.used_ms),
            is_recalled: row.recalled.unwrap_or_default(),
            heard_ms: if row.has_ended { 0 } else { heard_ms },
        });
    }
    Ok(Locked { pools, now_ns })
}

fn pool_id(kind: i16, subject: Uuid, tag: i64) -> Option<PoolId> {
    let kind = u8::try_from(kind).ok().and_then(Kind::from_code)?;
    Some(PoolId { kind, subject: Subject(subject.into_bytes()), tag: tag.cast_unsigned() })
}

/// What a transaction has changed.
#[derive(Default)]
pub(super) struct Changes<'a> {
    /// Rate limits whose use has changed.
    pub(super) rates: Vec<(PoolId, &'a Pool)>,
    /// Envoys that have asked.
    pub(super) askers: Vec<(PoolId, &'a Holder)>,
    /// Other Envoys that must hand back what they hold.
    pub(super) recalled: Vec<(PoolId, ReporterId)>,
}

/// Writes changes, in one statement.
pub(super) async fn write(connection: &mut PgConnection, changes: &Changes<'_>) -> Result<(), sqlx::Error> {
    let Changes { rates, askers, recalled } = changes;
    if rates.is_empty() && askers.is_empty() && recalled.is_empty() {
        return Ok(());
    }
    let rate_columns = PoolColumns::of(rates.iter().map(|(id, _)| *id));
    let arrivals: Vec<i64> = rates.iter().map(|(_, pool)| signed(pool.arrival_ns)).collect();
    let intervals: Vec<i64> = rates.iter().map(|(_, pool)| signed(pool.interval_ns)).collect();
    let asker_columns = PoolColumns::of(askers.iter().map(|(id, _)| *id));
    let reporters: Vec<Uuid> = askers.iter().map(|(_, holder)| Uuid::from_bytes(holder.reporter.0)).collect();
    let column = |of: &dyn Fn(&Holder) -> u64| askers.iter().map(|(_, holder)| signed(of(holder))).collect::<Vec<_>>();
    let flags: Vec<bool> = askers.iter().map(|(_, holder)| holder.is_recalled).collect();
    let recalled_columns = PoolColumns::of(recalled.iter().map(|(id, _)| *id));
    let recalled: Vec<Uuid> = recalled.iter().map(|(_, reporter)| Uuid::from_bytes(reporter.0)).collect();
    sqlx::query!(
        "with rates as (
            update pools set arrival_ns = new.arrival_ns, interval_ns = new.interval_ns
            from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[])
                as new (subject, tag, arrival_ns, interval_ns)
            where pools.kind = 0 and pools.subject = new.subject and pools.tag = new.tag
        ), asked as (
            insert into allowances (kind, subject, tag, reporter, session, granted, spent, returned, used_at, recalled)
            select kind, subject, tag, reporter, session, granted, spent, returned, to_timestamp(used_ms / 1000.0), recalled
            from unnest($5::smallint[], $6::uuid[], $7::bigint[], $8::uuid[], $9::bigint[], $10::bigint[], $11::bigint[],
                    $12::bigint[], $13::bigint[], $14::boolean[])
                as new (kind, subject, tag, reporter, session, granted, spent, returned, used_ms, recalled)
            order by kind, subject, tag, reporter
            on conflict (kind, subject, tag, reporter) do update set
                session = excluded.session, granted = excluded.granted, spent = excluded.spent,
                returned = excluded.returned, used_at = excluded.used_at, recalled = excluded.recalled
        )
        update allowances a set recalled = true
        from unnest($15::smallint[], $16::uuid[], $17::bigint[], $18::uuid[]) as of (kind, subject, tag, reporter)
        where a.kind = of.kind and a.subject = of.subject and a.tag = of.tag and a.reporter = of.reporter
            and not a.recalled",
        &rate_columns.subjects,
        &rate_columns.tags,
        &arrivals,
        &intervals,
        &asker_columns.kinds,
        &asker_columns.subjects,
        &asker_columns.tags,
        &reporters,
        &column(&|holder| holder.session),
        &column(&|holder| holder.granted),
        &column(&|holder| holder.spent),
        &column(&|holder| holder.returned),
        &column(&|holder| holder.used_ms),
        &flags,
        &recalled_columns.kinds,
        &recalled_columns.subjects,
        &recalled_columns.tags,
        &recalled
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Takes the pools whose allowance each of these Envoys must hand back, at most [`POOLS`] of each. Rows that another
/// transaction changes are left for the next call, so the statement waits for no lock.
pub(super) async fn take_recalls(
    connection: &mut PgConnection,
    callers: &[Uuid],
) -> Result<BTreeMap<Uuid, Vec<PoolId>>, sqlx::Error> {
    let rows = sqlx::query!(
        "update allowances a set recalled = false
        from (
            select r.* from unnest($1::uuid[]) as c (reporter)
            cross join lateral (
                select kind, subject, tag, reporter from allowances
                where reporter = c.reporter and recalled order by kind, subject, tag limit $2 for update skip locked
            ) r
        ) due
        where a.kind = due.kind and a.subject = due.subject and a.tag = due.tag and a.reporter = due.reporter
        returning a.kind, a.subject, a.tag, a.reporter",
        callers,
        i64::try_from(POOLS).unwrap_or(i64::MAX)
    )
    .fetch_all(connection)
    .await?;
    let mut recalls: BTreeMap<Uuid, Vec<PoolId>> = BTreeMap::new();
    for row in rows {
        if let Some(pool) = pool_id(row.kind, row.subject, row.tag) {
            recalls.entry(row.reporter).or_default().push(pool);
        }
    }
    Ok(recalls)
}
