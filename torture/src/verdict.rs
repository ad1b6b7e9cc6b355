//! Findings of the oracle: counts, responses and broken promises.

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
    /// … of which were lost with databases that were replaced by older copies.
    pub restored: Restored,
    /// Requests with a dead key of ours that were sent later than the bound and answered.
    pub judged_dead: u64,
}

/// What only databases that are gone had counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Allowed and other requests, by key; of keys that the copy did not know, too.
    pub keys: BTreeMap<String, (u64, u64)>,
    /// Requests without a known key.
    pub keyless: u64,
}

impl Restored {
    /// The reason, as it is told.
    pub const WHY: &str = "counted after the backup that was restored";

    /// All requests.
    pub fn all(&self) -> u64 {
        self.keys.values().map(|(allowed, other)| allowed + other).sum::<u64>() + self.keyless
    }

    /// Once more.
    pub fn add(&mut self, more: &Self) {
        for (key, (allowed, other)) in &more.keys {
            let sum = self.keys.entry(key.clone()).or_default();
            *sum = (sum.0 + allowed, sum.1 + other);
        }
        self.keyless += more.keyless;
    }
}

impl Verdict {
    /// How many requests may be lost of any key, whatever else is: all but what was lost with databases, which is known of
    /// each key.
    pub fn other_losses(&self) -> u64 {
        self.losses.iter().filter(|(why, _)| *why != Restored::WHY).map(|(_, requests)| requests).sum()
    }
}
