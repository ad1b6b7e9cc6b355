//! Calls for allowances: what is granted, booked, handed back and refused.

use std::time::{Duration, Instant};

use crate::support::gateway::{answer, call, end_alone, gateways};
use crate::support::reports::{Envoy, count};
use crate::support::{Fixture, change_key, execute, request, revision, row, rows, scalar};
use contract::id::{KeyId, ReporterId};
use contract::key::Secret;
use contract::outcome::Outcome;
use contract::rate::tag;
use contract::usage::Report;
use control_plane::allowances::tidy;
use control_plane::metering::{Submission, apply};
use limits::message::{Answer, Ask, Call, Grant};
use limits::pool::{Kind, PoolId};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const LIMIT: &str = r#"rate_limits = '[{"name": "a", "requests": 10, "window_s": 1000, "burst": 10, "shared": true}]'"#;
const QUOTA: &str =
    r#"applied_quota = '{"requests": 100, "period": "day"}', quota = '{"requests": 100, "period": "day"}'"#;

fn quota_of(key: Uuid) -> PoolId {
    PoolId { kind: Kind::Quota, subject: KeyId::from(key).into(), tag: 0 }
}

fn limit_of(key: Uuid) -> PoolId {
    PoolId { kind: Kind::Rate, subject: KeyId::from(key).into(), tag: tag("a") }
}

fn ask(pool: PoolId, need: u64, want: u64) -> Ask {
    Ask { need, least: need.min(1), want, ..Ask::new(pool, 1) }
}

fn call_of(number: u8, asks: &[Ask]) -> Call {
    Call { reporter: ReporterId([number; 16]), is_last: false, asks: asks.to_vec() }
}

async fn ask_one(fixture: &Fixture, sync: &Secret, number: u8, asked: Ask) -> Grant {
    answer(fixture, sync, &call_of(number, &[asked])).await.grants[0]
}

/// Used, held and remaining of the key's quota.
async fn quota_view(fixture: &Fixture, admin: &Secret, key: Uuid) -> Value {
    let view = fixture.get(&format!("/v1/keys/{key}/quota"), admin).await.expect(200);
    json!([view["used"], view["held"], view["remaining"]])
}

/// An admin key, a sync key, and a key with this setting, while Envoys 1 and 2 are live.
async fn two_envoys(pool: &PgPool, setting: &str) -> (Fixture, Secret, Secret, Uuid) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(pool).await;
    let (key, _) = fixture.key("ada@example.com", &[]).await;
    change_key(pool, key, setting).await;
    gateways(&fixture, &sync, 2).await;
    (fixture, admin, sync, key)
}

