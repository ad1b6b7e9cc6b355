//! Unknown keys that one VM captures and sends to the control plane. A VM sends each key once an hour, so the control plane
//! knows to the hour when it was last seen.

use contract::hash::KeyHash;
use contract::unknown::{HASHES, UnknownKeys};

use crate::time::MS_PER_HOUR;

/// Most keys that a VM captures in an hour. It ignores further ones until the next hour.
const REMEMBERED: usize = 10_000;

/// A message without a response counts as lost after this time. Envoy delivers no response to a root context that has ended.
const LOST_AFTER_MS: u64 = 20_000;

/// The pause after a message that failed.
const PAUSE_MS: u64 = 5_000;

/// The keys that one VM has captured.
#[derive(Debug, Default)]
pub struct Captured {
    /// Keys to send.
    unsent: Vec<KeyHash>,
    /// Keys of this hour, sorted.
    seen: Vec<KeyHash>,
    hour: u64,
    in_flight: Option<InFlight>,
    /// No message is sent before this time.
    paused_until_ms: u64,
}

#[derive(Debug)]
struct InFlight {
    token: u32,
    since_ms: u64,
    keys: Vec<KeyHash>,
}

impl Captured {
    /// Captures a key.
    pub fn add(&mut self, hash: KeyHash) {
        if self.see(hash) {
            self.unsent.push(hash);
        }
    }

    /// Remembers a key. Returns whether it is new and there is room.
    fn see(&mut self, hash: KeyHash) -> bool {
        let Err(place) = self.seen.binary_search(&hash) else { return false };
        let has_room = self.seen.len() < REMEMBERED;
        if has_room {
            self.seen.insert(place, hash);
        }
        has_room
    }

    /// The message to send now, if there is one.
    pub fn due(&mut self, now_ms: u64) -> Option<UnknownKeys> {
        if now_ms / MS_PER_HOUR != self.hour {
            self.hour = now_ms / MS_PER_HOUR;
            self.seen.clear();
            for hash in std::mem::take(&mut self.unsent) {
                self.add(hash);
            }
        }
        let is_lost = |sent: &mut InFlight| now_ms.abs_diff(sent.since_ms) >= LOST_AFTER_MS;
        if let Some(lost) = self.in_flight.take_if(is_lost) {
            self.unsent.extend(lost.keys);
        }
        // A pause longer than `PAUSE_MS` was set before the clock stepped back. It is ignored.
        let is_paused = (1..=PAUSE_MS).contains(&self.paused_until_ms.saturating_sub(now_ms));
        if self.unsent.is_empty() || self.in_flight.is_some() || is_paused {
            return None;
        }
        let first = self.unsent.len().min(HASHES);
        Some(UnknownKeys { hashes: self.unsent.get(..first).unwrap_or_default().to_vec() })
    }

    /// The message of [`Captured::due`] was sent, with this token.
    pub fn sent(&mut self, token: u32, now_ms: u64) {
        let first = self.unsent.len().min(HASHES);
        self.in_flight = Some(InFlight { token, since_ms: now_ms, keys: self.unsent.drain(..first).collect() });
    }

    /// Whether this token is that of a message in flight.
    #[must_use]
    pub fn is_in_flight(&self, token: u32) -> bool {
        self.in_flight.as_ref().is_some_and(|sent| sent.token == token)
    }

    /// Takes the response to the message in flight. Returns whether the token was that of this message.
    pub fn take_response(&mut self, token: u32, is_ok: bool, now_ms: u64) -> bool {
        let Some(sent) = self.in_flight.take_if(|sent| sent.token == token) else { return false };
        if !is_ok {
            self.unsent.extend(sent.keys);
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

    fn captured(keys: usize) -> Captured {
        let mut captured = Captured::default();
        assert_eq!(captured.due(NOW), None);
        (0..keys).for_each(|number| captured.add(hash(number)));
        captured
    }

    #[test]
    fn a_key_is_sent_once_an_hour() {
        let mut captured = captured(2);
        captured.add(hash(0));
        let both = UnknownKeys { hashes: vec![hash(0), hash(1)] };
        assert_eq!(captured.due(NOW), Some(both));
        captured.sent(7, NOW);
        assert_eq!((captured.due(NOW), captured.take_response(6, true, NOW)), (None, false));
        assert!(captured.take_response(7, true, NOW));
        captured.add(hash(1));
        assert_eq!(captured.due(NOW + MS_PER_HOUR - 1), None);
        assert_eq!(captured.due(NOW + MS_PER_HOUR), None);
        captured.add(hash(1));
        assert_eq!(captured.due(NOW + MS_PER_HOUR), Some(UnknownKeys { hashes: vec![hash(1)] }));
    }

    #[test]
    fn keys_of_a_message_that_failed_or_got_lost_are_sent_again() {
        let mut captured = captured(1);
        let message = captured.due(NOW);
        captured.sent(1, NOW);
        assert!(captured.take_response(1, false, NOW));
        assert_eq!((captured.due(NOW + PAUSE_MS - 1), captured.due(NOW + PAUSE_MS)), (None, message.clone()));
        captured.sent(2, NOW + PAUSE_MS);
        let lost_ms = NOW + PAUSE_MS + LOST_AFTER_MS;
        assert_eq!((captured.due(lost_ms - 1), captured.due(lost_ms)), (None, message));
    }

    #[test]
    fn a_flood_of_keys_is_bounded() {
        let mut captured = captured(REMEMBERED + 5);
        let mut sent = 0;
        while let Some(message) = captured.due(NOW) {
            assert!(message.hashes.len() <= HASHES);
            sent += message.hashes.len();
            captured.sent(1, NOW);
            captured.take_response(1, true, NOW);
        }
        assert_eq!(sent, REMEMBERED);
    }
}
