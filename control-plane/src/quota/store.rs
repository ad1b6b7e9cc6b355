//! Quotas in PostgreSQL: the use in the present window, and the flag by which filters refuse a key.

use std::collections::BTreeMap;

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::Use;
use crate::domain::Quota;

/// Most keys that one statement opens.
const TOGETHER: i64 = 10_000;

/// Adds allowed requests to the running windows of keys, and moves on windows that have ended. Returns what is used then. The
/// rows are locked in the order of the keys.
pub async fn count(
    connection: &mut PgConnection,
    of: &BTreeMap<Uuid, (&Quota, i64)>,
) -> Result<BTreeMap<Uuid, Use>, sqlx::Error> {
    let keys: Vec<Uuid> = of.keys().copied().collect();
    sqlx::query!(
        "insert into quota_use (key_id, window_start, window_end, kind)
        select key_id, 'epoch', 'epoch', '' from unnest($1::uuid[]) as new (key_id)
        where not exists (select from quota_use q where q.key_id = new.key_id)
        order by key_id on conflict do nothing",
        &keys
    )
    .execute(&mut *connection)
    .await?;
    let rows = sqlx::query!(
        r#"select key_id, kind, window_start, window_end, used, slots, now() as "now!"
        from quota_use where key_id = any($1) order by key_id for update"#,
        &keys
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut all = BTreeMap::new();
    let mut changed = Vec::new();
    for row in rows {
        let Some((quota, requests)) = of.get(&row.key_id) else { continue };
        let stored =
            Use { window_start: row.window_start, window_end: row.window_end, used: row.used, slots: row.slots };
        let (mut used, is_new) = stored.current(&row.kind, quota, row.now);
        if *requests > 0 {
            used.add(*requests);
        }
        if is_new || *requests > 0 {
            changed.push((row.key_id, quota.kind(), used.clone()));
        }
        all.insert(row.key_id, used);
    }
    write(connection, changed).await?;
    Ok(all)
}

async fn write(connection: &mut PgConnection, changed: Vec<(Uuid, String, Use)>) -> Result<(), sqlx::Error> {
    if changed.is_empty() {
        return Ok(());
    }
    let slots = |slots: &[i64]| {
        let slots: Vec<String> = slots.iter().map(ToString::to_string).collect();
        format!("{{{}}}", slots.join(","))
    };
    let keys: Vec<Uuid> = changed.iter().map(|(key, ..)| *key).collect();
    let starts: Vec<OffsetDateTime> = changed.iter().map(|(_, _, used)| used.window_start).collect();
    let ends: Vec<OffsetDateTime> = changed.iter().map(|(_, _, used)| used.window_end).collect();
    let used: Vec<i64> = changed.iter().map(|(_, _, used)| used.used).collect();
    let slots: Vec<String> = changed.iter().map(|(_, _, used)| slots(&used.slots)).collect();
    let kinds: Vec<String> = changed.into_iter().map(|(_, kind, _)| kind).collect();
    sqlx::query!(
        "update quota_use set window_start = new.window_start, window_end = new.window_end, kind = new.kind,
            used = new.used, slots = new.slots::bigint[]
        from unnest($1::uuid[], $2::timestamptz[], $3::timestamptz[], $4::text[], $5::bigint[], $6::text[])
            as new (key_id, window_start, window_end, kind, used, slots)
        where quota_use.key_id = new.key_id",
        &keys,
        &starts,
        &ends,
        &kinds,
        &used,
        &slots
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Marks keys as exhausted, given their use and the end of their windows, so that filters refuse them. Keys that are marked
/// already, and those whose quota was raised meanwhile, are left alone.
pub async fn shut(connection: &mut PgConnection, keys: &[(Uuid, i64, OffsetDateTime)]) -> Result<(), sqlx::Error> {
    if keys.is_empty() {
        return Ok(());
    }
    // A change of a plan holds this lock until it commits, so the next statement sees the new quota.
    sqlx::query!("select one from store_state for update").fetch_one(&mut *connection).await?;
    let ids: Vec<Uuid> = keys.iter().map(|(key, ..)| *key).collect();
    let used: Vec<i64> = keys.iter().map(|(_, used, _)| *used).collect();
    let ends: Vec<OffsetDateTime> = keys.iter().map(|(.., end)| *end).collect();
    let due = sqlx::query!(
        r#"select q.id as "id!", new.resets_at as "resets_at!"
        from unnest($1::uuid[], $2::bigint[], $3::timestamptz[]) as new (id, used, resets_at)
        join key_quotas q on q.id = new.id
        where new.used >= (q.quota ->> 'requests')::bigint and not (q.quota_exceeded and q.quota_resets_at > now())"#,
        &ids,
        &used,
        &ends
    )
    .fetch_all(&mut *connection)
    .await?;
    if due.is_empty() {
        return Ok(());
    }
    let (ids, ends): (Vec<Uuid>, Vec<OffsetDateTime>) = due.into_iter().map(|row| (row.id, row.resets_at)).unzip();
    sqlx::query!(
        "update api_keys set quota_exceeded = true, quota_resets_at = new.resets_at
        from unnest($1::uuid[], $2::timestamptz[]) as new (id, resets_at) where api_keys.id = new.id",
        &ids,
        &ends
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Opens exhausted keys whose next window has begun, with a new starter for every Envoy. Returns how many.
pub async fn reopen(pool: &PgPool) -> Result<u64, sqlx::Error> {
    // A statement that changes nothing would wake every filter, too.
    let any = sqlx::query_scalar!(
        r#"select exists (select from api_keys where quota_exceeded and quota_resets_at <= now()) as "any!""#
    );
    if !any.fetch_one(pool).await? {
        return Ok(0);
    }
    let opened = sqlx::query!(
        "update api_keys set quota_exceeded = false, quota_resets_at = null, quota_turn = quota_turn + 1
        where id in (
            select id from api_keys where quota_exceeded and quota_resets_at <= now()
            order by id limit $1 for update skip locked
        )",
        TOGETHER
    )
    .execute(pool)
    .await?;
    Ok(opened.rows_affected())
}

/// Opens or closes keys whose quota was changed, in the transaction of that change. Returns how many.
pub async fn reconsider(connection: &mut PgConnection, keys: &[Uuid]) -> Result<usize, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select id as "id!", quota, quota_exceeded as "quota_exceeded!", quota_starter, kind as "kind!",
            window_start as "window_start!", window_end as "window_end!", used as "used!", slots as "slots!", now() as "now!"
        from key_quotas where id = any($1) and (quota_exceeded or kind <> '')"#,
        keys
    )
    .fetch_all(&mut *connection)
    .await?;
    let (mut opened, mut exhausted) = (Vec::new(), Vec::new());
    for row in rows {
        let stored =
            Use { window_start: row.window_start, window_end: row.window_end, used: row.used, slots: row.slots };
        let until = Quota::of(row.quota).and_then(|quota| {
            let (used, _) = stored.current(&row.kind, &quota, row.now);
            let opens_at = used.opens_at(&quota, quota.starter(row.quota_starter));
            used.exceeds(&quota).then_some((used.used, opens_at))
        });
        match until {
            None if row.quota_exceeded => opened.push(row.id),
            Some((used, until)) if !row.quota_exceeded => exhausted.push((row.id, used, until)),
            _ => {}
        }
    }
    if !opened.is_empty() {
        sqlx::query!(
            "update api_keys set quota_exceeded = false, quota_resets_at = null, quota_turn = quota_turn + 1
            where id = any($1) and quota_exceeded",
            &opened
        )
        .execute(&mut *connection)
        .await?;
    }
    shut(connection, &exhausted).await?;
    Ok(opened.len().saturating_add(exhausted.len()))
}

/// The quota of a key and what is left of it.
#[derive(Clone, Debug)]
pub struct View {
    /// The quota: the key's own or its plan's.
    pub quota: Quota,
    /// What was used of it.
    pub used: Use,
    /// Requests that Envoys have a lease for and have not reported.
    pub leased: i64,
    /// Whether filters refuse the key because of it.
    pub exceeded: bool,
    pub resets_at: Option<OffsetDateTime>,
}

/// Reads the quota of a key; none if it has none.
pub async fn view(pool: &PgPool, key: Uuid) -> Result<Option<View>, sqlx::Error> {
    let row = sqlx::query!(
        r#"select quota, quota_exceeded as "quota_exceeded!", quota_resets_at, kind as "kind!",
            window_start as "window_start!", window_end as "window_end!", used as "used!", slots as "slots!", now() as "now!",
            (
                select coalesce(sum(greatest(l.held - l.spent, 0)), 0)::bigint
                from leases l join usage_reporters r on r.reporter = l.reporter
                where l.stock = 1 and l.subject = key_quotas.id
                    and greatest(l.renewed_at, r.reported_at) > now() - interval '60 seconds'
            ) as "leased!"
        from key_quotas where id = $1"#,
        key
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let Some(quota) = Quota::of(row.quota) else { return Ok(None) };
    let stored = Use { window_start: row.window_start, window_end: row.window_end, used: row.used, slots: row.slots };
    let (used, _) = stored.current(&row.kind, &quota, row.now);
    let (leased, exceeded) = (row.leased, row.quota_exceeded && row.quota_resets_at.is_none_or(|at| at > row.now));
    Ok(Some(View { quota, used, leased, exceeded, resets_at: row.quota_resets_at.filter(|_| exceeded) }))
}
