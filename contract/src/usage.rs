//! Usage on its way from the filters to the database: counts by key, outcome and hour, frozen into numbered reports.
//!
//! A report is identified by its reporter and number. The control plane applies each number of a reporter once, in order;
//! the filter sends a report unchanged until it is acknowledged. A batch carries the reports of one reporter in ascending
//! order, so that two of them never overtake each other.

extern crate alloc;

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::budget::Stock;
use crate::codec::{self, ACK, DecodeError, USAGE};
use crate::id::{KeyId, ReporterId};

/// Most counts in one report: what is left over waits for the next. Keeps a report well below a megabyte.
pub const REPORT_COUNTS: usize = 20_000;

/// Added to the code of an outcome that was told and not enforced, in shadow mode.
pub const SHADOW: u8 = 0x80;

/// Most grants in one acknowledgement: what is left over comes with the next.
pub const GRANTS: usize = 20_000;

/// What was counted of one key, outcome and hour since the last report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Whose requests.
    pub of: Subject,
    /// How many requests.
    pub requests: u64,
    /// Credits that were drawn for them, or would have been, had there been enough; none for those that were refused for
    /// another reason, and none where the owner's credits are not metered.
    pub cost: u64,
    /// Those of them that drew from a lease of the key's quota: fewer than all if the filter did not know of it yet.
    pub drawn: u64,
    /// When the last of them came, in milliseconds of Unix time.
    pub last_ms: u64,
}

/// What requests are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Subject {
    /// The secret that was used; `None` for requests without a known key, which are only ever counted in total.
    pub key: Option<KeyRef>,
    /// [`Outcome::code`](crate::outcome::Outcome::code), kept as a number so that newer outcomes pass through. With
    /// [`SHADOW`] added if the request was let through all the same.
    pub outcome: u8,
    /// Hours since the start of Unix time.
    pub hour: u32,
}

/// One secret of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyRef {
    /// The key.
    pub id: KeyId,
    /// Which of its secrets.
    pub generation: u32,
}

impl Count {
    /// Adds what was counted elsewhere of the same subject.
    pub fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.cost = self.cost.saturating_add(other.cost);
        self.drawn = self.drawn.saturating_add(other.drawn);
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

/// Writes reports in the order given.
///
/// # Errors
/// None in practice: see [`codec::seal`].
pub fn write_reports(reports: &[Report]) -> Result<Vec<u8>, DecodeError> {
    codec::seal(USAGE, &wire::List::of(reports))
}

/// Reads what [`write_reports`] wrote.
///
/// # Errors
/// Each variant of [`DecodeError`].
pub fn read_reports(bytes: &[u8]) -> Result<Vec<Report>, DecodeError> {
    let reports: Vec<wire::Report<'_>> = codec::open(USAGE, bytes)?;
    reports.iter().map(wire::Report::read).collect()
}

/// Says that every report of the reporter up to a number is in the database, for good, and what the reporter is leased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Whose reports.
    pub reporter: ReporterId,
    /// The last number that is applied.
    pub seq: u64,
    /// At most [`GRANTS`].
    pub grants: Vec<Grant>,
}

/// What an Envoy is leased of one stock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// [`Stock::code`], kept as a number so that newer stocks are stepped over.
    pub stock: u8,
    /// The key's id, or the owner's for credits.
    pub of: [u8; 16],
    /// A share in parts per million, none for one that the Envoy has left to others; or all that was ever granted; or the
    /// [tag](crate::rate::tag) of a limit.
    pub amount: u64,
    /// As of which turn of the stock; for a limit, how far ahead of now it is used, in hundredths of a second.
    pub turn: u32,
}

impl Grant {
    /// What it is of; `None` for stocks of newer versions.
    #[must_use]
    pub const fn stock(&self) -> Option<Stock> {
        Stock::from_code(self.stock)
    }
}