#[sqlx::test(migrations = "./migrations")]
async fn what_an_envoy_was_granted_is_held_until_it_is_reported_or_handed_back(pool: PgPool) {
    let (fixture, admin, sync, key) = two_envoys(&pool, QUOTA).await;
    let first = ask(quota_of(key), 10, 4);
    let grant = ask_one(&fixture, &sync, 1, first).await;
    assert_eq!((grant.granted, grant.held, grant.left, grant.others), (14, 14, 86, 0));
    assert!((1..=86_400_000).contains(&grant.empty_ms) || grant.empty_ms == 0, "{grant:?}");
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([0, 14, 86]));
    // The answer was lost: nothing more is granted.
    assert_eq!(ask_one(&fixture, &sync, 1, first).await.granted, 14);
    // The report books what was used, and the sums stay.
    let mut envoy = Envoy::new(1, &sync);
    envoy.report(&fixture, &[count(key, Outcome::Allowed, 10), count(key, Outcome::QuotaExceeded, 3)]).await;
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([10, 4, 86]));
    envoy.again(&fixture, &[count(key, Outcome::Allowed, 10)]).await;
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([10, 4, 86]));
    // Another Envoy sees what the first holds.
    let grant = ask_one(&fixture, &sync, 2, ask(quota_of(key), 1, 0)).await;
    assert_eq!((grant.granted, grant.left, grant.others), (1, 85, 4));
    let returned = Ask { granted: 14, spent: 10, returned: 4, need: 0, least: 0, want: 0, ..first };
    let grant = ask_one(&fixture, &sync, 1, returned).await;
    assert_eq!((grant.held, grant.left), (0, 89));
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([10, 1, 89]));
    // A call of an earlier session says nothing.
    let late = ask_one(&fixture, &sync, 1, Ask { session: 0, need: 50, ..first }).await;
    assert_eq!(late, Grant { session: 1, ..Grant::default() });
    // What was used without an allowance is booked as well.
    Envoy::new(3, &sync).report(&fixture, &[count(key, Outcome::Allowed, 5)]).await;
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([15, 1, 84]));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_rate_limit_counts_what_envoys_tell_and_comes_back_with_time(pool: PgPool) {
    let (fixture, _, sync, key) = two_envoys(&pool, LIMIT).await;
    let first = ask(limit_of(key), 6, 0);
    let grant = ask_one(&fixture, &sync, 1, first).await;
    assert_eq!((grant.granted, grant.left), (6, 4));
    let other = ask_one(&fixture, &sync, 2, ask(limit_of(key), 10, 0)).await;
    assert_eq!((other.granted, other.left, other.others), (4, 0, 6));
    assert!((1..=100_000).contains(&other.empty_ms), "{other:?}");
    let spent = ask_one(&fixture, &sync, 1, Ask { granted: 6, spent: 6, need: 1, ..first }).await;
    assert_eq!((spent.granted, spent.held, spent.left, spent.others), (6, 0, 0, 4));
    // Six of ten are used: 600 seconds.
    assert!((599_000_000_000..=600_000_000_000).contains(&spent.ahead_ns), "{spent:?}");
    // A hundred seconds bring one back.
    execute(&pool, "update pools set arrival_ns = arrival_ns - 100000000000").await;
    let back = ask_one(&fixture, &sync, 1, Ask { granted: 6, spent: 6, need: 1, ..first }).await;
    assert_eq!(back.granted, 7);
    // A limit that is raised has more, and one that is lowered less; what is used stays used.
    change_key(&pool, key, &LIMIT.replace("10", "20")).await;
    let raised = ask_one(&fixture, &sync, 2, Ask { granted: 4, ..ask(limit_of(key), 9, 0) }).await;
    assert_eq!((raised.granted, raised.left), (9, 5));
    change_key(&pool, key, &LIMIT.replace("10", "5")).await;
    let lowered = ask_one(&fixture, &sync, 2, Ask { granted: 9, ..ask(limit_of(key), 10, 0) }).await;
    assert_eq!((lowered.granted, lowered.left), (9, 0));
}

#[sqlx::test(migrations = "./migrations")]
async fn what_another_envoy_needs_is_recalled(pool: PgPool) {
    let (fixture, _, sync, key) = two_envoys(&pool, QUOTA).await;
    let first = ask(quota_of(key), 60, 0);
    assert_eq!(ask_one(&fixture, &sync, 1, first).await.granted, 60);
    let second = ask(quota_of(key), 50, 0);
    let grant = ask_one(&fixture, &sync, 2, second).await;
    assert_eq!((grant.granted, grant.left, grant.others), (40, 0, 60));
    // The first learns of it with its next call, whichever pools that names, and once.
    let recalls = async || answer(&fixture, &sync, &call_of(1, &[])).await.recalls;
    assert_eq!((recalls().await, recalls().await), (vec![quota_of(key)], vec![]));
    ask_one(&fixture, &sync, 1, Ask { granted: 60, spent: 20, returned: 40, need: 0, least: 0, ..first }).await;
    assert_eq!(ask_one(&fixture, &sync, 2, Ask { granted: 40, ..second }).await.granted, 50);
}

