//! `GET /v1/usage`, and the roll-up and deletion of old usage.

use crate::support::{Fixture, Reply, execute, rows, scalar};
use contract::id::{KeyId, ReporterId};
use contract::key::Secret;
use contract::usage::{Count, KeyRef, Report, Subject};
use control_plane::metering::retention::{Retention, forget, roll_up, tidy};
use control_plane::metering::{Submission, apply, events};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const SPAN: &str = "from=2026-05-01T00:00:00Z&to=2026-07-01T00:00:00Z";

async fn count(pool: &PgPool, id: Uuid, hour: &str, outcome: i16, requests: i64) {
    let sql = format!(
        "insert into usage_hourly values ('{id}', '{hour}'::text::timestamptz, '{outcome}', 1, '{requests}', '{requests}' * 2)"
    );
    execute(pool, sql).await;
}

async fn get(fixture: &Fixture, key: &Secret, query: &str) -> Reply {
    fixture.get(&format!("/v1/usage?{query}"), key).await
}

async fn usage(fixture: &Fixture, key: &Secret, query: &str) -> Value {
    get(fixture, key, &format!("{SPAN}&{query}")).await.expect(200)["usage"].take()
}

/// A sum of the group that `of` names.
fn row(mut of: Value, allowed: i64, refused: i64, other: i64, cost: i64) -> Value {
    let counts = json!({"allowed": allowed, "refused": refused, "other": other, "cost": cost});
    of["requests"] = json!(allowed + refused + other);
    of.as_object_mut().unwrap().extend(counts.as_object().unwrap().clone());
    of
}

/// Two users, three keys, a role and a plan; what they used in May and June; requests without a key.
async fn counted(pool: &PgPool) -> (Fixture, Secret, [(Uuid, Secret); 3]) {
    let (fixture, admin) = Fixture::with_admin(pool).await;
    let one = fixture.key("a@example.com", &["orders:read", "orders:write"]).await;
    let two = fixture.key("a@example.com", &[]).await;
    let three = fixture.key("b@example.com", &["orders:read"]).await;
    let definitions = "insert into definitions (kind, name, scopes)
        values ('role', 'r', '{from:role}'), ('plan', 'gold', '{from:plan}')";
    execute(pool, definitions).await;
    let number = |kind: &str| format!("select number from definitions where kind = '{kind}'");
    let plan = format!("plan_number = ({}) where email = 'b@example.com'", number("plan"));
    execute(pool, format!("update user_preferences set {plan}")).await;
    let role = format!("role_numbers = array({}) where id = '{}'", number("role"), two.0);
    execute(pool, format!("update api_keys set {role}")).await;
    for (id, hour, outcome, requests) in [
        (one.0, "2026-05-01 10:00Z", 0, 1),
        (one.0, "2026-05-01 11:00Z", 0, 2),
        (one.0, "2026-05-01 11:00Z", 8, 4),
        (one.0, "2026-05-02 00:00Z", 136, 8),
        (two.0, "2026-06-10 10:00Z", 0, 16),
        (three.0, "2026-06-30 23:00Z", 0, 32),
        (three.0, "2026-07-01 00:00Z", 0, 64),
    ] {
        count(pool, id, hour, outcome, requests).await;
    }
    let sql = "insert into usage_keyless_hourly values ('2026-05-01 10:00Z', 1, 128), ('2026-06-01 10:00Z', 2, 256)";
    execute(pool, sql).await;
    (fixture, admin, [one, two, three])
}

