//! PostgreSQL's statistics of tables that grow from nothing.

use crate::support::scalars;
use control_plane::jobs::statistics::renew;
use portcullis_tests::wait::eventually;
use sqlx::PgPool;

#[sqlx::test(migrations = "./migrations")]
async fn tables_that_have_grown_from_nothing_are_counted_anew_and_then_left_alone(pool: PgPool) {
    // Few rows need no new statistics.
    assert!(!renew(&pool).await.unwrap());
    sqlx::raw_sql(
        "insert into user_preferences (id, email) select gen_random_uuid(), n || '@example.com' from generate_series(1, 500) n;
        insert into api_keys (id, owner_id, name, hash, revision)
        select gen_random_uuid(), id, 'Many', sha256(convert_to(email, 'UTF8')), 0 from user_preferences",
    )
    .execute(&pool)
    .await
    .unwrap();
    // Other sessions see the row count a moment after the commit.
    eventually("the tables to be counted", async || renew(&pool).await.unwrap().then_some(())).await.unwrap();
    let sql = "select reltuples from pg_class where oid in ('api_keys'::regclass, 'user_preferences'::regclass)";
    let known: Vec<f32> = scalars(&pool, sql).await;
    assert_eq!(known, [500.0, 500.0]);
    eventually("the tables to be left alone", async || (!renew(&pool).await.unwrap()).then_some(())).await.unwrap();
}
