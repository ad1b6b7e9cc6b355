//! Leases in the answers to reports, over the real router and a real PostgreSQL.

use crate::support::reports::{Envoy, count, granted};
use crate::support::{Fixture, execute, request, scalar};
use contract::outcome::Outcome;
use contract::rate::WHOLE;
use contract::usage::Report;
use control_plane::metering::{Submission, apply, lease};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const LIMITS: &str = r#"[{"name": "a", "requests": 100, "window_s": 1, "burst": 100, "shared": true}]"#;
const ALONE: &str = r#"[{"name": "a", "requests": 100, "window_s": 1, "burst": 100, "shared": false}]"#;

async fn limit(pool: &PgPool, id: Uuid, limits: &str) {
    execute(pool, &format!("update api_keys set rate_limits = '{limits}' where id = '{id}'")).await;
}

/// All that is held of a key's limits.
async fn held(pool: &PgPool, id: Uuid) -> i64 {
    let sql = format!("select coalesce(sum(held), 0)::bigint from leases where stock = 0 and subject = '{id}'");
    scalar(pool, sql).await
}

async fn rows(pool: &PgPool) -> i64 {
    let count = "select (select count(*) from leases) + (select count(*) from lease_locks)";
    scalar(pool, count).await
}

#[sqlx::test(migrations = "./migrations")]
async fn keys_that_draw_from_nothing_shared_leave_no_trace(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (plain, _) = fixture.key("a@example.com", &[]).await;
    let (alone, _) = fixture.key("a@example.com", &[]).await;
    limit(&pool, alone, ALONE).await;
    let mut envoy = Envoy::new(1, &sync);
    let counts = [count(plain, Outcome::Allowed, 9), count(alone, Outcome::RateLimited, 9)];
    assert_eq!(envoy.report(&fixture, &counts).await, []);
    assert_eq!(envoy.report(&fixture, &[]).await, []);
    assert_eq!(rows(&pool).await, 0);
}

