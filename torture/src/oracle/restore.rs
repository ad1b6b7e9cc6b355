//! Effect of restoring an older copy of the database on the expected state of keys.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::{Known, Oracle, Standing};
use crate::envoy_model::Span;
use crate::verdict::Restored;

/// How long usage takes to be reported, without a disruption.
const REPORTED: Duration = Duration::from_secs(2);

/// State of the keys at some time.
#[derive(Clone, Debug)]
pub struct Snapshot {
    secrets: Vec<(Standing, Option<SystemTime>)>,
    /// Before the copy was made.
    time: Instant,
}

impl Oracle {
    pub fn snapshot(&self) -> Snapshot {
        let known = self.known();
        let secrets = known.secrets.iter().map(|secret| (secret.standing, secret.ends_at)).collect();
        Snapshot { secrets, time: Instant::now() }
    }

    /// The database is being restored: the state of every key is unknown, except of the steady ones, which are in both.
    pub fn doubt_all(&self) {
        let mut known = self.known();
        let steady = known.steady;
        for secret in known.secrets.iter_mut().skip(steady) {
            secret.standing = Standing::Doubtful;
            secret.version += 1;
        }
    }

    /// Restores the state of the keys. Later keys no longer exist, and the steady ones are unchanged.
    pub fn go_back(&self, to: &Snapshot) {
        let mut known = self.known();
        let Known { secrets, forgotten, pools, models, steady, .. } = &mut *known;
        pools.iter_mut().for_each(|pool| pool.go_back(to.time));
        for model in models.iter_mut() {
            let from = model.unreported_since(to.time, REPORTED);
            model.uncounted.push(Span { from, to: Instant::now() });
        }
        let kept: HashSet<Arc<str>> =
            secrets.iter().take(to.secrets.len()).map(|secret| Arc::clone(&secret.key)).collect();
        for (number, secret) in secrets.iter_mut().enumerate().skip(*steady) {
            let (standing, ends_at) = to.secrets.get(number).copied().unwrap_or((Standing::Dead, secret.ends_at));
            (secret.standing, secret.ends_at) = (standing, ends_at);
            secret.since = Instant::now();
            secret.version += 1;
            if !kept.contains(&secret.key) {
                forgotten.insert(Arc::clone(&secret.key));
            }
        }
    }

    /// Excuses the counts that only the replaced database had.
    pub fn restored(&self, lost: &Restored) {
        self.known().found.restored.add(lost);
        self.may_lose(Restored::WHY, lost.all());
    }
}
