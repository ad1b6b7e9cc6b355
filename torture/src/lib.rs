//! Torture: the real stack under constant load, a random schedule of faults from a seed, and an
//! oracle that knows the state of every key and judges every response.
//!
//! Reading order: [`plan`] makes the schedule of faults, [`stack`] starts the processes, [`proxy`]
//! sits between Envoys and control planes, [`load`] is the clients, [`driver`] the administrator,
//! `limited` the keys with limits. [`oracle`] judges each response, with [`envoy_model`] and
//! `limit_model`. [`watch`] checks what must never go back, [`faults`] carries out the faults,
//! [`count`] compares the counts at the end, [`report`] prints the result.

pub mod plan;
pub mod stack;

pub mod proxy;

pub mod driver;
mod limited;
pub mod load;

pub mod envoy_model;
mod limit_model;
pub mod oracle;
pub mod watch;

pub mod verdict;

pub mod faults;

pub mod count;
pub mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use driver::Driver;
use faults::Faults;
use load::Load;
use oracle::Oracle;
use plan::{Kind, Lane};
use report::{Journal, Report};
use stack::TortureStack;
use watch::{Doing, Watch};

/// When memory is measured for the first time.
const WARM: Duration = Duration::from_secs(120);

/// Allowed growth from then to the end, in percent.
const GROWTH: u64 = 10;

#[derive(Clone, Debug)]
pub struct Options {
    /// Repeats a run.
    pub seed: u64,
    /// How long faults are injected. If none, each kind is injected once.
    pub length: Option<Duration>,
    pub envoys: usize,
    /// Faults of the control planes and PostgreSQL.
    pub behind: Vec<Kind>,
    /// Faults of the Envoys.
    pub before: Vec<Kind>,
    /// Pause between two faults of a lane, from and to.
    pub pause: (Duration, Duration),
    /// Duration of a fault, from and to, for kinds that have one.
    pub lasts: (Duration, Duration),
    pub journal: PathBuf,
}

impl Options {
    /// The short form: each fault once.
    pub fn short(seed: u64, journal: PathBuf) -> Self {
        let ms = Duration::from_millis;
        Self {
            seed,
            length: None,
            envoys: 2,
            behind: Kind::all(false),
            before: Kind::all(true),
            pause: (ms(200), ms(600)),
            lasts: (ms(1_000), ms(2_000)),
            journal,
        }
    }

    pub fn long(seed: u64, length: Duration, journal: PathBuf) -> Self {
        let ms = Duration::from_millis;
        Self {
            length: Some(length),
            envoys: 3,
            pause: (ms(500), ms(4_000)),
            lasts: (ms(1_000), ms(6_000)),
            ..Self::short(seed, journal)
        }
    }
}

/// Runs the torture. Fails if the stack does not start or does not come to rest. Broken promises are in the report.
pub async fn run(options: Options) -> Result<Report> {
    let journal = Journal::create(&options.journal)?;
    journal.note(&format!("seed {}", options.seed));
    let stack = Arc::new(TortureStack::start(options.envoys).await?);
    journal.note(&format!("the stack runs in {}", stack.directory().display()));
    let oracle = Arc::new(Oracle::new(stack.envoys.len(), journal.clone()));
    let driver = Driver::start(&stack, &oracle).await?;
    let doing = Doing::nothing(stack.envoys.len());
    let watch = Watch::start(&stack, &oracle, &doing);
    // Every Envoy has the steady keys before the first fault, and the requests that checked that are counted.
    count::come_to_rest(&stack).await?;
    oracle.probed(count::usage(&mut stack.database.connect().await?).await?.requests(), 0);
    let load = Load::start(&stack, &oracle, options.seed)?;
    let changing = driver.run(options.seed, Duration::from_millis(250));

    let spare = options.length.is_some_and(|length| length > WARM);
    let traps = Arc::new(AtomicU64::new(0));
    let faults = Faults {
        stack: Arc::clone(&stack),
        oracle: Arc::clone(&oracle),
        driver: Arc::clone(&driver),
        doing,
        spare,
        long: options.length.is_some(),
        traps: Arc::clone(&traps),
    };
    let start = Instant::now();
    let (injected, warm) = inject(&options, &faults, &journal).await;
    let took = start.elapsed();
    journal.note("no more faults");

    // The load continues until every Envoy must obey the last change.
    driver.stop();
    changing.await?;
    // None: a fault did not end, which is a broken promise already.
    let obeyed = oracle.all_obey_by(Instant::now()).unwrap_or_else(Instant::now) + Duration::from_millis(500);
    tokio::time::sleep_until(obeyed.into()).await;
    load.stop().await;
    oracle.load_is_over();
    let memory = warm.map(|first| grown(&oracle, first, memory(&stack))).unwrap_or_default();
    count::come_to_rest(&stack).await?;
    watch.stop().await;
    let log_lines = count::import_last_words(&stack)?;
    let book = driver.hold().await.clone();
    let counted = count::compare(&stack, &oracle, &book, log_lines).await?;
    read_logs(&stack, &oracle, traps.load(Ordering::Relaxed))?;
    let verdict = oracle.verdict();
    Ok(Report { seed: options.seed, took, faults: injected, verdict, counted, memory, journal: journal.path.clone() })
}

