//! Credits and their ledger.

use crate::support::reports::{Envoy, coded, count};
use crate::support::{Fixture, Reply, execute, request, revision, rows, scalar};
use contract::key::Secret;
use contract::outcome::Outcome;
use contract::usage::SHADOW;
use control_plane::credits::{refill, rollup};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

const ADA: &str = "ada@example.com";

async fn call(fixture: &Fixture, method: &str, path: &str, key: &Secret, body: Option<Value>) -> Reply {
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    fixture.send(request(method, path, Some(key), body)).await
}

async fn top_up(fixture: &Fixture, admin: &Secret, amount: i64) -> Value {
    fixture.post(&ledger_path(fixture).await, admin, json!({"amount": amount})).await.expect(201)
}

async fn ledger_path(fixture: &Fixture) -> String {
    format!("{}/ledger", fixture.user(ADA).await)
}

async fn balance(fixture: &Fixture, key: &Secret) -> Value {
    fixture.get(&format!("{}/balance", fixture.user(ADA).await), key).await.expect(200)
}

/// Kind and amount of all rows of the ledger. Each balance is the sum of the rows up to it.
async fn ledger(pool: &PgPool) -> Vec<(String, i64)> {
    let sql = "select count(*) from (
            select balance, sum(amount) over (partition by owner_id order by id) as sum from ledger
        ) l where balance <> sum";
    let wrong: i64 = scalar(pool, sql).await;
    let sql = "select count(*) from user_preferences p
        where balance <> coalesce((select sum(amount) from ledger where owner_id = p.id), 0)
            or credits_spent <> coalesce((select -sum(amount) from ledger where owner_id = p.id and kind = 'usage'), 0)";
    let unequal: i64 = scalar(pool, sql).await;
    assert_eq!((wrong, unequal), (0, 0), "the ledger does not sum to the balance");
    rows(pool, "select kind, amount from ledger order by id").await
}

/// Of the user's keys: whether the credits are exhausted, whether requests cost credits, and how often the balance was changed.
async fn as_filters_know(pool: &PgPool) -> Vec<(bool, bool, i32)> {
    let sql = format!(
        "select credits_exhausted, k.metered, k.credits_fill from api_keys k
        join user_preferences p on p.id = k.owner_id where email = '{ADA}' order by k.id"
    );
    rows(pool, sql).await
}

async fn try_execute(pool: &PgPool, sql: &str) -> Result<u64, String> {
    let done = sqlx::query(AssertSqlSafe(sql.to_owned())).execute(pool).await;
    done.map(|done| done.rows_affected()).map_err(|error| error.to_string())
}

#[sqlx::test(migrations = "./migrations")]
async fn the_first_top_up_meters_a_user_and_is_a_row_of_the_ledger(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (admin_id, admin) = fixture.key("admin@example.com", &["admin"]).await;
    let (_, own) = fixture.key(ADA, &[]).await;
    assert_eq!(as_filters_know(&pool).await, [(false, false, 0)]);
    let body = json!({"amount": 1_000, "note": " invoice 7 "});
    let entry = fixture.post(&ledger_path(&fixture).await, &admin, body).await.expect(201);
    let expected = json!({
        "id": entry["id"], "at": entry["at"], "kind": "top_up", "amount": 1_000, "balance": 1_000, "note": "invoice 7",
        "actor_key_id": admin_id, "refill_due": null
    });
    assert_eq!(entry, expected);
    assert_eq!(as_filters_know(&pool).await, [(false, true, 1)]);
    let expected = json!({"balance": 1_000, "held": 0, "available": 1_000});
    assert_eq!(balance(&fixture, &own).await, expected);
    let user = call(&fixture, "GET", &fixture.user(ADA).await, &own, None).await.json();
    assert_eq!((&user["balance"], &user["metered"]), (&json!(1_000), &json!(true)));
    // Filters learn of each change.
    top_up(&fixture, &admin, 600).await;
    assert_eq!(as_filters_know(&pool).await, [(false, true, 2)]);
    top_up(&fixture, &admin, 24_000).await;
    assert_eq!(as_filters_know(&pool).await, [(false, true, 3)]);
    let amounts = [1_000, 600, 24_000].map(|amount| ("top_up".into(), amount));
    assert_eq!(ledger(&pool).await, amounts);
    let sql = "select action, actor_key_id, target, detail from audit where action like 'ledger.%' order by id";
    let audited: Vec<(String, Option<Uuid>, Option<String>, Value)> = rows(&pool, sql).await;
    let detail = json!({"kind": "top_up", "amount": 1_000, "balance": 1_000});
    assert_eq!(audited[0], ("ledger.create".into(), Some(admin_id), Some(ADA.into()), detail));
}

