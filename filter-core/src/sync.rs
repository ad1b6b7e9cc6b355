//! The conversation with the control plane that keeps the store up to date, as a state machine without input or output:
//! the host tells it what happened and asks it what to do next.
//!
//! It polls with the revision it has; the answer comes when there is something newer, or after a while without news. A
//! control plane that cannot continue from that revision answers with the first page of a snapshot, and the machine asks
//! for the rest page by page. Whatever goes wrong, it polls again after a pause that doubles up to [`MAX_PAUSE_MS`], with
//! jitter, so that a thousand Envoys do not come back at once.

use contract::hash::BUCKETS;
use contract::id::{Epoch, ReporterId};
use contract::page::{Header, Part};

use crate::store::State;

/// How long a poll may take: longer than the control plane holds one.
pub const POLL_TIMEOUT_MS: u64 = 40_000;
/// The longest pause between two tries.
pub const MAX_PAUSE_MS: u64 = 5_000;

/// The version of the filter, as it tells the control plane.
const VERSION: &str = env!("CARGO_PKG_VERSION");

const MIN_PAUSE_MS: u64 = 100;

/// A poll whose end nobody told us of is given up this long after its own timeout: its context is gone.
const LOST_AFTER_MS: u64 = POLL_TIMEOUT_MS + 5_000;

/// Where the store stands in the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// Nothing loaded.
    Empty,
    /// Everything up to a revision.
    At { epoch: Epoch, revision: u64 },
    /// In the middle of a snapshot. Its pages may come from several replicas at several revisions; what is surely in it
    /// is what the least of them had seen.
    Loading { epoch: Epoch, least_revision: u64, cursor: u32 },
}

/// The machine.
#[derive(Clone, Debug)]
pub struct Sync {
    position: Position,
    /// The newest that was ever in the store. A replica that has not seen it must not fill the store.
    newest: Option<(Epoch, u64)>,
    /// Whether the control plane has answered since the machine began or since it last failed to. Until then it is asked
    /// not to hold the poll, so that a store that is as new as can be need not pass for stale meanwhile.
    confirmed: bool,
    failures: u32,
    next_at_ms: u64,
    in_flight: Option<(u32, u64)>,
}

/// What a page means for the store, once its entries are in the buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The store is complete up to this state.
    Complete {
        /// To be noted with the time.
        epoch: Epoch,
        /// To be noted with the time.
        revision: u64,
        /// To be noted with the time.
        keys: u64,
    },
    /// More pages of the snapshot are to come.
    Partial,
    /// The page does not continue what the store holds: it must not be applied.
    Misplaced,
}

impl Sync {
    /// Starts from what the store holds, polling at once.
    #[must_use]
    pub fn from(state: Option<&State>) -> Self {
        let newest = state.map(|state| (state.epoch, state.revision));
        let position = newest.map_or(Position::Empty, |(epoch, revision)| Position::At { epoch, revision });
        Self { position, newest, confirmed: false, failures: 0, next_at_ms: 0, in_flight: None }
    }

    /// The path to poll now, or `None` if a poll is under way or a pause has not ended. It tells who asks: the reporter,
    /// the version of the filter, and how many requests no acknowledged report has told of.
    #[must_use]
    pub fn due(&self, reporter: ReporterId, pending: u64, now_ms: u64) -> Option<String> {
        let under_way = self.in_flight.is_some_and(|(_, since_ms)| now_ms.abs_diff(since_ms) < LOST_AFTER_MS);
        // A pause that seems longer than any was set before the clock stepped back.
        let pausing = self.next_at_ms > now_ms && self.next_at_ms.saturating_sub(now_ms) <= MAX_PAUSE_MS;
        (!under_way && !pausing).then(|| format!("{}&version={VERSION}&pending={pending}", self.path(reporter)))
    }

