//! Quotas in PostgreSQL: what was used is added up in the running window, the flag that filters see is set and taken back.

use std::collections::BTreeMap;

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::Use;
use crate::domain::{Period, Quota};

/// Most keys that are opened in one statement.
const TOGETHER: i64 = 10_000;

/// Adds allowed requests to the running windows of keys, and lets windows begin anew that have ended. Gives what is used
/// then. The rows are locked in the order of the keys.
pub async fn count(
    connection: &mut PgConnection,
    of: &BTreeMap<Uuid, (&Quota, i64)>,
) -> Result<BTreeMap<Uuid, Use>, sqlx::Error> {
    let keys: Vec<Uuid> = of.keys().copied().collect();
    let kinds: Vec<String> = of.values().map(|(quota, _)| quota.kind()).collect();
    let periods: Vec<String> = of.values().map(|(quota, _)| quota.period.name().to_owned()).collect();
    let zones: Vec<String> = of.values().map(|(quota, _)| quota.zone().to_owned()).collect();
    sqlx::query!(
        "insert into quota_use (key_id, window_start, window_end, kind)
        select key_id, '-infinity', '-infinity', '' from unnest($1::uuid[]) as new (key_id)
        where not exists (select from quota_use q where q.key_id = new.key_id)
        order by key_id on conflict do nothing",
        &keys
    )
    .execute(&mut *connection)
    .await?;
    // What of a window has ended begins with nothing used; rolling ones are rolled on below.
    let rows = sqlx::query!(
        r#"select q.key_id, q.kind = new.kind as "same!", q.used, q.slots, now() as "now!", c.starts, c.ends,
            case when isfinite(q.window_start) then q.window_start end as window_start,
            case when isfinite(q.window_end) then q.window_end end as window_end
        from unnest($1::uuid[], $2::text[], $3::text[], $4::text[]) as new (key_id, kind, period, zone)
        join quota_use q on q.key_id = new.key_id
        cross join lateral calendar_window(
            new.period, new.zone,
            case when new.period <> 'rolling' and (q.kind <> new.kind or q.window_end <= now()) then now() end
        ) c
        order by q.key_id for update of q"#,
        &keys,
        &kinds,
        &periods,
        &zones
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut all = BTreeMap::new();
    let mut changed = Vec::new();
    for row in rows {
        let Some((quota, requests)) = of.get(&row.key_id) else { continue };
        let known = row.window_start.zip(row.window_end).filter(|_| row.same);
        let known =
            known.map(|(window_start, window_end)| Use { window_start, window_end, used: row.used, slots: row.slots });
        let (mut used, mut new) = match (known, quota.period, row.starts.zip(row.ends)) {
            (Some(mut used), Period::Rolling, _) => {
                let rolled = used.roll(quota.window_s(), row.now);
                (used, rolled)
            }
            (None, Period::Rolling, _) => (Use::rolling(quota.window_s(), row.now), true),
            (_, _, Some((window_start, window_end))) => {
                (Use { window_start, window_end, used: 0, slots: Vec::new() }, true)
            }
            (Some(used), _, None) => (used, false),
            (None, _, None) => continue,
        };
        if *requests > 0 {
            used.add(*requests);
            new = true;
        }
        if new {
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

/// Tells filters that quotas are used up: of which keys, how much was used, and until when. Keys that they know it of
/// already are left alone, and those whose quota was raised meanwhile.
pub async fn shut(connection: &mut PgConnection, keys: &[(Uuid, i64, OffsetDateTime)]) -> Result<(), sqlx::Error> {
    if keys.is_empty() {
        return Ok(());
    }
    // Whoever changes a plan holds this lock until it commits: the statement after it sees the quota as it is then.
    sqlx::query!("select one from store_state for update").fetch_one(&mut *connection).await?;
    let ids: Vec<Uuid> = keys.iter().map(|(key, ..)| *key).collect();
    let used: Vec<i64> = keys.iter().map(|(_, used, _)| *used).collect();
    let ends: Vec<OffsetDateTime> = keys.iter().map(|(.., end)| *end).collect();
    let due = sqlx::query!(
        r#"select k.id, new.resets_at as "resets_at!"
        from unnest($1::uuid[], $2::bigint[], $3::timestamptz[]) as new (id, used, resets_at)
        join api_keys k on k.id = new.id
        left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
        where new.used >= (coalesce(k.quota, d.quota) ->> 'requests')::bigint
            and not (k.quota_exceeded and k.quota_resets_at > now())"#,
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

/// Opens keys whose quota was used up and is filled anew by now, with a new starter for every Envoy. Says how many.
pub async fn reopen(pool: &PgPool) -> Result<u64, sqlx::Error> {
    // A statement that changes nothing would wake every filter all the same.
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

/// Opens or shuts keys at once whose quota was changed, in the transaction that changed it. Says how many.
pub async fn reconsider(connection: &mut PgConnection, keys: &[Uuid]) -> Result<usize, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select k.id as "id!", k.quota_exceeded as "quota_exceeded!", k.quota_starter, coalesce(k.quota, d.quota) as quota, now() as "now!",
            q.kind as "kind?", q.used as "used?", q.slots as "slots?",
            case when isfinite(q.window_start) then q.window_start end as window_start,
            case when isfinite(q.window_end) then q.window_end end as window_end
        from api_keys k
        left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
        left join quota_use q on q.key_id = k.id
        where k.id = any($1) and (k.quota_exceeded or q.key_id is not null)"#,
        keys
    )
    .fetch_all(&mut *connection)
    .await?;
    let (mut opened, mut shut_) = (Vec::new(), Vec::new());
    for row in rows {
        let quota = Quota::of(row.quota);
        let until = quota.and_then(|quota| {
            let (window_start, window_end) = row.window_start.zip(row.window_end)?;
            let mut used = Use { window_start, window_end, used: row.used?, slots: row.slots? };
            if quota.period == Period::Rolling {
                used.roll(quota.window_s(), row.now);
            }
            let counts = row.kind.as_deref() == Some(&quota.kind()) && used.window_end > row.now;
            (counts && used.exceeds(&quota))
                .then(|| (used.used, used.opens_at(&quota, quota.starter(row.quota_starter))))
        });
        match until {
            None if row.quota_exceeded => opened.push(row.id),
            Some((used, until)) if !row.quota_exceeded => shut_.push((row.id, used, until)),
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
    shut(connection, &shut_).await?;
    Ok(opened.len().saturating_add(shut_.len()))
}

/// The quota of a key and what is left of it.
#[derive(Clone, Debug)]
pub struct View {
    /// The quota: the key's own or its plan's.
    pub quota: Quota,
    /// What was used of it.
    pub used: Use,
    /// What Envoys hold and have not told of.
    pub leased: i64,
    /// Whether filters were told that it is used up.
    pub exceeded: bool,
    pub resets_at: Option<OffsetDateTime>,
}

/// Reads the quota of a key; none if it has none.
pub async fn view(pool: &PgPool, key: Uuid) -> Result<Option<View>, sqlx::Error> {
    let row = sqlx::query!(
        r#"select coalesce(k.quota, d.quota) as quota, k.quota_exceeded, k.quota_resets_at, now() as "now!",
            q.kind as "kind?", q.used as "used?", q.slots as "slots?",
            case when isfinite(q.window_start) then q.window_start end as window_start,
            case when isfinite(q.window_end) then q.window_end end as window_end,
            (
                select coalesce(sum(greatest(l.held - l.spent, 0)), 0)::bigint
                from leases l join usage_reporters r on r.reporter = l.reporter
                where l.stock = 1 and l.subject = k.id
                    and greatest(l.renewed_at, r.reported_at) > now() - interval '60 seconds'
            ) as "leased!"
        from api_keys k
        left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
        left join quota_use q on q.key_id = k.id
        where k.id = $1"#,
        key
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let Some(quota) = Quota::of(row.quota) else { return Ok(None) };
    let same = row.kind.as_deref() == Some(&quota.kind());
    let known = row.window_start.zip(row.window_end).filter(|_| same).map(|(window_start, window_end)| Use {
        window_start,
        window_end,
        used: row.used.unwrap_or_default(),
        slots: row.slots.unwrap_or_default(),
    });
    let used = match known {
        Some(mut used) if quota.period == Period::Rolling => {
            used.roll(quota.window_s(), row.now);
            used
        }
        None if quota.period == Period::Rolling => Use::rolling(quota.window_s(), row.now),
        Some(used) if used.window_end > row.now => used,
        _ => {
            let window = sqlx::query!(
                r#"select starts as "starts!", ends as "ends!" from calendar_window($1, $2, $3)"#,
                quota.period.name(),
                quota.zone(),
                row.now
            )
            .fetch_one(pool)
            .await?;
            Use { window_start: window.starts, window_end: window.ends, used: 0, slots: Vec::new() }
        }
    };
    let (leased, exceeded) = (row.leased, row.quota_exceeded && row.quota_resets_at.is_none_or(|at| at > row.now));
    Ok(Some(View { quota, used, leased, exceeded, resets_at: row.quota_resets_at.filter(|_| exceeded) }))
}