/// Injects the faults of both lanes. Returns how often each was injected, and the memory after [`WARM`] in a long run.
async fn inject(
    options: &Options,
    faults: &Faults,
    journal: &Journal,
) -> (BTreeMap<Kind, u64>, Option<[Option<u64>; 2]>) {
    let warm = async {
        if !faults.spare {
            return None;
        }
        tokio::time::sleep(WARM).await;
        Some(memory(&faults.stack))
    };
    let lanes = (lane(options, &options.behind, faults, journal), lane(options, &options.before, faults, journal));
    let (mut injected, others, warm) = tokio::join!(lanes.0, lanes.1, warm);
    injected.extend(others);
    (injected, warm)
}

/// Injects one fault after another. Returns how often each was injected.
async fn lane(options: &Options, kinds: &[Kind], faults: &Faults, journal: &Journal) -> BTreeMap<Kind, u64> {
    let (start, length) = (Instant::now(), options.length);
    let most = if length.is_some() { usize::MAX } else { kinds.len() };
    let mut injected = BTreeMap::new();
    for step in Lane::new(options.seed, kinds, options.pause, options.lasts).take(most) {
        tokio::time::sleep(step.pause).await;
        if length.is_some_and(|length| start.elapsed() >= length) {
            break;
        }
        journal.note(&format!("begins: {} ({}, {:.1?})", step.kind, step.target, step.lasts));
        if let Err(error) = faults.inject(&step).await {
            faults.oracle.broken(&format!("the stack did not recover: {}: {error:#}", step.kind));
            break;
        }
        journal.note(&format!("over: {}", step.kind));
        *injected.entry(step.kind).or_default() += 1;
    }
    injected
}

/// Resident memory of the processes that no fault ends.
fn memory(stack: &TortureStack) -> [Option<u64>; 2] {
    let envoy = stack.envoys.last().and_then(|envoy| envoy.resident_kib().ok());
    [envoy, stack.control_planes.last().and_then(|control_plane| control_plane.resident_kib().ok())]
}

/// Reports the growth of memory, and a broken promise if it is too much or unknown.
fn grown(oracle: &Oracle, first: [Option<u64>; 2], last: [Option<u64>; 2]) -> Vec<(String, u64, u64)> {
    let mut grown = Vec::new();
    for ((name, first), last) in ["an Envoy", "a control plane"].into_iter().zip(first).zip(last) {
        let (Some(first), Some(last)) = (first, last) else {
            oracle.broken(&format!("the memory of {name} could not be read"));
            continue;
        };
        if last > first + first * GROWTH / 100 {
            oracle.broken(&format!("the memory of {name} grew from {first} to {last} KiB"));
        }
        grown.push((name.to_owned(), first, last));
    }
    grown
}

/// Checks that everything runs, that nothing panicked or deadlocked, and that VMs trapped only on demand.
fn read_logs(stack: &TortureStack, oracle: &Oracle, traps: u64) -> Result<()> {
    let mut trapped = 0;
    for control_plane in &stack.control_planes {
        control_plane.must_run()?;
        for sign in ["panicked", "\"level\":\"ERROR\""] {
            if let Some(line) = control_plane.log().lines_with(sign).first() {
                oracle.broken(&format!("a control plane logged: {line}"));
            }
        }
    }
    for envoy in &stack.envoys {
        envoy.must_run()?;
        // Traps in a request are on demand. Any other trap is a fault of the filter.
        let (meant, others): (Vec<_>, Vec<_>) = envoy
            .log()
            .lines_with("Uncaught RuntimeError")
            .into_iter()
            .partition(|line| line.contains("request_headers"));
        trapped += meant.len() as u64;
        for line in others {
            oracle.broken(&format!("a VM trapped by itself: {line}"));
        }
        for sign in ["assert failure", "Segmentation fault", "[critical]"] {
            if let Some(line) = envoy.log().lines_with(sign).iter().find(|line| !line.contains("Uncaught")) {
                oracle.broken(&format!("an Envoy says: {line}"));
            }
        }
    }
    if trapped != traps {
        oracle.broken(&format!("{trapped} VMs trapped, {traps} were made to"));
    }
    for sign in ["deadlock detected", "PANIC"] {
        if let Some(line) = stack.postgres.log.lines_with(sign).first() {
            oracle.broken(&format!("PostgreSQL says: {line}"));
        }
    }
    Ok(())
}