impl Ack {
    /// The sealed form. Without grants it is that of the first version.
    ///
    /// # Errors
    /// None in practice: see [`codec::seal`].
    pub fn write(&self) -> Result<Vec<u8>, DecodeError> {
        let first = (self.reporter, self.seq);
        if self.grants.is_empty() {
            return codec::seal(ACK, &first);
        }
        let grants = self.grants.iter().map(codec::grown).collect::<Result<Vec<_>, _>>()?;
        codec::seal(ACK, &(first, grants))
    }

    /// Reads the sealed form.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`].
    pub fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let ((reporter, seq), rest) = codec::open_part(ACK, bytes)?;
        let grants: Vec<Vec<u8>> = if rest.is_empty() { Vec::new() } else { codec::part(rest)? };
        let grants = grants.iter().map(|grant| codec::part(grant)).collect::<Result<_, _>>()?;
        Ok(Self { reporter, seq, grants })
    }
}

/// The layout of reports: each count a byte string of its own, so that counts may grow. The first version did not say what
/// drew from a quota: it took all requests for that.
mod wire {
    use alloc::vec::Vec;

    use serde::ser::Error;
    use serde::{Deserialize, Serialize, Serializer};

    use super::Subject;
    use crate::codec::{Bytes, DecodeError, part, part_of};
    use crate::id::ReporterId;

    extern crate alloc;

    /// More than what stands in a byte string takes: eight numbers of ten bytes at the most, an id and two marks.
    const MOST_BYTES: usize = 100;

    /// A report as it is read.
    #[derive(Deserialize)]
    pub(super) struct Report<'a> {
        #[serde(borrow)]
        header: Bytes<'a>,
        #[serde(borrow)]
        counts: Vec<Bytes<'a>>,
    }

    /// A report as it is written.
    #[derive(Serialize)]
    pub(super) struct Written<'a> {
        header: Grown<Header>,
        counts: List<'a, super::Count, Grown<(Count, u64)>>,
    }

    #[derive(Serialize, Deserialize)]
    struct Header {
        reporter: ReporterId,
        seq: u64,
    }

    #[derive(Serialize, Deserialize)]
    struct Count {
        of: Subject,
        requests: u64,
        cost: u64,
        last_ms: u64,
    }

    /// Written as a byte string.
    struct Grown<T>(T);

    impl<T: Serialize> Serialize for Grown<T> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut buffer = [0; MOST_BYTES];
            serializer.serialize_bytes(postcard::to_slice(&self.0, &mut buffer).map_err(S::Error::custom)?)
        }
    }

    /// Written one by one, each in another form.
    pub(super) struct List<'a, T, W>(&'a [T], fn(&'a T) -> W);

    impl<T, W: Serialize> Serialize for List<'_, T, W> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_seq(self.0.iter().map(self.1))
        }
    }

    impl<'a> List<'a, super::Report, Written<'a>> {
        pub(super) fn of(reports: &'a [super::Report]) -> Self {
            Self(reports, |report| Written {
                header: Grown(Header { reporter: report.reporter, seq: report.seq }),
                counts: List(&report.counts, |count| {
                    let super::Count { of, requests, cost, drawn, last_ms } = *count;
                    Grown((Count { of, requests, cost, last_ms }, drawn))
                }),
            })
        }
    }

    impl Report<'_> {
        pub(super) fn read(&self) -> Result<super::Report, DecodeError> {
            let Header { reporter, seq } = part(self.header.0)?;
            let counts = self.counts.iter().map(|count| read_count(count.0)).collect::<Result<_, _>>()?;
            Ok(super::Report { reporter, seq, counts })
        }
    }

    fn read_count(bytes: &[u8]) -> Result<super::Count, DecodeError> {
        let (Count { of, requests, cost, last_ms }, rest) = part_of(bytes)?;
        let drawn = if rest.is_empty() { requests } else { part(rest)? };
        Ok(super::Count { of, requests, cost, drawn, last_ms })
    }
}
