//! Quotas, over the real router and a real PostgreSQL.

use crate::support::reports::{Envoy, coded, count};
use crate::support::{Fixture, execute, revision, row, scalar};
use contract::key::Secret;
use contract::outcome::Outcome;
use contract::usage::SHADOW;
use control_plane::domain::{Every, Window};
use control_plane::quota::{Whose, apply_quotas, reconsider, reopen};
use serde_json::{Value, json};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

async fn set_quota(pool: &PgPool, id: Uuid, quota: &Value) {
    execute(pool, &format!("update api_keys set quota = '{quota}', applied_quota = '{quota}' where id = '{id}'")).await;
}

/// Flag, fill, and whether the end lies ahead.
async fn as_filters_know(pool: &PgPool, id: Uuid) -> (bool, i32, Option<bool>) {
    let sql = format!("select quota_exceeded, quota_fill, quota_resets_at > now() from api_keys where id = '{id}'");
    row(pool, sql).await
}

async fn view(fixture: &Fixture, admin: &Secret, id: Uuid) -> Value {
    fixture.get(&format!("/v1/keys/{id}/quota"), admin).await.expect(200)
}

/// A quota view without its times.
fn timeless(mut view: Value) -> Value {
    for field in ["window_start", "window_end", "resets_at"] {
        view.as_object_mut().unwrap().remove(field);
    }
    view
}

#[sqlx::test(migrations = "./migrations")]
async fn a_quota_is_used_up_and_opens_with_the_next_window(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (id, _) = fixture.key("ada@example.com", &[]).await;
    let reply = fixture.get(&format!("/v1/keys/{id}/quota"), &admin).await;
    assert_eq!((reply.status, reply.json()["code"].as_str()), (404, Some("not_found")));

    set_quota(&pool, id, &json!({"requests": 100, "period": "month", "time_zone": "Europe/Berlin"})).await;
    let mut envoy = Envoy::new(1, &sync);
    let shadow = coded(id, SHADOW | Outcome::QuotaExceeded.code(), 9, 0);
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 40), count(id, Outcome::ScopeDenied, 5), shadow]).await;
    let seen = view(&fixture, &admin, id).await;
    let expected = json!({
        "requests": 100, "per": "key", "period": "month", "time_zone": "Europe/Berlin", "window_seconds": null,
        "used": 40, "held": 0, "remaining": 60, "exceeded": false
    });
    let sql = "select to_char(starts at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), to_char(ends at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')
        from (
            select date_trunc('month', now(), 'Europe/Berlin') as starts,
                date_trunc('month', date_trunc('month', now(), 'Europe/Berlin') + interval '45 days', 'Europe/Berlin') as ends
        ) month";
    let calendar: (String, String) = row(&pool, sql).await;
    assert_eq!(
        (seen["window_start"].as_str().unwrap(), seen["window_end"].as_str().unwrap()),
        (&*calendar.0, &*calendar.1)
    );
    assert_eq!(seen["resets_at"], Value::Null);
    assert_eq!(timeless(seen), expected);

    let before = revision(&pool).await;
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 59)]).await;
    assert_eq!((as_filters_know(&pool, id).await, revision(&pool).await), ((false, 0, None), before));
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 3)]).await;
    assert_eq!(as_filters_know(&pool, id).await, (true, 0, Some(true)));
    let seen = view(&fixture, &admin, id).await;
    assert_eq!(seen["resets_at"], seen["window_end"]);
    assert_eq!((&seen["used"], &seen["remaining"], &seen["exceeded"]), (&json!(102), &json!(0), &json!(true)));
    // Reports that come late say nothing new.
    let before = revision(&pool).await;
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 1), count(id, Outcome::QuotaExceeded, 3)]).await;
    assert_eq!(revision(&pool).await, before);
    assert_eq!(reopen(&pool).await.unwrap(), 0);

    // The month ends.
    execute(
        &pool,
        "update quota_use set window_start = now() - interval '32 days', window_end = now() - interval '1 second'",
    )
    .await;
    execute(&pool, "update api_keys set quota_resets_at = now() - interval '1 second' where quota_exceeded").await;
    assert_eq!(timeless(view(&fixture, &admin, id).await)["used"], 0);
    assert_eq!(reopen(&pool).await.unwrap(), 1);
    assert_eq!(as_filters_know(&pool, id).await, (false, 0, None));
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 4)]).await;
    let seen = view(&fixture, &admin, id).await;
    assert_eq!((&seen["used"], seen["window_start"].as_str()), (&json!(4), Some(&*calendar.0)));
    fixture.in_step().await;
}

