//! Pauses after failures, which double up to a limit.

use crate::time::is_ahead;

/// The longest pause, in milliseconds.
pub const MAX_PAUSE_MS: u64 = 5_000;

/// A backoff. A clock that steps back ends its pause.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    failures: u32,
    next_at_ms: u64,
}

impl Backoff {
    /// The pause after one more failure: `first_ms`, doubled with each failure before it.
    #[must_use]
    pub fn next_pause_ms(&self, first_ms: u64) -> u64 {
        first_ms.checked_shl(self.failures).unwrap_or(MAX_PAUSE_MS).min(MAX_PAUSE_MS)
    }

    /// Begins a pause after a failure.
    pub fn pause(&mut self, pause_ms: u64, now_ms: u64) {
        self.failures = self.failures.saturating_add(1).min(16);
        self.next_at_ms = now_ms.saturating_add(pause_ms);
    }

    /// Ends the pause after a success.
    pub const fn reset(&mut self) {
        self.failures = 0;
        self.next_at_ms = 0;
    }

    /// Whether a pause lasts.
    #[must_use]
    pub const fn is_pausing(&self, now_ms: u64) -> bool {
        is_ahead(self.next_at_ms, now_ms, MAX_PAUSE_MS)
    }
}
