//! Usage events: every count once, with any number of writers and readers.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::{EARLY, Fixture, Reply, execute, rows, scalar, scalars};
use contract::id::{KeyId, ReporterId};
use contract::key::Secret;
use contract::usage::{Count, KeyRef, Report, Subject};
use control_plane::metering::{Submission, apply, events};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const HOUR: u32 = 490_000;

async fn count(pool: &PgPool, reporter: u8, seq: u64, counts: &[(Uuid, u32, u8, u64)]) {
    let reporter = ReporterId([reporter; 16]);
    let counts = counts.iter().map(|(id, generation, outcome, requests)| {
        let key = Some(KeyRef { id: KeyId::from(*id), generation: *generation });
        let of = Subject { key, outcome: *outcome, hour: HOUR + u32::from(*outcome) };
        Count { of, requests: *requests, cost: requests * 2, last_ms: 0 }
    });
    let report = Report { reporter, seq, counts: counts.collect() };
    apply(pool, &[Submission { reporter, sync_key: None, reports: vec![report] }]).await.unwrap();
}

async fn read(fixture: &Fixture, admin: &Secret, query: &str) -> Reply {
    fixture.get(&format!("/v1/usage/events?{query}"), admin).await
}

/// All events after one, page by page, as a reader that remembers the last one.
async fn read_on(fixture: &Fixture, admin: &Secret, after: &mut String) -> Vec<Value> {
    let mut all = Vec::new();
    loop {
        let reply = read(fixture, admin, &format!("after={after}&limit=3")).await;
        let batch = reply.json();
        assert_eq!((reply.status, reply.header("content-type")), (200, "application/cloudevents-batch+json"));
        assert_eq!(reply.header("cache-control"), "no-store");
        reply.header("portcullis-cursor").clone_into(after);
        assert_eq!(reply.header("link"), format!("</v1/usage/events?after={after}&limit=3>; rel=\"next\""));
        if batch.as_array().unwrap().is_empty() {
            return all;
        }
        all.extend(batch.as_array().unwrap().clone());
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn an_event_says_what_was_counted_since_the_one_before(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    count(&pool, 1, 1, &[(id, 1, 0, 5), (id, 2, 0, 7), (id, 1, 136, 1)]).await;
    assert_eq!(events::export_all(&pool).await.unwrap(), 2, "secrets of one key count together");
    count(&pool, 1, 2, &[(id, 1, 0, 3)]).await;
    assert_eq!(events::export_all(&pool).await.unwrap(), 1);
    assert_eq!(events::export_all(&pool).await.unwrap(), 0);
    let owner: Uuid = scalar(&pool, format!("select owner_id from api_keys where id = '{id}'")).await;
    execute(&pool, "update usage_events set created_at = '2026-05-15 14:30:00.5Z'").await;
    let ids: Vec<Uuid> = scalars(&pool, "select id from usage_events order by seq").await;
    let event = |seq: usize, hour: &str, outcome: &str, requests: u64| {
        json!({
            "specversion": "1.0", "id": ids[seq - 1], "source": "/v1/usage/events", "type": "dev.portcullis.usage.v1",
            "subject": id, "time": "2026-05-15T14:30:00Z", "sequence": format!("{seq:019}"),
            "datacontenttype": "application/json",
            "data": {
                "key_id": id, "owner_id": owner, "hour": hour, "outcome": outcome, "requests": requests,
                "cost": if outcome == "allowed" { requests * 2 } else { 0 },
            },
        })
    };
    let reply = read(&fixture, &admin, "").await;
    let expected = json!([
        event(1, "2025-11-24T16:00:00Z", "allowed", 12),
        event(2, "2025-11-30T08:00:00Z", "shadow:rate_limited", 1),
        event(3, "2025-11-24T16:00:00Z", "allowed", 3),
    ]);
    assert_eq!((reply.status, reply.json()), (200, expected));
    assert_eq!(reply.header("portcullis-cursor"), "3");
}

/// Longer than a screen: one story.
#[sqlx::test(migrations = "./migrations")]
async fn the_sum_of_events_is_usage_whoever_writes_and_whenever(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let mut keys = Vec::new();
    for number in 0..4 {
        keys.push(fixture.key(&format!("user{number}@example.com"), &[]).await.0);
    }
    let ingest = (1..=3_u8).map(|reporter| {
        let (pool, keys) = (&pool, &keys);
        async move {
            for seq in 1..=80_u64 {
                let mix = |number: u64| (seq * 31 + number * 17 + u64::from(reporter) * 5) % 101;
                let counts: Vec<_> = (0..6)
                    .map(|number| {
                        let mix = mix(number);
                        let key = keys[usize::try_from(mix % 4).unwrap()];
                        (key, u32::try_from(mix % 3).unwrap() + 1, u8::try_from(mix % 7).unwrap(), mix % 9 + 1)
                    })
                    .collect();
                count(pool, reporter, seq, &counts).await;
            }
        }
    });
    // Two exporters at once, and a reader that goes on from where it was.
    let export = async || {
        let mut written = 0;
        for _ in 0..60 {
            written += events::export(&pool).await.unwrap();
            tokio::task::yield_now().await;
        }
        written
    };
    let mut cursor = "0".to_owned();
    let mut taken = Vec::new();
    let reading = async {
        for _ in 0..20 {
            taken.extend(read_on(&fixture, &admin, &mut cursor).await);
        }
    };
    let (_, one, other, ()) = tokio::join!(futures_util::future::join_all(ingest), export(), export(), reading);
    assert!(one + other > 0, "events were written while reports came");
    events::export_all(&pool).await.unwrap();
    taken.extend(read_on(&fixture, &admin, &mut cursor).await);

    let mut sums = BTreeMap::<(Uuid, String), (i64, i64)>::new();
    for event in &taken {
        let data = &event["data"];
        let key =
            (serde_json::from_value(data["key_id"].clone()).unwrap(), data["outcome"].as_str().unwrap().to_owned());
        let sum = sums.entry(key).or_default();
        *sum = (sum.0 + data["requests"].as_i64().unwrap(), sum.1 + data["cost"].as_i64().unwrap());
    }
    let sql = "select key_id, outcome, sum(requests)::bigint, sum(cost)::bigint from usage_hourly group by 1, 2";
    let usage: Vec<(Uuid, i16, i64, i64)> = rows(&pool, sql).await;
    let usage: BTreeMap<_, _> = usage
        .into_iter()
        .map(|(id, outcome, requests, cost)| ((id, control_plane::metering::outcome::name(outcome)), (requests, cost)))
        .collect();
    assert_eq!(sums, usage);
    // No number is left out, and who reads again reads the same.
    let numbers: Vec<String> = taken.iter().map(|event| event["sequence"].as_str().unwrap().to_owned()).collect();
    assert_eq!(numbers, (1..=taken.len()).map(|seq| format!("{seq:019}")).collect::<Vec<_>>());
    assert_eq!(read_on(&fixture, &admin, &mut "0".to_owned()).await, taken);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_reader_may_wait_for_the_next_event_and_is_let_go_when_the_process_ends(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    let mut waiting = Box::pin(read(&fixture, &admin, "after=0&wait=25"));
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut waiting).await.is_err());
    count(&pool, 1, 1, &[(id, 1, 0, 5)]).await;
    events::export_all(&pool).await.unwrap();
    let reply = tokio::time::timeout(EARLY, waiting).await.expect("the event ends the wait");
    assert_eq!(reply.json()[0]["data"]["requests"], 5);
    assert_eq!(read(&fixture, &admin, "after=1").await.json(), json!([]));
    let mut waiting = Box::pin(read(&fixture, &admin, "after=1&wait=25"));
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut waiting).await.is_err());
    fixture.stop();
    let reply = tokio::time::timeout(EARLY, waiting).await.expect("the stop ends the wait");
    assert_eq!((reply.json(), reply.header("portcullis-cursor")), (json!([]), "1"));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_reader_is_told_of_events_that_it_cannot_have(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (id, _) = fixture.key("user@example.com", &[]).await;
    for seq in 1..=3 {
        count(&pool, 1, seq, &[(id, 1, 0, 5)]).await;
        events::export_all(&pool).await.unwrap();
    }
    execute(&pool, "update usage_events set created_at = now() - interval '31 days'").await;
    assert_eq!(events::forget(&pool, 30).await.unwrap(), 2, "the newest stays: numbers count on from it");
    count(&pool, 1, 4, &[(id, 1, 0, 5)]).await;
    events::export_all(&pool).await.unwrap();
    let numbers = |reply: Reply| -> Vec<String> {
        reply.json().as_array().unwrap().iter().map(|event| event["sequence"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(numbers(read(&fixture, &admin, "").await), ["0000000000000000003", "0000000000000000004"]);
    assert_eq!(numbers(read(&fixture, &admin, "after=2").await).len(), 2);
    for (query, status, code) in [
        ("after=1", 410, "gone"),
        ("after=5", 409, "conflict"),
        ("after=-1", 400, "invalid"),
        ("limit=201", 400, "invalid"),
        ("wait=26", 400, "invalid"),
        ("from=1", 400, "invalid"),
    ] {
        let reply = read(&fixture, &admin, query).await;
        assert_eq!((reply.status, &reply.json()["code"]), (status, &json!(code)), "{query}");
    }
}
