//! The state machine that keeps the store up to date. It has no input or output: the leader tells it the events and asks it
//! for the next step.
//!
//! It polls with the revision of the store. The response comes when there is a newer revision, or after a while without one.
//! A control plane that cannot continue from that revision answers with the first update of a snapshot, and the machine asks
//! for the other updates one by one. After a failure it polls again after a pause that doubles up to [`super::backoff::MAX_PAUSE_MS`]. The
//! pauses are random, so that a thousand Envoys do not poll at the same moment.

use contract::hash::BUCKETS;
use contract::id::{Epoch, ReporterId};
use contract::update::{Header, Part};

use super::backoff::Backoff;
use crate::store::state::StoreState;

/// The time-out of a poll. The control plane answers earlier than this.
pub const POLL_TIMEOUT_MS: u64 = 40_000;

/// The version of the filter, as polls carry it.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The first pause.
const MIN_PAUSE_MS: u64 = 100;

/// A poll without response is given up this long after its own time-out: the context that should get the response is gone.
const LOST_AFTER_MS: u64 = POLL_TIMEOUT_MS + 5_000;

/// What the store contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// Nothing.
    Empty,
    /// Every change up to a revision.
    At { epoch: Epoch, revision: u64 },
    /// The buckets of a snapshot before `cursor`. Its updates may come from several replicas at several revisions; changes up to
    /// the least of these revisions are certain to be in it.
    Loading { epoch: Epoch, least_revision: u64, cursor: u32 },
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct StoreSync {
    position: Position,
    /// The newest revision that the store ever had. A replica that has not seen it must not fill the store.
    newest: Option<(Epoch, u64)>,
    /// Whether the control plane has answered since the start or the last failure. Until then the control plane is asked to
    /// answer at once, so that the age of an up-to-date store is reset soon.
    confirmed: bool,
    backoff: Backoff,
    in_flight: Option<(u32, u64)>,
}

/// The effect of an update on the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// With this update the store is complete.
    Complete {
        /// The life of the database.
        epoch: Epoch,
        /// Every change up to this revision is in the store.
        revision: u64,
        /// Keys in the store, as the control plane counts them.
        keys: u64,
    },
    /// More updates of the snapshot follow.
    Partial,
    /// The update does not continue the store and must not be applied.
    Misplaced,
}

impl StoreSync {
    /// Starts from the state of the store, with a poll at once.
    #[must_use]
    pub fn new(state: Option<&StoreState>) -> Self {
        let newest = state.map(|state| (state.epoch, state.revision));
        let position = newest.map_or(Position::Empty, |(epoch, revision)| Position::At { epoch, revision });
        Self { position, newest, confirmed: false, backoff: Backoff::default(), in_flight: None }
    }

