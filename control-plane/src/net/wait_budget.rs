//! Time that a peer may keep the control plane waiting while it sends or takes data.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// A budget of waiting time, restored by a number of bytes. A large body over a slow line may take long, while a peer that sends
/// or takes next to nothing exhausts the budget.
#[derive(Debug)]
pub struct WaitBudget {
    whole: Duration,
    left: Duration,
    renewed_bytes: usize,
    bytes: usize,
    /// Since when the peer keeps the control plane waiting, and until when it may.
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl WaitBudget {
    /// A budget that each `renewed_bytes` restore.
    pub const fn new(whole: Duration, renewed_bytes: usize) -> Self {
        Self { whole, left: whole, renewed_bytes, bytes: 0, waiting: None }
    }

    /// Passes on what a peer sent or took, and its `bytes`; `None` once the budget is exhausted.
    pub fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<T>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<Option<T>> {
        if let Poll::Ready(done) = polled {
            let waited = self.waiting.take().map(|(since, _)| since.elapsed()).unwrap_or_default();
            self.record(waited, bytes(&done));
            return Poll::Ready(Some(done));
        }
        let left = self.left;
        let (_, until) = self.waiting.get_or_insert_with(|| (Instant::now(), Box::pin(tokio::time::sleep(left))));
        until.as_mut().poll(cx).map(|()| None)
    }

    fn record(&mut self, waited: Duration, bytes: usize) {
        self.left = self.left.saturating_sub(waited);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes >= self.renewed_bytes {
            (self.left, self.bytes) = (self.whole, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_uses_the_budget_up_and_bytes_renew_it() {
        let second = Duration::from_secs(1);
        let mut budget = WaitBudget::new(second * 3, 1 << 20);
        for _ in 0..2 {
            budget.record(second, 1 << 18);
        }
        assert_eq!(budget.left, second);
        budget.record(second / 2, 1 << 19);
        assert_eq!(budget.left, second * 3);
        budget.record(second * 9, 1);
        assert_eq!(budget.left, Duration::ZERO);
    }
}
