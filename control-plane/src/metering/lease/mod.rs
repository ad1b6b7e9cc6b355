//! Leases: what Envoys have reported comes in, what each of them may spend or hold until its next report goes out, in the
//! answer to the report. The arithmetic is here, free of SQL: [`share`] divides a rate limit, [`stock`] a quota or
//! credits; what is kept of it is read and written in `rows`.
//!
//! An answer may be lost, so what an Envoy was told counts at its worst, as `held`, until the Envoy's next report proves
//! that it heard the answer to the one before. What is taken from one Envoy is given to others only then. Nothing here
//! waits for an Envoy: one that was not heard of for [`CUT_OFF_MS`] counts as gone, with what it held.
//!
//! # Bounds
//! - Of a stock no more is spent than it holds, plus one starter for each Envoy that begins to use it in a turn, or rests
//!   after it gave its lease back (the starter as it was then), plus what Envoys hold that were cut off for longer than
//!   [`CUT_OFF_MS`] and still serve. (Another starter, in the worst case, for an Envoy that hears an answer of a new turn
//!   before it hears of the turn itself.)
//! - Of a shared rate limit all Envoys together admit no more than the limit and its burst, plus the shares of Envoys that
//!   were cut off for longer than [`CUT_OFF_MS`], plus, for each Envoy that begins to use the key, or begins again after it
//!   has left its share to others, its even share of one Nth, of the burst too, until the answer to its first report.

mod rows;
pub mod share;
#[cfg(test)]
mod simulation;
pub mod stock;
pub mod used;

use uuid::Uuid;

pub use rows::tidy;
pub(super) use rows::{Subject, UsedTable, grant, keep, keep_used, load, repeat};

/// How long an Envoy counts as one that uses a key after it last did.
pub const ACTIVE_MS: i64 = 3_000;

/// How long an Envoy is silent before what it holds is given to others.
pub const CUT_OFF_MS: i64 = 60_000;

/// Over which time demand is averaged.
const MEMORY_S: f64 = 1.0;

/// Bounds of the time that a report is taken to tell of, in seconds. A report that follows a pause tells of its last
/// moments only.
const REPORT_S: (f64, f64) = (0.1, 2.0);

/// What the first report of an Envoy is taken to tell of.
const FIRST_REPORT_S: f64 = 0.25;

/// What one Envoy holds of one stock.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The Envoy process.
    pub reporter: Uuid,
    /// What it was last told: a share, or all that it was ever granted.
    pub told: u64,
    /// The most that it may believe it holds.
    pub held: u64,
    /// The report that was answered with it.
    pub told_seq: u64,
    /// As of which turn of the stock.
    pub turn: u32,
    /// All that it has reported as spent.
    pub spent: u64,
    /// What it was told beyond, of a stock, to begin again with.
    pub rest: u64,
    /// Requests or credits a second, lately.
    pub demand: f64,
    /// When it last used the stock, in milliseconds of Unix time.
    pub renewed_ms: i64,
    /// When it was last heard of.
    pub heard_ms: i64,
}

impl Row {
    /// One that was told nothing yet.
    #[must_use]
    pub const fn new(reporter: Uuid) -> Self {
        Self {
            reporter,
            told: 0,
            held: 0,
            told_seq: 0,
            turn: 0,
            spent: 0,
            rest: 0,
            demand: 0.0,
            renewed_ms: i64::MIN,
            heard_ms: i64::MIN,
        }
    }

    /// Whether what it holds counts.
    #[must_use]
    pub const fn is_live(&self, now_ms: i64) -> bool {
        now_ms.saturating_sub(self.heard_ms) < CUT_OFF_MS
    }

    /// Whether it has used the stock lately.
    #[must_use]
    pub const fn is_active(&self, now_ms: i64) -> bool {
        now_ms.saturating_sub(self.renewed_ms) < ACTIVE_MS
    }

    /// What it may still spend, at the most.
    #[must_use]
    pub const fn unspent(&self) -> u64 {
        self.held.saturating_sub(self.spent)
    }

    /// Takes note of a report: it proves what was heard, and tells of demand. One without any counts says that the Envoy
    /// went quiet.
    fn hear(&mut self, report: &Heard) {
        if report.seq > self.told_seq {
            self.held = self.told;
        }
        self.heard_ms = report.now_ms;
        let used = report.used();
        if report.quiet {
            self.demand = 0.0;
        } else {
            let now = used as f64 / report.elapsed_s;
            let kept = if self.is_active(report.now_ms) { (-report.elapsed_s / MEMORY_S).exp() } else { 0.0 };
            self.demand = self.demand.mul_add(kept, now * (1.0 - kept));
        }
        if used > 0 {
            self.renewed_ms = report.now_ms;
        }
    }

    /// Tells it something new.
    fn tell(&mut self, told: u64, seq: u64, turn: u32) {
        self.held = self.held.max(told);
        self.told = told;
        self.rest = 0;
        self.told_seq = seq;
        self.turn = turn;
    }
}

/// What reports of one Envoy that were applied together say of one stock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heard {
    /// The number of the last of them.
    pub seq: u64,
    /// When they were applied, in milliseconds of Unix time.
    pub now_ms: i64,
    /// How many seconds they tell of.
    pub elapsed_s: f64,
    /// Whether they have no counts at all, of any key.
    pub quiet: bool,
    /// What was spent: requests, or credits.
    pub spent: u64,
    /// Requests that were refused for want of it.
    pub refused: u64,
    /// What one of those needed.
    pub price: u64,
}

impl Heard {
    /// What was used, and how often more was wanted: none if it rested.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.spent.saturating_add(self.refused)
    }
}

/// How many seconds a report tells of that comes so long after the one before.
#[must_use]
pub fn elapsed_s(since_last_s: Option<f64>) -> f64 {
    since_last_s.unwrap_or(FIRST_REPORT_S).clamp(REPORT_S.0, REPORT_S.1)
}

/// The place of an Envoy's row, which is made if it is not there.
#[must_use]
pub fn place(rows: &mut Vec<Row>, reporter: Uuid) -> usize {
    rows.iter().position(|row| row.reporter == reporter).unwrap_or_else(|| {
        rows.push(Row::new(reporter));
        rows.len().saturating_sub(1)
    })
}