#[sqlx::test(migrations = "./migrations")]
async fn what_a_silent_or_ended_envoy_holds_is_free_again(pool: PgPool) {
    let (fixture, admin, sync, key) = two_envoys(&pool, QUOTA).await;
    let first = ask(quota_of(key), 60, 0);
    ask_one(&fixture, &sync, 1, first).await;
    let second = ask(quota_of(key), 100, 0);
    assert_eq!(ask_one(&fixture, &sync, 2, second).await.granted, 40);
    // It says that it ends, and hands back what it did not use. What it used is held until its report.
    let last = Ask { granted: 60, spent: 10, returned: 50, need: 0, least: 0, ..first };
    let ended = answer(&fixture, &sync, &Call { is_last: true, ..call_of(1, &[last]) }).await;
    assert_eq!((ended.live, ended.alone_ms), (1, 0));
    end_alone(&pool).await;
    let grant = ask_one(&fixture, &sync, 2, Ask { granted: 40, ..second }).await;
    assert_eq!((grant.granted, grant.others), (90, 0));
    Envoy::new(1, &sync).report(&fixture, &[count(key, Outcome::Allowed, 10)]).await;
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([10, 90, 0]));
    // The other is killed.
    execute(&pool, "update allowance_callers set heard_at = now() - interval '59 seconds'").await;
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([10, 90, 0]));
    execute(&pool, "update allowance_callers set heard_at = now() - interval '61 seconds'").await;
    assert_eq!(quota_view(&fixture, &admin, key).await, json!([10, 0, 90]));
    end_alone(&pool).await;
    assert_eq!(ask_one(&fixture, &sync, 3, second).await.granted, 90);
    // Its rows are deleted, then those that hold nothing, then the pool.
    assert_eq!(tidy(&pool).await.unwrap(), 2);
    let left: Vec<Uuid> = crate::support::scalars(&pool, "select reporter from allowances").await;
    assert_eq!(left, [Uuid::from_bytes([3; 16])]);
    execute(&pool, "update allowances set returned = granted, used_at = now() - interval '16 minutes'").await;
    execute(
        &pool,
        "update allowance_callers set heard_at = now() - interval '11 minutes' where reporter <> md5('')::uuid",
    )
    .await;
    assert!(tidy(&pool).await.unwrap() >= 2);
    let counts: (i64, i64, i64) = row(
        &pool,
        "select (select count(*) from allowances), (select count(*) from pools), (select count(*) from allowance_callers)",
    )
    .await;
    assert_eq!(counts, (0, 0, 0));
}

