//! Collects the status of Envoys from polls and reports, and writes it to the table `filters` in batches.
//!
//! The status is kept in memory, so that no poll waits for the database or needs it. The database has the status
//! from all replicas.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use contract::id::{Epoch, ReporterId};
use sqlx::PgPool;
use tokio::sync::{Notify, watch};
use tracing::warn;
use uuid::Uuid;

use super::Position;
use super::filters::{self, KnownEnvoy, SILENT};

/// Most Envoys in memory. Beyond, a new one replaces the one that has been silent for longest, if that is at least [`SILENT`];
/// otherwise the new one is counted in `portcullis_filter_calls_rejected_total` and not shown.
const REPORTERS: usize = 10_000;

/// Shortest interval between searches for silent Envoys of a sync key that has too many.
const SWEEP: Duration = Duration::from_secs(1);

/// Shortest interval between writes.
const WRITE: Duration = Duration::from_millis(250);

/// How often the live Envoys of all replicas are counted.
const COUNT: Duration = Duration::from_secs(3);

/// Pause after a fault, before the database is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Most revisions whose arrival time is kept.
const ARRIVALS: usize = 10_000;

/// What an Envoy reports with a poll.
#[derive(Clone, Debug, Default)]
pub struct PollStatus {
    /// The key of the poll.
    pub sync_key: Uuid,
    /// The address of the Envoy.
    pub address: Option<String>,
    /// Its version of the filter.
    pub version: Option<String>,
    /// Everything up to this revision of this epoch is in its store.
    pub holds: Option<(Epoch, u64)>,
    /// Requests that it counted and has not seen acknowledged.
    pub pending: Option<u64>,
}

/// The result of noting a message of an Envoy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// The Envoy is new to this process.
    Newcomer,
    /// It was known.
    Known,
    /// It is not shown: the Envoy belongs to another sync key, or there are too many Envoys in all.
    Ignored,
    /// Its sync key has as many live Envoys as it may have.
    TooMany,
}

/// The Envoys that call this process. Clones share it.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Most live Envoys of one sync key.
    per_sync_key: u32,
    state: Mutex<State>,
    /// Held during a write: when [`Registry::write`] returns, no earlier status is still being written.
    writing: tokio::sync::Mutex<()>,
    /// There is something to write.
    heard: Notify,
}

#[derive(Debug, Default)]
struct State {
    known: HashMap<ReporterId, KnownEnvoy>,
    /// An Envoy came that was new to this process.
    newcomers: bool,
    /// How many of them came under each sync key.
    of_key: HashMap<Uuid, u32>,
    /// When silent Envoys were last searched for because a sync key had too many.
    swept: Option<Instant>,
    /// The live Envoys of all replicas, when they were last counted, and of each sync key.
    counted: u32,
    counted_of_key: HashMap<Uuid, u32>,
    epoch: Option<Epoch>,
    arrivals: BTreeMap<u64, Instant>,
}

impl State {
    fn forget(&mut self, gone: impl Fn(&KnownEnvoy) -> bool) {
        self.known.retain(|_, known| !gone(known));
        self.of_key.clear();
        for known in self.known.values() {
            *self.of_key.entry(known.sync_key).or_default() += 1;
        }
    }

    /// Whether a sync key may have one more Envoy. Silent ones make room.
    fn has_room(&mut self, sync_key: Uuid, most: u32, now: Instant) -> bool {
        let of = |counts: &HashMap<Uuid, u32>| counts.get(&sync_key).copied().unwrap_or_default();
        if of(&self.of_key) >= most && self.swept.is_none_or(|at| now.saturating_duration_since(at) >= SWEEP) {
            self.swept = Some(now);
            self.forget(|known| !known.unwritten && now.saturating_duration_since(known.seen) >= SILENT);
        }
        of(&self.of_key).max(of(&self.counted_of_key)) < most
    }
}

impl Registry {
    /// An empty registry, with the most live Envoys that a sync key may have.
    #[must_use]
    pub fn bounded(per_sync_key: u32) -> Self {
        Self(Arc::new(Shared {
            per_sync_key,
            state: Mutex::default(),
            writing: tokio::sync::Mutex::default(),
            heard: Notify::default(),
        }))
    }

    /// How many live Envoys a sync key may have.
    #[must_use]
    pub fn per_sync_key(&self) -> u32 {
        self.0.per_sync_key
    }

    /// Records a poll.
    pub fn polled(&self, reporter: ReporterId, heard: PollStatus) -> Registration {
        let now = Instant::now();
        let PollStatus { sync_key, .. } = heard;
        self.note(reporter, sync_key, now, |known| {
            known.sync_key = sync_key;
            known.address = heard.address.or_else(|| known.address.take());
            known.version = heard.version.or_else(|| known.version.take());
            known.pending = heard.pending.or(known.pending);
            if heard.holds.is_some() {
                (known.holds, known.confirmed) = (heard.holds, now);
            }
        })
    }

