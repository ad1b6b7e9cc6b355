//! Units of time, and deadlines on a clock that may step back.

pub use contract::time::{MS_PER_HOUR, MS_PER_S, NS_PER_MS, NS_PER_S};

/// Whether a deadline lies ahead. Deadlines are set `longest_ms` ahead at most: one that lies further ahead was set before
/// the clock stepped back, and does not count.
#[must_use]
pub const fn is_ahead(at_ms: u64, now_ms: u64, longest_ms: u64) -> bool {
    at_ms > now_ms && at_ms.saturating_sub(now_ms) <= longest_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_counts_until_it_is_reached_unless_the_clock_stepped_back() {
        assert!(is_ahead(1_100, 1_000, 100) && is_ahead(1_001, 1_000, 100));
        assert!(!is_ahead(1_000, 1_000, 100) && !is_ahead(999, 1_000, 100));
        assert!(!is_ahead(1_101, 1_000, 100));
    }
}
