//! Continuous checks: the store version of each Envoy and the revision of the database never go
//! back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::oracle::Oracle;
use crate::stack::TortureStack;

const PAUSE: Duration = Duration::from_millis(200);

/// Faults in progress that explain a step back.
#[derive(Debug)]
pub struct Doing {
    /// Increased whenever an Envoy is stopped: its next process starts with an empty store.
    pub envoys: Vec<AtomicU64>,
    /// Increased before the database is restored, and again once every Envoy has the new epoch.
    pub epochs: AtomicU64,
    /// Whether a control plane is paused.
    pub standing_still: AtomicBool,
}

impl Doing {
    pub fn nothing(envoys: usize) -> Arc<Self> {
        let envoys = (0..envoys).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { envoys, epochs: AtomicU64::new(0), standing_still: AtomicBool::new(false) })
    }

    fn life(&self, envoy: usize) -> (u64, u64) {
        let of_envoy = self.envoys.get(envoy).map_or(0, |life| life.load(Ordering::SeqCst));
        (of_envoy, self.epochs.load(Ordering::SeqCst))
    }

    /// Whether the database is being restored.
    pub(crate) fn between_epochs(&self) -> bool {
        self.epochs.load(Ordering::SeqCst) % 2 == 1
    }
}

#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Watch {
    pub fn start(stack: &Arc<TortureStack>, oracle: &Arc<Oracle>, doing: &Arc<Doing>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        tasks.spawn(database(Arc::clone(stack), Arc::clone(oracle), Arc::clone(&stop)));
        for envoy in 0..stack.envoys.len() {
            let (stack, oracle, doing) = (Arc::clone(stack), Arc::clone(oracle), Arc::clone(doing));
            tasks.spawn(one_envoy(envoy, stack, oracle, doing, Arc::clone(&stop)));
        }
        Self { stop, tasks }
    }

    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.tasks.join_all().await;
    }
}

/// The version of an Envoy's store never goes back within an epoch.
async fn one_envoy(
    envoy: usize,
    stack: Arc<TortureStack>,
    oracle: Arc<Oracle>,
    doing: Arc<Doing>,
    stop: Arc<AtomicBool>,
) {
    let (mut newest, mut compared) = ((doing.life(envoy), 0), 0_u64);
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(PAUSE).await;
        let life = doing.life(envoy);
        let Some(revision) = stack.stat(envoy, "store.revision").await else { continue };
        // A fault during the request makes the response meaningless.
        if doing.life(envoy) != life || doing.between_epochs() {
            continue;
        }
        if newest.0 == life {
            compared += 1;
            if revision < newest.1 {
                oracle
                    .broken(&format!("the store of Envoy {envoy} went back from revision {} to {revision}", newest.1));
            }
        }
        newest = (life, revision);
    }
    if compared == 0 {
        oracle.broken(&format!("no two versions of the store of Envoy {envoy} were compared"));
    }
}

/// The revision of the database never goes back within an epoch.
async fn database(stack: Arc<TortureStack>, oracle: Arc<Oracle>, stop: Arc<AtomicBool>) {
    let mut newest: Option<(String, i64)> = None;
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(PAUSE).await;
        let asked = stack.database.text("select epoch::text || ' ' || revision from store_state");
        let Ok(Ok(state)) = tokio::time::timeout(Duration::from_secs(1), asked).await else { continue };
        let Some((epoch, revision)) = state.split_once(' ') else { continue };
        let revision: i64 = revision.parse().unwrap_or_default();
        let went_back = newest.as_ref().is_some_and(|(known, at)| known == epoch && revision < *at);
        if went_back && keeps_epoch(&stack, epoch, &stop).await {
            oracle.broken(&format!("the database went back to revision {revision} and kept its epoch"));
        }
        newest = Some((epoch.to_owned(), revision));
    }
}

/// Whether a restored database has its old epoch for longer than control planes need to change it. While its row is locked,
/// they cannot.
async fn keeps_epoch(stack: &TortureStack, epoch: &str, stop: &AtomicBool) -> bool {
    let mut since = Instant::now();
    while !stop.load(Ordering::Relaxed) && since.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(PAUSE).await;
        let asked = stack.database.text("select epoch::text from store_state for key share nowait");
        match tokio::time::timeout(Duration::from_secs(1), asked).await {
            Ok(Ok(now)) if now != epoch => return false,
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => since = Instant::now(),
        }
    }
    !stop.load(Ordering::Relaxed)
}