#[sqlx::test(migrations = "./migrations")]
async fn usage_is_summed_by_key_user_plan_scope_outcome_and_interval(pool: PgPool) {
    let (fixture, admin, [one, two, three]) = counted(&pool).await;
    assert_eq!(usage(&fixture, &admin, "").await, json!([row(json!({}), 51, 388, 8, 126)]));
    let name = "a key";
    assert_eq!(
        usage(&fixture, &admin, "group_by=key").await,
        json!([
            row(json!({"key_id": null, "key_name": null}), 0, 384, 0, 0),
            row(json!({"key_id": one.0, "key_name": name}), 3, 4, 8, 30),
            row(json!({"key_id": two.0, "key_name": name}), 16, 0, 0, 32),
            row(json!({"key_id": three.0, "key_name": name}), 32, 0, 0, 64),
        ])
    );
    assert_eq!(
        usage(&fixture, &admin, "group_by=outcome").await,
        json!([
            row(json!({"outcome": "allowed"}), 51, 0, 0, 102),
            row(json!({"outcome": "missing"}), 0, 128, 0, 0),
            row(json!({"outcome": "unknown"}), 0, 256, 0, 0),
            row(json!({"outcome": "rate_limited"}), 0, 4, 0, 8),
            row(json!({"outcome": "shadow:rate_limited"}), 0, 0, 8, 16),
        ])
    );
    let (may, june) = ("2026-05-01T00:00:00Z", "2026-06-01T00:00:00Z");
    assert_eq!(
        usage(&fixture, &admin, "group_by=user,plan&interval=month").await,
        json!([
            row(json!({"start": may, "email": null, "plan": null}), 0, 128, 0, 0),
            row(json!({"start": may, "email": "a@example.com", "plan": null}), 3, 4, 8, 30),
            row(json!({"start": june, "email": null, "plan": null}), 0, 256, 0, 0),
            row(json!({"start": june, "email": "a@example.com", "plan": null}), 16, 0, 0, 32),
            row(json!({"start": june, "email": "b@example.com", "plan": "gold"}), 32, 0, 0, 64),
        ])
    );
    // A key counts under each of its scopes: its own, its roles', its plan's.
    assert_eq!(
        usage(&fixture, &admin, "group_by=scope").await,
        json!([
            row(json!({"scope": null}), 0, 384, 0, 0),
            row(json!({"scope": "from:plan"}), 32, 0, 0, 64),
            row(json!({"scope": "from:role"}), 16, 0, 0, 32),
            row(json!({"scope": "orders:read"}), 35, 4, 8, 94),
            row(json!({"scope": "orders:write"}), 3, 4, 8, 30),
        ])
    );
    let hours = "interval=hour&from=2026-05-01T00:00:00Z&to=2026-05-02T01:00:00Z&email=A%40example.com";
    assert_eq!(
        get(&fixture, &admin, hours).await.json(),
        json!({
            "from": "2026-05-01T00:00:00Z", "to": "2026-05-02T01:00:00Z", "time_zone": "UTC", "next_cursor": null,
            "usage": [
                row(json!({"start": "2026-05-01T10:00:00Z"}), 1, 0, 0, 2),
                row(json!({"start": "2026-05-01T11:00:00Z"}), 2, 4, 0, 12),
                row(json!({"start": "2026-05-02T00:00:00Z"}), 0, 0, 8, 16),
            ],
        })
    );
}

#[sqlx::test(migrations = "./migrations")]
async fn usage_is_filtered_by_key_user_plan_scope_and_outcome(pool: PgPool) {
    let (fixture, admin, [one, ..]) = counted(&pool).await;
    for (query, requests) in [
        (format!("key_id={}", one.0), 15),
        ("email=b@example.com".into(), 32),
        ("plan=gold".into(), 32),
        ("scope=orders:read".into(), 47),
        ("scope=from:role".into(), 16),
        ("outcome=allowed".into(), 51),
        ("outcome=shadow:rate_limited".into(), 8),
        ("outcome=missing".into(), 128),
        ("outcome=allowed&scope=orders:read&plan=gold".into(), 32),
    ] {
        assert_eq!(usage(&fixture, &admin, &query).await[0]["requests"], requests, "{query}");
    }
    assert_eq!(usage(&fixture, &admin, "plan=silver").await, json!([]));
    let per_key = format!("/v1/keys/{}/usage?{SPAN}", one.0);
    let per_key = fixture.get(&per_key, &admin).await.json();
    assert_eq!(per_key["totals"]["shadow:rate_limited"], json!({"requests": 8, "cost": 16}));
    assert_eq!(per_key["sum"], row(json!({}), 3, 4, 8, 30));
}

