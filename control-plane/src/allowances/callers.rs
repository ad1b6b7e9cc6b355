//! Which Envoys are live, and whether one of them is alone and decides by itself.
//!
//! An Envoy that polls is live before its first call, so that another Envoy has stopped deciding by itself by then.
//! Two Envoys must never both be alone, on whichever replicas they call. The row of `lone_caller` therefore is locked before an
//! Envoy becomes alone, and before a newcomer is taken to be one of several. An Envoy that has called before is seen by all
//! others, so its calls need no such lock once there are several.

use std::collections::{BTreeMap, HashMap};

use limits::ledger::OtherEnvoys;
use limits::{ALONE_GRACE_MS, ALONE_MS, LIVE_MS};
use sqlx::PgConnection;
use uuid::Uuid;

/// For how long a transaction waits for a lock. Requests wait for its answer no longer than this.
const LOCK_TIMEOUT_MS: u64 = limits::LONGEST_WAIT_MS;

/// One Envoy that calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    /// The key of the call.
    pub(super) sync_key: Uuid,
    /// It says that it ends.
    pub(super) is_last: bool,
}

/// Which Envoys there are beside those that call.
#[derive(Debug)]
pub(super) struct Standing {
    /// The sync key of each Envoy that calls. Those that belong to another one are left out.
    owners: HashMap<Uuid, Uuid>,
    /// How many Envoys are live.
    pub(super) live: u32,
    /// The calling Envoy that may decide by itself after this answer.
    alone: Option<Uuid>,
    /// The Envoy that may still decide by itself, after this answer or an earlier one.
    lone: Option<Uuid>,
    /// Some Envoy that calls has allowances to hand back.
    pub(super) has_recalls: bool,
}

impl Standing {
    /// Whether an Envoy may call under this sync key.
    pub(super) fn admits(&self, reporter: Uuid, sync_key: Uuid) -> bool {
        self.owners.get(&reporter) == Some(&sync_key)
    }

    /// Which Envoys there are beside this one.
    pub(super) fn company(&self, reporter: Uuid) -> OtherEnvoys {
        match self.lone {
            Some(lone) if lone != reporter => OtherEnvoys::AnotherIsAlone,
            _ => OtherEnvoys::Several,
        }
    }

    /// For how long this Envoy may decide by itself, in milliseconds.
    pub(super) fn alone_ms(&self, reporter: Uuid) -> u32 {
        if self.alone == Some(reporter) { u32::try_from(ALONE_MS).unwrap_or(u32::MAX) } else { 0 }
    }
}

/// An Envoy that was noted, with the state of the table before.
struct Noted {
    reporter: Uuid,
    sync_key_id: Uuid,
    has_ended: bool,
    /// Whether it called within half of [`LIVE_MS`] before, so that all other transactions count it as live.
    was_live: bool,
    /// Live Envoys that do not call now.
    others: i64,
    lone: Uuid,
    is_lone: bool,
    has_recalls: bool,
    /// The settings of the transaction, as they are now.
    _settings: Option<String>,
}

/// Notes that Envoys have called, and sees which others are live.
pub(super) async fn note(
    connection: &mut PgConnection,
    callers: &BTreeMap<Uuid, Caller>,
) -> Result<Standing, sqlx::Error> {
    let rows = write(&mut *connection, callers).await?;
    let live = |others: i64| {
        let own = rows.iter().filter(|row| !row.has_ended).count();
        u32::try_from(others).unwrap_or(u32::MAX).saturating_add(u32::try_from(own).unwrap_or(u32::MAX))
    };
    let mut standing = Standing {
        owners: rows.iter().map(|row| (row.reporter, row.sync_key_id)).collect(),
        live: 0,
        alone: None,
        lone: None,
        has_recalls: rows.iter().any(|row| row.has_recalls),
    };
    let Some(first) = rows.first() else { return Ok(standing) };
    standing.live = live(first.others);
    standing.lone = first.is_lone.then_some(first.lone);
    // The first caller that does not end. If just one Envoy is live, it is this one.
    let only = rows.iter().find(|row| !row.has_ended).map(|row| row.reporter);
    match only {
        _ if standing.live > 1 && !first.is_lone && rows.iter().all(|row| row.was_live) => {}
        None => {}
        Some(me) if standing.live == 1 && first.is_lone && first.lone == me && renew_lone(connection, me).await? => {
            standing.alone = Some(me);
        }
        Some(me) => {
            standing.lone = lock_lone(connection).await?;
            standing.live = live(others(connection, callers).await?);
            if standing.live == 1 && standing.lone.is_none_or(|lone| lone == me) {
                set_lone(connection, me).await?;
                (standing.alone, standing.lone) = (Some(me), Some(me));
            }
        }
    }
    Ok(standing)
}

