//! Books what reports have used of quotas and credits, and what of that an Envoy held as an allowance.
//!
//! Keys without a quota whose owner is not metered cost nothing here: [`bookable`] finds the others by the index
//! `api_keys_booked`. Requests wait for pools, so pools are locked last, and nothing is waited for afterwards.

use std::collections::{BTreeMap, BTreeSet};

use contract::outcome::Outcome;
use contract::usage::Report;
use limits::pool::{Kind, PoolId, Subject};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::allowances;
use crate::credits;
use crate::domain::Quota;
use crate::quota::{self, QuotaId};

/// Reports of one Envoy that were not applied before.
#[derive(Debug)]
pub(super) struct Fresh<'a> {
    /// The Envoy process.
    pub reporter: Uuid,
    /// The reports.
    pub reports: Vec<&'a Report>,
}

/// A key whose usage counts against a quota or credits.
struct Bookable {
    owner: Uuid,
    plan: Option<i32>,
    metered: bool,
    quota: Option<Quota>,
    /// Filters refuse the key already because its quota is exhausted.
    is_shut: bool,
}

impl Bookable {
    fn quota_id(&self, key: Uuid) -> Option<QuotaId> {
        Some(QuotaId::of(self.quota.as_ref()?.per, key, self.owner, self.plan))
    }
}

/// What each Envoy has used of each pool.
type Used = BTreeMap<(PoolId, Uuid), u64>;

