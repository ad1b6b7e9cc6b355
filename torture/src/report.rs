//! Output of a run: a journal with one line for each event, and a table at the end.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::count::Counted;
use crate::plan::Kind;
use crate::verdict::Verdict;

/// Log of events with the time since the start.
#[derive(Clone, Debug)]
pub struct Journal {
    pub start: Instant,
    pub path: PathBuf,
    file: Arc<Mutex<File>>,
}

impl Journal {
    pub fn create(path: &Path) -> Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { start: Instant::now(), path: path.to_owned(), file: Arc::new(Mutex::new(file)) })
    }

    pub fn note(&self, what: &str) {
        let line = format!("{:9.3} {what}\n", self.start.elapsed().as_secs_f64());
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk must not stop the run. Writing the table at the end fails then.
        let _ = std::io::Write::write_all(&mut *file, line.as_bytes());
    }
}

#[derive(Clone, Debug)]
pub struct Report {
    pub seed: u64,
    /// How long faults were injected.
    pub took: Duration,
    /// How often each fault was injected.
    pub faults: BTreeMap<Kind, u64>,
    pub verdict: Verdict,
    pub counted: Counted,
    /// Resident memory of processes that ran throughout: name, KiB at the start, KiB at the end.
    pub memory: Vec<(String, u64, u64)>,
    pub journal: PathBuf,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        self.verdict.broken.is_empty()
    }

    pub fn table(&self) -> String {
        let mut table = String::new();
        let mut row = |name: &str, value: &dyn std::fmt::Display| {
            let _ = writeln!(table, "{name:<44} {value}");
        };
        row("seed", &self.seed);
        row("faults were injected for, s", &format!("{:.0}", self.took.as_secs_f64()));
        for (kind, times) in &self.faults {
            row(&format!("fault: {kind}"), times);
        }
        let Verdict { sent, answers, admitted_wrongly, broken, unnamed, longest_gap, longest_gaps, losses, .. } =
            &self.verdict;
        row("requests sent", sent);
        for (answer, times) in answers {
            row(&format!("answered: {answer}"), times);
        }
        row("admitted wrongly", admitted_wrongly);
        row("longest admission of a dead key, s", &format!("{:.3}", self.verdict.longest_open.as_secs_f64()));
        row("requests with dead keys judged", &self.verdict.judged_dead);
        for of in &self.verdict.limited {
            let (admitted, refused, wrongful) = (of.admitted, of.refused, of.wrongful.len());
            let found = format!("{admitted}, {refused}; {}; {wrongful}; {}", of.judged, of.excess);
            row(&format!("{}: admitted, refused; judged; wrongful; excess", of.name), &found);
        }
        let Counted { decided, doubtful, counted, keys, top_ups, log_lines } = self.counted;
        row("requests decided, as seen by clients", &decided);
        row("requests without a response", &doubtful);
        row("requests counted", &counted);
        row("keys whose count was compared", &keys);
        let stated: u64 = losses.values().sum();
        row("lost, of at most", &format!("{}, of {stated}", decided.saturating_sub(counted)));
        for (why, requests) in losses {
            row(&format!("  may be lost: {why}"), requests);
        }
        row("usage lines of logs imported", &log_lines);
        row("top-ups, each booked once", &top_ups);
        row("longest gap in service, all Envoys, s", &format!("{:.3}", longest_gap.as_secs_f64()));
        for (envoy, gap) in longest_gaps.iter().enumerate() {
            row(&format!("longest gap in service, Envoy {envoy}, s"), &format!("{:.3}", gap.as_secs_f64()));
        }
        for (name, first, last) in &self.memory {
            row(&format!("resident memory of {name}, KiB"), &format!("{first} at the start, {last} at the end"));
        }
        row("promises broken", &(broken.len() as u64 + unnamed));
        for what in broken {
            row("  broken", what);
        }
        row("journal", &self.journal.display());
        table
    }
}