#[sqlx::test(migrations = "./migrations")]
async fn users_see_their_own_usage(pool: PgPool) {
    let (fixture, _, [one, _, three]) = counted(&pool).await;
    assert_eq!(usage(&fixture, &one.1, "").await, json!([row(json!({}), 19, 4, 8, 62)]));
    assert_eq!(usage(&fixture, &one.1, "group_by=user&email=a@example.com").await[0]["email"], "a@example.com");
    for id in [three.0, Uuid::now_v7()] {
        let reply = get(&fixture, &one.1, &format!("key_id={id}")).await;
        assert_eq!((reply.status, &reply.json()["detail"]), (404, &json!(format!("There is no key {id}."))));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn usage_as_csv_contains_no_formula_for_spreadsheets(pool: PgPool) {
    let (fixture, admin, [one, two, three]) = counted(&pool).await;
    execute(&pool, format!("update api_keys set name = '=HYPERLINK(\"x\", 1)' where id = '{}'", one.0)).await;
    let expected = format!(
        "start,key_id,key_name,email,requests,allowed,refused,other,cost\r\n\
         2026-05-01T00:00:00Z,,,,128,0,128,0,0\r\n\
         2026-05-01T00:00:00Z,{},\"'=HYPERLINK(\"\"x\"\", 1)\",a@example.com,15,3,4,8,30\r\n\
         2026-06-01T00:00:00Z,,,,256,0,256,0,0\r\n\
         2026-06-01T00:00:00Z,{},a key,a@example.com,16,16,0,0,32\r\n\
         2026-06-01T00:00:00Z,{},a key,b@example.com,32,32,0,0,64\r\n",
        one.0, two.0, three.0
    );
    let query = format!("{SPAN}&group_by=key,user&interval=month");
    let (uri, csv) = (format!("/v1/usage?{query}"), [("accept", "text/csv")]);
    for reply in [
        get(&fixture, &admin, &format!("{query}&format=csv")).await,
        fixture.call_with("GET", &uri, &admin, None, &csv).await,
    ] {
        assert_eq!(reply.header("content-type"), "text/csv; charset=utf-8; header=present");
        assert_eq!(reply.header("cache-control"), "no-store");
        assert_eq!((reply.status, String::from_utf8(reply.body).unwrap()), (200, expected.clone()));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn pages_hold_every_row_once_though_usage_goes_on(pool: PgPool) {
    let (fixture, admin, [one, ..]) = counted(&pool).await;
    for format in ["json", "csv"] {
        let all = usage(&fixture, &admin, "group_by=key,scope,outcome&interval=day").await;
        let first = format!("{SPAN}&group_by=key,scope,outcome&interval=day&limit=2&format={format}");
        let (mut seen, mut lines, mut pages) = (Vec::new(), 0, 0);
        let mut uri = format!("/v1/usage?{first}");
        loop {
            let reply = fixture.get(&uri, &admin).await;
            assert_eq!(reply.status, 200);
            pages += 1;
            match format {
                "json" => seen.extend(reply.json()["usage"].as_array().unwrap().clone()),
                _ => lines += String::from_utf8_lossy(&reply.body).lines().count() - 1,
            }
            let Some(next) = reply.headers.get("link") else { break };
            let next = next.to_str().unwrap();
            uri = next.strip_prefix('<').unwrap().strip_suffix(">; rel=\"next\"").unwrap().to_owned();
            if format == "json" {
                assert!(uri.contains(reply.json()["next_cursor"].as_str().unwrap()));
            }
            // A count in a row of an earlier page.
            let of = format!("key_id = '{}' and hour = '2026-05-01 10:00Z'", one.0);
            execute(&pool, format!("update usage_hourly set requests = requests + 1 where {of}")).await;
        }
        let rows = all.as_array().unwrap().len();
        assert_eq!(pages, rows.div_ceil(2));
        if format == "json" {
            assert_eq!(
                seen.iter().map(|row| &row["scope"]).collect::<Vec<_>>(),
                all.as_array().unwrap().iter().map(|row| &row["scope"]).collect::<Vec<_>>()
            );
            assert_eq!(seen.len(), rows);
        } else {
            assert_eq!(lines, rows);
        }
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_wrong_parameter_is_named(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    for (query, field, detail) in [
        ("group_by=keys", "group_by", "must be any of key, user, plan, scope and outcome, with commas between"),
        ("group_by=", "group_by", "must be any of key, user, plan, scope and outcome, with commas between"),
        ("interval=year", "interval", "must be hour, day, week, month or total"),
        ("outcome=fine", "outcome", "must be the name of an outcome, as allowed or shadow:rate_limited"),
        ("format=xml", "format", "must be json or csv"),
        ("cursor=e30", "cursor", "must be the next_cursor of the page before"),
        ("limit=201", "limit", "must be a number from 1 to 200"),
        ("from=2024-05-02T00:00:00Z&to=2026-05-02T00:00:00Z", "from", "must lie at most 366 days before to"),
        (
            "interval=hour&from=2026-05-01T00:00:00Z&to=2026-06-02T00:00:00Z",
            "from",
            "must lie at most 31 days before to, by the hour",
        ),
        ("email=x", "email", "must be an email address such as user@example.com"),
        ("plan=%00", "plan", "must have 1 to 256 characters"),
    ] {
        get(&fixture, &admin, query).await.assert_invalid(field, detail);
    }
    assert_eq!(get(&fixture, &admin, "hours=1").await.status, 400);
}

/// Sums by key and outcome of all there is, hours and days together.
async fn all_sums(pool: &PgPool) -> Vec<(Option<Uuid>, i16, i64, i64)> {
    let sql = "select key_id, outcome, sum(requests)::bigint, sum(cost)::bigint from (
            select key_id, outcome, requests, cost from usage_hourly
            union all select key_id, outcome, requests, cost from usage_daily
            union all select null, outcome, requests, 0 from usage_keyless_hourly
            union all select null, outcome, requests, 0 from usage_keyless_daily
        ) u group by 1, 2 order by 1, 2";
    rows(pool, sql).await
}

fn submission(reporter: u8, seq: u64, counts: Vec<Count>) -> Submission {
    let reporter = ReporterId([reporter; 16]);
    Submission { reporter, sync_key: None, reports: vec![Report { reporter, seq, counts }] }
}

fn of(key: Option<Uuid>, outcome: u8, hour: u32, requests: u64) -> Count {
    let key = key.map(|id| KeyRef { id: KeyId::from(id), generation: 1 });
    Count { of: Subject { key, outcome, hour }, requests, cost: requests * 3, last_ms: 0 }
}

#[sqlx::test(migrations = "./migrations")]
async fn every_sum_stays_as_it_is_while_usage_is_rolled_up_and_reports_go_on(pool: PgPool) {
    let mut keys = Vec::new();
    for number in 0..3 {
        keys.push(crate::support::key(&pool, &format!("user{number}@example.com"), &[]).await.0);
    }
    let now = u32::try_from(time::OffsetDateTime::now_utc().unix_timestamp() / 3_600).unwrap();
    // 100 hours of the time around the end of retention, again and again, from three Envoys.
    let ingest = (1..=3_u8).map(|reporter| {
        let (pool, keys) = (&pool, &keys);
        async move {
            for seq in 1..=60_u64 {
                let counts = (0..20_u64).map(|number| {
                    let mix = seq * 7 + number * 13 + u64::from(reporter);
                    let hour = now - 30 * 24 - 50 + u32::try_from(mix % 100).unwrap();
                    let key = keys.get(usize::try_from(mix % 4).unwrap()).copied();
                    of(key, if mix % 3 == 0 { 8 } else { 0 }, hour, mix % 5 + 1)
                });
                apply(pool, &[submission(reporter, seq, counts.collect())]).await.unwrap();
            }
        }
    });
    let moved = async {
        let mut moved = 0;
        for _ in 0..40 {
            events::export_all(&pool).await.unwrap();
            // Two replicas at once.
            let (one, other) = tokio::join!(roll_up(&pool, 30), roll_up(&pool, 30));
            moved += one.unwrap() + other.unwrap();
        }
        moved
    };
    let (_, moved) = tokio::join!(futures_util::future::join_all(ingest), moved);
    assert!(moved > 0, "some rows moved while reports came");

    let expected: u64 = (1..=3_u64)
        .flat_map(|reporter| {
            (1..=60_u64).flat_map(move |seq| (0..20_u64).map(move |n| (seq * 7 + n * 13 + reporter) % 5 + 1))
        })
        .sum();
    let before = all_sums(&pool).await;
    assert_eq!(before.iter().map(|(.., requests, _)| requests).sum::<i64>().cast_unsigned(), expected);
    events::export_all(&pool).await.unwrap();
    roll_up(&pool, 30).await.unwrap();
    assert_eq!(all_sums(&pool).await, before);
    let sql = "select (select count(*) from usage_hourly where hour < date_trunc('day', now() - interval '30 days', 'UTC'))
            + (select count(*) from usage_keyless_hourly where hour < date_trunc('day', now() - interval '30 days', 'UTC'))";
    assert_eq!(scalar::<i64>(&pool, sql).await, 0, "all of it was rolled up");
    assert_eq!(roll_up(&pool, 30).await.unwrap(), 0);
}

#[sqlx::test(migrations = "./migrations")]
async fn hourly_usage_is_rolled_up_after_its_event_and_daily_usage_expires(pool: PgPool) {
    let (id, _) = crate::support::key(&pool, "user@example.com", &[]).await;
    count(&pool, id, "2020-05-01 10:00Z", 0, 5).await;
    assert_eq!(roll_up(&pool, 90).await.unwrap(), 0, "its event is not written yet");
    events::export_all(&pool).await.unwrap();
    assert_eq!(roll_up(&pool, 90).await.unwrap(), 1);
    let before = all_sums(&pool).await;
    assert_eq!(before, [(Some(id), 0, 5, 10)]);
    // A report that comes late makes a row of its own, and moves with the next round.
    count(&pool, id, "2020-05-01 10:00Z", 0, 7).await;
    let retention = Retention { hourly_days: 90, daily_days: None, event_days: 30 };
    events::export_all(&pool).await.unwrap();
    tidy(&pool, retention).await.unwrap();
    let daily: Vec<(i64, i64)> = rows(&pool, "select requests, cost from usage_daily").await;
    assert_eq!(daily, [(12, 24)], "0 days: for ever");
    assert_eq!(forget(&pool, 36_500).await.unwrap(), 0);
    tidy(&pool, Retention { daily_days: Some(1_100), ..retention }).await.unwrap();
    assert_eq!(all_sums(&pool).await, []);
}
