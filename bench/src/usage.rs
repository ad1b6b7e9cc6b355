//! Suite `usage`: how fast usage reports are stored, by time and by CPU time, through the control
//! plane and as a bare upsert of the same rows. In each round both run one after the other, in
//! random order.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use contract::id::{KeyId, ReporterId};
use contract::usage::{Count, KeyRef, Report as UsageReport, Subject, write_reports};
use portcullis_harness::dice::Dice;
use portcullis_harness::http::Connection;
use portcullis_harness::output::progress;
use portcullis_harness::stack::Stack;
use sqlx::types::Uuid;
use sqlx::{Connection as _, PgConnection};
use tokio::task::JoinSet;

use crate::Options;
use crate::report::{Bound, Report};
use crate::stats::{Estimate, Samples, Side};
use crate::store::{self, Used};

const SUITE: &str = "usage: ingest";
const BY_CORE: &str = "usage: ingest by second of processor";
/// Envoys that report in parallel.
const REPORTERS: u8 = 8;
/// Keys in each report.
const COUNTS: usize = 2_000;
/// Reports of each Envoy in a round.
const REPORTS: u64 = 5;

/// Tables like those of the product, with the same indexes.
const BARE: &str = "
    create table bare_usage (like key_usage including all) with (fillfactor = 70);
    create table bare_hourly (like usage_hourly including all) with (fillfactor = 70)";

pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let stack = store::start(0).await?;
    let keys = if options.quick { 20_000 } else { 100_000 };
    store::fill(&stack, keys).await?;
    stack.database.execute(BARE).await?;
    let mut connection = stack.database.connect().await?;
    let ids: Vec<Uuid> = sqlx::query_scalar("select id from api_keys").fetch_all(&mut connection).await?;
    let hour = u32::try_from(stack.database.number("select floor(extract(epoch from now()) / 3600)::bigint").await?)?;
    let rounds = if options.quick { 3 } else { 20 };
    let postmaster = store::postmaster(&stack).await?;
    // Seconds for each count, and CPU seconds.
    let (mut ours, mut bare) = (Samples::default(), Samples::default());
    let (mut cpu, mut cpu_with_database, mut bare_cpu) = (Samples::default(), Samples::default(), Samples::default());
    let mut random = Dice::new(3);
    let total = f64::from(REPORTERS) * f64::from(u32::try_from(COUNTS)?) * f64::from(u32::try_from(REPORTS)?);
    // The first round does not count: it finds the tables empty.
    for round in 0..=rounds {
        progress(&format!("suite usage: round {round} of {rounds}"));
        let work = work(&ids, hour, round, &mut random)?;
        for side in Side::both(&mut random) {
            let before = Used::read(&stack, postmaster)?;
            let took = match side {
                Side::Ours => report_all(&stack, &work).await?,
                Side::Theirs => upsert_all(&mut connection, &work).await?,
            };
            let (control_plane, database) = Used::read(&stack, postmaster)?.since(&before);
            match side {
                _ if round == 0 => {}
                Side::Ours => {
                    ours.push(took / total);
                    cpu.push(control_plane / total);
                    cpu_with_database.push((control_plane + database) / total);
                }
                Side::Theirs => {
                    bare.push(took / total);
                    bare_cpu.push(database / total);
                }
            }
        }
    }
    let ratio = show([&ours, &bare], [&cpu, &cpu_with_database, &bare_cpu], report)?;
    report.target("usage ingest ÷ bare bulk upsert", Bound::AtLeast(0.7), "", ratio);
    Ok(())
}

/// Adds the figures to the report. Returns the ratio of the rates.
fn show(
    [ours, bare]: [&Samples; 2],
    [cpu, cpu_with_database, bare_cpu]: [&Samples; 3],
    report: &mut Report,
) -> Result<Estimate> {
    let in_report = f64::from(u32::try_from(COUNTS)?);
    let counts = |times: &Samples| Estimate::of([times], |[time]| 1.0 / time);
    let reports = |times: &Samples| Estimate::of([times], |[time]| 1.0 / time / in_report);
    let to_bare = |ours: &Samples, bare: &Samples| Estimate::by_the_round(bare, ours);
    let ratio = to_bare(ours, bare);
    report.figure(SUITE, "bare bulk upsert of the same rows", "counts/s", counts(bare));
    let name = "Portcullis, reports of 2,000 counts";
    report.compared(SUITE, name, "counts/s", counts(ours), Some((ratio, "bare")));
    report.figure(SUITE, "Portcullis, the same as reports", "reports/s", reports(ours));
    report.figure(BY_CORE, "bare bulk upsert, PostgreSQL", "counts/s", counts(bare_cpu));
    let name = "Portcullis, control plane and PostgreSQL";
    let by_core = Some((to_bare(cpu_with_database, bare_cpu), "bare"));
    report.compared(BY_CORE, name, "counts/s", counts(cpu_with_database), by_core);
    report.figure(BY_CORE, name, "reports/s", reports(cpu_with_database));
    let name = "Portcullis, control plane alone";
    report.figure(BY_CORE, name, "counts/s", counts(cpu));
    report.figure(BY_CORE, name, "reports/s", reports(cpu));
    Ok(ratio)
}