/// Books what new reports have used. `keys`: those that the reports count. Returns the quotas that are exhausted and whose keys
/// filters do not refuse yet.
pub(super) async fn book(
    connection: &mut PgConnection,
    fresh: &[Fresh<'_>],
    keys: &[Uuid],
) -> Result<Vec<QuotaId>, sqlx::Error> {
    let bookable = bookable(connection, keys).await?;
    if bookable.is_empty() {
        return Ok(Vec::new());
    }
    let mut used = used(fresh, &bookable);
    used.retain(|_, tokens| *tokens > 0);

    let of_owners: BTreeSet<Uuid> = used
        .keys()
        .filter(|(pool, _)| pool.kind == Kind::Credits)
        .map(|(pool, _)| pool.subject.0)
        .map(Uuid::from_bytes)
        .collect();
    if !of_owners.is_empty() {
        let owners: Vec<Uuid> = of_owners.into_iter().collect();
        let locked = credits::lock(connection, &owners).await?;
        let cost = |owner: Uuid| {
            let pool = PoolId::of_credits(owner.into());
            used.range((pool, Uuid::nil())..=(pool, Uuid::max()))
                .fold(0_u64, |sum, (_, cost)| sum.saturating_add(*cost))
        };
        let costs: Vec<_> = locked.into_iter().map(|owner| (owner, cost(owner.id))).collect();
        // `store_state` may be held from here on, until the transaction ends.
        credits::book_usage(connection, &costs).await?;
    }

    let pools: BTreeSet<PoolId> = used.keys().map(|(pool, _)| *pool).collect();
    allowances::lock(connection, &pools).await?;
    let exhausted = count_quotas(connection, &bookable, &used).await?;
    allowances::book(connection, &used).await?;
    Ok(exhausted)
}

async fn bookable(connection: &mut PgConnection, keys: &[Uuid]) -> Result<BTreeMap<Uuid, Bookable>, sqlx::Error> {
    if keys.is_empty() {
        return Ok(BTreeMap::new());
    }
    let rows = sqlx::query!(
        r#"select id, owner_id, coalesce(plan_number, owner_plan_number) as plan_number, metered, applied_quota,
            quota_exceeded and quota_resets_at > now() as "is_shut"
        from api_keys where id = any($1) and (applied_quota is not null or metered)"#,
        keys
    )
    .fetch_all(connection)
    .await?;
    let bookable = rows.into_iter().map(|row| {
        let key = Bookable {
            owner: row.owner_id,
            plan: row.plan_number,
            metered: row.metered,
            quota: Quota::of(row.applied_quota),
            is_shut: row.is_shut.unwrap_or_default(),
        };
        (row.id, key)
    });
    Ok(bookable.collect())
}

fn used(fresh: &[Fresh<'_>], bookable: &BTreeMap<Uuid, Bookable>) -> Used {
    let mut used = Used::new();
    for Fresh { reporter, reports } in fresh {
        for count in reports.iter().flat_map(|report| &report.counts) {
            let Some(key) = count.of.key.filter(|_| count.of.outcome == Outcome::Allowed.code()) else { continue };
            let id = Uuid::from(key.id);
            let Some(key) = bookable.get(&id) else { continue };
            let mut add = |pool: PoolId, tokens: u64| {
                let sum = used.entry((pool, *reporter)).or_default();
                *sum = sum.saturating_add(tokens);
            };
            if let Some(quota) = key.quota_id(id) {
                add(pool_of(quota), count.requests);
            }
            if key.metered {
                add(PoolId::of_credits(key.owner.into()), count.cost);
            }
        }
    }
    used
}

fn pool_of(quota: QuotaId) -> PoolId {
    PoolId { kind: Kind::Quota, subject: Subject(quota.subject.into_bytes()), tag: quota.plan.cast_unsigned().into() }
}

/// Counts requests against the present windows of quotas, see [`book`].
async fn count_quotas(
    connection: &mut PgConnection,
    bookable: &BTreeMap<Uuid, Bookable>,
    used: &Used,
) -> Result<Vec<QuotaId>, sqlx::Error> {
    let mut counted: BTreeMap<QuotaId, (Quota, i64)> = BTreeMap::new();
    let mut open = BTreeSet::new();
    for (key, of) in bookable {
        let (Some(id), Some(quota)) = (of.quota_id(*key), &of.quota) else { continue };
        if !of.is_shut {
            open.insert(id);
        }
        let pool = pool_of(id);
        let of_it = used.range((pool, Uuid::nil())..=(pool, Uuid::max()));
        let requests = of_it.fold(0_u64, |sum, (_, requests)| sum.saturating_add(*requests));
        counted.insert(id, (quota.clone(), i64::try_from(requests).unwrap_or(i64::MAX)));
    }
    if counted.is_empty() {
        return Ok(Vec::new());
    }
    let now_used = quota::count(connection, &counted).await?;
    let exhausted = now_used
        .into_iter()
        .filter(|(id, used)| open.contains(id) && counted.get(id).is_some_and(|(quota, _)| used.exceeds(quota)));
    Ok(exhausted.map(|(id, _)| id).collect())
}

#[cfg(test)]
mod tests {
    use contract::id::{KeyId, ReporterId};
    use contract::record::Per;
    use contract::usage::{Count, KeyRef, Subject as Counted};

    use super::*;
    use crate::domain::Period;

    fn key(owner: u8, per: Option<Per>, metered: bool) -> Bookable {
        let quota = per.map(|per| Quota {
            requests: 9,
            period: Period::Day,
            time_zone: None,
            anchor_day: None,
            window_s: None,
            per,
        });
        Bookable { owner: Uuid::from_bytes([owner; 16]), plan: Some(3), metered, quota, is_shut: false }
    }

    fn count(key: u8, outcome: Outcome, requests: u64, cost: u64) -> Count {
        let key = Some(KeyRef { id: KeyId([key; 16]), generation: 1 });
        Count { of: Counted { key, outcome: outcome.code(), hour: 1 }, requests, cost, last_ms: 0 }
    }

    #[test]
    fn allowed_requests_count_against_the_quota_and_their_cost_against_the_credits_of_each_envoy() {
        let bookable = BTreeMap::from([
            (Uuid::from_bytes([1; 16]), key(9, Some(Per::Owner), true)),
            (Uuid::from_bytes([2; 16]), key(9, Some(Per::Owner), true)),
            (Uuid::from_bytes([3; 16]), key(9, Some(Per::Key), false)),
        ]);
        let counts = vec![
            count(1, Outcome::Allowed, 5, 50),
            count(2, Outcome::Allowed, 1, 2),
            count(2, Outcome::QuotaExceeded, 7, 7),
            count(3, Outcome::Allowed, 4, 0),
            count(4, Outcome::Allowed, 6, 6),
        ];
        let report = Report { reporter: ReporterId([7; 16]), seq: 1, counts };
        let reporter = Uuid::from_bytes([7; 16]);
        let used = used(&[Fresh { reporter, reports: vec![&report] }], &bookable);
        let pool = |kind, subject: u8, tag| PoolId { kind, subject: Subject([subject; 16]), tag };
        let expected = [
            ((pool(Kind::Quota, 3, 0), reporter), 4),
            ((pool(Kind::Quota, 9, 3), reporter), 6),
            ((pool(Kind::Credits, 9, 0), reporter), 52),
        ];
        assert_eq!(used, expected.into());
    }
}
