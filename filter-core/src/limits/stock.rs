//! Quotas and credits: what a request costs comes in, whether this Envoy's leases pay for it goes out. The arithmetic is
//! `contract::budget`; here is its memory.
//!
//! ```text
//! cell: id (16 bytes) │ granted (8) │ spent (8) │ turn (4)      repeated
//! ```
//! Cells are shared by all VMs and each change insists on the version that was read, so leases are exact for an Envoy
//! process. An entry is kept as long as Envoy runs, since grants count from its start: there are at most as many as keys
//! with a quota, and owners with credits, were used since, 36 bytes each; and one more for each owner whose credits a request
//! lacked: what the owner has in all.

use contract::budget::{Held, Stock};
use contract::outcome::Outcome;
use contract::record::{Budget, Flags, Record};

use super::wait::{RETRY_RENEWAL_S, Wait};
use crate::shared::{CellKey, Cells, Conflict, SharedData};

/// Cells of each kind of stock: the last 16 bits of the id name one.
pub const STOCK_CELLS: u32 = 65_536;

/// Pays for one allowed request: one of the key's quota, and its cost in the owner's credits; both or nothing. A record
/// without them costs no look at any cell. Says which of them refused.
pub fn spend(data: &SharedData<impl Cells>, record: &Record, cost: u32) -> Option<Outcome> {
    let paid = |stock, of, budget: Option<Budget>, cost| match budget {
        Some(budget) if cost > 0 => take(data, stock, of, &budget, cost),
        _ => true,
    };
    if !paid(Stock::Quota, &record.key_id.0, record.quota, 1) {
        return Some(Outcome::QuotaExceeded);
    }
    if !paid(Stock::Credits, &record.owner_id.0, record.credits, cost.into()) {
        if record.quota.is_some() {
            // Should it not go back, the key has one request less, which is better than one too many.
            let _ = give_back(data, Stock::Quota, &record.key_id.0, 1);
        }
        return Some(Outcome::CreditsExhausted);
    }
    None
}

/// Takes over what the control plane says that this Envoy was granted so far.
///
/// # Errors
/// [`Conflict`], as good as never.
pub fn grant(
    data: &SharedData<impl Cells>,
    stock: Stock,
    of: &[u8; 16],
    granted: u64,
    turn: u32,
) -> Result<(), Conflict> {
    change(data, stock, of, |held| {
        held.grant(granted, turn);
        true
    })
    .map(|_| ())
}

/// How long a client should wait whose request of this price was refused for the lack of one of these; as usual for other
/// outcomes.
#[must_use]
pub fn wait(data: &SharedData<impl Cells>, outcome: Outcome, record: &Record, price: u32, now_s: u64) -> Wait {
    let (flag, budget) = match outcome {
        Outcome::QuotaExceeded => (Flags::QUOTA_EXCEEDED, record.quota),
        Outcome::CreditsExhausted => (Flags::CREDITS_EXHAUSTED, record.credits),
        _ => return Wait::Usual,
    };
    if !record.flags.contains(flag) {
        let hopeless = outcome == Outcome::CreditsExhausted && is_above_balance(data, record, price.into());
        return if hopeless { Wait::Hopeless } else { Wait::Renewal };
    }
    // The stock is filled anew already, or nobody knows when it will be: then ask now and then.
    let resets_at_s = budget.and_then(|budget| budget.resets_at_s);
    resets_at_s.map_or(Wait::Usual, |at| Wait::Seconds(at.saturating_sub(now_s).max(RETRY_RENEWAL_S)))
}

/// Whether a price is above all the credits that the owner has, as the control plane told after a request was refused.
fn is_above_balance(data: &SharedData<impl Cells>, record: &Record, price: u64) -> bool {
    let of = &record.owner_id.0;
    let [.., high, low] = *of;
    let cell = data.get(CellKey::Stock(Stock::Balance, u16::from_be_bytes([high, low])));
    let told = cell.and_then(|cell| find(&cell.value, of));
    let turn = record.credits.map(|credits| credits.turn);
    told.is_some_and(|told| Some(told.turn) == turn && price > told.granted)
}