#[sqlx::test(migrations = "./migrations")]
async fn one_envoy_is_alone_until_another_comes(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (key, _) = fixture.key("ada@example.com", &[]).await;
    change_key(&pool, key, QUOTA).await;
    let says = async |number: u8| answer(&fixture, &sync, &call_of(number, &[ask(quota_of(key), 1, 0)])).await;
    for _ in 0..2 {
        let alone = says(1).await;
        assert_eq!((alone.live, alone.alone_ms, alone.grants[0].granted), (1, 400, 1));
    }
    // The second is granted nothing as long as the first may judge by itself.
    let began = Instant::now();
    let second = says(2).await;
    let expected = Grant { left: 0, others: u64::MAX, ..second.grants[0] };
    assert_eq!((second.live, second.alone_ms, second.grants[0], second.grants[0].granted), (2, 0, expected, 0));
    let first = says(1).await;
    assert_eq!((first.live, first.alone_ms), (2, 0));
    while says(2).await.grants[0].granted == 0 {
        assert!(began.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(began.elapsed() > Duration::from_millis(600), "{:?}", began.elapsed());
    // The first is gone.
    let gone = format!(
        "update allowance_callers set heard_at = now() - interval '11 seconds' where reporter = '{}'",
        Uuid::from_bytes([1; 16])
    );
    execute(&pool, gone).await;
    let alone = says(2).await;
    assert_eq!((alone.live, alone.alone_ms), (1, 400));
}

#[sqlx::test(migrations = "./migrations")]
async fn of_envoys_that_start_at_once_on_two_replicas_one_is_alone_at_most(pool: PgPool) {
    let (one, other) = (Fixture::new(&pool).await, Fixture::new(&pool).await);
    let (_, sync) = one.key("operator@example.com", &["sync"]).await;
    for round in 0..20_u8 {
        execute(&pool, "delete from allowance_callers").await;
        end_alone(&pool).await;
        let says =
            async |fixture: &Fixture, number: u8| answer(fixture, &sync, &call_of(number, &[])).await.alone_ms > 0;
        let (first, second) = (1 + 2 * round, 2 + 2 * round);
        let (is_first, is_second) = tokio::join!(says(&one, first), says(&other, second));
        assert!(!(is_first && is_second), "both are alone");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_pool_without_a_limit_grants_all_that_is_asked_and_writes_nothing(pool: PgPool) {
    let (fixture, _, sync, key) = two_envoys(&pool, "name = 'plain'").await;
    let owner: Uuid = scalar(&pool, format!("select owner_id from api_keys where id = '{key}'")).await;
    let credits = PoolId::of_credits(owner.into());
    for pool_id in [quota_of(key), limit_of(key), credits, quota_of(Uuid::nil())] {
        let asked = Ask { granted: 3, spent: 4, returned: 2, ..ask(pool_id, 5, 7) };
        let expected =
            Grant { session: 1, granted: 6 + 5 + 7, spent: 4, left: u64::MAX / 2, users: 1, ..Grant::default() };
        assert_eq!(ask_one(&fixture, &sync, 1, asked).await, expected, "{pool_id:?}");
    }
    let rows: (i64, i64) = row(&pool, "select (select count(*) from pools), (select count(*) from allowances)").await;
    assert_eq!(rows, (0, 0));
}

#[sqlx::test(migrations = "./migrations")]
async fn calls_that_are_wrong_or_of_another_sync_key_are_refused(pool: PgPool) {
    let (fixture, admin, sync, key) = two_envoys(&pool, QUOTA).await;
    let send = async |key: Option<&Secret>, body: Vec<u8>| {
        fixture.send(request("POST", "/sync/v1/allowances", key, body)).await
    };
    let asked = call_of(1, &[ask(quota_of(key), 1, 0)]);
    assert_eq!(send(None, asked.write().unwrap()).await.status, 401);
    assert_eq!(send(Some(&admin), asked.write().unwrap()).await.status, 403);
    assert_eq!(send(Some(&sync), vec![0; 9]).await.status, 400);
    assert_eq!(send(Some(&sync), vec![0; 70_000]).await.status, 413);
    let many = call_of(1, &[ask(quota_of(key), 1, 0); 501]);
    let detail = "asks: more than 500 in one call";
    call(&fixture, &sync, &many).await.assert_problem(400, "invalid", detail, None);
    let most = answer(&fixture, &sync, &call_of(1, &[ask(quota_of(key), u64::MAX >> 4, 0); 500])).await;
    assert_eq!(most.grants[499].granted, 100);
    // An Envoy belongs to the key of its first call, or of its first report.
    let (_, other) = fixture.key("operator@example.com", &["sync"]).await;
    let detail = "This reporter belongs to another sync key. Restart Envoy after changing its key.";
    let before: String = scalar(&pool, "select string_agg(a::text, ' ' order by reporter) from allowances a").await;
    call(&fixture, &other, &call_of(2, &[ask(quota_of(key), 1, 0)])).await.assert_problem(
        403,
        "forbidden",
        detail,
        None,
    );
    Envoy::new(9, &sync).report(&fixture, &[]).await;
    call(&fixture, &other, &call_of(9, &[])).await.assert_problem(403, "forbidden", detail, None);
    let after: String = scalar(&pool, "select string_agg(a::text, ' ' order by reporter) from allowances a").await;
    assert_eq!(before, after);
}

#[sqlx::test(migrations = "./migrations")]
async fn last_words_from_a_log_are_booked(pool: PgPool) {
    let (key, _) = crate::support::key(&pool, "a@example.com", &[]).await;
    change_key(&pool, key, QUOTA).await;
    execute(&pool, "update user_preferences set metered = true").await;
    execute(
        &pool,
        "insert into ledger (owner_id, kind, amount, balance) select id, 'top_up', 10, 0 from user_preferences",
    )
    .await;
    let reporter = ReporterId([9; 16]);
    let reports = vec![Report { reporter, seq: 1, counts: vec![count(key, Outcome::Allowed, 4)] }];
    apply(&pool, &[Submission { reporter, sync_key: None, reports }]).await.unwrap();
    let booked: (i64, i64, i64) = row(
        &pool,
        "select balance, (select used from quota_use), (select count(*) from allowances) from user_preferences",
    )
    .await;
    assert_eq!(booked, (6, 4, 0));
}

/// Calls, reports and changes of keys, plans and balances at the same time on two replicas.
#[sqlx::test(migrations = "./migrations")]
async fn many_calls_at_once_are_answered_quickly_beside_reports_and_changes(pool: PgPool) {
    let (one, other) = (Fixture::new(&pool).await, Fixture::new(&pool).await);
    let (_, admin) = one.key("admin@example.com", &["admin"]).await;
    let (_, sync) = one.key("operator@example.com", &["sync"]).await;
    let limits = json!([{"name": "a", "requests": 1_000_000, "window_seconds": 1}]);
    let plan = |requests: i64| json!({"rate_limits": limits, "quota": {"requests": requests, "period": "day"}});
    one.put("/v1/plans/gold", &admin, plan(1_000_000)).await.expect(201);
    let user = one.user("user@example.com").await;
    one.post(&format!("{user}/ledger"), &admin, json!({"amount": 1_000_000})).await.expect(201);
    let mut keys = Vec::new();
    for _ in 0..20 {
        keys.push(crate::support::id_of(&one.create(&admin, json!({"plan": "gold"})).await.expect(201)));
    }
    let owner: Uuid = scalar(&pool, "select id from user_preferences where email = 'user@example.com'").await;
    let pools: Vec<PoolId> = keys
        .iter()
        .flat_map(|key| [limit_of(*key), quota_of(*key)])
        .chain([PoolId::of_credits(owner.into())])
        .collect();
    let calls = async |number: u8| {
        let (fixture, mut took) = (if number.is_multiple_of(2) { &one } else { &other }, Vec::new());
        for round in 0..40_usize {
            let mut asks: Vec<Ask> = pools.iter().map(|pool| ask(*pool, 2, 3)).collect();
            asks.rotate_left((round * usize::from(number)) % pools.len());
            asks.truncate(1 + round % pools.len());
            let began = Instant::now();
            let answer = answer(fixture, &sync, &call_of(number, &asks)).await;
            took.push(began.elapsed());
            assert_eq!(answer.grants.len(), asks.len());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        took
    };
    let reports = async |number: u8| {
        let mut envoy = Envoy::new(number, &sync);
        for round in 0..20_usize {
            let mut counts: Vec<_> = keys.iter().map(|key| count(*key, Outcome::Allowed, 1)).collect();
            counts.rotate_left(round % keys.len());
            envoy.report(if round % 2 == 0 { &one } else { &other }, &counts).await;
        }
    };
    let changes = async {
        for round in 0..20 {
            assert_eq!(one.put("/v1/plans/gold", &admin, plan(1_000_000 + round)).await.status, 200);
            one.post(&format!("{user}/ledger"), &admin, json!({"amount": 10})).await.expect(201);
            one.post(&format!("/v1/keys/{}/rotate", keys[0]), &admin, json!({})).await;
            tidy(&pool).await.unwrap();
        }
    };
    let before = deadlocks(&pool).await;
    let ((mut took, ()), ()) = tokio::join!(
        async {
            let numbers: Vec<u8> = (1..=10).collect();
            let took = futures_util::future::join_all(numbers.iter().map(|number| calls(*number)));
            let reported = futures_util::future::join_all((1..=10).map(reports));
            let (took, _) = tokio::join!(took, reported);
            (took.concat(), ())
        },
        changes
    );
    took.sort_unstable();
    let at = |part: usize| took[took.len() * part / 100];
    println!(
        "calls beside reports and changes: p50 {:?}, p90 {:?}, p99 {:?} of {}",
        at(50),
        at(90),
        at(99),
        took.len()
    );
    assert!(at(50) < Duration::from_millis(500));
    assert_eq!(deadlocks(&pool).await, before, "deadlocks");
    // What is used and what is left agree.
    let used: i64 = scalar(&pool, "select sum(used)::bigint from quota_use").await;
    let spent: i64 = scalar(&pool, "select -sum(amount)::bigint from ledger where kind = 'usage'").await;
    assert_eq!((used, spent), (10 * 20 * 20, 10 * 20 * 20));
    let over: Vec<(Uuid, i64)> =
        rows(&pool, "select reporter, granted - spent - returned from allowances where granted < spent + returned")
            .await;
    assert_eq!(over, []);
    assert!(revision(&pool).await > 0);
}

async fn deadlocks(pool: &PgPool) -> i64 {
    scalar(pool, "select deadlocks from pg_stat_database where datname = current_database()").await
}

#[sqlx::test(migrations = "./migrations")]
async fn a_call_takes_some_milliseconds(pool: PgPool) {
    let (fixture, _, sync, key) = two_envoys(&pool, QUOTA).await;
    let mut took = Vec::new();
    for _ in 0..300 {
        let began = Instant::now();
        let _: Answer = answer(&fixture, &sync, &call_of(1, &[ask(quota_of(key), 1, 0)])).await;
        took.push(began.elapsed());
    }
    took.sort_unstable();
    println!("one call of one pool at a time: p50 {:?}, p99 {:?}", took[150], took[297]);
    assert!(took[150] < Duration::from_millis(250));
}
