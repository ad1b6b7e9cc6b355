//! What is known of the credits that the metered key draws from: whether an Envoy may say that they are used up.

use std::time::Instant;

use super::gate::{BOUND, Gate};

/// What others may hold of the credits at any time: leases of Envoys that have not spent them yet.
const HELD: u64 = 500;

/// The top-ups that were confirmed, and when.
#[derive(Debug, Default)]
pub(super) struct Purse(Vec<(Instant, u64)>);

impl Purse {
    /// So much came in.
    pub(super) fn add(&mut self, amount: u64) {
        self.0.push((Instant::now(), amount));
    }

    pub(super) const fn top_ups(&self) -> usize {
        self.0.len()
    }

    /// The database is again what it was with so many top-ups.
    pub(super) fn go_back(&mut self, top_ups: usize) {
        self.0.truncate(top_ups);
    }

    /// Whether an Envoy may refuse a request that was sent then for want of credits, of which this much may be spent: while it
    /// hears of none, because it is cut off and its lease is spent; or if what it must know of came to no more than that.
    pub(super) fn may_refuse(&self, gate: &Gate, sent: Instant, spent: u64) -> bool {
        let cut_off = |spells: &[super::gate::Spell]| {
            spells.iter().any(|spell| spell.end.is_none_or(|end| sent <= end + spell.after + BOUND))
        };
        let heard = |at: Instant| gate.deadline(at).is_some_and(|deadline| sent > deadline);
        let funds: u64 = self.0.iter().filter(|(at, _)| heard(*at)).map(|(_, amount)| amount).sum();
        cut_off(&gate.changes) || cut_off(&gate.leases) || funds <= spent + HELD
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::gate::Spell;
    use super::*;

    const LATER: Duration = Duration::from_secs(3);

    fn holding(top_ups: u64) -> Purse {
        let mut purse = Purse::default();
        (0..top_ups).for_each(|_| purse.add(HELD));
        purse
    }

    #[test]
    fn credits_that_came_in_and_were_not_spent_may_not_be_said_to_be_used_up() {
        let (gate, sent) = (Gate::default(), Instant::now() + LATER);
        assert!(!holding(2).may_refuse(&gate, sent, HELD - 1));
        assert!(holding(2).may_refuse(&gate, sent, HELD));
        assert!(holding(1).may_refuse(&gate, sent, 0));
        // The Envoy need not have heard of them yet.
        assert!(holding(2).may_refuse(&gate, Instant::now(), 0));
        // They went with the database.
        let mut purse = holding(2);
        purse.go_back(1);
        assert!(purse.may_refuse(&gate, sent, 0));
    }

    #[test]
    fn an_envoy_that_is_cut_off_may_have_spent_its_lease() {
        for after in [Duration::ZERO, LATER] {
            let mut gate = Gate::default();
            let start = Instant::now();
            gate.leases.push(Spell { start, end: Some(start), after });
            let sent = |late: Duration| start + after + BOUND + late;
            assert!(holding(9).may_refuse(&gate, sent(Duration::ZERO), 0));
            assert!(!holding(9).may_refuse(&gate, sent(LATER), 0));
        }
    }
}
