//! The list of Envoys and the state of each, as its polls and reports tell it.

use std::time::{Duration, Instant};

use crate::support::reports::submit;
use crate::support::{Fixture, Reply, execute, request, revision, revoke, row, scalar};
use contract::id::{Epoch, ReporterId};
use contract::key::Secret;
use contract::usage::Report;
use control_plane::metering::NEW_REPORTERS;
use control_plane::metering::retention::forget_reporters;
use control_plane::sync::filters;
use control_plane::sync::registry::{PollStatus, Registry};
use limits::message::Call;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

async fn live(pool: &PgPool) -> u32 {
    filters::live(pool).await.unwrap().values().sum()
}

fn envoy(number: u8) -> ReporterId {
    ReporterId([number; 16])
}

async fn poll(fixture: &Fixture, sync: &Secret, query: &str) -> Reply {
    let reply = fixture.get(&format!("/sync/v1/keys?{query}"), sync).await;
    assert_eq!(reply.status, 200);
    reply
}

/// An Envoy polls, and confirms a revision of an epoch.
async fn confirm(fixture: &Fixture, sync: &Secret, (epoch, revision): (Uuid, u64), number: u8) {
    let query = format!("epoch={epoch}&revision={revision}&wait=0&reporter={}", envoy(number));
    poll(fixture, sync, &query).await;
}

async fn applied_on(fixture: &Fixture, key: &Secret, id: Uuid) -> Value {
    fixture.app.filters.write(&fixture.pool).await.unwrap();
    fixture.get(&format!("/v1/keys/{id}"), key).await.json()["applied_on"].clone()
}

async fn epoch(pool: &PgPool) -> Uuid {
    scalar(pool, "select epoch from store_state").await
}

