//! A holding as numbers, as an Envoy stores it.

use super::Holding;

/// How many numbers a [`Holding`] has.
pub const WORDS: usize = 21;

impl Holding {
    /// Its numbers, to be stored.
    #[must_use]
    pub const fn words(&self) -> [u64; WORDS] {
        [
            self.session,
            self.granted,
            self.spent,
            self.returned,
            self.refunded,
            self.arrival_ns,
            self.interval_ns,
            self.terms,
            self.fallback_ns,
            self.alone_term as u64,
            self.alone_left,
            self.left,
            self.others,
            self.known_until_ms,
            self.empty_until_ms,
            self.asked_ms,
            self.needed_ms,
            self.tick,
            self.used,
            self.peak,
            self.users,
        ]
    }

    /// The holding with these numbers.
    #[must_use]
    pub fn from_words(words: [u64; WORDS]) -> Self {
        let [session, granted, spent, returned, refunded, arrival_ns, interval_ns, terms, rest @ ..] = words;
        let [fallback_ns, alone_term, alone_left, left, others, known_until_ms, empty_until_ms, rest @ ..] = rest;
        let [asked_ms, needed_ms, tick, used, peak, users] = rest;
        let alone_term = u32::try_from(alone_term).unwrap_or_default();
        Self {
            session,
            granted,
            spent,
            returned,
            refunded,
            arrival_ns,
            interval_ns,
            terms,
            fallback_ns,
            alone_term,
            alone_left,
            left,
            others,
            known_until_ms,
            empty_until_ms,
            asked_ms,
            needed_ms,
            tick,
            used,
            peak,
            users,
        }
    }
}
