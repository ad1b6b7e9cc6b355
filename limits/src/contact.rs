//! What an Envoy knows of the control plane's answers: whether it is cut off, how many Envoys are live, and whether it is alone.

use crate::{ALONE_GRACE_MS, ALONE_MS, VOID_AFTER_MS};

/// What an Envoy knows of its contact with the control plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contact {
    /// When the Envoy was last cut off, in milliseconds of Unix time. Sessions from before are void.
    pub since_ms: u64,
    /// When the last answer came.
    pub answered_ms: u64,
    /// How many Envoys were live then.
    pub live: u32,
    /// The number of the latest term in which the Envoy is alone. Each term has a new number.
    pub alone_term: u32,
    /// Until when it may decide by itself; 0 if it is not alone.
    pub alone_until_ms: u64,
}

impl Contact {
    /// Notes an answer to a call. `sent_ms`: when the call was sent; `alone_ms`: see [`crate::message::Answer::alone_ms`].
    pub fn answered(&mut self, sent_ms: u64, now_ms: u64, live: u32, alone_ms: u32) {
        if self.is_cut_off(now_ms) {
            self.since_ms = self.valid_since_ms(sent_ms);
        }
        // The control plane grants other Envoys nothing before the grace is over. An answer before its end continues the term.
        let sent_before_ms = self.alone_until_ms.saturating_sub(ALONE_MS);
        let is_in_time = (sent_before_ms..=self.alone_until_ms.saturating_add(ALONE_GRACE_MS)).contains(&now_ms);
        let is_same_term = self.was_alone() && is_in_time;
        if alone_ms > 0 && !is_same_term {
            self.alone_term = self.alone_term.wrapping_add(1);
        }
        self.answered_ms = now_ms;
        self.live = live;
        self.alone_until_ms = if alone_ms > 0 { sent_ms.saturating_add(alone_ms as u64) } else { 0 };
    }

    /// Whether the Envoy was alone as of the last answer.
    #[must_use]
    pub const fn was_alone(&self) -> bool {
        self.alone_until_ms > 0
    }

    pub(crate) const fn is_cut_off(&self, now_ms: u64) -> bool {
        now_ms.abs_diff(self.answered_ms) > VOID_AFTER_MS
    }

    /// Sessions from before this time are void.
    pub(crate) const fn valid_since_ms(&self, now_ms: u64) -> u64 {
        let cut_off_ms = self.answered_ms.saturating_add(VOID_AFTER_MS);
        match self.is_cut_off(now_ms) {
            // After a step back of the clock, the time at which the Envoy was cut off is unknown.
            true if cut_off_ms > now_ms => now_ms,
            true => cut_off_ms,
            false => self.since_ms,
        }
    }

    /// Whether the Envoy may decide by itself now.
    #[must_use]
    pub const fn is_alone(&self, now_ms: u64) -> bool {
        // A clock that has stepped back must not make it longer.
        now_ms < self.alone_until_ms && self.alone_until_ms.saturating_sub(now_ms) <= ALONE_MS
    }
}
