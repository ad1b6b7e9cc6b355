//! What one VM has seen and sends to the control plane: unknown keys, and policies that routes name. A VM sends a key once an
//! hour and a name every ten minutes, so the control plane knows as accurately when each was last seen.

use contract::hash::KeyHash;
use contract::sightings::{POLICIES, Sightings, UNKNOWN_KEYS};

use crate::time::MS_PER_HOUR;

/// Maximum number of unknown keys, and of policies, that a VM notes in one period. It ignores further ones until the next.
const REMEMBERED: usize = 10_000;

/// A message without a response counts as lost after this time. Envoy delivers no response to a root context that has ended.
const LOST_AFTER_MS: u64 = 20_000;

/// The pause after a message that failed.
const PAUSE_MS: u64 = 5_000;

/// What one VM has seen and has to report.
#[derive(Debug)]
pub struct SightingsBuffer {
    unknown_keys: Periodic,
    policies: Periodic,
    in_flight: Option<InFlight>,
    /// No message is sent before this time.
    paused_until_ms: u64,
}

/// Keys or names, each sent once in a period.
#[derive(Debug)]
struct Periodic {
    length_ms: u64,
    /// The number of the present period.
    number: u64,
    unsent: Vec<Vec<u8>>,
    /// Values seen in this period, sorted.
    seen: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct InFlight {
    token: u32,
    since_ms: u64,
    message: Sightings,
}

impl Default for SightingsBuffer {
    fn default() -> Self {
        Self {
            unknown_keys: Periodic::new(MS_PER_HOUR),
            policies: Periodic::new(MS_PER_HOUR / 6),
            in_flight: None,
            paused_until_ms: 0,
        }
    }
}

impl Periodic {
    const fn new(length_ms: u64) -> Self {
        Self { length_ms, number: 0, unsent: Vec::new(), seen: Vec::new() }
    }

    fn add(&mut self, thing: &[u8]) {
        if let Err(place) = self.seen.binary_search_by(|known| known.as_slice().cmp(thing))
            && self.seen.len() < REMEMBERED
        {
            self.seen.insert(place, thing.to_vec());
            self.unsent.push(thing.to_vec());
        }
    }

    /// Begins another period if it is time. What was not sent counts as seen in this one.
    fn renew(&mut self, now_ms: u64) {
        let number = now_ms.checked_div(self.length_ms).unwrap_or_default();
        if number == self.number {
            return;
        }
        self.number = number;
        self.seen.clear();
        for thing in std::mem::take(&mut self.unsent) {
            self.add(&thing);
        }
    }

    fn take(&mut self, most: usize) -> impl Iterator<Item = Vec<u8>> {
        self.unsent.drain(..self.unsent.len().min(most))
    }
}

impl SightingsBuffer {
    /// A client sent a key that the store does not have.
    pub fn unknown_key(&mut self, hash: KeyHash) {
        self.unknown_keys.add(&hash.0);
    }

    /// A route named a policy.
    pub fn policy(&mut self, name: &str) {
        self.policies.add(name.as_bytes());
    }

    /// The message to send now, if there is one. The caller then calls [`SightingsBuffer::sent`] or [`SightingsBuffer::not_sent`]
    /// with it.
    pub fn due(&mut self, now_ms: u64) -> Option<Sightings> {
        self.unknown_keys.renew(now_ms);
        self.policies.renew(now_ms);
        let is_lost = |sent: &mut InFlight| now_ms.abs_diff(sent.since_ms) >= LOST_AFTER_MS;
        if let Some(lost) = self.in_flight.take_if(is_lost) {
            self.not_sent(lost.message);
        }
        // A pause longer than `PAUSE_MS` was set before the clock stepped back. It is ignored.
        let is_paused = (1..=PAUSE_MS).contains(&self.paused_until_ms.saturating_sub(now_ms));
        if self.in_flight.is_some() || is_paused {
            return None;
        }
        let keys = self.unknown_keys.take(UNKNOWN_KEYS);
        let unknown_keys = keys.filter_map(|bytes| bytes.try_into().ok().map(KeyHash)).collect();
        let policies = self.policies.take(POLICIES).filter_map(|bytes| String::from_utf8(bytes).ok()).collect();
        let message = Sightings { unknown_keys, policies };
        (message != Sightings::default()).then_some(message)
    }

    /// The message was sent, with this token.
    pub fn sent(&mut self, token: u32, message: Sightings, now_ms: u64) {
        self.in_flight = Some(InFlight { token, since_ms: now_ms, message });
    }

