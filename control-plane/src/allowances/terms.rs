//! What pools allow at present: rate limits, quotas and credits, as keys, plans and users have them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use contract::rate::{Rate, tag};
use contract::record::{Per, RateLimit};
use limits::pool::{Kind, PoolId, Terms, owner_tag};
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::domain::Quota;
use crate::quota::{self, QuotaId, Use};

/// What a pool allows, without its use.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Allowed {
    /// A shared rate limit.
    Rate(Rate),
    /// A quota.
    Quota(QuotaId, Quota),
    /// The credits of a metered user.
    Credits(Uuid),
}

/// What the subject of a pool has: a key, or a user.
#[derive(Debug, Default)]
struct Subject {
    is_user: bool,
    /// Rate limits of a key: its own, or those of its plan.
    limits: Vec<RateLimit>,
    /// The quota of a key.
    quota: Option<Quota>,
    /// Whether a user's requests cost credits.
    metered: bool,
    /// A user's time zone.
    time_zone: Option<String>,
}

/// A plan with a limit or a quota that all keys of a user share.
struct Plan {
    number: i32,
    limits: Vec<RateLimit>,
    quota: Option<Quota>,
}

/// Reads what pools allow. Pools whose limit, quota or user does not exist are left out.
pub(super) async fn read(
    connection: &mut PgConnection,
    pools: &BTreeSet<PoolId>,
) -> Result<BTreeMap<PoolId, Allowed>, sqlx::Error> {
    let subjects = subjects(connection, pools).await?;
    let is_of_owner =
        |pool: &&PoolId| pool.kind != Kind::Credits && of(&subjects, pool).is_some_and(|subject| subject.is_user);
    let plans = if pools.iter().any(|pool| is_of_owner(&pool)) { plans(connection).await? } else { Vec::new() };
    let allowed = pools.iter().filter_map(|pool| Some((*pool, allowed(pool, of(&subjects, pool)?, &plans)?)));
    Ok(allowed.collect())
}

fn of<'a>(subjects: &'a HashMap<Uuid, Subject>, pool: &PoolId) -> Option<&'a Subject> {
    subjects.get(&Uuid::from_bytes(pool.subject.0))
}

async fn subjects(
    connection: &mut PgConnection,
    pools: &BTreeSet<PoolId>,
) -> Result<HashMap<Uuid, Subject>, sqlx::Error> {
    let ids: BTreeSet<Uuid> = pools.iter().map(|pool| Uuid::from_bytes(pool.subject.0)).collect();
    let ids: Vec<Uuid> = ids.into_iter().collect();
    let rows = sqlx::query!(
        r#"select k.id as "id!", false as "is_user!", k.applied_quota as quota, false as "metered!",
            null::text as time_zone,
            case when k.rate_limits <> '[]' then k.rate_limits else d.rate_limits end as "limits: Json<Vec<RateLimit>>"
        from unnest($1::uuid[]) as of (id) join api_keys k on k.id = of.id
        left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
        union all
        select u.id, true, null, u.metered, u.time_zone, null
        from unnest($1::uuid[]) as of (id) join user_preferences u on u.id = of.id"#,
        &ids
    )
    .fetch_all(connection)
    .await?;
    let subjects = rows.into_iter().map(|row| {
        let limits = row.limits.map(|limits| limits.0).unwrap_or_default();
        (
            row.id,
            Subject {
                is_user: row.is_user,
                limits,
                quota: Quota::of(row.quota),
                metered: row.metered,
                time_zone: row.time_zone,
            },
        )
    });
    Ok(subjects.collect())
}

async fn plans(connection: &mut PgConnection) -> Result<Vec<Plan>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select number, rate_limits as "rate_limits: Json<Vec<RateLimit>>", quota from definitions
        where kind = 'plan' and not removed
            and (rate_limits @> '[{"per": "owner"}]' or quota @> '{"per": "owner"}')"#
    )
    .fetch_all(connection)
    .await?;
    let plans =
        rows.into_iter().map(|row| Plan { number: row.number, limits: row.rate_limits.0, quota: Quota::of(row.quota) });
    Ok(plans.collect())
}

fn allowed(pool: &PoolId, subject: &Subject, plans: &[Plan]) -> Option<Allowed> {
    let id = Uuid::from_bytes(pool.subject.0);
    match pool.kind {
        Kind::Rate if subject.is_user => {
            let of_plan = |plan: &Plan| {
                let number = Some(plan.number.cast_unsigned());
                let is_it = |limit: &&RateLimit| {
                    limit.shared && limit.per == Per::Owner && owner_tag(&limit.name, number) == pool.tag
                };
                plan.limits.iter().find(is_it).map(Rate::of)
            };
            plans.iter().find_map(of_plan).map(Allowed::Rate)
        }
        Kind::Rate => {
            let is_it = |limit: &&RateLimit| limit.shared && limit.per == Per::Key && tag(&limit.name) == pool.tag;
            subject.limits.iter().find(is_it).map(Rate::of).map(Allowed::Rate)
        }
        Kind::Quota => {
            let plan = i32::try_from(pool.tag).ok()?;
            let quota = if subject.is_user {
                let plan = plans.iter().find(|of| of.number == plan)?;
                plan.quota.clone().filter(|quota| quota.per == Per::Owner)?.in_zone(subject.time_zone.as_deref())
            } else {
                subject.quota.clone().filter(|quota| quota.per == Per::Key && plan == 0)?
            };
            Some(Allowed::Quota(QuotaId { subject: id, plan }, quota))
        }
        Kind::Credits => (subject.metered && pool.tag == 0).then_some(Allowed::Credits(id)),
    }
}