    fn path(&self, reporter: ReporterId) -> String {
        let newest = |epoch| self.newest.filter(|(ours, _)| *ours == epoch).map_or(0, |(_, revision)| revision);
        match (self.position, self.newest) {
            (Position::Empty, None) => format!("/sync/v1/keys?reporter={reporter}"),
            (Position::Empty, Some((epoch, revision))) => {
                format!("/sync/v1/keys?epoch={epoch}&cursor=0&revision={revision}&reporter={reporter}")
            }
            (Position::At { epoch, revision }, _) => {
                let wait = if self.confirmed { "" } else { "&wait=0" };
                format!("/sync/v1/keys?epoch={epoch}&revision={revision}{wait}&reporter={reporter}")
            }
            (Position::Loading { epoch, least_revision, cursor }, _) => {
                let revision = newest(epoch).max(least_revision);
                format!("/sync/v1/keys?epoch={epoch}&cursor={cursor}&revision={revision}&reporter={reporter}")
            }
        }
    }

    /// A poll is on its way, under this token.
    pub const fn sent(&mut self, token: u32, now_ms: u64) {
        self.in_flight = Some((token, now_ms));
    }

    /// Whether an answer with this token is the one that is waited for. If so, it is not waited for any longer.
    pub fn answered(&mut self, token: u32) -> bool {
        self.in_flight.take_if(|(awaited, _)| *awaited == token).is_some()
    }

    /// No usable answer: pause, then go on from where the store is. `random` spreads the pauses; any number will do.
    /// Returns the pause in milliseconds.
    pub fn failed(&mut self, now_ms: u64, random: u64) -> u64 {
        let doubled = MIN_PAUSE_MS.checked_shl(self.failures).unwrap_or(MAX_PAUSE_MS).min(MAX_PAUSE_MS);
        let spread = random.checked_rem(doubled.saturating_add(1)).unwrap_or_default();
        let pause_ms = doubled.saturating_add(spread).checked_div(2).unwrap_or(doubled);
        self.confirmed = false;
        self.failures = self.failures.saturating_add(1).min(16);
        self.next_at_ms = now_ms.saturating_add(pause_ms);
        self.in_flight = None;
        pause_ms
    }

    /// Judges a page before it is applied.
    #[must_use]
    pub fn judge(&self, header: &Header) -> Progress {
        match (self.next(header), header) {
            (None, _) => Progress::Misplaced,
            (Some(Position::At { epoch, revision }), header) => {
                Progress::Complete { epoch, revision, keys: header.total_keys }
            }
            (Some(_), _) => Progress::Partial,
        }
    }

    /// A page was applied: go on from there, at once.
    pub fn applied(&mut self, header: &Header) {
        self.position = self.next(header).unwrap_or(Position::Empty);
        if let Position::At { epoch, revision } = self.position {
            self.newest = Some((epoch, revision));
        }
        self.confirmed = true;
        self.failures = 0;
        self.next_at_ms = 0;
    }

    /// The control plane does not follow: start the snapshot over.
    pub const fn restart(&mut self) {
        self.position = Position::Empty;
    }