    /// The message could not be sent. It is due again.
    pub fn not_sent(&mut self, message: Sightings) {
        self.unknown_keys.unsent.extend(message.unknown_keys.iter().map(|hash| hash.0.to_vec()));
        self.policies.unsent.extend(message.policies.into_iter().map(String::into_bytes));
    }

    /// Whether this token is that of the message in flight.
    #[must_use]
    pub fn is_in_flight(&self, token: u32) -> bool {
        self.in_flight.as_ref().is_some_and(|sent| sent.token == token)
    }

    /// Takes the response to the message in flight. Returns whether the token was that of this message.
    pub fn take_response(&mut self, token: u32, is_ok: bool, now_ms: u64) -> bool {
        let Some(sent) = self.in_flight.take_if(|sent| sent.token == token) else { return false };
        if !is_ok {
            self.not_sent(sent.message);
            self.paused_until_ms = now_ms.saturating_add(PAUSE_MS);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 500_000 * MS_PER_HOUR;

    fn hash(number: usize) -> KeyHash {
        KeyHash::of(&number.to_le_bytes())
    }

    fn message(unknown_keys: &[usize], policies: &[&str]) -> Sightings {
        let unknown_keys = unknown_keys.iter().map(|number| hash(*number)).collect();
        Sightings { unknown_keys, policies: policies.iter().map(|name| (*name).to_owned()).collect() }
    }

    fn seen(keys: usize) -> SightingsBuffer {
        let mut seen = SightingsBuffer::default();
        assert_eq!(seen.due(NOW), None);
        (0..keys).for_each(|number| seen.unknown_key(hash(number)));
        seen
    }

    #[test]
    fn a_key_is_sent_once_an_hour_and_a_policy_every_ten_minutes() {
        let mut seen = seen(2);
        seen.unknown_key(hash(0));
        ["orders", "orders", "items"].iter().for_each(|name| seen.policy(name));
        let due = seen.due(NOW).unwrap();
        assert_eq!(due, message(&[0, 1], &["orders", "items"]));
        seen.sent(7, due, NOW);
        assert_eq!((seen.due(NOW), seen.take_response(6, true, NOW)), (None, false));
        assert!(seen.take_response(7, true, NOW));
        let see_again = |seen: &mut SightingsBuffer| {
            seen.unknown_key(hash(1));
            seen.policy("items");
        };
        see_again(&mut seen);
        assert_eq!(seen.due(NOW + MS_PER_HOUR / 6 - 1), None);
        assert_eq!(seen.due(NOW + MS_PER_HOUR / 6), None);
        see_again(&mut seen);
        let due = seen.due(NOW + MS_PER_HOUR / 6).unwrap();
        assert_eq!(due, message(&[], &["items"]));
        seen.sent(8, due, NOW + MS_PER_HOUR / 6);
        assert!(seen.take_response(8, true, NOW + MS_PER_HOUR / 6));
        assert_eq!(seen.due(NOW + MS_PER_HOUR), None);
        seen.unknown_key(hash(1));
        seen.policy("items");
        assert_eq!(seen.due(NOW + MS_PER_HOUR), Some(message(&[1], &["items"])));
    }

    #[test]
    fn a_message_that_failed_or_got_lost_is_sent_again() {
        let mut seen = seen(1);
        seen.policy("orders");
        let due = seen.due(NOW).unwrap();
        seen.not_sent(due);
        let due = seen.due(NOW).unwrap();
        seen.sent(1, due.clone(), NOW);
        assert!(seen.take_response(1, false, NOW));
        assert_eq!((seen.due(NOW + PAUSE_MS - 1), seen.due(NOW + PAUSE_MS)), (None, Some(due.clone())));
        seen.sent(2, due.clone(), NOW + PAUSE_MS);
        let lost_ms = NOW + PAUSE_MS + LOST_AFTER_MS;
        assert_eq!((seen.due(lost_ms - 1), seen.due(lost_ms)), (None, Some(due.clone())));
        // Also if an hour begins meanwhile: what is sent then is not sent twice in it.
        seen.sent(3, due.clone(), lost_ms);
        assert!(seen.take_response(3, false, lost_ms));
        assert_eq!(seen.due(NOW + MS_PER_HOUR), Some(due));
        seen.policy("orders");
        assert_eq!(seen.due(NOW + MS_PER_HOUR), None);
    }

    #[test]
    fn a_flood_of_keys_is_bounded() {
        let mut seen = seen(REMEMBERED + 5);
        let mut sent = 0;
        while let Some(due) = seen.due(NOW) {
            assert!(due.unknown_keys.len() <= UNKNOWN_KEYS);
            sent += due.unknown_keys.len();
            seen.sent(1, due, NOW);
            seen.take_response(1, true, NOW);
        }
        assert_eq!(sent, REMEMBERED);
    }
}