#[sqlx::test(migrations = "./migrations")]
async fn a_rolling_quota_opens_when_enough_has_left_it(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (id, _) = fixture.key("ada@example.com", &[]).await;
    set_quota(&pool, id, &json!({"requests": 32, "period": "rolling", "window_s": 3_600})).await;
    let mut envoy = Envoy::new(1, &sync);
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 20)]).await;
    // Half an hour passes.
    execute(&pool, "update quota_use set window_start = window_start - interval '30 minutes', window_end = window_end - interval '30 minutes'").await;
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 12)]).await;
    let sql = format!(
        "select quota_exceeded, round(extract(epoch from quota_resets_at - now()) / 60)::int from api_keys where id = '{id}'"
    );
    let (exceeded, minutes): (bool, i32) = row(&pool, sql).await;
    assert!(exceeded && (29..=31).contains(&minutes), "{exceeded} {minutes}");
    let seen = view(&fixture, &admin, id).await;
    assert_eq!(
        (&seen["period"], &seen["time_zone"], &seen["window_seconds"]),
        (&json!("rolling"), &Value::Null, &json!(3_600))
    );
    execute(&pool, "update quota_use set window_start = window_start - interval '31 minutes', window_end = window_end - interval '31 minutes'").await;
    assert_eq!(timeless(view(&fixture, &admin, id).await)["used"], 12);
    execute(&pool, "update api_keys set quota_resets_at = now() where quota_exceeded").await;
    assert_eq!(reopen(&pool).await.unwrap(), 1);
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    assert_eq!(timeless(view(&fixture, &admin, id).await)["used"], 13);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_plans_quota_counts_for_its_keys_and_a_change_opens_or_shuts_at_once(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (id, _) = fixture.key("ada@example.com", &[]).await;
    let (own, _) = fixture.key("ada@example.com", &[]).await;
    execute(
        &pool,
        r#"insert into definitions (kind, name, quota) values ('plan', 'small', '{"requests": 10, "period": "day"}')"#,
    )
    .await;
    let plan: i32 = scalar(&pool, "select number from definitions").await;
    execute(
        &pool,
        "update user_preferences set plan_number = (select number from definitions) where email = 'ada@example.com'",
    )
    .await;
    execute(&pool, "update api_keys set applied_quota = '{\"requests\": 10, \"period\": \"day\"}' where owner_plan_number is not null").await;
    set_quota(&pool, own, &json!({"requests": 5, "period": "day"})).await;
    let mut envoy = Envoy::new(1, &sync);
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 10), count(own, Outcome::Allowed, 6)]).await;
    assert_eq!((as_filters_know(&pool, id).await.0, as_filters_know(&pool, own).await.0), (true, true));
    assert_eq!(view(&fixture, &admin, id).await["requests"], 10);

    let mut transaction = pool.begin().await.unwrap();
    let more = r#"update definitions set quota = '{"requests": 20, "period": "day"}'"#;
    sqlx::query(more).execute(&mut *transaction).await.unwrap();
    assert_eq!(apply_quotas(&mut transaction, Whose::Plan(plan)).await.unwrap(), 2);
    transaction.commit().await.unwrap();
    // Copied to the row, and open again.
    assert_eq!(as_filters_know(&pool, id).await, (false, 1, None));
    assert_eq!(as_filters_know(&pool, own).await, (true, 0, Some(true)));

    let mut connection = pool.acquire().await.unwrap();
    // Nothing was changed: nothing happens, and filters sleep on.
    let before = revision(&pool).await;
    assert_eq!(reconsider(&mut connection, &[id, own]).await.unwrap(), 0);
    assert_eq!(revision(&pool).await, before);
    set_quota(&pool, own, &json!({"requests": 6, "period": "day"})).await;
    assert_eq!(reconsider(&mut connection, &[own]).await.unwrap(), 0);
    // Of another kind, so nothing of it is used.
    set_quota(&pool, own, &json!({"requests": 6, "period": "week"})).await;
    assert_eq!(reconsider(&mut connection, &[own]).await.unwrap(), 1);
    assert_eq!(as_filters_know(&pool, own).await, (false, 0, None));
    assert_eq!(view(&fixture, &admin, own).await["used"], 0);
    set_quota(&pool, id, &json!({"requests": 3, "period": "day"})).await;
    assert_eq!(reconsider(&mut connection, &[id]).await.unwrap(), 1);
    assert_eq!(as_filters_know(&pool, id).await, (true, 1, Some(true)));
    execute(&pool, &format!("update api_keys set quota = null, applied_quota = null where id = '{id}'")).await;
    execute(&pool, "update definitions set removed = true").await;
    assert_eq!(reconsider(&mut connection, &[id]).await.unwrap(), 1);
    assert_eq!(as_filters_know(&pool, id).await, (false, 1, None));
}