    /// Records that an Envoy is live: its poll ends now, or it sends a report.
    pub fn held(&self, reporter: ReporterId, sync_key: Uuid) -> Registration {
        self.note(reporter, sync_key, Instant::now(), |_| ())
    }

    /// Records that reports of an Envoy are in the database.
    pub fn reported(&self, reporter: ReporterId, sync_key: Uuid) {
        let now = Instant::now();
        self.note(reporter, sync_key, now, |known| known.reported = Some(now));
    }

    /// For how long this process has had this revision or a later one; `None` if the revision is older than the process or not
    /// there yet.
    #[must_use]
    pub fn since_arrival(&self, epoch: Epoch, revision: u64) -> Option<Duration> {
        let state = self.state();
        let arrived = state.arrivals.range(revision..).next().filter(|_| state.epoch == Some(epoch));
        arrived.map(|(_, at)| at.elapsed())
    }

    /// Writes and counts until the future is dropped. Call [`Registry::write`] once more at the end.
    pub async fn run(self, pool: PgPool, mut positions: watch::Receiver<Position>) {
        // Not before the schema is there.
        if positions.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let arrivals = async {
            loop {
                let position = *positions.borrow_and_update();
                self.arrived(position);
                if positions.changed().await.is_err() {
                    return;
                }
            }
        };
        let writing = async {
            let mut counted: Option<Instant> = None;
            loop {
                let newcomers = std::mem::take(&mut self.state().newcomers);
                let wrote = async {
                    self.write(&pool).await?;
                    if newcomers || counted.is_none_or(|at| at.elapsed() >= COUNT) {
                        self.count(&pool).await?;
                        counted = Some(Instant::now());
                    }
                    Ok::<_, sqlx::Error>(())
                };
                let pause = match wrote.await {
                    Ok(()) => WRITE,
                    Err(error) => {
                        warn!(%error, "could not write the status of filters; trying again");
                        self.state().newcomers |= newcomers;
                        PAUSE
                    }
                };
                // Without the database, count the Envoys of this process.
                let here = self.live();
                let counted = self.state().counted;
                metrics::gauge!("portcullis_filters_live").set(f64::from(counted.max(here)));
                tokio::time::sleep(pause).await;
                tokio::select! {
                    () = self.0.heard.notified() => {}
                    () = tokio::time::sleep(COUNT) => {}
                }
            }
        };
        tokio::join!(arrivals, writing);
    }

    /// Writes what changed since the last write, in one statement. After an error, the next call writes it.
    pub async fn write(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        let _writing = self.0.writing.lock().await;
        let unwritten: Vec<(ReporterId, KnownEnvoy)> = {
            let mut state = self.state();
            // Those that have gone are in the database.
            state.forget(|known| !known.unwritten && known.seen.elapsed() >= SILENT * 10);
            let fresh = state.known.iter_mut().filter(|(_, known)| known.unwritten);
            let taken = fresh.map(|(reporter, known)| {
                known.unwritten = false;
                (*reporter, known.clone())
            });
            taken.collect()
        };
        if unwritten.is_empty() {
            return Ok(());
        }
        let mut restore =
            Restore { registry: self, reporters: unwritten.iter().map(|(reporter, _)| *reporter).collect() };
        filters::write(pool, &unwritten).await?;
        restore.reporters.clear();
        metrics::counter!("portcullis_filter_state_writes_total").increment(1);
        Ok(())
    }

    async fn count(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        let of_key = filters::live(pool).await?;
        let live = of_key.values().fold(0_u32, |sum, live| sum.saturating_add(*live));
        let mut state = self.state();
        (state.counted, state.counted_of_key) = (live, of_key);
        Ok(())
    }

    /// How many live Envoys have spoken to this process.
    #[must_use]
    pub fn live(&self) -> u32 {
        let live = self.state().known.values().filter(|known| known.seen.elapsed() < SILENT).count();
        u32::try_from(live).unwrap_or(u32::MAX)
    }

    fn note(
        &self,
        reporter: ReporterId,
        sync_key: Uuid,
        now: Instant,
        change: impl FnOnce(&mut KnownEnvoy),
    ) -> Registration {
        let mut state = self.state();
        let newcomer = !state.known.contains_key(&reporter);
        if newcomer {
            if !state.has_room(sync_key, self.0.per_sync_key, now) {
                metrics::counter!("portcullis_filter_calls_over_limit_total").increment(1);
                return Registration::TooMany;
            }
            if state.known.len() >= REPORTERS && !make_room(&mut state) {
                metrics::counter!("portcullis_filter_calls_rejected_total").increment(1);
                return Registration::Ignored;
            }
            state.newcomers = true;
            *state.of_key.entry(sync_key).or_default() += 1;
        }
        let known = state.known.entry(reporter).or_insert_with(|| KnownEnvoy {
            sync_key,
            address: None,
            version: None,
            holds: None,
            pending: None,
            confirmed: now,
            seen: now,
            reported: None,
            unwritten: true,
        });
        if known.sync_key != sync_key {
            // A sync key speaks for its own Envoys only.
            metrics::counter!("portcullis_filter_calls_rejected_total").increment(1);
            return Registration::Ignored;
        }
        change(known);
        (known.seen, known.unwritten) = (now, true);
        drop(state);
        self.0.heard.notify_one();
        if newcomer { Registration::Newcomer } else { Registration::Known }
    }

