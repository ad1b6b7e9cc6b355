//! Sync of keys to the filters. The [`feed`] brings committed changes into the [`mirror`], and polls get updates of the
//! mirror. Polls also contain the progress of each filter: [`registry`] collects it, [`filters`] stores it.
//!
//! [`Store`] is the handle by which the rest of the control plane uses the mirror.

pub mod feed;
pub mod filters;
pub mod mirror;
pub mod registry;

mod rows;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use contract::codec::DecodeError;
use contract::definition::Definitions;
use contract::hash::KeyHash;
use contract::id::Epoch;
use contract::record::Record;
use tokio::sync::watch;

use self::mirror::{Mirror, UpdateRequest};
use crate::change::FeedWaker;

/// Most cached updates, all of the newest revision. At the bound, the cache is emptied.
const SHARED_UPDATES: usize = 256;

/// Epoch and revision of the mirror; `None` until it is loaded.
pub type Position = Option<(Epoch, u64)>;

/// The mirror and what belongs to it, shared by all tasks.
#[derive(Clone, Debug)]
pub struct Store(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    mirror: RwLock<Option<Mirror>>,
    position: watch::Sender<Position>,
    waker: FeedWaker,
    refreshing: tokio::sync::Mutex<Option<Instant>>,
    seen: Mutex<Option<Instant>>,
    updates: Mutex<Updates>,
}

#[derive(Debug, Default)]
struct Updates {
    at: Position,
    updates: HashMap<WantedKey, Bytes>,
}

/// Changes or a snapshot, and from where on.
type WantedKey = (bool, u64);

impl Store {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            mirror: RwLock::new(None),
            position: watch::Sender::new(None),
            waker: FeedWaker::default(),
            refreshing: tokio::sync::Mutex::new(None),
            seen: Mutex::new(None),
            updates: Mutex::default(),
        }))
    }

    /// The position of the mirror.
    #[must_use]
    pub fn position(&self) -> Position {
        *self.0.position.borrow()
    }

    /// A receiver of new positions. The present one counts as seen.
    #[must_use]
    pub fn positions(&self) -> watch::Receiver<Position> {
        self.0.position.subscribe()
    }

    /// Keys that filters know.
    #[must_use]
    pub fn keys(&self) -> u64 {
        self.read(|mirror| mirror.map_or(0, Mirror::keys))
    }

    /// How long ago the mirror was last compared with the database; `None` if it never was.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.map(|at| at.elapsed())
    }

    /// What records refer to by number.
    #[must_use]
    pub fn definitions(&self) -> Arc<Definitions> {
        self.read(|mirror| mirror.map(Mirror::definitions)).unwrap_or_default()
    }

    /// Wakes the feed.
    #[must_use]
    pub fn waker(&self) -> &FeedWaker {
        &self.0.waker
    }

    /// Waits until no other task refreshes the mirror. The lock guards the start of the last successful refresh.
    pub async fn refreshing(&self) -> tokio::sync::MutexGuard<'_, Option<Instant>> {
        self.0.refreshing.lock().await
    }

    /// Records that the mirror has the state of the database.
    pub fn seen(&self) {
        *self.0.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Changes the mirror and wakes waiting polls.
    pub fn update(&self, change: impl FnOnce(&mut Option<Mirror>)) {
        let position = {
            let mut mirror = self.0.mirror.write().unwrap_or_else(PoisonError::into_inner);
            change(&mut mirror);
            mirror.as_ref().map(|mirror| (mirror.epoch(), mirror.revision()))
        };
        self.seen();
        self.0.position.send_replace(position);
    }

    /// What the mirror knows of a key.
    #[must_use]
    pub fn find(&self, hash: &KeyHash) -> Option<Record> {
        self.read(|mirror| Record::from_bytes(mirror?.find(hash)?).ok())
    }

    /// Whether the mirror has all changes after a revision of an epoch; `None` if nothing is loaded.
    #[must_use]
    pub fn follows(&self, epoch: Epoch, revision: u64) -> Option<bool> {
        self.read(|mirror| mirror.map(|mirror| mirror.epoch() == epoch && mirror.reaches_back_to(revision)))
    }

    /// An update, encoded once for all readers that want the same at the same revision; `None` if nothing is loaded.
    ///
    /// # Errors
    /// None in practice: see [`contract::codec::encode`].
    pub fn write_update(&self, wanted: UpdateRequest) -> Option<Result<Bytes, DecodeError>> {
        let key = match wanted {
            UpdateRequest::Snapshot(from) => (false, u64::from(from)),
            UpdateRequest::Changes(after) => (true, after),
        };
        self.read(|mirror| {
            let mirror = mirror?;
            let at = Some((mirror.epoch(), mirror.revision()));
            if let Some(update) = self.updates_at(at).updates.get(&key) {
                return Some(Ok(update.clone()));
            }
            let update = mirror.write_update(wanted);
            if let Ok(update) = &update {
                let mut shared = self.updates_at(at);
                if shared.updates.len() >= SHARED_UPDATES {
                    shared.updates.clear();
                }
                shared.updates.insert(key, update.clone());
            }
            Some(update)
        })
    }

    fn updates_at(&self, at: Position) -> MutexGuard<'_, Updates> {
        let mut shared = self.0.updates.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.at != at {
            *shared = Updates { at, updates: HashMap::new() };
        }
        shared
    }

    fn read<T>(&self, look: impl FnOnce(Option<&Mirror>) -> T) -> T {
        look(self.0.mirror.read().unwrap_or_else(PoisonError::into_inner).as_ref())
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}