/// The reports of each Envoy, in order.
type Work = Vec<Vec<UsageReport>>;

fn work(ids: &[Uuid], hour: u32, round: u64, random: &mut Dice) -> Result<Work> {
    let mut work = Work::new();
    for reporter in 0..REPORTERS {
        let mut reports = Vec::new();
        for number in 1..=REPORTS {
            // Consecutive keys from a random start, so that no key occurs twice in a report.
            let start = random.below(ids.len());
            let chosen = ids.iter().cycle().skip(start).take(COUNTS);
            let count = |id: &Uuid| Count {
                of: Subject { key: Some(KeyRef { id: KeyId(id.into_bytes()), generation: 1 }), outcome: 0, hour },
                requests: 10,
                cost: 10,
                last_ms: u64::from(hour) * 3_600_000,
            };
            let seq = round * REPORTS + number;
            reports.push(UsageReport {
                reporter: ReporterId([reporter; 16]),
                seq,
                counts: chosen.map(count).collect(),
            });
        }
        work.push(reports);
    }
    ensure!(ids.len() >= COUNTS, "too few keys");
    Ok(work)
}

/// Sends all reports, those of each Envoy in sequence. Returns the seconds.
async fn report_all(stack: &Stack, work: &Work) -> Result<f64> {
    let sync_key = stack.control_plane.settings().sync_key;
    let mut envoys = JoinSet::new();
    for reports in work {
        let mut connection = Connection::open(stack.control_plane.address()).await?;
        let key = sync_key.reveal().to_owned();
        let bodies: Vec<Vec<u8>> =
            reports.iter().map(|one| write_reports(std::slice::from_ref(one))).collect::<Result<_, _>>()?;
        envoys.spawn(async move {
            for body in bodies {
                let request = axum::http::Request::post("/sync/v1/usage").header("x-api-key", &key);
                let reply = connection.send(request.body(body.into())?).await?;
                ensure!(reply.status == 200, "a report was answered with {}", reply.status);
            }
            Ok(())
        });
    }
    let start = Instant::now();
    while let Some(done) = envoys.join_next().await {
        done??;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Rows of one transaction.
struct Batch {
    ids: Vec<Uuid>,
    requests: Vec<i64>,
    hour_s: f64,
}

/// The same rows; a transaction has those of one report of each Envoy.
fn batches(work: &Work) -> Result<Vec<Batch>> {
    let mut batches = Vec::new();
    for number in 0..usize::try_from(REPORTS)? {
        let mut counts: Vec<Count> =
            work.iter().filter_map(|reports| reports.get(number)).flat_map(|one| one.counts.clone()).collect();
        counts.sort_by_key(|count| count.of);
        counts.dedup_by(|next, first| {
            let same = next.of == first.of;
            if same {
                first.add(next);
            }
            same
        });
        batches.push(Batch {
            ids: counts.iter().filter_map(|count| count.of.key).map(|key| Uuid::from_bytes(key.id.0)).collect(),
            requests: counts.iter().map(|count| count.requests.cast_signed()).collect(),
            hour_s: counts.first().map(|count| f64::from(count.of.hour) * 3_600.0).context("no counts")?,
        });
    }
    Ok(batches)
}

const UPSERTS: [&str; 2] = [
    "insert into bare_usage (key_id, generation, requests, last_used_at)
    select id, 1, requests, to_timestamp($3) from unnest($1::uuid[], $2::bigint[]) as new (id, requests)
    on conflict (key_id, generation) do update set requests = bare_usage.requests + excluded.requests,
        last_used_at = greatest(bare_usage.last_used_at, excluded.last_used_at)",
    "insert into bare_hourly (key_id, generation, hour, outcome, requests, cost)
    select id, 1, to_timestamp($3), 0, requests, requests
    from unnest($1::uuid[], $2::bigint[]) as new (id, requests)
    on conflict (key_id, hour, outcome, generation) do update set
        requests = bare_hourly.requests + excluded.requests, cost = bare_hourly.cost + excluded.cost",
];

/// Upserts the same rows on one connection. Returns the seconds.
async fn upsert_all(connection: &mut PgConnection, work: &Work) -> Result<f64> {
    let batches = batches(work)?;
    let start = Instant::now();
    for Batch { ids, requests, hour_s } in &batches {
        let mut transaction = connection.begin().await?;
        for upsert in UPSERTS {
            sqlx::query(upsert).bind(ids).bind(requests).bind(hour_s).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
    }
    Ok(start.elapsed().as_secs_f64())
}