#[sqlx::test(migrations = "./migrations")]
async fn users_see_their_own_credits_and_only_admins_change_them(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, own) = fixture.key(ADA, &[]).await;
    let (_, other) = fixture.key("other@example.com", &[]).await;
    let (_, sync) = fixture.key("operator@example.com", &["sync"]).await;
    let user = fixture.user(ADA).await;
    let (ledger, balance) = (format!("{user}/ledger"), format!("{user}/balance"));
    for path in [&balance, &ledger] {
        for (key, status) in [(&own, 200), (&admin, 200), (&other, 403), (&sync, 403)] {
            assert_eq!(fixture.get(path, key).await.status, status, "{path}");
        }
    }
    // Users do not read which key of an administrator topped them up.
    top_up(&fixture, &admin, 3).await;
    for (key, is_shown) in [(&own, false), (&admin, true)] {
        let page = fixture.get(&ledger, key).await.json();
        assert_eq!(page["entries"][0]["actor_key_id"].is_string(), is_shown, "{page}");
    }
    for key in [&own, &other, &sync] {
        for (method, path, body) in
            [("POST", &ledger, json!({"amount": 5})), ("PATCH", &user, json!({"metered": true}))]
        {
            let reply = call(&fixture, method, path, key, Some(body)).await;
            assert_eq!((reply.status, reply.json()["code"].as_str()), (403, Some("forbidden")));
        }
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_field_is_named_and_changes_nothing(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (_, _) = fixture.key(ADA, &[]).await;
    let user = fixture.user(ADA).await;
    let path = format!("{user}/ledger");
    for (method, body, field) in [
        ("POST", json!({"amount": 0}), Some("amount")),
        ("POST", json!({"amount": -5}), Some("amount")),
        ("POST", json!({"amount": 1_000_000_000_001_i64}), Some("amount")),
        ("POST", json!({"amount": 1.5}), Some("amount")),
        ("POST", json!({"amount": 0, "kind": "correction"}), Some("amount")),
        ("POST", json!({"amount": 1, "kind": "usage"}), Some("kind")),
        ("POST", json!({"amount": 1, "note": "a\0b"}), Some("note")),
        ("POST", json!({"amount": 1, "note": "x".repeat(201)}), Some("note")),
        ("PATCH", json!({}), None),
        ("PATCH", json!({"metered": 1}), Some("metered")),
        ("PATCH", json!({"refill": {"amount": 0, "period": "day"}}), Some("refill")),
        ("PATCH", json!({"refill": {"amount": 1, "period": "day", "up_to": 0}}), Some("refill")),
        ("PATCH", json!({"refill": {"amount": 1, "period": "year"}}), Some("refill.period")),
        ("PATCH", json!({"refill": {"amount": 1, "period": "day", "time_zone": "Mars/Olympus"}}), Some("refill")),
    ] {
        let path = if method == "POST" { &path } else { &user };
        let reply = call(&fixture, method, path, &admin, Some(body.clone())).await;
        let problem = reply.json();
        assert_eq!(
            (reply.status, problem["code"].as_str(), problem["field"].as_str()),
            (400, Some("invalid"), field),
            "{body}: {problem}"
        );
    }
    assert_eq!(ledger(&pool).await, []);
    // Balances stay within what JSON readers know exactly.
    for _ in 0..1_000 {
        execute(&pool, "insert into ledger (owner_id, kind, amount, balance) select id, 'top_up', 1000000000000, 0 from user_preferences where email = 'ada@example.com'").await;
    }
    let reply = fixture.post(&path, &admin, json!({"amount": 1})).await;
    assert_eq!((reply.status, reply.json()["code"].as_str()), (409, Some("conflict")));
}

#[sqlx::test(migrations = "./migrations")]
async fn allowed_requests_cost_credits_and_a_user_without_any_is_exhausted_until_a_top_up(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (one, _) = fixture.key(ADA, &[]).await;
    let (two, _) = fixture.key(ADA, &[]).await;
    let (free, _) = fixture.key("free@example.com", &[]).await;
    let mut envoy = Envoy::new(1, &sync);
    // No user is metered yet.
    envoy.report(&fixture, &[count(one, Outcome::Allowed, 50), count(free, Outcome::Allowed, 50)]).await;
    assert_eq!(ledger(&pool).await, []);
    top_up(&fixture, &admin, 100).await;
    let counts = [
        count(one, Outcome::Allowed, 10),
        coded(two, 0, 1, 25),
        count(free, Outcome::Allowed, 50),
        count(one, Outcome::RateLimited, 7),
        // A shadow outcome costs nothing, whatever the report says.
        coded(one, SHADOW | Outcome::RateLimited.code(), 5, 5),
    ];
    envoy.report(&fixture, &counts).await;
    envoy.again(&fixture, &counts).await;
    assert_eq!(ledger(&pool).await, [("top_up".into(), 100), ("usage".into(), -35)]);
    let before = revision(&pool).await;
    envoy.report(&fixture, &[count(one, Outcome::Allowed, 64)]).await;
    assert_eq!(revision(&pool).await, before, "filters need not know of every booking");
    envoy.report(&fixture, &[count(one, Outcome::Allowed, 3)]).await;
    assert_eq!(as_filters_know(&pool).await, [(true, true, 1); 2]);
    assert_eq!(balance(&fixture, &admin).await["balance"], -2);
    // A key that is made now is exhausted too.
    fixture.key(ADA, &[]).await;
    assert_eq!(as_filters_know(&pool).await[2], (true, true, 1));
    top_up(&fixture, &admin, 2).await;
    assert_eq!(as_filters_know(&pool).await[0], (true, true, 2));
    top_up(&fixture, &admin, 1_600).await;
    assert_eq!(as_filters_know(&pool).await, [(false, true, 3); 3]);
    fixture.in_step().await;
    // A correction takes away; who is not metered pays nothing.
    let body = json!({"amount": -1_700, "kind": "correction", "note": "by mistake"});
    let reply = fixture.post(&ledger_path(&fixture).await, &admin, body).await;
    assert_eq!((reply.status, &reply.json()["balance"]), (201, &json!(-100)));
    assert!(as_filters_know(&pool).await[0].0);
    let reply = fixture.patch(&fixture.user(ADA).await, &admin, json!({"metered": false})).await;
    assert_eq!((reply.status, &reply.json()["metered"]), (200, &json!(false)));
    assert_eq!(as_filters_know(&pool).await[0], (false, false, 5));
    envoy.report(&fixture, &[count(one, Outcome::Allowed, 3)]).await;
    assert_eq!(ledger(&pool).await.len(), 7);
}

#[sqlx::test(migrations = "./migrations")]
async fn forged_costs_saturate_and_stop_no_report(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (id, _) = fixture.key(ADA, &[]).await;
    top_up(&fixture, &admin, 100).await;
    let mut envoy = Envoy::new(1, &sync);
    for _ in 0..3 {
        envoy.report(&fixture, &vec![coded(id, 0, 1_000_000_000_000, 1_000_000_000_000_000); 20_000]).await;
    }
    let (_, other) = (envoy.report(&fixture, &[count(id, Outcome::Allowed, 1)]).await, ledger(&pool).await);
    assert_eq!(other.len(), 2);
    assert_eq!(balance(&fixture, &admin).await["balance"], -1_000_000_000_000_000_000_i64);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_balance_changes_by_a_row_of_the_ledger_and_by_nothing_else(pool: PgPool) {
    crate::support::key(&pool, ADA, &[]).await;
    for (sql, refusal) in [
        ("update user_preferences set balance = 5", "a balance is the sum of its rows in ledger"),
        ("update user_preferences set balance = balance + 1", "a balance is the sum of its rows in ledger"),
        (
            "insert into user_preferences (id, email, balance) values (gen_random_uuid(), 'b@example.com', 1)",
            "a balance is the sum",
        ),
    ] {
        assert!(try_execute(&pool, sql).await.unwrap_err().contains(refusal), "{sql}");
    }
    let add = |kind: &str, amount: i64| {
        format!(
            "insert into ledger (owner_id, kind, amount, balance) select id, '{kind}', {amount}, 77 from user_preferences"
        )
    };
    // Sums hold for any order and size, and for a row that is inserted with a balance of its own.
    let mut random = 88_172_645_463_325_252_u64;
    for _ in 0..200 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let kind = ["top_up", "usage", "refill", "correction"][(random % 4) as usize];
        let amount = (random >> 20) as i64 % 2_001 - 1_000;
        assert_eq!(try_execute(&pool, &add(kind, amount)).await, Ok(1));
    }
    assert_eq!(ledger(&pool).await.len(), 200);
    for sql in ["update ledger set amount = 1", "delete from ledger"] {
        assert!(try_execute(&pool, sql).await.unwrap_err().contains("rows of ledger are never changed"), "{sql}");
    }
    assert!(try_execute(&pool, &add("gift", 1)).await.unwrap_err().contains("ledger_kind"));
    assert_eq!(ledger(&pool).await.len(), 200);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_refill_is_booked_once_for_each_period_by_one_replica(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    fixture.key(ADA, &[]).await;
    let body = json!({"refill": {"amount": 100, "period": "day", "time_zone": "Europe/Berlin", "up_to": 250}});
    let user = fixture.user(ADA).await;
    let reply = fixture.patch(&user, &admin, &body).await;
    assert_eq!((reply.status, &reply.json()["refill"]), (200, &body["refill"]));
    assert_eq!(reply.json()["metered"], true);
    let sql = "select refill_at = (date_trunc('day', now() at time zone 'Europe/Berlin') + interval '1 day') at time zone 'Europe/Berlin'
        from user_preferences where email = 'ada@example.com'";
    let next: bool = scalar(&pool, sql).await;
    assert!(next, "{}", reply.json()["refill_at"]);
    assert_eq!(refill::refill(&pool).await.unwrap(), 0);
    assert_eq!(as_filters_know(&pool).await, [(true, true, 1)]);

    // Two midnights have passed unseen.
    execute(&pool, "update user_preferences set refill_at = (date_trunc('day', now() at time zone 'Europe/Berlin') - interval '1 day') at time zone 'Europe/Berlin' where refill is not null").await;
    let replicas = (0..4).map(|_| refill::refill(&pool));
    let booked: usize = futures_util::future::join_all(replicas).await.into_iter().map(Result::unwrap).sum();
    assert_eq!(booked, 1);
    assert_eq!(ledger(&pool).await, [("refill".into(), 100), ("refill".into(), 100)]);
    assert_eq!(as_filters_know(&pool).await, [(false, true, 2)]);
    let due: i64 = scalar(&pool, "select count(distinct refill_due) from ledger where refill_due <= now()").await;
    assert_eq!(due, 2);
    assert_eq!(refill::refill(&pool).await.unwrap(), 0);

    // Up to 250 and no further; a schedule that lay idle for years goes on from now.
    execute(&pool, "update user_preferences set refill_at = '2020-01-01' where refill is not null").await;
    assert_eq!(refill::refill(&pool).await.unwrap(), 1);
    assert_eq!(ledger(&pool).await.last(), Some(&("refill".into(), 50)));
    execute(
        &pool,
        "update user_preferences set refill = refill - 'up_to', refill_at = '2020-01-01' where refill is not null",
    )
    .await;
    assert_eq!(refill::refill(&pool).await.unwrap(), 1);
    // One of the 400 was booked before.
    assert_eq!(ledger(&pool).await.len(), 3 + 399);
    let sql = "select refill_at > now() and refill_at < now() + interval '26 hours' from user_preferences where refill is not null";
    let ahead: bool = scalar(&pool, sql).await;
    assert!(ahead);

    let reply = fixture.patch(&user, &admin, json!({"refill": null})).await;
    assert_eq!((&reply.json()["refill"], &reply.json()["refill_at"]), (&Value::Null, &Value::Null));
}

#[sqlx::test(migrations = "./migrations")]
async fn the_ledger_is_paged_with_the_newest_first(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for amount in 1..=5 {
        top_up(&fixture, &admin, amount).await;
    }
    let path = ledger_path(&fixture).await;
    let pages = fixture.pages(&path, "", "entries", "amount", &admin).await;
    assert_eq!(pages, [vec![5, 4], vec![3, 2], vec![1]]);
    for query in ["limit=0", "limit=201", "cursor=x"] {
        assert_eq!(fixture.get(&format!("{path}?{query}"), &admin).await.status, 400, "{query}");
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn old_usage_becomes_one_row_a_day_and_no_sum_changes(pool: PgPool) {
    crate::support::key(&pool, ADA, &[]).await;
    crate::support::key(&pool, "b@example.com", &[]).await;
    let add = async |email: &str, kind: &str, amount: i64, days: i64| {
        let sql = format!(
            "insert into ledger (owner_id, kind, amount, balance, at)
            select id, '{kind}', {amount}, 0, date_trunc('day', now(), 'UTC') - interval '{days} days' + interval '7 hours'
            from user_preferences where email = '{email}'"
        );
        execute(&pool, &sql).await;
    };
    for days in [40, 39, 3] {
        add(ADA, "top_up", 100, days).await;
        for amount in 1..=10 {
            add(ADA, "usage", -amount, days).await;
            add("b@example.com", "usage", -1, days).await;
            if amount == 4 {
                add(ADA, "correction", 7, days).await;
            }
        }
    }
    let before = ledger(&pool).await;
    while rollup::roll_up(&pool, 35).await.unwrap() > 0 {}
    let after = ledger(&pool).await;
    let sum = |rows: &[(String, i64)]| rows.iter().map(|(_, amount)| amount).sum::<i64>();
    assert_eq!(sum(&before), sum(&after));
    // Each of two days: a top-up, what came before the correction, the correction, what came after; and one of the other's.
    assert_eq!((before.len(), after.len()), (66, 22 + 2 * 5));
    let sql = format!(
        "select kind, amount, l.balance from ledger l join user_preferences p on p.id = owner_id
        where email = '{ADA}' order by l.id limit 4"
    );
    let kept: Vec<(String, i64, i64)> = rows(&pool, sql).await;
    let row = |kind: &str, amount, balance| (kind.to_owned(), amount, balance);
    assert_eq!(kept, [row("top_up", 100, 100), row("usage", -10, 90), row("correction", 7, 97), row("usage", -45, 52)]);
    assert_eq!(rollup::roll_up(&pool, 35).await.unwrap(), 0);
}
