//! The quota that applies to a key: its own, or that of its plan. The row of the key has a copy, so that the records of filters
//! are read from one table, and so that filters learn of each change.

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

/// Copies the quotas that apply to the rows of keys. Then opens keys whose quota is no longer exhausted, because it grew or was
/// removed, and closes keys whose quota shrank. Returns how many rows changed. Statements that would change none are not
/// executed, since they would wake every filter.
///
/// Call it in the transaction that changes the quota, the plan or the assignment, after that change: `store_state` is then locked.
pub async fn apply_quotas(connection: &mut PgConnection, whose: Whose<'_>) -> Result<u64, sqlx::Error> {
    let (keys, plan, owner) = match whose {
        Whose::Keys(ids) => (Some(ids), None, None),
        Whose::Plan(number) => (None, Some(number), None),
        Whose::Owner(id) => (None, None, Some(id)),
    };
    let of = sqlx::query!(
        r#"select id as "id!", differs as "differs!" from (
            select k.id, k.quota_exceeded, quota_in_zone(coalesce(k.quota, d.quota), k.owner_time_zone) as quota,
                quota_in_zone(coalesce(k.quota, d.quota), k.owner_time_zone) is distinct from k.applied_quota as differs
            from api_keys k
            left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
            where k.revoked_at is null
                and ($1::uuid[] is null or k.id = any($1))
                and ($2::integer is null or coalesce(k.plan_number, k.owner_plan_number) = $2)
                and ($3::uuid is null or k.owner_id = $3)
        ) keys where differs or quota is not null or quota_exceeded"#,
        keys,
        plan,
        owner
    )
    .fetch_all(&mut *connection)
    .await?;
    let due: Vec<_> = of.iter().filter(|key| key.differs).map(|key| key.id).collect();
    if !due.is_empty() {
        sqlx::query!(
            "update api_keys k set applied_quota = due.quota, quota_fill = quota_fill + 1
            from (
                select k.id, quota_in_zone(coalesce(k.quota, d.quota), k.owner_time_zone) as quota
                from api_keys k
                left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
                where k.id = any($1)
            ) due where k.id = due.id",
            &due
        )
        .execute(&mut *connection)
        .await?;
    }
    let with_quota: Vec<_> = of.iter().map(|key| key.id).collect();
    let changed = due.len().saturating_add(reconsider(connection, &with_quota).await?);
    Ok(u64::try_from(changed).unwrap_or(u64::MAX))
}
