//! Model of the credits of the metered key: whether an Envoy may refuse a request because they are
//! exhausted, or because it cannot ask.

use std::time::Instant;

use crate::envoy_model::{BOUND, EnvoyModel};

/// Credits that Envoys may hold that were killed or cut off, and that come back after a minute.
const HELD: u64 = 500;

/// The confirmed top-ups with their times.
#[derive(Debug, Default)]
pub(crate) struct CreditModel(Vec<(Instant, u64)>);

impl CreditModel {
    /// A top-up was confirmed.
    pub(crate) fn add(&mut self, amount: u64) {
        self.0.push((Instant::now(), amount));
    }

    pub(crate) const fn top_ups(&self) -> usize {
        self.0.len()
    }

    /// The database was restored to a state with this number of top-ups.
    pub(crate) fn go_back(&mut self, top_ups: usize) {
        self.0.truncate(top_ups);
    }

    /// Whether an Envoy may refuse a request with `credits_exhausted` when up to `spent` credits are spent: while a disruption
    /// cuts it off from allowances, or if the top-ups that it must know of are used up.
    pub(crate) fn may_refuse(&self, model: &EnvoyModel, sent: Instant, spent: u64) -> bool {
        let known = |at: Instant| model.deadline(at).is_some_and(|deadline| sent > deadline);
        let funds: u64 = self.0.iter().filter(|(at, _)| known(*at)).map(|(_, amount)| amount).sum();
        may_be_unavailable(model, sent) || funds <= spent + HELD
    }
}

/// Whether an Envoy may refuse a request with `limits_unavailable`: while a disruption cuts it off from allowances.
pub(crate) fn may_be_unavailable(model: &EnvoyModel, sent: Instant) -> bool {
    let mut disruptions = model.changes.iter().chain(&model.allowances);
    disruptions.any(|disruption| disruption.end.is_none_or(|end| sent <= end + disruption.after + BOUND))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::envoy_model::Disruption;

    const LATER: Duration = Duration::from_secs(3);

    fn holding(top_ups: u64) -> CreditModel {
        let mut credits = CreditModel::default();
        (0..top_ups).for_each(|_| credits.add(HELD));
        credits
    }

    #[test]
    fn credits_that_came_in_and_were_not_spent_may_not_be_said_to_be_used_up() {
        let (model, sent) = (EnvoyModel::default(), Instant::now() + LATER);
        assert!(!holding(2).may_refuse(&model, sent, HELD - 1));
        assert!(holding(2).may_refuse(&model, sent, HELD));
        assert!(holding(1).may_refuse(&model, sent, 0));
        // The Envoy need not know of them yet.
        assert!(holding(2).may_refuse(&model, Instant::now(), 0));
        // The restored database does not have them.
        let mut credits = holding(2);
        credits.go_back(1);
        assert!(credits.may_refuse(&model, sent, 0));
    }

    #[test]
    fn an_envoy_that_is_cut_off_may_have_spent_its_allowance() {
        for after in [Duration::ZERO, LATER] {
            let mut model = EnvoyModel::default();
            let start = Instant::now();
            model.allowances.push(Disruption { start, end: Some(start), after });
            let sent = |late: Duration| start + after + BOUND + late;
            assert!(holding(9).may_refuse(&model, sent(Duration::ZERO), 0));
            assert!(!holding(9).may_refuse(&model, sent(LATER), 0));
            assert_eq!([Duration::ZERO, LATER].map(|late| may_be_unavailable(&model, sent(late))), [true, false]);
        }
    }
}
