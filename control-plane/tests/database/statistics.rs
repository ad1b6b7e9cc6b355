//! PostgreSQL's plans while keys become many.

use control_plane::jobs::statistics::renew;
use portcullis_tests::wait::eventually;
use sqlx::PgPool;

#[sqlx::test(migrations = "./migrations")]
async fn tables_that_have_grown_from_nothing_are_counted_anew_and_then_left_alone(pool: PgPool) {
    // Nobody has to count a few.
    assert!(!renew(&pool).await.unwrap());
    sqlx::raw_sql(
        "insert into user_preferences (id, email) select gen_random_uuid(), n || '@example.com' from generate_series(1, 500) n;
        insert into api_keys (id, owner_id, name, hash, revision)
        select gen_random_uuid(), id, 'Many', sha256(convert_to(email, 'UTF8')), 0 from user_preferences",
    )
    .execute(&pool)
    .await
    .unwrap();
    // What a session has written, PostgreSQL tells the others a moment later.
    eventually("the tables to be counted", async || renew(&pool).await.unwrap().then_some(())).await.unwrap();
    let known: Vec<f32> = sqlx::query_scalar(
        "select reltuples from pg_class where oid in ('api_keys'::regclass, 'user_preferences'::regclass)",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(known, [500.0, 500.0]);
    eventually("the tables to be left alone", async || (!renew(&pool).await.unwrap()).then_some(())).await.unwrap();
}
