//! What the control plane leases to this Envoy: the grants of an acknowledgement come in and stand in the cells of limits
//! and stocks afterwards. Stocks of newer versions are stepped over.

use contract::budget::Stock;
use contract::id::KeyId;
use contract::rate::WHOLE;
use contract::usage::Grant;

use super::limiter::Used;
use super::{limiter, stock};
use crate::shared::{Cells, SharedData};

/// Notes what was granted. Each grant says all that was ever granted, so that one that is lost is made up for by the next.
pub fn apply(data: &SharedData<impl Cells>, grants: &[Grant], default_share: u32, now_ns: u64) {
    let mut rest = grants;
    while let Some((grant, after)) = rest.split_first() {
        rest = after;
        let applied = match grant.stock() {
            Some(Stock::Share) => {
                let share = u32::try_from(grant.amount).unwrap_or(WHOLE).min(WHOLE);
                let of_it = |used: &&Grant| used.stock() == Some(Stock::Used) && used.of == grant.of;
                let used = after.iter().take_while(of_it).map(|used| Used::told(used.amount, used.turn));
                let used: Vec<Used> = used.collect();
                let share = Some(share).filter(|share| *share > 0);
                limiter::grant(data, KeyId(grant.of), share, &used, default_share, now_ns)
            }
            Some(kind @ (Stock::Quota | Stock::Credits | Stock::Balance)) => {
                stock::grant(data, kind, &grant.of, grant.amount, grant.turn)
            }
            // Read with the share that it stands behind.
            Some(Stock::Used) | None => Ok(()),
        };
        // Nobody gets through to the cell: this Envoy goes on with what it had.
        let _ = applied;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::new_data;

    #[test]
    fn each_grant_finds_its_cell_and_unknown_stocks_none() {
        let data = new_data();
        let grant = |stock, of, amount| Grant { stock, of: [of; 16], amount, turn: 1 };
        apply(&data, &[grant(0, 1, 5), grant(1, 2, 5), grant(2, 3, 5), grant(9, 4, 5)], WHOLE, 0);
        let names: Vec<String> = data.host().cell_names();
        let expected = [":c0303", ":l0101", ":q0202"];
        assert!(names.iter().zip(expected).all(|(name, end)| name.ends_with(end)), "{names:?}");
        assert_eq!(names.len(), expected.len());
    }
}
