//! Units of time, and deadlines on a clock that may step back.

/// Nanoseconds of a millisecond.
pub const NS_PER_MS: u64 = 1_000_000;

/// Nanoseconds of a second.
pub const NS_PER_S: u64 = 1_000_000_000;

/// Milliseconds of a second.
pub const MS_PER_S: u64 = 1_000;

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