    fn arrived(&self, position: Position) {
        let Some((epoch, revision)) = position else { return };
        let mut state = self.state();
        if state.epoch != Some(epoch) {
            // What was there before this process is of no known age.
            let began = state.epoch.replace(epoch).is_none();
            state.arrivals.clear();
            if began {
                return;
            }
        }
        state.arrivals.entry(revision).or_insert_with(Instant::now);
        while state.arrivals.len() > ARRIVALS {
            state.arrivals.pop_first();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the Envoy that has been silent for longest, if it is not live. Returns whether there was one.
fn make_room(state: &mut State) -> bool {
    let oldest = state.known.iter().min_by_key(|(_, known)| known.seen);
    let gone = oldest.filter(|(_, known)| known.seen.elapsed() >= SILENT).map(|(reporter, _)| *reporter);
    let Some(known) = gone.and_then(|reporter| state.known.remove(&reporter)) else { return false };
    if let Some(count) = state.of_key.get_mut(&known.sync_key) {
        *count = count.saturating_sub(1);
    }
    true
}

/// Marks entries as unwritten again if the write fails or is cancelled.
struct Restore<'a> {
    registry: &'a Registry,
    reporters: Vec<ReporterId>,
}

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        let mut state = self.registry.state();
        for reporter in &self.reporters {
            if let Some(known) = state.known.get_mut(reporter) {
                known.unwritten = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch([7; 16]);

    fn reporter(number: u32) -> ReporterId {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        ReporterId(bytes)
    }

    #[test]
    fn what_an_envoy_holds_is_what_it_said_last_and_silence_takes_nothing_back() {
        let registry = Registry::bounded(u32::MAX);
        registry.polled(reporter(1), PollStatus { holds: Some((EPOCH, 4)), pending: Some(3), ..PollStatus::default() });
        registry.polled(reporter(1), PollStatus::default());
        registry.reported(reporter(1), Uuid::nil());
        let state = registry.state();
        let known = &state.known[&reporter(1)];
        assert_eq!((known.holds, known.pending, known.reported.is_some()), (Some((EPOCH, 4)), Some(3), true));
        assert!(known.confirmed < known.seen);
    }

    #[test]
    fn the_number_of_envoys_in_memory_is_bounded() {
        let registry = Registry::bounded(u32::MAX);
        for number in 0..=u32::try_from(REPORTERS).unwrap() {
            registry.held(reporter(number), Uuid::nil());
        }
        assert_eq!(registry.state().known.len(), REPORTERS);
        let long_ago = Instant::now().checked_sub(SILENT).unwrap();
        registry.state().known.get_mut(&reporter(5)).unwrap().seen = long_ago;
        registry.held(reporter(u32::MAX), Uuid::nil());
        let state = registry.state();
        assert_eq!(state.known.len(), REPORTERS);
        assert!(!state.known.contains_key(&reporter(5)) && state.known.contains_key(&reporter(u32::MAX)));
    }

    #[test]
    fn a_sync_key_has_as_many_envoys_as_it_may_and_silent_ones_make_room() {
        let registry = Registry::bounded(2);
        let (stolen, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let noted = [1, 2, 3, 1].map(|number| registry.held(reporter(number), stolen));
        assert_eq!(noted, [Registration::Newcomer, Registration::Newcomer, Registration::TooMany, Registration::Known]);
        assert_eq!(registry.held(reporter(4), other), Registration::Newcomer);
        // Silent ones are looked for once a second at most, and are in the database first.
        let long_ago = Instant::now().checked_sub(SILENT).unwrap();
        let silence = |number| {
            let mut state = registry.state();
            let known = state.known.get_mut(&reporter(number)).unwrap();
            (known.seen, known.unwritten) = (long_ago, false);
        };
        silence(2);
        registry.state().swept = None;
        assert_eq!(registry.held(reporter(3), stolen), Registration::Newcomer);
        assert_eq!(registry.held(reporter(2), stolen), Registration::TooMany);
        // Those that speak to other replicas count.
        silence(1);
        registry.state().swept = None;
        registry.state().counted_of_key.insert(stolen, 2);
        assert_eq!(registry.held(reporter(2), stolen), Registration::TooMany);
    }

    #[test]
    fn the_age_of_a_revision_is_that_of_the_first_that_has_it() {
        let registry = Registry::bounded(u32::MAX);
        registry.arrived(Some((EPOCH, 10)));
        assert_eq!(registry.since_arrival(EPOCH, 10), None, "it was there before");
        registry.arrived(Some((EPOCH, 12)));
        assert!(registry.since_arrival(EPOCH, 11).is_some() && registry.since_arrival(EPOCH, 12).is_some());
        assert_eq!(registry.since_arrival(EPOCH, 13), None);
        assert_eq!(registry.since_arrival(Epoch([8; 16]), 11), None);
    }
}