/// Longer than a screen: one page, whole.
#[sqlx::test(migrations = "./migrations")]
async fn every_envoy_is_shown_with_what_it_says(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (sync_id, sync) = fixture.key("operator@example.com", &["sync"]).await;
    let now = fixture.in_step().await;
    let epoch = epoch(&pool).await;
    let [one, two, three] = [1, 2, 3].map(envoy);
    // In step, two behind with requests that wait, and still loading; a reporter and numbers that make no sense.
    poll(&fixture, &sync, &format!("epoch={epoch}&revision={now}&wait=0&reporter={one}&version=0.3.0&pending=0")).await;
    poll(&fixture, &sync, &format!("epoch={epoch}&revision={}&reporter={two}&pending=7", now - 2)).await;
    poll(&fixture, &sync, &format!("epoch={epoch}&cursor=0&revision={now}&reporter={three}&pending=x&version=%0a"))
        .await;
    poll(&fixture, &sync, "reporter=nonsense").await;
    let report = Report { reporter: two, seq: 1, counts: Vec::new() };
    assert_eq!(submit(&fixture, &sync, &[report]).await.status, 200);
    fixture.app.filters.write(&pool).await.unwrap();

    let reply = fixture.get("/v1/envoys", &admin).await;
    let mut page = reply.json();
    assert_eq!(reply.status, 200, "{page}");
    let mut ages = Vec::new();
    for filter in page["envoys"].as_array_mut().unwrap() {
        assert_eq!(filter["live"], true);
        for (name, of) in [("seen_at", 0), ("synced_at", 0), ("age_seconds", 0), ("reported_at", 1), ("lag_seconds", 1)]
        {
            let place = if of == 0 { &mut filter[name] } else { &mut filter["usage"][name] };
            if let Some(age) = place.as_f64() {
                assert!((0.0..30.0).contains(&age), "{name}: {age}");
                ages.push(name);
            }
            if !place.is_null() {
                *place = json!("checked");
            }
        }
    }
    assert_eq!(ages, ["age_seconds", "lag_seconds", "age_seconds", "lag_seconds"]);
    let filter = |id: ReporterId, version: Value, far: [Value; 5], usage: Value| {
        let [epoch, revision, behind, in_step, synced] = far;
        json!({
            "id": Uuid::from(id), "sync_key_id": sync_id, "address": null, "version": version, "live": true,
            "seen_at": "checked", "epoch": epoch, "revision": revision, "revisions_behind": behind, "up_to_date": in_step,
            "synced_at": synced, "age_seconds": synced, "usage": usage,
        })
    };
    let usage = |pending: Value, reported: Value, lag: Value| json!({"pending_requests": pending, "reported_at": reported, "lag_seconds": lag});
    let checked = json!("checked");
    let expected = json!({
        "epoch": epoch, "revision": now, "next_cursor": null,
        "envoys": [
            filter(one, json!("0.3.0"), [json!(epoch), json!(now), json!(0), json!(true), checked.clone()],
                usage(json!(0), Value::Null, checked.clone())),
            filter(two, Value::Null, [json!(epoch), json!(now - 2), json!(2), json!(false), checked.clone()],
                usage(json!(7), checked.clone(), checked.clone())),
            filter(three, Value::Null, [Value::Null, Value::Null, Value::Null, json!(false), Value::Null],
                usage(Value::Null, Value::Null, Value::Null)),
        ],
    });
    assert_eq!(page, expected);

    let first = fixture.get("/v1/envoys?limit=2", &admin).await;
    let next = format!("/v1/envoys?cursor={}&limit=2", first.json()["next_cursor"].as_str().unwrap());
    assert_eq!(first.header("link"), format!("<{next}>; rel=\"next\""));
    let second = fixture.get(&next, &admin).await;
    assert_eq!((second.json()["envoys"].as_array().unwrap().len(), second.headers.get("link")), (1, None));
    assert_eq!(fixture.get("/v1/envoys?limit=0", &admin).await.json()["field"], "limit");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_change_that_prefers_to_wait_is_answered_once_every_live_envoy_has_it(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let before = fixture.in_step().await;
    let epoch = epoch(&pool).await;
    let says = async |number, revision| confirm(&fixture, &sync, (epoch, revision), number).await;
    says(1, before).await;
    says(2, before).await;
    let body = json!({"email": "user@example.com", "name": "n"});
    let create = async |prefer| {
        let reply = fixture.call_with("POST", "/v1/keys", &admin, Some(&body), &[("prefer", prefer)]).await;
        (reply, Instant::now())
    };
    let confirmed = async {
        while revision(&pool).await == before {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let after = fixture.in_step().await;
        says(1, after).await;
        let last = Instant::now();
        says(2, after).await;
        last
    };
    let ((reply, answered), confirmed) = tokio::join!(create("respond-async, wait=10"), confirmed);
    assert_eq!((reply.status, reply.header("preference-applied")), (201, "wait=10"));
    assert!(answered > confirmed);

    // No Envoy confirms: the change is made, and the answer does not say that it is applied.
    let began = Instant::now();
    let (reply, answered) = create("wait=1").await;
    assert_eq!((reply.status, reply.headers.get("preference-applied")), (201, None));
    assert!(answered - began >= Duration::from_secs(1));
    // It concerns changes only, and those that are made.
    let refused = fixture.call_with("POST", "/v1/keys", &admin, Some(&json!({})), &[("prefer", "wait=10")]).await;
    let read = fixture.call_with("GET", "/v1/keys", &admin, None, &[("prefer", "wait=10")]).await;
    assert_eq!([refused.status, read.status], [400, 200]);
    assert!(answered.elapsed() < Duration::from_secs(5), "neither waited");
    let (bad, _) = create("wait=60").await;
    bad.assert_invalid("Prefer", "wait must be a number of seconds from 1 to 10");
    assert_eq!(read.json()["keys"], fixture.get("/v1/keys", &admin).await.json()["keys"], "nothing was made");
}

#[sqlx::test(migrations = "./migrations")]
async fn a_key_tells_on_how_many_envoys_its_last_change_is_applied(pool: PgPool) {
    let (fixture, admin, sync) = Fixture::with_admin_and_sync(&pool).await;
    let (id, user) = fixture.key("user@example.com", &[]).await;
    // Notes when changes arrive.
    let running = tokio::spawn(fixture.app.filters.clone().run(pool.clone(), fixture.app.store.positions()));
    let all = |envoys: u32| json!({"envoys": envoys, "applied": envoys, "max_lag_seconds": null, "unreachable": 0});
    assert_eq!(applied_on(&fixture, &user, id).await, all(0));
    let before = fixture.in_step().await;
    let epoch = epoch(&pool).await;
    let says = async |number, revision| confirm(&fixture, &sync, (epoch, revision), number).await;
    says(1, before).await;
    says(2, before).await;
    assert_eq!(applied_on(&fixture, &user, id).await, all(2));

    let revoked = Instant::now();
    revoke(&pool, id).await;
    let after = fixture.in_step().await;
    let none = applied_on(&fixture, &admin, id).await;
    assert_eq!((&none["envoys"], &none["applied"]), (&json!(2), &json!(0)));
    says(1, after).await;
    let one = applied_on(&fixture, &admin, id).await;
    assert_eq!((&one["envoys"], &one["applied"]), (&json!(2), &json!(1)));
    let (lags, most) = (one["max_lag_seconds"].as_f64().unwrap(), revoked.elapsed().as_secs_f64());
    assert!((0.0..=most).contains(&lags), "{lags} of {most}");
    let later = applied_on(&fixture, &admin, id).await["max_lag_seconds"].as_f64().unwrap();
    assert!(later > lags, "{later} after {lags}");
    says(2, after).await;
    assert_eq!(applied_on(&fixture, &admin, id).await, all(2));

    // A role of the key is part of it; a filter of another epoch has nothing of this one; silent ones do not count.
    let role: i32 = scalar(&pool, "insert into definitions (kind, name) values ('role', 'r') returning number").await;
    execute(&pool, format!("update api_keys set role_numbers = array[{role}] where id = '{id}'")).await;
    let after = fixture.in_step().await;
    says(1, after).await;
    assert_eq!(applied_on(&fixture, &admin, id).await["applied"], 1);
    sqlx::query("update definitions set scopes = '{a}' where number = $1").bind(role).execute(&pool).await.unwrap();
    assert_eq!(applied_on(&fixture, &admin, id).await["applied"], 0);
    let foreign = PollStatus { holds: Some((Epoch([9; 16]), u64::MAX)), ..PollStatus::default() };
    fixture.app.filters.polled(envoy(3), foreign);
    let three = applied_on(&fixture, &admin, id).await;
    assert_eq!((&three["envoys"], &three["applied"], &three["unreachable"]), (&json!(3), &json!(0), &json!(0)));
    execute(&pool, "update filters set seen_at = now() - interval '61 seconds'").await;
    running.abort();
    // They may be gone, or serve an old store: they are counted separately.
    let silent = json!({"envoys": 0, "applied": 0, "max_lag_seconds": null, "unreachable": 3});
    assert_eq!(applied_on(&fixture, &admin, id).await, silent);
    let gone = "update filters set seen_at = now() - interval '25 hours'";
    execute(&pool, format!("{gone} where reporter = '{}'", envoy(1))).await;
    assert_eq!(applied_on(&fixture, &admin, id).await["unreachable"], 2);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_replica_does_not_overwrite_newer_state_of_an_envoy(pool: PgPool) {
    let (one, other) = (Registry::bounded(1_000), Registry::bounded(1_000));
    let epoch = Epoch::from(epoch(&pool).await);
    let (sync, _) = crate::support::key(&pool, "operator@example.com", &["sync"]).await;
    let says = |revision| PollStatus { sync_key: sync, holds: Some((epoch, revision)), ..PollStatus::default() };
    let stored = async || -> (i64, Option<Uuid>) { row(&pool, "select revision, sync_key_id from filters").await };
    other.held(envoy(1), sync);
    other.write(&pool).await.unwrap();
    one.polled(envoy(1), says(5));
    other.polled(envoy(1), says(6));
    other.write(&pool).await.unwrap();
    one.write(&pool).await.unwrap();
    assert_eq!(stored().await, (6, Some(sync)), "the older word came later");
    other.held(envoy(1), sync);
    one.reported(envoy(1), sync);
    other.write(&pool).await.unwrap();
    one.write(&pool).await.unwrap();
    assert_eq!(stored().await, (6, Some(sync)));
    one.polled(envoy(1), says(7));
    one.write(&pool).await.unwrap();
    assert_eq!((stored().await.0, live(&pool).await), (7, 1));
    // A sync key reports for its own Envoys only, at every replica.
    let (stranger, _) = crate::support::key(&pool, "operator@example.com", &["sync"]).await;
    for replica in [one, Registry::bounded(1_000)] {
        replica.polled(envoy(1), PollStatus { sync_key: stranger, ..says(8) });
        replica.write(&pool).await.unwrap();
        assert_eq!(stored().await, (7, Some(sync)));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn the_state_of_envoys_is_kept_while_the_database_is_down(pool: PgPool) {
    let registry = Registry::bounded(1_000);
    let away = pool.clone();
    let here = sqlx::postgres::PgPoolOptions::new().connect_with((*pool.connect_options()).clone()).await.unwrap();
    away.close().await;
    registry.polled(envoy(1), PollStatus { holds: Some((Epoch([7; 16]), 5)), ..PollStatus::default() });
    assert!(registry.write(&away).await.is_err());
    registry.polled(envoy(2), PollStatus::default());
    assert!(registry.write(&away).await.is_err());
    registry.write(&here).await.unwrap();
    let rows: Vec<(Uuid, i64)> =
        sqlx::query_as("select reporter, revision from filters order by 1").fetch_all(&here).await.unwrap();
    assert_eq!(rows, [(envoy(1).into(), 5), (envoy(2).into(), 0)]);
    here.close().await;
}

#[sqlx::test(migrations = "./migrations")]
async fn envoys_are_forgotten_a_day_after_their_last_message(pool: PgPool) {
    let registry = Registry::bounded(1_000);
    for number in 1..=3 {
        registry.polled(envoy(number), PollStatus::default());
    }
    registry.write(&pool).await.unwrap();
    assert_eq!(live(&pool).await, 3);
    let gone = "update filters set seen_at = now() - interval '25 hours'";
    execute(&pool, format!("{gone} where reporter <> '{}'", envoy(1))).await;
    assert_eq!((filters::forget(&pool).await.unwrap(), live(&pool).await), (2, 1));
}

#[sqlx::test(migrations = "./migrations")]
async fn polls_are_written_in_batches(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    fixture.in_step().await;
    for _ in 0..50 {
        for number in 1..=4 {
            poll(&fixture, &sync, &format!("reporter={}", envoy(number))).await;
        }
    }
    let rows = async || -> i64 { scalar(&pool, "select count(*) from filters").await };
    assert_eq!(rows().await, 0, "no poll writes");
    fixture.app.filters.write(&pool).await.unwrap();
    assert_eq!(rows().await, 4);
}

/// What a new Envoy is answered, once as it polls and once as it reports.
async fn newcomer(fixture: &Fixture, sync: &Secret, number: u8) -> [Reply; 2] {
    let query = format!("/sync/v1/keys?wait=0&reporter={}", envoy(number));
    let polled = fixture.get(&query, sync).await;
    let report = Report { reporter: envoy(number), seq: 1, counts: Vec::new() };
    [polled, submit(fixture, sync, &[report]).await]
}

async fn reporters(pool: &PgPool) -> i64 {
    scalar(pool, "select count(*) from usage_reporters").await
}

#[sqlx::test(migrations = "./migrations")]
async fn a_sync_key_names_no_more_envoys_than_it_may(pool: PgPool) {
    let mut fixture = Fixture::new(&pool).await;
    fixture.configure(|app| app.filters = Registry::bounded(3));
    let (_, stolen) = fixture.key("operator@example.com", &["sync"]).await;
    let (_, other) = fixture.key("operator@example.com", &["sync"]).await;
    for number in 1..=3 {
        let statuses = newcomer(&fixture, &stolen, number).await.map(|reply| reply.status);
        assert_eq!(statuses, [200, 200]);
    }
    let detail = "This sync key has 3 live Envoys, which is as many as it may have. Give each zone a sync key of its own, raise \
                  --envoys-per-sync-key, or revoke the key if it was stolen.";
    for number in 4..=9 {
        // It gets the keys, so that it can serve, and counts for nothing.
        let [polled, refused] = newcomer(&fixture, &stolen, number).await;
        assert_eq!(polled.status, 200);
        let call = Call { reporter: envoy(number), is_last: false, asks: Vec::new() };
        let call = request("POST", "/sync/v1/allowances", Some(&stolen), call.write().unwrap());
        fixture.send(call).await.assert_problem(429, "bound_reached", detail, None);
        refused.assert_problem(429, "bound_reached", detail, None);
        assert_eq!(refused.header("retry-after"), "60");
    }
    // Known Envoys continue, and so do those of another key.
    for (sync, number) in [(&stolen, 2), (&other, 10)] {
        let statuses = newcomer(&fixture, sync, number).await.map(|reply| reply.status);
        assert_eq!(statuses, [200, 200]);
    }
    fixture.app.filters.write(&pool).await.unwrap();
    assert_eq!((live(&pool).await, fixture.app.filters.live(), reporters(&pool).await), (4, 4, 4));
}

#[sqlx::test(migrations = "./migrations")]
async fn rows_of_envoys_that_are_gone_are_bounded_and_expire(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (key, sync) = fixture.key("operator@example.com", &["sync"]).await;
    let (_, other) = fixture.key("operator@example.com", &["sync"]).await;
    assert_eq!(newcomer(&fixture, &sync, 1).await[1].status, 200);
    let came = "insert into usage_reporters (reporter, sync_key_id, last_seq)
        select gen_random_uuid(), $1, 1 from generate_series(2, $2)";
    sqlx::query(came).bind(key).bind(NEW_REPORTERS).execute(&pool).await.unwrap();
    let detail = "Reports of 10000 new Envoys came under this sync key within 24 hours, which is as many as it may have. Give each \
                  zone a sync key of its own, or revoke the key if it was stolen.";
    newcomer(&fixture, &sync, 2).await[1].assert_problem(429, "bound_reached", detail, None);
    assert_eq!(newcomer(&fixture, &sync, 1).await[1].status, 200);
    assert_eq!(newcomer(&fixture, &other, 3).await[1].status, 200);
    let yesterday = "update usage_reporters set created_at = now() - interval '1 day'";
    execute(&pool, format!("{yesterday} where reporter <> '{}'", envoy(1))).await;
    assert_eq!(newcomer(&fixture, &sync, 2).await[1].status, 200);

    assert_eq!(forget_reporters(&pool).await.unwrap(), 0);
    let sql = format!(
        "update usage_reporters set reported_at = now() - interval '91 days' where last_seq > 0 and sync_key_id = '{key}'"
    );
    execute(&pool, sql).await;
    assert_eq!((forget_reporters(&pool).await.unwrap(), reporters(&pool).await), (10_001, 1));

    let shown = format!(
        "insert into filters (reporter, sync_key_id, epoch, revision, confirmed_at, seen_at)
        select gen_random_uuid(), '{key}', gen_random_uuid(), 0, now(), now() - make_interval(mins => 1 + n / 100)
        from generate_series(1, 10007) n"
    );
    execute(&pool, shown).await;
    let trimmed = filters::trim(&pool).await.unwrap();
    let left: i64 = scalar(&pool, "select count(*) from filters where seen_at < now() - interval '1 minute'").await;
    assert_eq!((trimmed, left), (7, 10_000));
}
