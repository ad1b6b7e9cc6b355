//! Usage reports: numbered counts by key, outcome and hour, and their acknowledgement.
//!
//! A report is identified by its reporter and number. The control plane applies each number of a reporter once, in order;
//! the filter sends a report unchanged until it is acknowledged. A batch has the reports of one reporter in ascending
//! order, so that no report overtakes another.

use serde::{Deserialize, Serialize};

use crate::codec::{self, ACK, DecodeError, USAGE};
use crate::id::{KeyId, ReporterId};

/// Most counts in one report, which keeps it below a megabyte. Further counts wait for the next report.
pub const REPORT_COUNTS: usize = 20_000;

/// Added to the code of an outcome that was not enforced, in shadow mode.
pub const SHADOW: u8 = 0x80;

/// Requests of one key, outcome and hour since the last report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// The key, outcome and hour.
    pub of: Subject,
    /// How many requests.
    pub requests: u64,
    /// Credits that were spent for them: 0 for refused requests, and if the owner's credits are not metered.
    pub cost: u64,
    /// The time of the last request, in milliseconds of Unix time.
    pub last_ms: u64,
}

/// The key, outcome and hour of counted requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Subject {
    /// The secret that was used. `None` for requests without a known key, which are counted in total only.
    pub key: Option<KeyRef>,
    /// [`Outcome::code`](crate::outcome::Outcome::code), plus [`SHADOW`] if the outcome was not enforced. A number, so that
    /// the control plane counts outcomes that it does not know.
    pub outcome: u8,
    /// Hours since the start of Unix time.
    pub hour: u32,
}

/// One secret of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyRef {
    /// The key.
    pub id: KeyId,
    /// The number of the secret, see [`Record::generation`](crate::record::Record::generation).
    pub generation: u32,
}

impl Count {
    /// Adds another count of the same subject.
    pub fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.cost = self.cost.saturating_add(other.cost);
        self.last_ms = self.last_ms.max(other.last_ms);
    }
}

/// A numbered report: the same number always carries the same counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The Envoy process that counted.
    pub reporter: ReporterId,
    /// Counted up by one with each report of the reporter, from 1.
    pub seq: u64,
    /// At most [`REPORT_COUNTS`].
    pub counts: Vec<Count>,
}

/// Encodes reports, in the order given.
///
/// # Errors
/// None in practice: see [`codec::encode`].
pub fn write_reports(reports: &[Report]) -> Result<Vec<u8>, DecodeError> {
    codec::encode(USAGE, reports)
}

/// Decodes the reports that [`write_reports`] encoded.
///
/// # Errors
/// Each variant of [`DecodeError`].
pub fn read_reports(bytes: &[u8]) -> Result<Vec<Report>, DecodeError> {
    codec::decode(USAGE, bytes)
}

/// Says that the database has every report of the reporter up to a number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The reporter.
    pub reporter: ReporterId,
    /// The number of the last report that is applied.
    pub seq: u64,
}

impl Ack {
    /// Encodes the acknowledgement.
    ///
    /// # Errors
    /// None in practice: see [`codec::encode`].
    pub fn write(&self) -> Result<Vec<u8>, DecodeError> {
        codec::encode(ACK, self)
    }

    /// Decodes an acknowledgement.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`].
    pub fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode(ACK, bytes)
    }
}