fn take(data: &SharedData<impl Cells>, stock: Stock, of: &[u8; 16], budget: &Budget, cost: u64) -> bool {
    // Too much contention on the cell: treat the stock as exhausted.
    change(data, stock, of, |held| held.spend(budget, cost)).unwrap_or(false)
}

fn give_back(data: &SharedData<impl Cells>, stock: Stock, of: &[u8; 16], cost: u64) -> Result<bool, Conflict> {
    change(data, stock, of, |held| {
        held.spent = held.spent.saturating_sub(cost);
        true
    })
}

/// Changes what is held of one stock, where `change` says so, and passes on what it says.
fn change(
    data: &SharedData<impl Cells>,
    stock: Stock,
    of: &[u8; 16],
    change: impl Fn(&mut Held) -> bool,
) -> Result<bool, Conflict> {
    let [.., high, low] = *of;
    data.update(CellKey::Stock(stock, u16::from_be_bytes([high, low])), |cell| {
        let mut held = find(cell, of).unwrap_or_default();
        if !change(&mut held) {
            return Err(false);
        }
        let mut bytes = Vec::with_capacity(cell.len().saturating_add(ENTRY_BYTES));
        let others = cell.chunks_exact(ENTRY_BYTES).filter(|entry| !entry.starts_with(of));
        others.for_each(|entry| bytes.extend_from_slice(entry));
        bytes.extend_from_slice(of);
        bytes.extend_from_slice(&held.granted.to_le_bytes());
        bytes.extend_from_slice(&held.spent.to_le_bytes());
        bytes.extend_from_slice(&held.turn.to_le_bytes());
        Ok((bytes, true))
    })
}

const ENTRY_BYTES: usize = 36;

fn find(cell: &[u8], of: &[u8; 16]) -> Option<Held> {
    let entry = cell.chunks_exact(ENTRY_BYTES).find(|entry| entry.starts_with(of))?;
    let (_, rest) = entry.split_first_chunk::<16>()?;
    let (granted, rest) = rest.split_first_chunk::<8>()?;
    let (spent, rest) = rest.split_first_chunk::<8>()?;
    let (turn, _) = rest.split_first_chunk::<4>()?;
    Some(Held {
        granted: u64::from_le_bytes(*granted),
        spent: u64::from_le_bytes(*spent),
        turn: u32::from_le_bytes(*turn),
    })
}

#[cfg(test)]
mod tests {
    use contract::id::{KeyId, OwnerId};

    use super::*;
    use crate::mock::{TestData, new_data};

    const KEY: [u8; 16] = [7; 16];
    const OWNER: [u8; 16] = [8; 16];

    const fn budget(starter: u32) -> Option<Budget> {
        Some(Budget { starter, turn: 1, resets_at_s: None })
    }

    fn record(quota: Option<Budget>, credits: Option<Budget>) -> Record {
        let mut record = Record::plain(KeyId(KEY), OwnerId(OWNER));
        record.quota = quota;
        record.credits = credits;
        record
    }

    fn held(data: &TestData, stock: Stock, of: &[u8; 16]) -> Held {
        let [.., high, low] = *of;
        let cell = data.get(CellKey::Stock(stock, u16::from_be_bytes([high, low])));
        cell.and_then(|cell| find(&cell.value, of)).unwrap_or_default()
    }

    #[test]
    fn a_key_without_quota_and_credits_touches_no_cell() {
        let data = new_data();
        assert_eq!(spend(&data, &record(None, None), 1), None);
        assert_eq!(spend(&data, &record(None, budget(0)), 0), None);
        assert_eq!(data.host().cell_names(), Vec::<String>::new());
    }

