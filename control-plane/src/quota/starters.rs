//! Starters of keys with a quota: the requests that an Envoy may admit before it has a lease. The row of the key has a copy, so
//! that records are read from one table.

use sqlx::PgConnection;
use uuid::Uuid;

use super::reconsider;

/// Keys whose quota may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose<'a> {
    /// Single keys.
    Keys(&'a [Uuid]),
    /// All keys that a plan applies to, by its number.
    Plan(i32),
    /// All keys of a user.
    Owner(Uuid),
}

/// Sets the starters of keys to a sixteenth of their quota (at least 1, at most 1,000,000, none without a quota). Then opens keys
/// whose quota is no longer exhausted, because it grew or was removed, and closes keys whose quota shrank. Returns how many keys
/// changed. Statements that would change none are not executed, since they would wake every filter.
///
/// Call it in the transaction that changes the quota, the plan or the assignment, after that change: `store_state` is then locked.
pub async fn refresh_starters(connection: &mut PgConnection, whose: Whose<'_>) -> Result<u64, sqlx::Error> {
    let (keys, plan, owner) = match whose {
        Whose::Keys(ids) => (Some(ids), None, None),
        Whose::Plan(number) => (None, Some(number), None),
        Whose::Owner(id) => (None, None, Some(id)),
    };
    let of = sqlx::query!(
        r#"select id as "id!", starter as "starter!", starter <> present as "differs!", exceeded as "exceeded!" from (
            select k.id, coalesce(k.quota_starter, 0) as present, k.quota_exceeded as exceeded,
                case when q.requests is null then 0 else least(greatest(q.requests / 16, 1), 1000000) end::integer
                    as starter
            from api_keys k
            left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number)
            cross join lateral (select (coalesce(k.quota, d.quota) ->> 'requests')::bigint as requests) q
            where k.revoked_at is null
                and ($1::uuid[] is null or k.id = any($1))
                and ($2::integer is null or coalesce(k.plan_number, k.owner_plan_number) = $2)
                and ($3::uuid is null or k.owner_id = $3)
        ) keys where starter <> 0 or present <> 0 or exceeded"#,
        keys,
        plan,
        owner
    )
    .fetch_all(&mut *connection)
    .await?;
    let due: Vec<_> = of.iter().filter(|key| key.differs).collect();
    let mut changed = due.len();
    if !due.is_empty() {
        let ids: Vec<_> = due.iter().map(|key| key.id).collect();
        let starters: Vec<_> = due.iter().map(|key| key.starter).collect();
        sqlx::query!(
            "update api_keys k set quota_starter = nullif(due.starter, 0)
            from unnest($1::uuid[], $2::integer[]) due (id, starter) where k.id = due.id",
            &ids,
            &starters
        )
        .execute(&mut *connection)
        .await?;
    }
    let with_quota: Vec<_> = of.iter().map(|key| key.id).collect();
    changed = changed.saturating_add(reconsider(connection, &with_quota).await?);
    Ok(u64::try_from(changed).unwrap_or(u64::MAX))
}
