//! Effect of restoring an older copy of the database on the expected state of keys.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::{Known, Oracle, Standing};
use crate::verdict::Restored;

/// State of the keys at some time.
#[derive(Clone, Debug)]
pub struct Snapshot {
    secrets: Vec<(Standing, Option<SystemTime>)>,
    top_ups: usize,
}

impl Oracle {
    pub fn snapshot(&self) -> Snapshot {
        let known = self.known();
        let secrets = known.secrets.iter().map(|secret| (secret.standing, secret.ends_at)).collect();
        Snapshot { secrets, top_ups: known.credits.top_ups() }
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
        let Known { secrets, forgotten, credits, steady, .. } = &mut *known;
        credits.go_back(to.top_ups);
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
