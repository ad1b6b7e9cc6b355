//! The schedule of faults, from a seed and a length. The same seed gives the same schedule on every
//! machine and in every version, so that a failed run can be repeated.
//!
//! Two lanes run in parallel, each one fault at a time: one lane has the faults of control planes
//! and PostgreSQL, the other those of Envoys. Faults of both lanes therefore meet in every
//! combination, and the end of each fault is still known.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use portcullis_harness::dice::Dice;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    ControlPlaneKill,
    ControlPlaneTerm,
    ControlPlanePause,
    ControlPlaneClock,
    AnswerLost,
    AnswerDelayed,
    AnswerCut,
    AnswerGarbage,
    PostgresCrash,
    PostgresCut,
    /// A transaction holds locks for longer than any request waits for them.
    PostgresLock,
    PostgresRestore,
    EnvoyTerm,
    EnvoyKill,
    EnvoyTrap,
    EnvoyUpdate,
    /// An Envoy is drained, receives SIGTERM and is started again.
    EnvoyDrain,
    EnvoyClock,
}

impl Kind {
    /// The faults of Envoys, or those of control planes and PostgreSQL.
    pub fn all(of_envoys: bool) -> Vec<Self> {
        Self::value_variants().iter().copied().filter(|kind| (*kind >= Self::EnvoyTerm) == of_envoys).collect()
    }

    pub const fn may_lose(self) -> bool {
        matches!(self, Self::PostgresRestore | Self::EnvoyKill | Self::EnvoyTrap)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ControlPlaneKill => "control plane killed",
            Self::ControlPlaneTerm => "control plane terminated",
            Self::ControlPlanePause => "control plane paused",
            Self::ControlPlaneClock => "control plane's clock shifted",
            Self::AnswerLost => "responses lost after commit",
            Self::AnswerDelayed => "responses delayed",
            Self::AnswerCut => "updates cut",
            Self::AnswerGarbage => "responses replaced by garbage",
            Self::PostgresCrash => "PostgreSQL crashed",
            Self::PostgresCut => "PostgreSQL's connections cut",
            Self::PostgresLock => "PostgreSQL's rows locked",
            Self::PostgresRestore => "older backup restored",
            Self::EnvoyTerm => "Envoy terminated",
            Self::EnvoyKill => "Envoy killed",
            Self::EnvoyTrap => "VM trapped",
            Self::EnvoyUpdate => "configuration updated",
            Self::EnvoyDrain => "Envoy drained",
            Self::EnvoyClock => "Envoy's clock shifted",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Pause after the end of the fault before.
    pub pause: Duration,
    pub kind: Kind,
    /// Its target, modulo the number of candidates.
    pub target: usize,
    /// Its duration, for kinds that have one.
    pub lasts: Duration,
    /// Randomness for other choices.
    pub dice: u64,
}

/// An endless lane. Every kind occurs once in each round, in random order.
#[derive(Clone, Debug)]
pub struct Lane {
    kinds: Vec<Kind>,
    bag: Vec<Kind>,
    dice: Dice,
    pause: (Duration, Duration),
    lasts: (Duration, Duration),
}

impl Lane {
    pub fn new(seed: u64, kinds: &[Kind], pause: (Duration, Duration), lasts: (Duration, Duration)) -> Self {
        // Two lanes of a seed are not the same.
        let dice = Dice::new(seed ^ kinds.first().map_or(0, |kind| u64::from(*kind as u8) << 32));
        Self { kinds: kinds.to_vec(), bag: Vec::new(), dice, pause, lasts }
    }
}

impl Iterator for Lane {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if self.bag.is_empty() {
            self.bag.clone_from(&self.kinds);
            self.dice.shuffle(&mut self.bag);
        }
        let kind = self.bag.pop()?;
        Some(Step {
            pause: self.dice.between(self.pause.0, self.pause.1),
            kind,
            target: self.dice.below(1 << 16),
            lasts: self.dice.between(self.lasts.0, self.lasts.1),
            dice: self.dice.number(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const SECONDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3));

    fn lane(seed: u64, kinds: &[Kind]) -> Lane {
        Lane::new(seed, kinds, SECONDS, SECONDS)
    }

    #[test]
    fn a_seed_gives_the_same_schedule_again_and_another_seed_another() {
        let steps = |seed| lane(seed, &Kind::all(false)).take(50).collect::<Vec<_>>();
        assert_eq!(steps(7), steps(7));
        assert_ne!(steps(7), steps(8));
    }

    #[test]
    fn every_round_has_every_kind_once() {
        for kinds in [false, true].map(Kind::all) {
            let mut lane = lane(3, &kinds);
            for _ in 0..5 {
                let round: BTreeSet<Kind> = lane.by_ref().take(kinds.len()).map(|step| step.kind).collect();
                assert_eq!(round, kinds.iter().copied().collect());
            }
        }
    }

    #[test]
    fn times_keep_within_their_bounds() {
        for step in lane(11, &Kind::all(false)).take(1_000) {
            for time in [step.pause, step.lasts] {
                assert!(time >= SECONDS.0 && time < SECONDS.1, "{step:?}");
            }
        }
    }
}
