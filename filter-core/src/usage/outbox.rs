//! The outbox: usage that the leader has collected and the control plane has not acknowledged.

use contract::id::ReporterId;
use contract::usage::{Count, REPORT_COUNTS, Report};

/// Most reports that are sent together.
pub const BATCH_REPORTS: usize = 4;

/// The outbox of an Envoy process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbox {
    /// This Envoy process.
    pub reporter: ReporterId,
    /// The number of the newest frozen report; 0 before the first.
    pub frozen_seq: u64,
    /// Reports that are frozen and not acknowledged, by ascending number. More than one only after a last report.
    pub frozen: Vec<(u64, Vec<Count>)>,
    /// Counts for the next report.
    pub pending: Vec<Count>,
}

/// What to freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freeze {
    /// The pending counts, as many as fit one report, unless a report waits for its acknowledgement.
    Pending,
    /// All pending counts, in as many reports as it takes: Envoy ends.
    All,
}

impl Outbox {
    /// An empty outbox.
    #[must_use]
    pub const fn new(reporter: ReporterId) -> Self {
        Self { reporter, frozen_seq: 0, frozen: Vec::new(), pending: Vec::new() }
    }

    /// The reports that wait for their acknowledgement, as many as fit one batch.
    #[must_use]
    pub fn reports(&self) -> Vec<Report> {
        self.batches().next().unwrap_or_default()
    }

    /// All reports that wait for their acknowledgement, batch by batch.
    pub fn batches(&self) -> impl Iterator<Item = Vec<Report>> {
        let report =
            |(seq, counts): &(u64, Vec<Count>)| Report { reporter: self.reporter, seq: *seq, counts: counts.clone() };
        self.frozen.chunks(BATCH_REPORTS).map(move |batch| batch.iter().map(report).collect())
    }

    /// Freezes pending counts into reports. Returns whether it changed anything.
    pub fn freeze(&mut self, what: Freeze) -> bool {
        let reports = match what {
            Freeze::Pending if self.frozen.is_empty() => usize::from(!self.pending.is_empty()),
            Freeze::Pending => 0,
            Freeze::All => self.pending.len().div_ceil(REPORT_COUNTS),
        };
        for _ in 0..reports {
            let rest = self.pending.split_off(self.pending.len().min(REPORT_COUNTS));
            self.frozen_seq = self.frozen_seq.saturating_add(1);
            self.frozen.push((self.frozen_seq, std::mem::replace(&mut self.pending, rest)));
        }
        reports > 0
    }

    /// Requests that no acknowledged report contains.
    #[must_use]
    pub fn requests(&self) -> u64 {
        let counts = self.frozen.iter().flat_map(|(_, counts)| counts).chain(&self.pending);
        counts.fold(0, |sum, count| sum.saturating_add(count.requests))
    }
}