#[sqlx::test(migrations = "./migrations")]
async fn an_invalid_quota_or_time_zone_stops_no_report(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (odd, _) = fixture.key("ada@example.com", &[]).await;
    let (lost, _) = fixture.key("ada@example.com", &[]).await;
    execute(&pool, &format!("update api_keys set applied_quota = '{{\"requests\": \"many\"}}' where id = '{odd}'"))
        .await;
    set_quota(&pool, lost, &json!({"requests": 3, "period": "day", "time_zone": "Mars/Olympus"})).await;
    let counts = [count(odd, Outcome::Allowed, 2), count(lost, Outcome::Allowed, 2)];
    Envoy::new(1, &sync).report(&fixture, &counts).await;
    assert_eq!(view(&fixture, &admin, lost).await["used"], 2);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_that_is_created_with_a_quota_has_the_etag_that_its_next_change_asks_for(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let quota = json!({"requests": 100, "period": "day"});
    for extra in [json!({}), json!({"quota": quota}), json!({"cost": 5})] {
        let created = fixture.create(&admin, extra.clone()).await;
        created.expect(201);
        let (etag, uri) = (created.header("etag").to_owned(), created.header("location").to_owned());
        assert_eq!(fixture.get(&uri, &admin).await.header("etag"), etag, "{extra}");
        let renamed = json!({"name": "other"});
        let changed = fixture.call_with("PATCH", &uri, &admin, Some(&renamed), &[("if-match", &etag)]).await;
        assert_eq!(changed.status, 200, "{extra}");
    }
}

/// Statements over usage group by days and months of UTC with `date_trunc`; quotas have the windows of the calendar module.
#[sqlx::test(migrations = "./migrations")]
async fn postgresql_and_the_calendar_agree_on_days_weeks_and_months_of_utc(pool: PgPool) {
    for (unit, every) in [("day", Every::Day), ("week", Every::Week), ("month", Every::Month)] {
        let windows: Vec<(OffsetDateTime, OffsetDateTime, OffsetDateTime)> = sqlx::query_as(
            "select at, date_trunc($1, at, 'UTC'),
                (date_trunc($1, at at time zone 'UTC') + ('1 ' || $1)::interval) at time zone 'UTC'
            from generate_series('2020-01-01T00:00Z'::timestamptz, '2040-01-01T00:00Z', interval '43 hours 59.5 seconds') at",
        )
        .bind(unit)
        .fetch_all(&pool)
        .await
        .unwrap();
        assert!(windows.len() > 3_000);
        for (at, start, end) in windows {
            assert_eq!(Window::containing(at, every, "UTC"), Window { start, end }, "{unit} {at}");
        }
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn a_quota_that_is_reset_is_open_at_once_and_the_audit_log_says_why(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (id, _) = fixture.key("ada@example.com", &[]).await;
    let path = format!("/v1/keys/{id}/quota/reset");
    let none = fixture.post(&path, &admin, json!({})).await;
    assert_eq!((none.status, none.json()["code"].as_str()), (404, Some("not_found")));
    let mut envoy = Envoy::new(1, &sync);
    for quota in [
        json!({"requests": 10, "period": "day", "time_zone": "UTC"}),
        json!({"requests": 10, "period": "rolling", "window_seconds": 3600}),
    ] {
        set_quota(&pool, id, &quota).await;
        envoy.report(&fixture, &[count(id, Outcome::Allowed, 12)]).await;
        let (exceeded, fill, _) = as_filters_know(&pool, id).await;
        assert!(exceeded);
        let before = revision(&pool).await;
        let reset = fixture.post(&path, &admin, json!({"note": "outage on Monday"})).await.expect(200);
        assert_eq!(json!([reset["used"], reset["remaining"], reset["exceeded"]]), json!([0, 10, false]));
        assert_eq!(as_filters_know(&pool, id).await, (false, fill + 1, None));
        assert!(revision(&pool).await > before, "filters hear of it");
        let sql = "select detail from audit where action = 'key.reset_quota' order by id desc limit 1";
        let detail: Value = scalar(&pool, sql).await;
        assert_eq!(detail, json!({"used": 12, "note": "outage on Monday"}));
        envoy.report(&fixture, &[count(id, Outcome::Allowed, 3)]).await;
        assert_eq!(view(&fixture, &admin, id).await["used"], 3);
        execute(&pool, "delete from quota_use").await;
    }
}