/// What is left of quotas and balances. Their pools are locked.
#[derive(Debug, Default)]
pub(super) struct Stocks {
    used: BTreeMap<QuotaId, Use>,
    balances: HashMap<Uuid, (i64, Option<OffsetDateTime>)>,
}

impl Stocks {
    pub(super) async fn read(
        connection: &mut PgConnection,
        allowed: &BTreeMap<PoolId, Allowed>,
    ) -> Result<Self, sqlx::Error> {
        let mut stocks = Self::default();
        let quotas = allowed.values().filter_map(|allowed| match allowed {
            Allowed::Quota(id, quota) => Some((*id, quota.clone())),
            _ => None,
        });
        let quotas: BTreeMap<QuotaId, Quota> = quotas.collect();
        if !quotas.is_empty() {
            stocks.used = quota::present_use(&mut *connection, &quotas).await?;
        }
        let owners = allowed.values().filter_map(|allowed| match allowed {
            Allowed::Credits(owner) => Some(*owner),
            _ => None,
        });
        let owners: Vec<Uuid> = owners.collect();
        if !owners.is_empty() {
            let rows = sqlx::query!("select id, balance, refill_at from user_preferences where id = any($1)", &owners);
            let rows = rows.fetch_all(connection).await?;
            stocks.balances = rows.into_iter().map(|row| (row.id, (row.balance, row.refill_at))).collect();
        }
        Ok(stocks)
    }

    /// The terms of a pool.
    pub(super) fn terms(&self, allowed: &Allowed, now: OffsetDateTime) -> Terms {
        match allowed {
            Allowed::Rate(rate) => Terms::Rate(*rate),
            Allowed::Quota(id, quota) => {
                let used = self.used.get(id).cloned().unwrap_or_else(|| Use::none(quota, now));
                let left = quota.requests.saturating_sub(used.used);
                Terms::Stock { left, renews_in_ms: Some(ms_until(used.frees_at(quota), now)) }
            }
            Allowed::Credits(owner) => {
                let (left, refill_at) = self.balances.get(owner).copied().unwrap_or_default();
                Terms::Stock { left, renews_in_ms: refill_at.map(|at| ms_until(at, now)) }
            }
        }
    }
}

/// Milliseconds until then, at least one.
fn ms_until(at: OffsetDateTime, now: OffsetDateTime) -> u64 {
    u64::try_from((at - now).whole_milliseconds()).unwrap_or_default().saturating_add(1)
}

#[cfg(test)]
mod tests {
    use contract::id::{KeyId, OwnerId};
    use limits::pool::Subject as PoolSubject;

    use super::*;
    use crate::domain::Period;

    fn limit(name: &str, requests: u32, shared: bool, per: Per) -> RateLimit {
        RateLimit { name: name.into(), requests, window_s: 1, burst: requests, shared, per }
    }

    fn quota(requests: i64, per: Per) -> Quota {
        Quota { requests, period: Period::Day, time_zone: None, anchor_day: None, window_s: None, per }
    }

    #[test]
    fn a_pool_has_the_terms_of_its_key_its_user_or_its_plan_or_none() {
        let limits =
            vec![limit("a", 1, true, Per::Key), limit("b", 2, false, Per::Key), limit("c", 3, true, Per::Owner)];
        let key = Subject { limits: limits.clone(), quota: Some(quota(5, Per::Key)), ..Subject::default() };
        let user = Subject { is_user: true, metered: true, ..Subject::default() };
        let plans = [Plan { number: 7, limits: limits.clone(), quota: Some(quota(9, Per::Owner)) }];
        let of_key: PoolSubject = KeyId([1; 16]).into();
        let of_user: PoolSubject = OwnerId([2; 16]).into();
        let id = |kind, subject, tag| PoolId { kind, subject, tag };
        let key_id = QuotaId { subject: Uuid::from_bytes([1; 16]), plan: 0 };
        let user_id = QuotaId { subject: Uuid::from_bytes([2; 16]), plan: 7 };
        for (pool, subject, expected) in [
            (id(Kind::Rate, of_key, tag("a")), &key, Some(Allowed::Rate(Rate::of(&limits[0])))),
            (id(Kind::Rate, of_key, tag("b")), &key, None),
            (id(Kind::Rate, of_key, tag("c")), &key, None),
            (id(Kind::Rate, of_user, owner_tag("c", Some(7))), &user, Some(Allowed::Rate(Rate::of(&limits[2])))),
            (id(Kind::Rate, of_user, owner_tag("c", Some(8))), &user, None),
            (id(Kind::Rate, of_user, owner_tag("a", Some(7))), &user, None),
            (id(Kind::Quota, of_key, 0), &key, Some(Allowed::Quota(key_id, quota(5, Per::Key)))),
            (id(Kind::Quota, of_key, 7), &key, None),
            (id(Kind::Quota, of_user, 7), &user, Some(Allowed::Quota(user_id, quota(9, Per::Owner)))),
            (id(Kind::Quota, of_user, 0), &user, None),
            (id(Kind::Quota, of_user, u64::MAX), &user, None),
            (id(Kind::Credits, of_user, 0), &user, Some(Allowed::Credits(Uuid::from_bytes([2; 16])))),
            (id(Kind::Credits, of_key, 0), &key, None),
        ] {
            assert_eq!(allowed(&pool, subject, &plans), expected, "{pool:?}");
        }
    }
}
