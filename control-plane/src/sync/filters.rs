//! The table of Envoys: the last status of each, whichever replica it reported to.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use contract::id::{Epoch, ReporterId};
use sqlx::PgPool;
use sqlx::postgres::types::PgInterval;
use time::OffsetDateTime;
use uuid::Uuid;

/// An Envoy that polled or reported within this time is live. Longer than any poll is held.
pub const SILENT: Duration = Duration::from_secs(60);

/// How long an Envoy is shown after its last message.
pub const SHOWN: Duration = Duration::from_hours(24);

/// Most shown Envoys of one sync key that are not live.
const SHOWN_OF_KEY: i64 = 10_000;

/// The last known status of an Envoy.
#[derive(Clone, Debug)]
pub(super) struct KnownEnvoy {
    pub(super) sync_key: Uuid,
    pub(super) address: Option<String>,
    pub(super) version: Option<String>,
    pub(super) holds: Option<(Epoch, u64)>,
    pub(super) pending: Option<u64>,
    /// When it confirmed its revision; before the first confirmation, when it first polled.
    pub(super) confirmed: Instant,
    pub(super) seen: Instant,
    pub(super) reported: Option<Instant>,
    pub(super) unwritten: bool,
}

/// One Envoy.
#[derive(Clone, Debug)]
pub struct EnvoyStatus {
    /// The id of its process.
    pub reporter: Uuid,
    /// The key that it syncs with.
    pub sync_key_id: Option<Uuid>,
    pub address: Option<String>,
    pub version: Option<String>,
    /// The epoch of its store; all zeros if it has confirmed none.
    pub epoch: Uuid,
    /// Every change up to it is in the Envoy's store.
    pub revision: i64,
    /// When it last confirmed that.
    pub confirmed_at: OffsetDateTime,
    /// When it last polled or reported.
    pub seen_at: OffsetDateTime,
    /// Requests that it counted and that are not acknowledged yet.
    pub pending_requests: Option<i64>,
    /// When a report of it last reached the database.
    pub reported_at: Option<OffsetDateTime>,
    pub live: bool,
}

/// Position and clock of the database.
#[derive(Clone, Copy, Debug)]
pub struct DatabasePosition {
    /// The epoch of the database.
    pub epoch: Uuid,
    pub revision: i64,
    pub now: OffsetDateTime,
}

/// How many Envoys have a change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rollout {
    /// The epoch of the database.
    pub epoch: Uuid,
    pub filters: i64,
    /// Live Envoys that have the change.
    pub applied: i64,
    /// Seconds since the slowest of the other live Envoys last confirmed an older revision.
    pub confirmed_s: Option<f64>,
    /// Envoys that are not live, were live within [`SHOWN`], and did not have the change then. They have ended, or are cut
    /// off and still serve what they had.
    pub silent: i64,
}

fn interval(of: Duration) -> PgInterval {
    PgInterval { months: 0, days: 0, microseconds: i64::try_from(of.as_micros()).unwrap_or(i64::MAX) }
}

