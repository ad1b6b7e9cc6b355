//! The binary form of counts in shared data. All counts have one length, so that thousands of them are read and written
//! quickly: Envoy's main thread does it four times a second. Numbers are little-endian.
//!
//! ```text
//! count:  key's id (16 bytes) │ generation (4) │ hour (4) │ requests (8) │ cost (8) │ last (8) │ outcome (1)
//!         │ 1 if there is a key (1)
//! outbox: requests in it (8) │ reporter (16) │ newest frozen number (8) │ number of frozen reports (4)
//!         │ of each report: its number (8), number of counts (4), counts │ pending counts, up to the end
//! ```

use contract::id::{KeyId, ReporterId};
use contract::usage::{Count, KeyRef, Subject};

use super::outbox::Outbox;

const COUNT_BYTES: usize = 50;

/// Writes counts.
pub(crate) fn write_counts<'a>(counts: impl Iterator<Item = &'a Count>) -> Vec<u8> {
    let (least, _) = counts.size_hint();
    let mut bytes = Vec::with_capacity(least.saturating_mul(COUNT_BYTES));
    counts.for_each(|count| write_count(&mut bytes, count));
    bytes
}

/// Reads what [`write_counts`] wrote.
pub(crate) fn read_counts(bytes: &[u8]) -> Vec<Count> {
    bytes.chunks_exact(COUNT_BYTES).filter_map(|bytes| read_count(&mut { bytes })).collect()
}

/// Writes the outbox.
pub(crate) fn write_outbox(outbox: &Outbox) -> Vec<u8> {
    let Outbox { reporter, frozen_seq, frozen, pending } = outbox;
    let counts = frozen.iter().fold(pending.len(), |sum, (_, counts)| sum.saturating_add(counts.len()));
    let mut bytes = Vec::with_capacity(counts.saturating_mul(COUNT_BYTES).saturating_add(128));
    bytes.extend_from_slice(&outbox.requests().to_le_bytes());
    bytes.extend_from_slice(&reporter.0);
    bytes.extend_from_slice(&frozen_seq.to_le_bytes());
    bytes.extend_from_slice(&length(frozen.len()));
    for (seq, counts) in frozen {
        bytes.extend_from_slice(&seq.to_le_bytes());
        bytes.extend_from_slice(&length(counts.len()));
        counts.iter().for_each(|count| write_count(&mut bytes, count));
    }
    pending.iter().for_each(|count| write_count(&mut bytes, count));
    bytes
}

/// Reads what [`write_outbox`] wrote; `None` for other bytes.
pub(crate) fn read_outbox(mut bytes: &[u8]) -> Option<Outbox> {
    let rest = &mut bytes;
    let _requests = number(rest)?;
    let reporter = ReporterId(take(rest)?);
    let frozen_seq = number(rest)?;
    let reports = u32::from_le_bytes(take(rest)?);
    let mut frozen = Vec::new();
    for _ in 0..reports {
        let seq = number(rest)?;
        let counts = u32::from_le_bytes(take(rest)?);
        frozen.push((seq, (0..counts).map(|_| read_count(rest)).collect::<Option<_>>()?));
    }
    Some(Outbox { reporter, frozen_seq, frozen, pending: read_counts(rest) })
}

/// How many requests an outbox contains, without reading its counts.
pub(crate) fn requests(mut outbox: &[u8]) -> u64 {
    number(&mut outbox).unwrap_or_default()
}

fn write_count(bytes: &mut Vec<u8>, count: &Count) {
    let Count { of: Subject { key, outcome, hour }, requests, cost, last_ms } = *count;
    let KeyRef { id, generation } = key.unwrap_or(KeyRef { id: KeyId([0; 16]), generation: 0 });
    bytes.extend_from_slice(&id.0);
    bytes.extend_from_slice(&generation.to_le_bytes());
    bytes.extend_from_slice(&hour.to_le_bytes());
    for number in [requests, cost, last_ms] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&[outcome, u8::from(key.is_some())]);
}

fn read_count(rest: &mut &[u8]) -> Option<Count> {
    let id = KeyId(take(rest)?);
    let generation = u32::from_le_bytes(take(rest)?);
    let hour = u32::from_le_bytes(take(rest)?);
    let [requests, cost, last_ms] = [number(rest)?, number(rest)?, number(rest)?];
    let [outcome, has_key] = take(rest)?;
    let key = (has_key == 1).then_some(KeyRef { id, generation });
    Some(Count { of: Subject { key, outcome, hour }, requests, cost, last_ms })
}

fn length(number: usize) -> [u8; 4] {
    u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes()
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    take(rest).map(u64::from_le_bytes)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (first, others) = rest.split_first_chunk::<N>()?;
    *rest = others;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn count() -> impl Strategy<Value = Count> {
        let key = option::of((any::<[u8; 16]>(), any::<u32>()))
            .prop_map(|key| key.map(|(id, generation)| KeyRef { id: KeyId(id), generation }));
        (key, any::<u8>(), any::<u32>(), any::<[u64; 3]>()).prop_map(|(key, outcome, hour, numbers)| {
            let [requests, cost, last_ms] = numbers;
            Count { of: Subject { key, outcome, hour }, requests, cost, last_ms }
        })
    }

    proptest! {
        #[test]
        fn counts_are_read_as_written(counts in vec(count(), 0..9)) {
            let bytes = write_counts(counts.iter());
            prop_assert_eq!(bytes.len(), counts.len() * COUNT_BYTES);
            prop_assert_eq!(read_counts(&bytes), counts);
        }

        #[test]
        fn an_outbox_and_its_number_of_requests_are_read_as_written(
            reporter: [u8; 16], frozen_seq: u64, frozen in vec((any::<u64>(), vec(count(), 0..5)), 0..4), pending in vec(count(), 0..5)
        ) {
            let outbox = Outbox { reporter: ReporterId(reporter), frozen_seq, frozen, pending };
            let bytes = write_outbox(&outbox);
            prop_assert_eq!(requests(&bytes), outbox.requests());
            prop_assert_eq!(read_outbox(&bytes), Some(outbox));
        }

        #[test]
        fn arbitrary_bytes_yield_no_more_counts_than_fit(bytes in vec(any::<u8>(), 0..199)) {
            prop_assert_eq!(read_counts(&bytes).len(), bytes.len() / COUNT_BYTES);
            if let Some(outbox) = read_outbox(&bytes) {
                let frozen = outbox.frozen.iter().map(|(_, counts)| counts.len());
                prop_assert!((frozen.sum::<usize>() + outbox.pending.len()) * COUNT_BYTES <= bytes.len());
            }
        }
    }

    #[test]
    fn an_empty_cell_is_no_outbox() {
        assert_eq!(read_outbox(&[]), None);
    }
}