    fn next(&self, header: &Header) -> Option<Position> {
        let epoch = header.epoch;
        match (header.part, self.position) {
            (Part::Changes { after }, Position::At { epoch: ours, revision }) => {
                (epoch == ours && after == revision && header.revision >= revision)
                    .then_some(Position::At { epoch, revision: header.revision })
            }
            (Part::Changes { .. }, _) => None,
            (Part::Snapshot { from, to }, position) => {
                let least_revision = match position {
                    _ if from == 0 => header.revision,
                    Position::Loading { epoch: ours, least_revision, cursor } if ours == epoch && cursor == from => {
                        least_revision.min(header.revision)
                    }
                    _ => return None,
                };
                Some(if to >= BUCKETS {
                    Position::At { epoch, revision: least_revision }
                } else {
                    Position::Loading { epoch, least_revision, cursor: to }
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch([1; 16]);
    const OTHER: Epoch = Epoch([2; 16]);
    const ME: ReporterId = ReporterId([0; 16]);
    const REPORTER: &str = "reporter=00000000-0000-0000-0000-000000000000&version=0.1.0&pending=3";

    fn state(revision: u64) -> State {
        State { epoch: EPOCH, revision, keys: 1, synced_ms: 0, filters: 0 }
    }

    fn header(epoch: Epoch, revision: u64, part: Part) -> Header {
        Header { epoch, revision, total_keys: 3, part, filters: 2 }
    }

    fn snapshot(revision: u64, from: u32, to: u32) -> Header {
        header(EPOCH, revision, Part::Snapshot { from, to })
    }

    fn complete(revision: u64) -> Progress {
        Progress::Complete { epoch: EPOCH, revision, keys: 3 }
    }

    #[test]
    fn an_empty_store_loads_a_snapshot_page_by_page_and_then_follows_changes() {
        let mut sync = Sync::from(None);
        assert_eq!(sync.due(ME, 3, 0), Some(format!("/sync/v1/keys?{REPORTER}")));
        let first = snapshot(10, 0, 40_000);
        assert_eq!(sync.judge(&first), Progress::Partial);
        sync.applied(&first);
        assert_eq!(
            sync.due(ME, 3, 0),
            Some(format!(
                "/sync/v1/keys?epoch=01010101-0101-0101-0101-010101010101&cursor=40000&revision=10&{REPORTER}"
            ))
        );
        let last = snapshot(12, 40_000, BUCKETS);
        // The first page did not have the changes 11 and 12: they are asked for once more.
        assert_eq!(sync.judge(&last), complete(10));
        sync.applied(&last);
        assert_eq!(
            sync.due(ME, 3, 0),
            Some(format!("/sync/v1/keys?epoch=01010101-0101-0101-0101-010101010101&revision=10&{REPORTER}"))
        );
        assert_eq!(sync.judge(&header(EPOCH, 12, Part::Changes { after: 10 })), complete(12));
    }

    #[test]
    fn a_page_of_a_replica_that_lags_behind_sets_the_revision_back() {
        let mut sync = Sync::from(None);
        sync.applied(&snapshot(10, 0, 100));
        sync.applied(&snapshot(8, 100, 200));
        assert_eq!(sync.judge(&snapshot(10, 200, BUCKETS)), complete(8));
    }

    #[test]
    fn a_page_that_does_not_continue_the_store_is_not_applied() {
        let sync = Sync::from(Some(&state(5)));
        for misplaced in [
            header(EPOCH, 9, Part::Changes { after: 4 }),
            header(EPOCH, 9, Part::Changes { after: 6 }),
            header(OTHER, 9, Part::Changes { after: 5 }),
            header(EPOCH, 4, Part::Changes { after: 5 }),
            snapshot(9, 100, BUCKETS),
        ] {
            assert_eq!(sync.judge(&misplaced), Progress::Misplaced, "{misplaced:?}");
        }
        assert_eq!(Sync::from(None).judge(&header(EPOCH, 9, Part::Changes { after: 0 })), Progress::Misplaced);
        let mut loading = Sync::from(None);
        loading.applied(&snapshot(5, 0, 100));
        assert_eq!(loading.judge(&snapshot(5, 101, 200)), Progress::Misplaced);
        assert_eq!(loading.judge(&header(OTHER, 5, Part::Snapshot { from: 100, to: 200 })), Progress::Misplaced);
    }

    #[test]
    fn a_new_epoch_starts_with_a_snapshot_at_any_time() {
        let sync = Sync::from(Some(&state(500)));
        let page = header(OTHER, 3, Part::Snapshot { from: 0, to: BUCKETS });
        assert_eq!(sync.judge(&page), Progress::Complete { epoch: OTHER, revision: 3, keys: 3 });
    }

    #[test]
    fn one_poll_is_under_way_at_a_time_and_only_its_answer_counts() {
        let mut sync = Sync::from(None);
        sync.sent(7, 1_000);
        assert_eq!(sync.due(ME, 3, 2_000), None);
        assert!(!sync.answered(6));
        assert!(sync.answered(7));
        assert!(!sync.answered(7));
        assert!(sync.due(ME, 3, 2_000).is_some());
    }

    #[test]
    fn a_poll_that_nobody_answers_is_given_up() {
        let mut sync = Sync::from(None);
        sync.sent(7, 0);
        assert_eq!(sync.due(ME, 3, LOST_AFTER_MS - 1), None);
        assert!(sync.due(ME, 3, LOST_AFTER_MS).is_some());
    }

    #[test]
    fn pauses_double_with_jitter_up_to_the_longest_and_end_with_success() {
        let mut sync = Sync::from(Some(&state(1)));
        let mut bounds = Vec::new();
        for _ in 0..8 {
            let least = sync.clone().failed(0, 0);
            let most = sync.failed(0, 0).max(least);
            bounds.push(most);
            assert!(sync.due(ME, 3, 0).is_none() && sync.due(ME, 3, least).is_some());
        }
        assert_eq!(bounds, [50, 100, 200, 400, 800, 1_600, 2_500, 2_500]);
        assert_eq!(sync.clone().failed(0, MAX_PAUSE_MS), MAX_PAUSE_MS);
        sync.applied(&header(EPOCH, 1, Part::Changes { after: 1 }));
        assert!(sync.due(ME, 3, 0).is_some());
        assert_eq!(sync.failed(0, 0), 50);
    }

    #[test]
    fn a_failure_in_the_middle_of_a_snapshot_keeps_its_place() {
        let mut sync = Sync::from(None);
        sync.applied(&snapshot(5, 0, 100));
        sync.failed(0, 0);
        assert_eq!(sync.judge(&snapshot(5, 100, BUCKETS)), complete(5));
    }

    #[test]
    fn a_poll_is_not_held_until_the_store_is_confirmed() {
        let (held, not) = (format!("&revision=7&{REPORTER}"), format!("&revision=7&wait=0&{REPORTER}"));
        let mut sync = Sync::from(Some(&state(7)));
        assert!(sync.due(ME, 3, 0).unwrap().ends_with(&not));
        sync.applied(&header(EPOCH, 7, Part::Changes { after: 7 }));
        assert!(sync.due(ME, 3, 0).unwrap().ends_with(&held));
        sync.failed(0, 0);
        assert!(sync.due(ME, 3, MAX_PAUSE_MS).unwrap().ends_with(&not));
    }

    #[test]
    fn starting_over_outlasts_the_pause_and_asks_for_nothing_older_than_was_there() {
        let mut sync = Sync::from(Some(&state(7)));
        sync.restart();
        sync.failed(0, 0);
        let start = format!("/sync/v1/keys?epoch={EPOCH}&cursor=0&revision=7&{REPORTER}");
        assert_eq!(sync.due(ME, 3, MAX_PAUSE_MS), Some(start));
        // The first page is of a newer revision: the others must be too.
        sync.applied(&snapshot(9, 0, 100));
        let next = format!("/sync/v1/keys?epoch={EPOCH}&cursor=100&revision=9&{REPORTER}");
        assert_eq!(sync.due(ME, 3, 0), Some(next));
        // Unless the database has gone back, which the control plane finds out before it answers.
        sync.applied(&snapshot(6, 100, 200));
        let next = format!("/sync/v1/keys?epoch={EPOCH}&cursor=200&revision=7&{REPORTER}");
        assert_eq!(sync.due(ME, 3, 0), Some(next));
    }

    #[test]
    fn a_clock_that_steps_back_ends_a_pause() {
        let mut sync = Sync::from(None);
        sync.failed(10_000_000, 0);
        assert!(sync.due(ME, 3, 1_000).is_some());
    }
}