    #[test]
    fn the_starter_is_spent_then_what_was_granted_and_then_nothing() {
        let data = new_data();
        let record = record(budget(2), None);
        let spent = || (0..10).filter(|_| spend(&data, &record, 1).is_none()).count();
        assert_eq!(spent(), 2);
        for _ in 0..2 {
            grant(&data, Stock::Quota, &KEY, 5, 1).unwrap();
            grant(&data, Stock::Credits, &KEY, 9, 1).unwrap();
        }
        assert_eq!(spent(), 3);
        assert_eq!(spend(&data, &record, 1), Some(Outcome::QuotaExceeded));
        assert_eq!(held(&data, Stock::Quota, &KEY), Held { granted: 5, spent: 5, turn: 1 });
    }

    #[test]
    fn a_request_pays_its_quota_and_its_cost_or_nothing() {
        let data = new_data();
        let record = record(budget(10), budget(10));
        let outcomes: Vec<_> = (0..4).map(|_| spend(&data, &record, 4)).collect();
        let refused = Some(Outcome::CreditsExhausted);
        assert_eq!(outcomes, [None, None, refused, refused]);
        assert_eq!(held(&data, Stock::Quota, &KEY).spent, 2);
        assert_eq!(held(&data, Stock::Credits, &OWNER).spent, 8);
        // The rest of the credits is enough for cheaper requests.
        assert_eq!(spend(&data, &record, 1), None);
    }

    #[test]
    fn keys_of_one_owner_share_the_credits_and_stocks_that_share_a_cell_do_not_mix() {
        let data = new_data();
        let mut neighbour = record(budget(1), budget(3));
        neighbour.key_id.0[0] = 1;
        let ours = record(budget(2), budget(3));
        assert_eq!(spend(&data, &ours, 1), None);
        assert_eq!(spend(&data, &neighbour, 1), None);
        assert_eq!(spend(&data, &neighbour, 1), Some(Outcome::QuotaExceeded));
        assert_eq!(spend(&data, &ours, 1), None);
        assert_eq!(held(&data, Stock::Credits, &OWNER).spent, 3);
        assert_eq!(held(&data, Stock::Quota, &neighbour.key_id.0).spent, 1);
    }

    #[test]
    fn two_workers_that_meet_spend_two() {
        let data = new_data();
        let record = record(budget(1), None);
        let other = record.clone();
        let data_of_other = data.clone();
        data.host().before_next_put(move || assert_eq!(spend(&data_of_other, &other, 1), None));
        assert_eq!(spend(&data, &record, 1), Some(Outcome::QuotaExceeded));
    }

    #[test]
    fn who_is_refused_is_told_when_there_may_be_more() {
        let retry = |flags, resets_at_s| {
            let quota = Some(Budget { starter: 1, turn: 1, resets_at_s });
            let record = Record { flags, ..record(quota, None) };
            wait(&new_data(), Outcome::QuotaExceeded, &record, 1, 1_000)
        };
        assert_eq!(retry(Flags(0), Some(9_000)), Wait::Renewal);
        assert_eq!(retry(Flags::QUOTA_EXCEEDED, None), Wait::Usual);
        assert_eq!(retry(Flags::QUOTA_EXCEEDED, Some(9_000)), Wait::Seconds(8_000));
        assert_eq!(retry(Flags::QUOTA_EXCEEDED, Some(500)), Wait::Seconds(1));
        let data = new_data();
        assert_eq!(wait(&data, Outcome::RateLimited, &record(None, None), 1, 0), Wait::Usual);
    }

    #[test]
    fn a_price_above_the_balance_is_hopeless_until_there_is_more() {
        let data = new_data();
        let record = record(None, budget(0));
        let told = |balance, turn, price| {
            grant(&data, Stock::Balance, &OWNER, balance, turn).unwrap();
            wait(&data, Outcome::CreditsExhausted, &record, price, 0)
        };
        assert_eq!(wait(&data, Outcome::CreditsExhausted, &record, 5, 0), Wait::Renewal, "nothing was told");
        assert_eq!((told(3, 1, 5), told(3, 1, 3), told(5, 1, 5)), (Wait::Hopeless, Wait::Renewal, Wait::Renewal));
        // What was told before or after the turn of the record says nothing.
        assert_eq!(told(3, 2, 5), Wait::Renewal);
    }
}
