//! Usage in Envoys' logs: the import applies lines that Envoys signed, once, and no others.

use std::io::Cursor;
use std::time::{SystemTime, UNIX_EPOCH};

use contract::id::ReporterId;
use contract::outcome::Outcome;
use contract::usage::{Report, write_reports};
use contract::usage_log::LogKey;
use control_plane::metering::import::{Imported, import};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::reports::{ENVOY_PREFIX, Envoy, allowed, count, line, logged};
use crate::support::{Fixture, revoke};

const SYNC: &[&str] = &["sync"];

/// A report of requests that came so many days ago.
fn aged(days: u64, reporter: u8, seq: u64, key: Uuid, requests: u64) -> Report {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut count = count(key, Outcome::Allowed, requests);
    count.of.hour = u32::try_from(now.as_secs() / 3_600 - days * 24).unwrap();
    Report { reporter: ReporterId([reporter; 16]), seq, counts: vec![count] }
}

fn report(reporter: u8, seq: u64, key: Uuid, requests: u64) -> Report {
    aged(0, reporter, seq, key, requests)
}

async fn imported(pool: &PgPool, log: &str) -> Imported {
    import(pool, Cursor::new(log)).await.unwrap()
}

#[sqlx::test(migrations = "./migrations")]
async fn lines_that_an_envoy_signed_are_imported_once(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    // The first report had arrived before Envoy ended.
    Envoy::new(5, &sync).report(&fixture, &[count(id, Outcome::Allowed, 10)]).await;
    let arrived = report(5, 1, id, 10);
    let log = format!(
        "[2026-11-24 02:44:59.436][1][warning][main] caught ENVOY_SIGTERM\n{}\n",
        logged(&pool, &sync, &[arrived, report(5, 2, id, 5)]).await
    );
    assert_eq!(imported(&pool, &log).await, Imported { applied: 1, known: 1, ..Imported::default() });
    assert_eq!(allowed(&pool, id).await, 15);
    assert_eq!(imported(&pool, &log).await, Imported { known: 2, ..Imported::default() });
    assert_eq!(allowed(&pool, id).await, 15);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_log_may_hold_the_lines_of_an_envoy_in_any_order(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    // The Envoys have polled, and have reported nothing.
    fixture.get("/sync/v1/keys", &sync).await;
    logged(&pool, &sync, &[]).await;
    // More than one message holds, the highest first, of two Envoys by turns.
    let lines = (1..=20).rev().flat_map(|seq| [1, 2].map(|envoy| line(&sync, &[report(envoy, seq, id, 1)])));
    let log: Vec<String> = lines.collect();
    assert_eq!(imported(&pool, &log.join("\n")).await, Imported { applied: 40, ..Imported::default() });
    assert_eq!(allowed(&pool, id).await, 40);
}

#[sqlx::test(migrations = "./migrations")]
async fn lines_that_a_client_forged_are_refused_by_number_and_book_nothing(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, key) = fixture.key("a@example.com", &[]).await;
    let mut envoy = Envoy::new(5, &sync);
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    let genuine = logged(&pool, &sync, &[report(5, 1, id, 1)]).await;

    let forged = write_reports(&[report(5, u64::MAX >> 1, id, 1_000)]).unwrap();
    let unsigned = format!("portcullis-usage {}", hex::encode(&forged));
    // What others know: the hash of the sync key, which every filter has; a key of their own; a line that is genuine.
    let by_hash = LogKey::derive(&sync.hash().0).line(&forged);
    let by_stored_hash = LogKey::from_bytes(sync.hash().0).line(&forged);
    let by_own_key = LogKey::derive(key.reveal().as_bytes()).line(&forged);
    let signature = genuine.split(' ').rev().nth(1).unwrap();
    let elsewhere = [
        format!("[2026-11-24T02:44:59.439Z] \"GET / HTTP/1.1\" 401 - \"{unsigned}\""),
        format!("[2026-11-24T02:44:59.439Z] \"GET / HTTP/1.1\" 401 - \"{genuine}\""),
        unsigned.clone(),
        genuine.replace(ENVOY_PREFIX, ""),
        format!("{{\"user_agent\": \"{unsigned}\"}}"),
    ];
    let not_signed = [
        format!("{ENVOY_PREFIX}{by_hash}"),
        format!("{ENVOY_PREFIX}{by_stored_hash}"),
        format!("{ENVOY_PREFIX}{by_own_key}"),
        format!("{ENVOY_PREFIX}portcullis-usage {signature} {}", hex::encode(&forged)),
    ];
    let cut = [format!("{ENVOY_PREFIX}{unsigned}"), genuine[..genuine.len() - 1].to_owned()];
    let log: Vec<&str> = elsewhere.iter().chain(&not_signed).chain(&cut).map(String::as_str).collect();
    let found = imported(&pool, &log.join("\n")).await;
    assert_eq!((found.applied, found.known, found.refused), (0, 0, log.len()));
    for (place, (line, why)) in found.bad.iter().enumerate() {
        assert_eq!(*line, place + 1);
        let expected = match place {
            0..5 => "the usage does not stand where Envoy's own log prefix begins the line",
            5..9 => "the signature is of no sync key that this control plane made and a filter has used",
            9 => "the line has no signature",
            _ => "the reports are not hexadecimal digits up to the end of the line",
        };
        assert!(why.starts_with(expected), "{}: {why}", log[place]);
    }
    // Nothing was booked, and the Envoy's next report counts.
    assert_eq!(allowed(&pool, id).await, 1);
    envoy.report(&fixture, &[count(id, Outcome::Allowed, 2)]).await;
    assert_eq!(allowed(&pool, id).await, 3);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_sync_key_signs_for_its_own_envoys_only_and_for_none_once_it_is_revoked(pool: PgPool) {
    let fixture = Fixture::new(&pool).await;
    let (_, ours) = fixture.key("operator@example.com", SYNC).await;
    let (stolen_id, stolen) = fixture.key("operator@example.com", SYNC).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    Envoy::new(5, &ours).report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    Envoy::new(6, &stolen).report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    let foreign = logged(&pool, &stolen, &[report(5, 2, id, 100)]).await;
    let found = imported(&pool, &format!("\n{foreign}\n")).await;
    let owner =
        format!("the Envoy {} belongs to another sync key than the one that signed the line", ReporterId([5; 16]));
    assert_eq!(found, Imported { bad: vec![(2, owner)], refused: 1, ..Imported::default() });
    assert_eq!(allowed(&pool, id).await, 2);

    let own = logged(&pool, &stolen, &[report(6, 2, id, 10)]).await;
    revoke(&pool, stolen_id).await;
    let found = imported(&pool, &own).await;
    let revoked = format!("the sync key {stolen_id} that signed the line is revoked");
    assert_eq!(found, Imported { bad: vec![(1, revoked)], refused: 1, ..Imported::default() });
    assert_eq!(allowed(&pool, id).await, 2);
    let honest = logged(&pool, &ours, &[report(5, 2, id, 7)]).await;
    assert_eq!(imported(&pool, &honest).await.applied, 1);
    assert_eq!(allowed(&pool, id).await, 9);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_line_counts_after_its_sync_key_was_rotated(pool: PgPool) {
    let (fixture, admin) = Fixture::with_admin(&pool).await;
    let (sync_id, sync) = fixture.key("operator@example.com", SYNC).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    Envoy::new(5, &sync).report(&fixture, &[count(id, Outcome::Allowed, 1)]).await;
    let before = logged(&pool, &sync, &[report(5, 2, id, 2)]).await;
    let rotated = fixture.call("POST", &format!("/v1/keys/{sync_id}/rotate"), &admin, None).await;
    assert_eq!(rotated.status, 201);
    assert_eq!(imported(&pool, &before).await.applied, 1);
    assert_eq!(allowed(&pool, id).await, 3);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_line_that_is_older_than_the_kept_numbers_of_reports_is_refused(pool: PgPool) {
    let (fixture, sync) = Fixture::with_sync(&pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    fixture.get("/sync/v1/keys", &sync).await;
    let recent = logged(&pool, &sync, &[aged(89, 1, 1, id, 5)]).await;
    let old = logged(&pool, &sync, &[aged(91, 2, 1, id, 5)]).await;
    let found = imported(&pool, &format!("{recent}\n{old}\n")).await;
    assert_eq!((found.applied, found.known, found.refused), (1, 0, 1));
    let (line, why) = &found.bad[0];
    assert!(*line == 2 && why.starts_with("the usage is older than the 90 days"), "{why}");
    assert_eq!(allowed(&pool, id).await, 5);
}

#[sqlx::test(migrations = "./migrations")]
async fn of_many_refused_lines_the_first_thousand_are_told_and_all_are_counted(pool: PgPool) {
    let found = imported(&pool, &"portcullis-usage 00ff\n".repeat(1_500)).await;
    assert_eq!((found.refused, found.bad.len(), found.bad[999].0), (1_500, 1_000, 1_000));
}
