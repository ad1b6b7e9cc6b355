//! What PostgreSQL plans with. A connection keeps the plans that it made, and one of when there were a handful of keys reads
//! all of them for each request. PostgreSQL looks after that only once a minute: while tables grow from nothing, or take in a
//! large import, that is long.

use sqlx::PgPool;

/// Counts anew if there are several times the keys or users that the plans were made for, and says whether it was due.
pub async fn renew(pool: &PgPool) -> Result<bool, sqlx::Error> {
    let has_grown = sqlx::query_scalar!(
        r#"select exists (
            select from pg_stat_user_tables s join pg_class c on c.oid = s.relid
            where s.relid in ('api_keys'::regclass, 'user_preferences'::regclass) and pg_has_role(c.relowner, 'usage')
                and s.n_live_tup > 100 + 3 * greatest(c.reltuples, 0)
        ) as "has_grown!""#
    )
    .fetch_one(pool)
    .await?;
    if has_grown {
        // Whoever else works on a table may do so: it is looked at again soon.
        sqlx::query!("analyze (skip_locked) api_keys, user_preferences").execute(pool).await?;
    }
    Ok(has_grown)
}