#[sqlx::test(migrations = "./migrations")]
async fn the_share_of_a_limit_moves_to_where_the_demand_is(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    limit(&pool, id, LIMITS).await;
    let (mut one, mut two) = (Envoy::new(1, &sync), Envoy::new(2, &sync));
    let busy = [count(id, Outcome::Allowed, 20), count(id, Outcome::RateLimited, 5)];
    let whole = u64::from(WHOLE);
    assert_eq!(granted(&one.report(&fixture, &busy).await, 0, id), Some((whole, 0)));
    // What the first holds is not the second's until the first has given it up and said so.
    assert_eq!(granted(&two.report(&fixture, &busy).await, 0, id), Some((1, 0)));
    let (less, _) = granted(&one.report(&fixture, &busy).await, 0, id).unwrap();
    assert!((400_000..=600_000).contains(&less), "{less}");
    assert_eq!(granted(&two.report(&fixture, &busy).await, 0, id), Some((1, 0)));
    // An answer that was not heard is given again, and proves nothing.
    assert_eq!(granted(&one.again(&fixture, &busy).await, 0, id), Some((less, 0)));
    assert_eq!(granted(&two.report(&fixture, &busy).await, 0, id), Some((1, 0)));
    one.report(&fixture, &busy).await;
    let (more, _) = granted(&two.report(&fixture, &busy).await, 0, id).unwrap();
    assert!((400_000..=600_000).contains(&more), "{more}");
    assert!(held(&pool, id).await <= i64::from(WHOLE));
    // The first goes quiet, leaves its share to others and says so twice.
    assert_eq!(granted(&one.report(&fixture, &[]).await, 0, id), Some((0, 0)));
    assert_eq!(one.report(&fixture, &[]).await.len(), 1);
    assert_eq!(one.report(&fixture, &[]).await, []);
    execute(&pool, "update leases set renewed_at = renewed_at - interval '4 seconds' where told = 0").await;
    assert_eq!(granted(&two.report(&fixture, &busy).await, 0, id), Some((whole, 0)));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_plans_limits_are_shared_too(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    execute(&pool, &format!("insert into definitions (kind, name, rate_limits) values ('plan', 'p', '{LIMITS}')"))
        .await;
    execute(&pool, "update api_keys set plan_number = (select number from definitions) where owner_id = (select id from user_preferences where email = 'a@example.com')").await;
    let grants = Envoy::new(1, &sync).report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    assert_eq!(granted(&grants, 0, id), Some((WHOLE.into(), 0)));
    // Limits of its own go before the plan's.
    limit(&pool, id, ALONE).await;
    assert_eq!(Envoy::new(2, &sync).report(&fixture, &[count(id, Outcome::Allowed, 1)]).await, []);
}

#[sqlx::test(migrations = "./migrations")]
async fn what_is_leased_of_credits_is_seen_and_never_more_than_there_is(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let owner: Uuid = scalar(&pool, format!("select owner_id from api_keys where id = '{id}'")).await;
    let (ledger, balance) = (format!("/v1/users/{owner}/ledger"), format!("/v1/users/{owner}/balance"));
    let add = json!({"amount": 1_000}).to_string();
    assert_eq!(fixture.send(request("POST", &ledger, Some(&admin), add.clone())).await.status, 201);
    let account = async || -> Value {
        let reply = fixture.get(&balance, &admin).await.json();
        json!([reply["balance"], reply["leased"], reply["available"]])
    };
    let mut envoys: Vec<Envoy> = (1..=3).map(|number| Envoy::new(number, &sync)).collect();
    let grants = envoys[0].report(&fixture, &[count(id, Outcome::Allowed, 50)]).await;
    assert_eq!(granted(&grants, 2, owner), Some((50 + 200, 2)));
    assert_eq!(account().await, json!([950, 200, 750]));
    assert_eq!(granted(&grants, 4, owner), None);
    // An Envoy that refused a request gets the balance: waiting does not help a request that costs more.
    let grants = envoys[0].report(&fixture, &[count(id, Outcome::CreditsExhausted, 1)]).await;
    assert_eq!(granted(&grants, 4, owner), Some((950, 2)));
    let mut spent = 50;
    for round in 0..40 {
        for envoy in &mut envoys {
            envoy.report(&fixture, &[count(id, Outcome::Allowed, 4), count(id, Outcome::CreditsExhausted, 1)]).await;
            spent += 4;
            let leased: i64 =
                scalar(&pool, "select sum(greatest(held - spent, 0))::bigint from leases where stock = 2").await;
            // Each had a starter of 62 to begin with, of which nobody knew.
            assert!(leased <= 1_000 - spent + 3 * 62 || leased == 0, "round {round}: {leased} of {}", 1_000 - spent);
        }
    }
    // Empty reports give back what is held, three seconds after it was last used.
    // A second more than that: times are kept in whole milliseconds, and the first report may come within one.
    execute(&pool, "update leases set renewed_at = now() - interval '4 seconds'").await;
    for _ in 0..2 {
        for envoy in &mut envoys {
            envoy.report(&fixture, &[]).await;
        }
    }
    assert_eq!(account().await, json!([1_000 - spent, 0, 1_000 - spent]));
    // A top-up when there is some is in the next answer; one that opens the door is a new turn.
    assert_eq!(fixture.send(request("POST", &ledger, Some(&admin), add)).await.status, 201);
    let grants = envoys[1].report(&fixture, &[count(id, Outcome::Allowed, 10)]).await;
    assert_eq!(granted(&grants, 2, owner), Some((160 + 10 + 40, 2)));
    // What an Envoy holds that is not heard of for a minute is counted no longer.
    execute(&pool, "update usage_reporters set reported_at = now() - interval '61 seconds'").await;
    execute(&pool, "update leases set renewed_at = now() - interval '61 seconds'").await;
    assert_eq!(account().await[1], 0);
}

#[sqlx::test(migrations = "./migrations")]
async fn however_many_envoys_come_at_once_no_more_than_the_whole_is_held(pool: PgPool) {
    let (one, other) = (Fixture::new(&pool).await, Fixture::new(&pool).await);
    let (_, sync) = one.key("operator@example.com", &["sync"]).await;
    let (id, _) = one.key("a@example.com", &[]).await;
    let (second, _) = one.key("b@example.com", &[]).await;
    limit(&pool, id, LIMITS).await;
    limit(&pool, second, LIMITS).await;
    let sends = (1..=20_u8).map(|number| {
        // Two replicas of the control plane.
        let fixture = if number % 2 == 0 { &one } else { &other };
        let (sync, pool) = (&sync, &pool);
        async move {
            let mut envoy = Envoy::new(number, sync);
            for round in 0..6 {
                let requests = u64::from(number) * 3 + round;
                let counts = [count(id, Outcome::Allowed, requests), count(second, Outcome::RateLimited, requests)];
                let grants = envoy.report(fixture, &counts).await;
                assert_eq!(grants.len(), 2);
                assert!(held(pool, id).await <= i64::from(WHOLE));
                assert!(held(pool, second).await <= i64::from(WHOLE));
            }
        }
    });
    futures_util::future::join_all(sends).await;
    // Each has a row, and each key its anchor.
    assert_eq!(rows(&pool).await, 2 * 21);
}

#[sqlx::test(migrations = "./migrations")]
async fn last_words_from_a_log_are_booked_and_lease_nothing(pool: PgPool) {
    let (id, _) = crate::support::key(&pool, "a@example.com", &[]).await;
    limit(&pool, id, LIMITS).await;
    execute(&pool, "update user_preferences set metered = true, credits_starter = 1").await;
    execute(
        &pool,
        "insert into ledger (owner_id, kind, amount, balance) select id, 'top_up', 10, 0 from user_preferences",
    )
    .await;
    let reporter = contract::id::ReporterId([9; 16]);
    let reports = vec![Report { reporter, seq: 1, counts: vec![count(id, Outcome::Allowed, 4)] }];
    apply(&pool, &[Submission { reporter, sync_key: None, live: false, reports }]).await.unwrap();
    let balance: i64 = scalar(&pool, "select balance from user_preferences").await;
    assert_eq!((balance, rows(&pool).await), (6, 0));
}

#[sqlx::test(migrations = "./migrations")]
async fn what_envoys_held_that_are_long_gone_is_forgotten(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    limit(&pool, id, LIMITS).await;
    Envoy::new(1, &sync).report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    assert_eq!(lease::tidy(&pool).await.unwrap(), 0);
    execute(&pool, "update usage_reporters set reported_at = now() - interval '2 hours'").await;
    execute(&pool, "update leases set renewed_at = now() - interval '2 hours'").await;
    execute(&pool, "update lease_locks set created_at = now() - interval '2 hours'").await;
    assert_eq!(lease::tidy(&pool).await.unwrap(), 1);
    assert_eq!(lease::tidy(&pool).await.unwrap(), 1);
    assert_eq!(rows(&pool).await, 0);
    // And it is there again as soon as it is needed.
    let grants = Envoy::new(2, &sync).report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    assert_eq!(granted(&grants, 0, id), Some((WHOLE.into(), 0)));
}
