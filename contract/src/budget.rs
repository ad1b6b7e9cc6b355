//! Quotas and credits, of which an Envoy spends what it was leased.
//!
//! A stock (the quota of a key, the credits of an owner) is kept by the control plane. Each Envoy spends from a lease, which
//! the answers to its usage reports renew, so that no request waits. Both sides count up from the start of the Envoy process
//! and never down: *granted* is all that it was ever leased, *spent* all that it ever spent. An answer that is lost or comes
//! twice does no harm.
//!
//! An Envoy that was leased nothing yet since the stock was last filled (a *turn*) may spend the record's *starter*.

use crate::record::Budget;

/// What a lease is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stock {
    /// A share of a key's rate limits: not spent, but held.
    Share,
    /// The quota of a key.
    Quota,
    /// The credits of an owner.
    Credits,
    /// How far a limit of a key is used over all Envoys, which is told beside a share of it: see [`crate::rate`].
    Used,
    /// The credits that an owner has in all. The control plane sends them beside a lease after a request was refused:
    /// for a request whose price is higher, waiting does not help. They are neither spent nor leased.
    Balance,
}

impl Stock {
    /// The number that stands in grants, in cells and in the database.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Share => 0,
            Self::Quota => 1,
            Self::Credits => 2,
            Self::Used => 3,
            Self::Balance => 4,
        }
    }

    /// The stock of a number; `None` for a number of a later version.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Share),
            1 => Some(Self::Quota),
            2 => Some(Self::Credits),
            3 => Some(Self::Used),
            4 => Some(Self::Balance),
            _ => None,
        }
    }
}

/// What one Envoy holds of a stock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// All that it was ever granted.
    pub granted: u64,
    /// All that it ever spent.
    pub spent: u64,
    /// The last turn in which it had its starter.
    pub turn: u32,
}

impl Held {
    /// Spends from the lease, or nothing. Says whether it did.
    #[must_use]
    pub fn spend(&mut self, budget: &Budget, cost: u64) -> bool {
        if self.turn != budget.turn {
            self.turn = budget.turn;
            self.granted = self.granted.max(self.spent.saturating_add(budget.starter.into()));
        }
        let after = self.spent.saturating_add(cost);
        if after > self.granted {
            return false;
        }
        self.spent = after;
        true
    }

    /// Takes over what the control plane says was granted so far, as of a turn. What it said before a newer turn began does
    /// not count any longer.
    pub fn grant(&mut self, granted: u64, turn: u32) {
        if turn >= self.turn {
            self.turn = turn;
            self.granted = granted;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn budget(starter: u32, turn: u32) -> Budget {
        Budget { starter, turn, resets_at_s: None }
    }

    fn spends(held: &mut Held, budget: Budget, requests: usize) -> usize {
        (0..requests).filter(|_| held.spend(&budget, 2)).count()
    }

    #[test]
    fn the_starter_is_spent_once_a_turn() {
        let mut held = Held::default();
        assert_eq!(spends(&mut held, budget(5, 1), 10), 2);
        assert_eq!(spends(&mut held, budget(5, 2), 10), 2);
        assert_eq!(held, Held { granted: 9, spent: 8, turn: 2 });
    }

    #[test]
    fn a_grant_is_the_sum_of_all_and_may_be_told_twice() {
        let mut held = Held::default();
        assert_eq!(spends(&mut held, budget(4, 1), 10), 2);
        for _ in 0..2 {
            held.grant(10, 1);
        }
        assert_eq!(spends(&mut held, budget(4, 1), 10), 3);
        // The control plane takes back what is not spent.
        held.grant(20, 1);
        held.grant(12, 1);
        assert_eq!(spends(&mut held, budget(4, 1), 10), 1);
    }

    #[test]
    fn what_was_granted_before_the_stock_was_filled_anew_does_not_shut_the_door_again() {
        let mut held = Held { granted: 10, spent: 10, turn: 1 };
        assert_eq!(spends(&mut held, budget(8, 2), 1), 1);
        held.grant(10, 1);
        assert_eq!(spends(&mut held, budget(8, 2), 10), 3);
    }

    #[test]
    fn a_stock_is_found_by_its_code() {
        for stock in [Stock::Share, Stock::Quota, Stock::Credits, Stock::Used, Stock::Balance] {
            assert_eq!(Stock::from_code(stock.code()), Some(stock));
        }
        assert_eq!(Stock::from_code(5), None);
    }
}
