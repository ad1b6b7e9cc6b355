//! Keys that lines of usage in Envoys' logs are signed with ([`contract::usage_log`]), one for each secret of a sync key.
//!
//! A filter signs under a key that it derives from its sync key. The control plane sees that key in each call of the filter
//! and stores what is derived from it, so that a line can be verified after its Envoy has ended, after its sync key was
//! rotated, and without the sync key. Filters get no derived keys, so one sync key signs for no other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use contract::key::check;
use contract::usage_log::{LogKey, SignedReports};
use sqlx::PgPool;
use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;

/// How long a stored key is not stored again. After a restore of the database it may be missing.
const STORED: Duration = Duration::from_secs(3_600);

/// Stores the keys of the filters that call. Holds an entry for each secret with the scope `sync` that was used.
#[derive(Clone, Debug)]
pub(super) struct LogKeys {
    pool: PgPool,
    stored: Arc<Mutex<HashMap<(Uuid, u32), Instant>>>,
}

impl LogKeys {
    pub(super) fn new(pool: PgPool) -> Self {
        Self { pool, stored: Arc::default() }
    }

    /// Derives and stores the key of a filter that was admitted with this sync key. Returns at once: a filter is answered
    /// while the database is away, and the next call tries again.
    pub(super) fn learn(&self, key_id: Uuid, generation: u32, sync_key: &[u8]) {
        let secret = (key_id, generation);
        let now = Instant::now();
        if !self.is_due(secret, now) {
            return;
        }
        // An imported key may be weak. What is derived from it would allow guesses that the pepper prevents.
        if !str::from_utf8(sync_key).is_ok_and(|text| check(text).is_ok()) {
            return;
        }
        let (keys, log_key) = (self.clone(), LogKey::derive(sync_key));
        tokio::spawn(async move {
            if let Err(error) = keys.store(secret, &log_key).await {
                warn!(%error, %key_id, "the key of usage lines in logs could not be stored; the next call tries again");
                keys.stored.lock().unwrap_or_else(PoisonError::into_inner).remove(&secret);
            }
        });
    }

    /// Whether the key of a secret has to be stored, which counts as done then.
    fn is_due(&self, secret: (Uuid, u32), now: Instant) -> bool {
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        let due = stored.get(&secret).is_none_or(|before| now - *before >= STORED);
        if due {
            stored.insert(secret, now);
        }
        due
    }

    async fn store(&self, (key_id, generation): (Uuid, u32), log_key: &LogKey) -> Result<(), sqlx::Error> {
        sqlx::query!(
            "insert into usage_log_keys (key_id, generation, log_key) values ($1, $2, $3) on conflict do nothing",
            key_id,
            generation.cast_signed(),
            &log_key.as_bytes()[..]
        )
        .execute(&self.pool)
        .await
        .map(|_| ())
    }
}

/// All keys that lines may be signed with.
#[derive(Debug)]
pub(super) struct Verifier(Vec<Signer>);

/// A secret of a sync key.
#[derive(Debug)]
struct Signer {
    key_id: Uuid,
    revoked: bool,
    log_key: LogKey,
}

impl Verifier {
    pub(super) async fn load(pool: &PgPool) -> Result<Self, sqlx::Error> {
        let rows = sqlx::query!(
            r#"select l.key_id, l.log_key, k.revoked_at is not null as "revoked!"
            from usage_log_keys l join api_keys k on k.id = l.key_id"#
        )
        .fetch_all(pool)
        .await?;
        let signers = rows.into_iter().filter_map(|row| {
            let log_key = LogKey::from_bytes(row.log_key.try_into().ok()?);
            Some(Signer { key_id: row.key_id, revoked: row.revoked, log_key })
        });
        Ok(Self(signers.collect()))
    }

    /// The sync key that signed a line.
    ///
    /// # Errors
    /// Why there is none that counts.
    pub(super) fn signer(&self, signed: &SignedReports) -> Result<Uuid, String> {
        let signer = self.0.iter().find(|signer| signer.log_key.has_signed(signed));
        let signer = signer.ok_or(
            "the signature is of no sync key that this control plane made and a filter has used: \
             somebody else wrote the line, or it was changed",
        )?;
        if signer.revoked {
            return Err(format!("the sync key {} that signed the line is revoked", signer.key_id));
        }
        Ok(signer.key_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_is_stored_again_each_hour_though_its_filter_calls_more_often() {
        let keys = LogKeys::new(PgPool::connect_lazy("postgres://127.0.0.1/none").unwrap());
        let secret = (Uuid::nil(), 1);
        let start = Instant::now();
        let due: Vec<u64> =
            (0..=7_300).step_by(25).filter(|s| keys.is_due(secret, start + Duration::from_secs(*s))).collect();
        assert_eq!(due, [0, 3_600, 7_200]);
        assert!(keys.is_due((Uuid::nil(), 2), start));
    }
}
