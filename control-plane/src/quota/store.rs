//! Quotas in PostgreSQL: the use in the present window, and the flag by which filters refuse a key.

use std::collections::BTreeMap;

use contract::record::Per;
use sqlx::{PgConnection, PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::Use;
use crate::change::transact;
use crate::domain::Quota;

/// Most keys that one statement opens.
const TOGETHER: i64 = 10_000;

/// Whose use of a quota is counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QuotaId {
    /// The key; of a quota that all keys of a user share, the user.
    pub subject: Uuid,
    /// The plan that such a quota belongs to; otherwise 0.
    pub plan: i32,
}

impl QuotaId {
    /// That of a key with this quota.
    #[must_use]
    pub fn of(per: Per, key: Uuid, owner: Uuid, plan: Option<i32>) -> Self {
        match per {
            Per::Key => Self { subject: key, plan: 0 },
            Per::Owner => Self { subject: owner, plan: plan.unwrap_or_default() },
        }
    }
}

/// Adds allowed requests to the running windows of quotas, and moves on windows that have ended. Returns what is used then. The
/// rows are locked in the order of their ids.
pub async fn count(
    connection: &mut PgConnection,
    of: &BTreeMap<QuotaId, (Quota, i64)>,
) -> Result<BTreeMap<QuotaId, Use>, sqlx::Error> {
    let (subjects, plans): (Vec<Uuid>, Vec<i32>) = of.keys().map(|id| (id.subject, id.plan)).unzip();
    sqlx::query!(
        "insert into quota_use (subject, plan_number, window_start, window_end, kind)
        select subject, plan_number, 'epoch', 'epoch', ''
        from unnest($1::uuid[], $2::integer[]) as new (subject, plan_number)
        where not exists (
            select from quota_use q where q.subject = new.subject and q.plan_number = new.plan_number
        )
        order by subject, plan_number on conflict do nothing",
        &subjects,
        &plans
    )
    .execute(&mut *connection)
    .await?;
    let rows = sqlx::query!(
        r#"select q.subject, q.plan_number, kind, window_start, window_end, used, slots, now() as "now!"
        from unnest($1::uuid[], $2::integer[]) as of (subject, plan_number)
        join quota_use q on q.subject = of.subject and q.plan_number = of.plan_number
        order by q.subject, q.plan_number for update of q"#,
        &subjects,
        &plans
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut all = BTreeMap::new();
    let mut changed = Vec::new();
    for row in rows {
        let id = QuotaId { subject: row.subject, plan: row.plan_number };
        let Some((quota, requests)) = of.get(&id) else { continue };
        let stored =
            Use { window_start: row.window_start, window_end: row.window_end, used: row.used, slots: row.slots };
        let (mut used, is_new) = stored.current(&row.kind, quota, row.now);
        used.add(*requests);
        if is_new || *requests > 0 {
            changed.push((id, quota.kind(), used.clone()));
        }
        all.insert(id, used);
    }
    write(connection, changed).await?;
    Ok(all)
}

async fn write(connection: &mut PgConnection, changed: Vec<(QuotaId, String, Use)>) -> Result<(), sqlx::Error> {
    if changed.is_empty() {
        return Ok(());
    }
    let slots = |slots: &[i64]| {
        let slots: Vec<String> = slots.iter().map(ToString::to_string).collect();
        format!("{{{}}}", slots.join(","))
    };
    let (subjects, plans): (Vec<Uuid>, Vec<i32>) = changed.iter().map(|(id, ..)| (id.subject, id.plan)).unzip();
    let starts: Vec<OffsetDateTime> = changed.iter().map(|(_, _, used)| used.window_start).collect();
    let ends: Vec<OffsetDateTime> = changed.iter().map(|(_, _, used)| used.window_end).collect();
    let used: Vec<i64> = changed.iter().map(|(_, _, used)| used.used).collect();
    let slots: Vec<String> = changed.iter().map(|(_, _, used)| slots(&used.slots)).collect();
    let kinds: Vec<String> = changed.into_iter().map(|(_, kind, _)| kind).collect();
    sqlx::query!(
        "update quota_use set window_start = new.window_start, window_end = new.window_end, kind = new.kind,
            used = new.used, slots = new.slots::bigint[]
        from unnest($1::uuid[], $2::integer[], $3::timestamptz[], $4::timestamptz[], $5::text[], $6::bigint[], $7::text[])
            as new (subject, plan_number, window_start, window_end, kind, used, slots)
        where quota_use.subject = new.subject and quota_use.plan_number = new.plan_number",
        &subjects,
        &plans,
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

/// What is used of quotas now. Those of which nothing was ever used are left out.
pub async fn present_use(
    connection: &mut PgConnection,
    of: &BTreeMap<QuotaId, Quota>,
) -> Result<BTreeMap<QuotaId, Use>, sqlx::Error> {
    let (subjects, plans): (Vec<Uuid>, Vec<i32>) = of.keys().map(|id| (id.subject, id.plan)).unzip();
    let rows = sqlx::query!(
        r#"select q.subject, q.plan_number, kind, window_start, window_end, used, slots, clock_timestamp() as "now!"
        from unnest($1::uuid[], $2::integer[]) as of (subject, plan_number)
        join quota_use q on q.subject = of.subject and q.plan_number = of.plan_number"#,
        &subjects,
        &plans
    )
    .fetch_all(connection)
    .await?;
    let present = rows.into_iter().filter_map(|row| {
        let id = QuotaId { subject: row.subject, plan: row.plan_number };
        let stored =
            Use { window_start: row.window_start, window_end: row.window_end, used: row.used, slots: row.slots };
        Some((id, stored.current(&row.kind, of.get(&id)?, row.now).0))
    });
    Ok(present.collect())
}

/// Marks the keys of exhausted quotas, so that filters refuse them. Usage is booked before, in a transaction of its own: this
/// one waits for all others that change keys, and requests wait for the pools that booking locks.
pub async fn shut(pool: &PgPool, exhausted: &[QuotaId]) -> Result<(), sqlx::Error> {
    if exhausted.is_empty() {
        return Ok(());
    }
    let (subjects, plans): (Vec<Uuid>, Vec<i32>) = exhausted.iter().map(|id| (id.subject, id.plan)).unzip();
    transact(pool, async |connection| {
        // A change of a plan holds this lock until it commits, so the next statements see the new quota.
        sqlx::query!("select one from store_state for update").fetch_one(&mut *connection).await?;
        let keys = sqlx::query_scalar!(
            r#"select k.id as "id!" from unnest($1::uuid[], $2::integer[]) as of (subject, plan_number)
            join api_keys k on k.id = of.subject where of.plan_number = 0
            union all
            select k.id from unnest($1::uuid[], $2::integer[]) as of (subject, plan_number)
            join api_keys k on k.owner_id = of.subject and coalesce(k.plan_number, k.owner_plan_number) = of.plan_number
            where k.quota is null and k.revoked_at is null"#,
            &subjects,
            &plans
        )
        .fetch_all(&mut *connection)
        .await?;
        reconsider(connection, &keys).await.map(|_| ())
    })
    .await
}

/// Sets what was used of a key's quota in the running window to zero, and opens all keys that share the quota. `store_state` is
/// locked. Returns what was used; none if the key has no quota.
pub async fn reset(connection: &mut PgConnection, key: Uuid) -> Result<Option<i64>, sqlx::Error> {
    let of = sqlx::query!(
        r#"select subject as "subject!", plan_number as "plan!" from key_quotas where id = $1 and quota is not null"#,
        key
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(of) = of else { return Ok(None) };
    let used = sqlx::query_scalar!(
        "with old as (
            select used from quota_use where subject = $1 and plan_number = $2 for update
        )
        update quota_use set used = 0, slots = array_fill(0::bigint, array[cardinality(slots)])
        from old where subject = $1 and plan_number = $2 returning old.used",
        of.subject,
        of.plan
    )
    .fetch_optional(&mut *connection)
    .await?;
    // With another fill, Envoys hand back what they hold and ask again.
    sqlx::query!(
        "update api_keys set quota_fill = quota_fill + 1, quota_exceeded = false, quota_resets_at = null
        where revoked_at is null
            and id in (select id from key_quotas where subject = $1 and plan_number = $2 and quota is not null)",
        of.subject,
        of.plan
    )
    .execute(&mut *connection)
    .await?;
    Ok(Some(used.unwrap_or_default()))
}

/// Opens exhausted keys whose next window has begun. Returns how many.
pub async fn reopen(pool: &PgPool) -> Result<u64, sqlx::Error> {
    // A statement that changes nothing would wake every filter, too.
    let any = sqlx::query_scalar!(
        r#"select exists (select from api_keys where quota_exceeded and quota_resets_at <= now()) as "any!""#
    );
    if !any.fetch_one(pool).await? {
        return Ok(0);
    }
    let opened = sqlx::query!(
        "update api_keys set quota_exceeded = false, quota_resets_at = null
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

/// Opens or closes keys whose quota or use was changed. `store_state` is locked, or nothing else changes quotas meanwhile.
/// Returns how many.
pub async fn reconsider(connection: &mut PgConnection, keys: &[Uuid]) -> Result<usize, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select id as "id!", quota, quota_exceeded as "quota_exceeded!", quota_resets_at, kind as "kind!",
            window_start as "window_start!", window_end as "window_end!", used as "used!", slots as "slots!", now() as "now!"
        from key_quotas where id = any($1) and (quota_exceeded or kind <> '')"#,
        keys
    )
    .fetch_all(&mut *connection)
    .await?;
    let (mut opened, mut exhausted, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let stored =
            Use { window_start: row.window_start, window_end: row.window_end, used: row.used, slots: row.slots };
        let until = Quota::of(row.quota).and_then(|quota| {
            let (used, _) = stored.current(&row.kind, &quota, row.now);
            used.exceeds(&quota).then(|| used.opens_at(&quota))
        });
        let is_shut = row.quota_exceeded && row.quota_resets_at.is_some_and(|at| at > row.now);
        match until {
            None if row.quota_exceeded => opened.push(row.id),
            Some(until) if !is_shut => {
                exhausted.push(row.id);
                ends.push(until);
            }
            _ => {}
        }
    }
    if !opened.is_empty() {
        sqlx::query!(
            "update api_keys set quota_exceeded = false, quota_resets_at = null where id = any($1) and quota_exceeded",
            &opened
        )
        .execute(&mut *connection)
        .await?;
    }
    if !exhausted.is_empty() {
        sqlx::query!(
            "update api_keys set quota_exceeded = true, quota_resets_at = new.resets_at
            from unnest($1::uuid[], $2::timestamptz[]) as new (id, resets_at) where api_keys.id = new.id",
            &exhausted,
            &ends
        )
        .execute(connection)
        .await?;
    }
    Ok(opened.len().saturating_add(exhausted.len()))
}

/// The quota of a key and what is left of it.
#[derive(Clone, Debug)]
pub struct View {
    /// The quota: the key's own or its plan's.
    pub quota: Quota,
    /// What was used of it.
    pub used: Use,
    /// Requests that Envoys hold and have not reported.
    pub held: i64,
    /// Whether filters refuse the key because of it.
    pub exceeded: bool,
    pub resets_at: Option<OffsetDateTime>,
}

/// Reads the quota of a key; none if it has none.
pub async fn view(database: impl PgExecutor<'_>, key: Uuid) -> Result<Option<View>, sqlx::Error> {
    let row = sqlx::query!(
        r#"select q.quota, q.quota_exceeded as "quota_exceeded!", q.quota_resets_at, q.kind as "kind!",
            q.window_start as "window_start!", q.window_end as "window_end!", q.used as "used!", q.slots as "slots!",
            now() as "now!", coalesce(h.held, 0) as "held!"
        from key_quotas q
        left join held_tokens h on h.kind = 1 and h.subject = q.subject and h.tag = q.plan_number
        where q.id = $1"#,
        key
    )
    .fetch_optional(database)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let Some(quota) = Quota::of(row.quota) else { return Ok(None) };
    let stored = Use { window_start: row.window_start, window_end: row.window_end, used: row.used, slots: row.slots };
    let (used, _) = stored.current(&row.kind, &quota, row.now);
    let exceeded = row.quota_exceeded && row.quota_resets_at.is_none_or(|at| at > row.now);
    Ok(Some(View { quota, used, held: row.held, exceeded, resets_at: row.quota_resets_at.filter(|_| exceeded) }))
}
