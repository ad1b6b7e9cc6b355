//! Statistics of the query planner. A connection keeps its query plans; one made while the tables had a handful of
//! rows scans them as a whole later. PostgreSQL renews statistics once a minute, which is late while tables grow
//! from nothing or during a large import.

use sqlx::PgPool;

/// Renews the statistics if keys, users, pools or allowances have multiplied since. Returns whether it did.
pub async fn renew(pool: &PgPool) -> Result<bool, sqlx::Error> {
    let has_grown = sqlx::query_scalar!(
        r#"select exists (
            select from pg_stat_user_tables s join pg_class c on c.oid = s.relid
            where s.relid in (
                'api_keys'::regclass, 'user_preferences'::regclass, 'pools'::regclass, 'allowances'::regclass
            ) and pg_has_role(c.relowner, 'usage')
                and s.n_live_tup > 100 + 3 * greatest(c.reltuples, 0)
        ) as "has_grown!""#
    )
    .fetch_one(pool)
    .await?;
    if has_grown {
        // A locked table is skipped. The next run takes it.
        sqlx::query!("analyze (skip_locked) api_keys, user_preferences, pools, allowances").execute(pool).await?;
    }
    Ok(has_grown)
}
