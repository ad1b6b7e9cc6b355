//! Findings of the oracle: counts, responses and broken promises.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::limit_model::PoolVerdict;

/// The clients' counts of requests of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// With a response of the API behind Envoy.
    pub admitted: u64,
    /// Refused by the filter.
    pub refused: u64,
    /// Without a response: decided or not.
    pub doubtful: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Verdict {
    pub sent: u64,
    /// Responses, by status and code.
    pub answers: BTreeMap<String, u64>,
    /// Requests with a dead key that were admitted later than the bound.
    pub admitted_wrongly: u64,
    /// The longest time after a revocation at which an admitted request was sent, without a disruption.
    pub longest_open: Duration,
    pub broken: Vec<String>,
    /// Number of broken promises whose text was dropped.
    pub unnamed: u64,
    /// The longest time in which no Envoy admitted a request.
    pub longest_gap: Duration,
    /// The same for each Envoy.
    pub longest_gaps: Vec<Duration>,
    /// The clients' counts of each key that the database still has.
    pub tallies: BTreeMap<String, Tally>,
    /// The clients' counts of requests without a known key.
    pub keyless: Tally,
    /// Excused losses of counts, by reason.
    pub losses: BTreeMap<String, u64>,
    /// Those of them that were lost with databases that older copies replaced.
    pub restored: Restored,
    /// Requests with a dead key that were sent later than the bound and got a response.
    pub judged_dead: u64,
    /// What was found of shared limits, quotas and credits.
    pub limited: Vec<PoolVerdict>,
}

/// Counts that only replaced databases had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Allowed and other requests, by key, including keys that the copy does not have.
    pub keys: BTreeMap<String, (u64, u64)>,
    /// Requests without a known key.
    pub keyless: u64,
}

impl Restored {
    /// The reason in reports.
    pub const WHY: &str = "counted after the backup that was restored";

    pub fn all(&self) -> u64 {
        self.keys.values().map(|(allowed, other)| allowed + other).sum::<u64>() + self.keyless
    }

    pub fn add(&mut self, more: &Self) {
        for (key, (allowed, other)) in &more.keys {
            let sum = self.keys.entry(key.clone()).or_default();
            *sum = (sum.0 + allowed, sum.1 + other);
        }
        self.keyless += more.keyless;
    }
}

impl Verdict {
    /// Excused losses of any key, without those by replaced databases, which are known for each key.
    pub fn other_losses(&self) -> u64 {
        self.losses.iter().filter(|(why, _)| *why != Restored::WHY).map(|(_, requests)| requests).sum()
    }
}