    /// The path to poll now; `None` while a poll is in flight or a pause lasts. The path carries the reporter, the version of
    /// the filter, and the number of requests that no acknowledged report contains.
    #[must_use]
    pub fn due(&self, reporter: ReporterId, pending: u64, now_ms: u64) -> Option<String> {
        let is_in_flight = self.in_flight.is_some_and(|(_, since_ms)| now_ms.abs_diff(since_ms) < LOST_AFTER_MS);
        (!is_in_flight && !self.backoff.is_pausing(now_ms))
            .then(|| format!("{}&version={VERSION}&pending={pending}", self.path(reporter)))
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

    /// A poll was sent, with this token.
    pub const fn sent(&mut self, token: u32, now_ms: u64) {
        self.in_flight = Some((token, now_ms));
    }

    /// Whether this token is that of the poll in flight. If so, the poll is no longer in flight.
    pub fn take_response(&mut self, token: u32) -> bool {
        self.in_flight.take_if(|(awaited, _)| *awaited == token).is_some()
    }

    /// A poll failed: pauses, then continues from the present position. Any number will do as `random`. Returns the pause in
    /// milliseconds.
    pub fn on_failure(&mut self, now_ms: u64, random: u64) -> u64 {
        let longest_ms = self.backoff.next_pause_ms(MIN_PAUSE_MS);
        // Between half and all of it.
        let spread = random.checked_rem(longest_ms.saturating_add(1)).unwrap_or_default();
        let pause_ms = longest_ms.saturating_add(spread) / 2;
        self.backoff.pause(pause_ms, now_ms);
        self.confirmed = false;
        self.in_flight = None;
        pause_ms
    }

    /// What an update will do to the store. Nothing is applied yet.
    #[must_use]
    pub fn classify(&self, header: &Header) -> Progress {
        match self.next(header) {
            None => Progress::Misplaced,
            Some(Position::At { epoch, revision }) => Progress::Complete { epoch, revision, keys: header.total_keys },
            Some(_) => Progress::Partial,
        }
    }

    /// An update was applied: the next poll starts at once.
    pub fn on_applied(&mut self, header: &Header) {
        self.position = self.next(header).unwrap_or(Position::Empty);
        if let Position::At { epoch, revision } = self.position {
            self.newest = Some((epoch, revision));
        }
        self.confirmed = true;
        self.backoff.reset();
    }

    /// Starts the snapshot over: the control plane sent an update that does not continue the store.
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
    use super::super::backoff::MAX_PAUSE_MS;
    use super::*;

    const EPOCH: Epoch = Epoch([1; 16]);
    const OTHER: Epoch = Epoch([2; 16]);
    const ME: ReporterId = ReporterId([0; 16]);
    const REPORTER: &str = "reporter=00000000-0000-0000-0000-000000000000&version=0.1.0&pending=3";

    fn state(revision: u64) -> StoreState {
        StoreState { epoch: EPOCH, revision, keys: 1, synced_ms: 0 }
    }

    fn header(epoch: Epoch, revision: u64, part: Part) -> Header {
        Header { epoch, revision, total_keys: 3, part }
    }

    fn snapshot(revision: u64, from: u32, to: u32) -> Header {
        header(EPOCH, revision, Part::Snapshot { from, to })
    }

    fn complete(revision: u64) -> Progress {
        Progress::Complete { epoch: EPOCH, revision, keys: 3 }
    }

    #[test]
    fn an_empty_store_loads_a_snapshot_update_by_update_and_then_follows_changes() {
        let mut sync = StoreSync::new(None);
        assert_eq!(sync.due(ME, 3, 0), Some(format!("/sync/v1/keys?{REPORTER}")));
        let first = snapshot(10, 0, 40_000);
        assert_eq!(sync.classify(&first), Progress::Partial);
        sync.on_applied(&first);
        assert_eq!(
            sync.due(ME, 3, 0),
            Some(format!(
                "/sync/v1/keys?epoch=01010101-0101-0101-0101-010101010101&cursor=40000&revision=10&{REPORTER}"
            ))
        );
        let last = snapshot(12, 40_000, BUCKETS);
        // The first update did not have the changes 11 and 12: they are asked for once more.
        assert_eq!(sync.classify(&last), complete(10));
        sync.on_applied(&last);
        assert_eq!(
            sync.due(ME, 3, 0),
            Some(format!("/sync/v1/keys?epoch=01010101-0101-0101-0101-010101010101&revision=10&{REPORTER}"))
        );
        assert_eq!(sync.classify(&header(EPOCH, 12, Part::Changes { after: 10 })), complete(12));
    }

    #[test]
    fn an_update_of_a_lagging_replica_sets_the_revision_back() {
        let mut sync = StoreSync::new(None);
        sync.on_applied(&snapshot(10, 0, 100));
        sync.on_applied(&snapshot(8, 100, 200));
        assert_eq!(sync.classify(&snapshot(10, 200, BUCKETS)), complete(8));
    }

    #[test]
    fn an_update_that_does_not_continue_the_store_is_not_applied() {
        let sync = StoreSync::new(Some(&state(5)));
        for misplaced in [
            header(EPOCH, 9, Part::Changes { after: 4 }),
            header(EPOCH, 9, Part::Changes { after: 6 }),
            header(OTHER, 9, Part::Changes { after: 5 }),
            header(EPOCH, 4, Part::Changes { after: 5 }),
            snapshot(9, 100, BUCKETS),
        ] {
            assert_eq!(sync.classify(&misplaced), Progress::Misplaced, "{misplaced:?}");
        }
        assert_eq!(StoreSync::new(None).classify(&header(EPOCH, 9, Part::Changes { after: 0 })), Progress::Misplaced);
        let mut loading = StoreSync::new(None);
        loading.on_applied(&snapshot(5, 0, 100));
        assert_eq!(loading.classify(&snapshot(5, 101, 200)), Progress::Misplaced);
        assert_eq!(loading.classify(&header(OTHER, 5, Part::Snapshot { from: 100, to: 200 })), Progress::Misplaced);
    }

    #[test]
    fn a_new_epoch_starts_with_a_snapshot_at_any_time() {
        let sync = StoreSync::new(Some(&state(500)));
        let update = header(OTHER, 3, Part::Snapshot { from: 0, to: BUCKETS });
        assert_eq!(sync.classify(&update), Progress::Complete { epoch: OTHER, revision: 3, keys: 3 });
    }

    #[test]
    fn one_poll_is_in_flight_at_a_time_and_only_its_response_counts() {
        let mut sync = StoreSync::new(None);
        sync.sent(7, 1_000);
        assert_eq!(sync.due(ME, 3, 2_000), None);
        assert!(!sync.take_response(6));
        assert!(sync.take_response(7));
        assert!(!sync.take_response(7));
        assert!(sync.due(ME, 3, 2_000).is_some());
    }

    #[test]
    fn a_poll_without_response_is_given_up() {
        let mut sync = StoreSync::new(None);
        sync.sent(7, 0);
        assert_eq!(sync.due(ME, 3, LOST_AFTER_MS - 1), None);
        assert!(sync.due(ME, 3, LOST_AFTER_MS).is_some());
    }

    #[test]
    fn pauses_double_with_jitter_up_to_the_longest_and_end_with_success() {
        let mut sync = StoreSync::new(Some(&state(1)));
        let mut bounds = Vec::new();
        for _ in 0..8 {
            let least = sync.clone().on_failure(0, 0);
            let most = sync.on_failure(0, 0).max(least);
            bounds.push(most);
            assert!(sync.due(ME, 3, 0).is_none() && sync.due(ME, 3, least).is_some());
        }
        assert_eq!(bounds, [50, 100, 200, 400, 800, 1_600, 2_500, 2_500]);
        assert_eq!(sync.clone().on_failure(0, MAX_PAUSE_MS), MAX_PAUSE_MS);
        sync.on_applied(&header(EPOCH, 1, Part::Changes { after: 1 }));
        assert!(sync.due(ME, 3, 0).is_some());
        assert_eq!(sync.on_failure(0, 0), 50);
    }

    #[test]
    fn a_failure_in_the_middle_of_a_snapshot_keeps_its_place() {
        let mut sync = StoreSync::new(None);
        sync.on_applied(&snapshot(5, 0, 100));
        sync.on_failure(0, 0);
        assert_eq!(sync.classify(&snapshot(5, 100, BUCKETS)), complete(5));
    }

    #[test]
    fn until_the_store_is_confirmed_polls_ask_for_a_response_at_once() {
        let (held, not) = (format!("&revision=7&{REPORTER}"), format!("&revision=7&wait=0&{REPORTER}"));
        let mut sync = StoreSync::new(Some(&state(7)));
        assert!(sync.due(ME, 3, 0).unwrap().ends_with(&not));
        sync.on_applied(&header(EPOCH, 7, Part::Changes { after: 7 }));
        assert!(sync.due(ME, 3, 0).unwrap().ends_with(&held));
        sync.on_failure(0, 0);
        assert!(sync.due(ME, 3, MAX_PAUSE_MS).unwrap().ends_with(&not));
    }

    #[test]
    fn a_restart_survives_the_pause_and_accepts_no_older_revision() {
        let mut sync = StoreSync::new(Some(&state(7)));
        sync.restart();
        sync.on_failure(0, 0);
        let start = format!("/sync/v1/keys?epoch={EPOCH}&cursor=0&revision=7&{REPORTER}");
        assert_eq!(sync.due(ME, 3, MAX_PAUSE_MS), Some(start));
        // The first update is of a newer revision: the others must be too.
        sync.on_applied(&snapshot(9, 0, 100));
        let next = format!("/sync/v1/keys?epoch={EPOCH}&cursor=100&revision=9&{REPORTER}");
        assert_eq!(sync.due(ME, 3, 0), Some(next));
        // Unless the database has gone back, which the control plane finds out before it answers.
        sync.on_applied(&snapshot(6, 100, 200));
        let next = format!("/sync/v1/keys?epoch={EPOCH}&cursor=200&revision=7&{REPORTER}");
        assert_eq!(sync.due(ME, 3, 0), Some(next));
    }

    #[test]
    fn a_clock_that_steps_back_ends_a_pause() {
        let mut sync = StoreSync::new(None);
        sync.on_failure(10_000_000, 0);
        assert!(sync.due(ME, 3, 1_000).is_some());
    }
}