/// Writes the rows of Envoys that call, except those that belong to another sync key. Sets the bounds of the transaction, too.
async fn write(connection: &mut PgConnection, callers: &BTreeMap<Uuid, Caller>) -> Result<Vec<Noted>, sqlx::Error> {
    let ids: Vec<Uuid> = callers.keys().copied().collect();
    let keys: Vec<Uuid> = callers.values().map(|caller| caller.sync_key).collect();
    let last: Vec<bool> = callers.values().map(|caller| caller.is_last).collect();
    // All of it sees the table as it was before.
    sqlx::query_as!(
        Noted,
        r#"with noted as (
            insert into allowance_callers (reporter, sync_key_id, heard_at, ended_at)
            select reporter, sync_key, clock_timestamp(), case when is_last then clock_timestamp() end
            from unnest($1::uuid[], $2::uuid[], $3::boolean[]) as new (reporter, sync_key, is_last)
            where not exists (
                select from usage_reporters r where r.reporter = new.reporter and r.sync_key_id <> new.sync_key
            )
            order by reporter
            on conflict (reporter) do update set
                heard_at = excluded.heard_at, ended_at = coalesce(allowance_callers.ended_at, excluded.ended_at)
            where allowance_callers.sync_key_id = excluded.sync_key_id
            returning reporter, sync_key_id, ended_at is not null as has_ended
        )
        select noted.reporter, noted.sync_key_id, noted.has_ended as "has_ended!",
            coalesce(before.heard_at > clock_timestamp() - make_interval(secs => $4), false) as "was_live!",
            other_live_envoys($1) as "others!",
            lone.reporter as "lone!", lone.until > clock_timestamp() as "is_lone!",
            exists (select from allowances where reporter = any($1) and recalled) as "has_recalls!",
            set_config('lock_timeout', $5, true) as "_settings"
        from noted left join allowance_callers before on before.reporter = noted.reporter cross join lone_caller lone"#,
        &ids,
        &keys,
        &last,
        seconds(LIVE_MS) / 2.0,
        LOCK_TIMEOUT_MS.to_string()
    )
    .fetch_all(connection)
    .await
}

/// Lets the lone Envoy decide by itself for some more time, unless its time has passed. An Envoy that starts meanwhile locks
/// the row and finds the old time or the new one.
async fn renew_lone(connection: &mut PgConnection, reporter: Uuid) -> Result<bool, sqlx::Error> {
    let renewed = sqlx::query!(
        "update lone_caller set until = clock_timestamp() + make_interval(secs => $2)
        where reporter = $1 and until > clock_timestamp()",
        reporter,
        seconds(ALONE_MS.saturating_add(ALONE_GRACE_MS))
    );
    Ok(renewed.execute(connection).await?.rows_affected() > 0)
}

async fn lock_lone(connection: &mut PgConnection) -> Result<Option<Uuid>, sqlx::Error> {
    let lone = sqlx::query!(r#"select reporter, until > clock_timestamp() as "is_lone!" from lone_caller for update"#);
    let lone = lone.fetch_one(connection).await?;
    Ok(lone.is_lone.then_some(lone.reporter))
}

async fn set_lone(connection: &mut PgConnection, reporter: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update lone_caller set reporter = $1, until = clock_timestamp() + make_interval(secs => $2)",
        reporter,
        seconds(ALONE_MS.saturating_add(ALONE_GRACE_MS))
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// How many Envoys are live beside these.
async fn others(connection: &mut PgConnection, callers: &BTreeMap<Uuid, Caller>) -> Result<i64, sqlx::Error> {
    let ids: Vec<Uuid> = callers.keys().copied().collect();
    sqlx::query_scalar!(r#"select other_live_envoys($1) as "others!""#, &ids).fetch_one(connection).await
}

fn seconds(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}