/// Writes the status of some Envoys. Times are sent as ages, to avoid skew between the clocks of replicas. A newer revision
/// that an Envoy reported through another replica is kept: within an epoch its store never goes back.
pub(super) async fn write(pool: &PgPool, heard: &[(ReporterId, KnownEnvoy)]) -> Result<(), sqlx::Error> {
    // In one order, so that replicas lock rows in one order.
    let mut heard: Vec<_> = heard.iter().collect();
    heard.sort_by_key(|(reporter, _)| *reporter);
    let column = |of: &dyn Fn(&KnownEnvoy) -> Option<i64>| heard.iter().map(|(_, known)| of(known)).collect::<Vec<_>>();
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let ids: Vec<Uuid> = heard.iter().map(|(reporter, _)| (*reporter).into()).collect();
    let sync_keys: Vec<Uuid> = heard.iter().map(|(_, known)| known.sync_key).collect();
    let addresses: Vec<Option<String>> = heard.iter().map(|(_, known)| known.address.clone()).collect();
    let versions: Vec<Option<String>> = heard.iter().map(|(_, known)| known.version.clone()).collect();
    let epochs: Vec<Uuid> = heard
        .iter()
        .map(|(_, known)| known.holds.map_or(Uuid::nil(), |(epoch, _)| Uuid::from_bytes(epoch.0)))
        .collect();
    let revisions = column(&|known| Some(known.holds.map_or(0, |(_, revision)| number(revision))));
    let confirmed: Vec<f64> = heard.iter().map(|(_, known)| known.confirmed.elapsed().as_secs_f64()).collect();
    let seen: Vec<f64> = heard.iter().map(|(_, known)| known.seen.elapsed().as_secs_f64()).collect();
    let pending = column(&|known| known.pending.map(number));
    let reported: Vec<Option<f64>> =
        heard.iter().map(|(_, known)| known.reported.map(|at| at.elapsed().as_secs_f64())).collect();
    sqlx::query!(
        "insert into filters (reporter, sync_key_id, address, version, epoch, revision, confirmed_at, seen_at,
            pending_requests, reported_at)
        select new.reporter, k.id, new.address, new.version, new.epoch, new.revision,
            now() - make_interval(secs => new.confirmed_s), now() - make_interval(secs => new.seen_s), new.pending,
            now() - make_interval(secs => new.reported_s)
        from unnest(
            $1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::uuid[], $6::bigint[], $7::float8[], $8::float8[],
            $9::bigint[], $10::float8[]
        ) as new (
            reporter, sync_key, address, version, epoch, revision, confirmed_s, seen_s, pending, reported_s
        )
        left join api_keys k on k.id = new.sync_key
        order by new.reporter
        on conflict (reporter) do update set
            sync_key_id = coalesce(excluded.sync_key_id, filters.sync_key_id),
            address = coalesce(excluded.address, filters.address),
            version = coalesce(excluded.version, filters.version),
            (epoch, revision, confirmed_at) = (
                select case when newer then excluded.epoch else filters.epoch end,
                    case when newer then excluded.revision else filters.revision end,
                    case when newer then greatest(excluded.confirmed_at, filters.confirmed_at)
                        else filters.confirmed_at end
                from (
                    select excluded.epoch <> '00000000-0000-0000-0000-000000000000' and case filters.epoch
                        when '00000000-0000-0000-0000-000000000000' then true
                        when excluded.epoch then excluded.revision >= filters.revision
                        else excluded.confirmed_at >= filters.confirmed_at
                    end as newer
                ) judged
            ),
            seen_at = greatest(filters.seen_at, excluded.seen_at),
            pending_requests = coalesce(excluded.pending_requests, filters.pending_requests),
            reported_at = greatest(filters.reported_at, excluded.reported_at)
        where filters.sync_key_id is null or excluded.sync_key_id is null or filters.sync_key_id = excluded.sync_key_id",
        &ids,
        &sync_keys,
        &addresses as &[Option<String>],
        &versions as &[Option<String>],
        &epochs,
        &revisions as &[Option<i64>],
        &confirmed,
        &seen,
        &pending as &[Option<i64>],
        &reported as &[Option<f64>]
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// How many Envoys of each sync key are live, over all replicas. Those of a key that is gone count under the nil id.
pub async fn live(pool: &PgPool) -> Result<HashMap<Uuid, u32>, sqlx::Error> {
    let live = sqlx::query!(
        r#"select sync_key_id, count(*) as "live!" from filters where seen_at > now() - $1::interval
        group by sync_key_id"#,
        interval(SILENT)
    )
    .fetch_all(pool)
    .await?;
    let count = |live: i64| u32::try_from(live).unwrap_or(u32::MAX);
    Ok(live.into_iter().map(|row| (row.sync_key_id.unwrap_or_default(), count(row.live))).collect())
}

/// Reads the Envoys that polled or reported within a day, after one by its id, at most `limit`, and the revision of the store.
pub async fn list(
    pool: &PgPool,
    after: Option<Uuid>,
    limit: i64,
) -> Result<(DatabasePosition, Vec<EnvoyStatus>), sqlx::Error> {
    // The Envoys before the store: none is ahead of it then.
    let filters = sqlx::query_as!(
        EnvoyStatus,
        r#"select reporter, sync_key_id, address, version, epoch, revision, confirmed_at, seen_at, pending_requests,
            reported_at, seen_at > now() - $1::interval as "live!"
        from filters
        where seen_at > now() - $2::interval and ($3::uuid is null or reporter > $3)
        order by reporter limit $4"#,
        interval(SILENT),
        interval(SHOWN),
        after,
        limit
    )
    .fetch_all(pool)
    .await?;
    Ok((position(pool).await?, filters))
}

/// Reads what is committed, and the clock.
pub async fn position(pool: &PgPool) -> Result<DatabasePosition, sqlx::Error> {
    let present = sqlx::query_as!(DatabasePosition, r#"select epoch, revision, now() as "now!" from store_state"#);
    present.fetch_one(pool).await
}

/// The newest revision that brought a change of this key: of itself, of a secret that it had, of its roles or its plan.
pub async fn revision_of(pool: &PgPool, key_id: Uuid) -> Result<Option<i64>, sqlx::Error> {
    let revision = sqlx::query_scalar!(
        "select greatest(
            k.revision,
            (select max(revision) from retired_secrets where key_id = k.id),
            (select max(revision) from definitions
                where number = any(k.role_numbers) or number = coalesce(k.plan_number, k.owner_plan_number))
        )
        from api_keys k where k.id = $1",
        key_id
    );
    Ok(revision.fetch_optional(pool).await?.flatten())
}

/// Counts the live Envoys, and those of them that confirmed a revision.
pub async fn rollout(pool: &PgPool, revision: i64) -> Result<Rollout, sqlx::Error> {
    sqlx::query_as!(
        Rollout,
        // The plan does not depend on the parameters, so that PostgreSQL makes it once.
        r#"select s.epoch, f.filters as "filters!", f.applied as "applied!", f.silent as "silent!",
            extract(epoch from now() - f.behind_since)::float8 as confirmed_s
        from store_state s cross join lateral (
            select count(*) filter (where live) as filters, count(*) filter (where live and applied) as applied,
                count(*) filter (where shown and not live and not applied) as silent,
                min(confirmed_at) filter (where live and not applied) as behind_since
            from (
                select confirmed_at, seen_at > now() - $2::interval as live, seen_at > now() - $3::interval as shown,
                    epoch = s.epoch and revision >= $1 as applied
                from filters
            ) judged
        ) f
        where s.one"#,
        revision,
        interval(SILENT),
        interval(SHOWN)
    )
    .fetch_one(pool)
    .await
}

/// Deletes Envoys that are not live beyond the newest `SHOWN_OF_KEY` of each sync key, since a stolen sync key could invent more
/// and more.
pub async fn trim(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let gone = sqlx::query!(
        "delete from filters where reporter in (
            select reporter from (
                select reporter, row_number() over (partition by sync_key_id order by seen_at desc) as place from filters
                where seen_at < now() - $1::interval
            ) silent where place > $2
        )",
        interval(SILENT),
        SHOWN_OF_KEY
    );
    Ok(gone.execute(pool).await?.rows_affected())
}

/// Deletes Envoys that neither polled nor reported for a day.
pub async fn forget(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let gone = sqlx::query!("delete from filters where seen_at < now() - $1::interval", interval(SHOWN));
    Ok(gone.execute(pool).await?.rows_affected())
}
