//! What the oracle found: counts, answers and broken promises.

use std::collections::BTreeMap;
use std::time::Duration;

/// What was counted of a key's requests by the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answered by the API behind Envoy.
    pub admitted: u64,
    /// Refused by the filter.
    pub refused: u64,
    /// Without an answer: maybe decided, maybe not.
    pub doubtful: u64,
}

/// What came of it all.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Requests.
    pub sent: u64,
    /// Answers, by status and code.
    pub answers: BTreeMap<String, u64>,
    /// Requests with a dead key that were admitted later than the bound.
    pub admitted_wrongly: u64,
    /// How long after it had died, at the most, a request was sent that a key still opened the door to, with nothing broken.
    pub longest_open: Duration,
    /// Promises that were broken, word for word.
    pub broken: Vec<String>,
    /// How many more were.
    pub unnamed: u64,
    /// The longest time in which no Envoy admitted anybody.
    pub longest_gap: Duration,
    /// The same for each Envoy.
    pub longest_gaps: Vec<Duration>,
    /// What the client counted of each key that the database still knows.
    pub tallies: BTreeMap<String, Tally>,
    /// What the client counted of requests without a known key.
    pub keyless: Tally,
    /// How many requests may go uncounted, by the reason.
    pub losses: BTreeMap<String, u64>,
}
