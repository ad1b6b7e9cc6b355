//! Usage reports: each is applied once, and invalid ones are refused.

use std::io::Cursor;

use crate::support::reports::{allowed, logged, submit};
use crate::support::{Fixture, Reply, request, rows, scalar};
use contract::id::{KeyId, ReporterId};
use contract::outcome::Outcome;
use contract::usage::{Ack, Count, KeyRef, REPORT_COUNTS, Report, Subject, write_reports};
use control_plane::metering::import::import;
use sqlx::PgPool;
use uuid::Uuid;

const REPORTER: ReporterId = ReporterId([5; 16]);
const HOUR: u32 = 490_000;
const LAST_MS: u64 = 1_764_000_123_456;

fn count(key: Option<Uuid>, outcome: Outcome, requests: u64) -> Count {
    let key = key.map(|id| KeyRef { id: KeyId::from(id), generation: 1 });
    Count { of: Subject { key, outcome: outcome.code(), hour: HOUR }, requests, cost: requests, last_ms: LAST_MS }
}

fn report(reporter: ReporterId, seq: u64, counts: &[Count]) -> Report {
    Report { reporter, seq, counts: counts.to_vec() }
}

fn acknowledged(reply: &Reply) -> u64 {
    assert_eq!((reply.status, reply.header("content-type")), (200, "application/vnd.portcullis.ack"));
    Ack::read(&reply.body).unwrap().seq
}

#[sqlx::test(migrations = "./migrations")]
async fn a_report_is_applied_once_however_often_it_is_sent(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let first = report(
        REPORTER,
        1,
        &[
            count(Some(id), Outcome::Allowed, 10),
            count(Some(id), Outcome::RateLimited, 3),
            count(None, Outcome::Unknown, 7),
        ],
    );
    for _ in 0..3 {
        assert_eq!(acknowledged(&submit(&fixture, &sync, std::slice::from_ref(&first)).await), 1);
    }
    assert_eq!(allowed(&pool, id).await, 10);
    let sql = format!("select outcome, requests, cost from usage_hourly where key_id = '{id}' order by outcome");
    let hourly: Vec<(i16, i64, i64)> = rows(&pool, sql).await;
    // What was refused has cost nothing, whatever it would have.
    assert_eq!(hourly, [(0, 10, 10), (8, 3, 0)]);
    let keyless: Vec<(i16, i64)> = rows(&pool, "select outcome, requests from usage_keyless_hourly").await;
    assert_eq!(keyless, [(2, 7)]);

    // A batch with a report that is known and one that is not.
    let second = report(REPORTER, 2, &[count(Some(id), Outcome::Allowed, 5)]);
    assert_eq!(acknowledged(&submit(&fixture, &sync, &[first, second]).await), 2);
    assert_eq!(allowed(&pool, id).await, 15);
}

#[sqlx::test(migrations = "./migrations")]
async fn many_envoys_that_report_at_once_are_all_counted(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let (other, _) = fixture.key("b@example.com", &[]).await;
    let sends = (0..60_u8).map(|envoy| {
        let (fixture, sync) = (&fixture, &sync);
        async move {
            let reporter = ReporterId([envoy; 16]);
            for seq in 1..=5 {
                let counts = [count(Some(id), Outcome::Allowed, 2), count(Some(other), Outcome::Allowed, 1)];
                assert_eq!(acknowledged(&submit(fixture, sync, &[report(reporter, seq, &counts)]).await), seq);
            }
        }
    });
    futures_util::future::join_all(sends).await;
    assert_eq!((allowed(&pool, id).await, allowed(&pool, other).await), (600, 300));
}

#[sqlx::test(migrations = "./migrations")]
async fn counts_of_keys_that_the_database_does_not_hold_do_not_stop_the_others(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let counts = [count(Some(Uuid::from_u128(9)), Outcome::Allowed, 4), count(Some(id), Outcome::Allowed, 1)];
    assert_eq!(acknowledged(&submit(&fixture, &sync, &[report(REPORTER, 1, &counts)]).await), 1);
    assert_eq!(allowed(&pool, id).await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn forged_sums_saturate_and_stop_no_report(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (_, admin) = fixture.key("operator@example.com", &["admin"]).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let most = Count { cost: 1_000_000_000_000_000, ..count(Some(id), Outcome::Allowed, 1_000_000_000_000) };
    for seq in 1..=2 {
        let forged = report(REPORTER, seq, &vec![most; REPORT_COUNTS]);
        assert_eq!(acknowledged(&submit(&fixture, &sync, &[forged]).await), seq);
    }
    let (other, _) = fixture.key("b@example.com", &[]).await;
    let honest = report(ReporterId([6; 16]), 1, &[count(Some(other), Outcome::Allowed, 3)]);
    assert_eq!(acknowledged(&submit(&fixture, &sync, &[honest]).await), 1);
    assert_eq!(allowed(&pool, other).await, 3);
    let uri = format!("/v1/keys/{id}/usage?from=2025-11-20T00:00:00Z&to=2025-12-01T00:00:00Z");
    let reply = fixture.get(&uri, &admin).await;
    let sums = serde_json::json!({"allowed": {"requests": 40_000_000_000_000_000_i64, "cost": i64::MAX}});
    assert_eq!((reply.status, &reply.json()["totals"]), (200, &sums));
}

#[sqlx::test(migrations = "./migrations")]
async fn a_message_that_is_damaged_or_senseless_changes_nothing(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let good = write_reports(&[report(REPORTER, 1, &[count(Some(id), Outcome::Allowed, 1)])]).unwrap();
    let mut damaged = good.clone();
    damaged[20] ^= 1;
    for body in [
        Vec::new(),
        b"nonsense".to_vec(),
        damaged,
        good[..good.len() - 1].to_vec(),
        write_reports(&[]).unwrap(),
        write_reports(&[report(REPORTER, 1, &[count(Some(id), Outcome::Allowed, u64::MAX)])]).unwrap(),
    ] {
        let reply = fixture.send(request("POST", "/sync/v1/usage", Some(&sync), body)).await;
        assert_eq!((reply.status, reply.json()["code"].as_str()), (400, Some("invalid")), "{}", reply.json());
    }
    assert_eq!(allowed(&pool, id).await, 0);
    assert_eq!(acknowledged(&fixture.send(request("POST", "/sync/v1/usage", Some(&sync), good)).await), 1);
    assert_eq!(allowed(&pool, id).await, 1);
}

#[sqlx::test(migrations = "./migrations")]
async fn usage_from_the_future_counts_as_of_now(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    let mut far = Count { last_ms: u64::MAX, ..count(Some(id), Outcome::Allowed, 1) };
    far.of.hour = u32::MAX;
    assert_eq!(acknowledged(&submit(&fixture, &sync, &[report(REPORTER, 1, &[far])]).await), 1);
    let line = logged(&pool, &sync, &[report(REPORTER, 2, &[far])]).await;
    assert_eq!(import(&pool, Cursor::new(&line)).await.unwrap().applied, 1);
    let sql = "select bool_and(last_used_at between now() - interval '1 minute' and now() + interval '1 second'
            and hour between now() - interval '61 minutes' and now())
        from key_usage join usage_hourly using (key_id)";
    let now: bool = scalar(&pool, sql).await;
    assert_eq!((now, allowed(&pool, id).await), (true, 2));
}
