//! The final comparison of counts: what the database counted must equal what the clients saw,
//! within the stated losses.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use portcullis_harness::wait::eventually_within;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::driver::Book;
use crate::oracle::Oracle;
use crate::stack::TortureStack;
use crate::verdict::{Restored, Tally, Verdict};

const REST: Duration = Duration::from_secs(120);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allowed and other requests, by key.
    pub keys: BTreeMap<String, (u64, u64)>,
    /// Requests without a known key.
    pub keyless: u64,
}

/// Counts of the database and of the clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Decided requests as the clients saw, without those of keys that the database lost.
    pub decided: u64,
    /// Requests that may have been decided.
    pub doubtful: u64,
    pub counted: u64,
    /// Keys whose count was compared.
    pub keys: u64,
    /// Top-ups that the API confirmed.
    pub top_ups: u64,
    /// Usage lines in logs of Envoys.
    pub log_lines: u64,
}

pub async fn usage(connection: &mut PgConnection) -> Result<Usage> {
    let keys = "select key_id::text, (coalesce(sum(requests) filter (where outcome = 0), 0))::bigint,
        (coalesce(sum(requests) filter (where outcome <> 0), 0))::bigint from usage_hourly group by key_id";
    let rows: Vec<(String, i64, i64)> = sqlx::query_as(AssertSqlSafe(keys)).fetch_all(&mut *connection).await?;
    let keyless = "select coalesce(sum(requests), 0)::bigint from usage_keyless_hourly";
    let keyless: i64 = sqlx::query_scalar(AssertSqlSafe(keyless)).fetch_one(&mut *connection).await?;
    let keys = rows.into_iter().map(|(key, allowed, other)| (key, (allowed.cast_unsigned(), other.cast_unsigned())));
    Ok(Usage { keys: keys.collect(), keyless: keyless.cast_unsigned() })
}

impl Usage {
    pub fn requests(&self) -> u64 {
        self.keys.values().map(|(allowed, other)| allowed + other).sum::<u64>() + self.keyless
    }

    /// The counts that are lost if this replaces a later state.
    pub fn lost_of(&self, later: &Self) -> Restored {
        let lost = |key: &String, (allowed, other): &(u64, u64)| {
            let kept = self.keys.get(key).copied().unwrap_or_default();
            (key.clone(), (allowed.saturating_sub(kept.0), other.saturating_sub(kept.1)))
        };
        Restored {
            keys: later.keys.iter().map(|(key, counts)| lost(key, counts)).collect(),
            keyless: later.keyless.saturating_sub(self.keyless),
        }
    }

    /// Differences from the counts of the clients, by key and for requests without a known key.
    fn misfits(&self, verdict: &Verdict) -> Vec<String> {
        let others = verdict.other_losses();
        let mut misfits = Vec::new();
        for (key, tally) in &verdict.tallies {
            let (allowed, _) = self.keys.get(key).copied().unwrap_or_default();
            let (lost, _) = verdict.restored.keys.get(key).copied().unwrap_or_default();
            if allowed > tally.admitted + tally.doubtful {
                misfits.push(format!("key {key}: {allowed} requests counted, {tally:?} seen: counted twice"));
            }
            if allowed + lost + others < tally.admitted {
                let may = format!("{lost} may be lost with databases, {others} otherwise");
                misfits.push(format!("key {key}: {allowed} requests counted, {tally:?} seen, {may}"));
            }
        }
        let (keyless, lost) = (&verdict.keyless, verdict.restored.keyless);
        // A request without a response may have been decided as one without a known key.
        let doubtful = keyless.doubtful + verdict.tallies.values().map(|tally| tally.doubtful).sum::<u64>();
        if self.keyless > keyless.refused + doubtful {
            misfits.push(format!("{} requests counted without a key, {keyless:?} seen: counted twice", self.keyless));
        }
        if self.keyless + lost + others < keyless.refused {
            let may = format!("{lost} may be lost with databases, {others} otherwise");
            misfits.push(format!("{} requests counted without a key, {keyless:?} seen, {may}", self.keyless));
        }
        misfits
    }
}

/// Waits until every Envoy has reported all usage.
pub async fn come_to_rest(stack: &TortureStack) -> Result<()> {
    for envoy in 0..stack.envoys.len() {
        let mut quiet = 0;
        eventually_within(&format!("Envoy {envoy} to have reported all usage"), REST, async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let pending = stack.stat(envoy, "usage.pending_requests").await?;
            quiet = if pending == 0 { quiet + 1 } else { 0 };
            // Counts take less time from a worker to the outbox.
            (quiet > 10).then_some(())
        })
        .await?;
    }
    Ok(())
}

/// Imports the usage lines that Envoys logged when they ended. Twice, since the second import must change nothing. Returns
/// the number of lines.
pub fn import_last_words(stack: &TortureStack) -> Result<u64> {
    let control_plane = stack.control_planes.first();
    let mut lines = 0;
    for envoy in &stack.envoys {
        let words = envoy.log().lines_with("portcullis-usage ");
        lines += words.len() as u64;
        for _ in 0..2 {
            control_plane.map(|control_plane| control_plane.import_usage(&words.join("\n"))).transpose()?;
        }
    }
    Ok(lines)
}

/// Compares the counts. The oracle receives the differences.
pub async fn compare(stack: &TortureStack, oracle: &Oracle, book: &Book, log_lines: u64) -> Result<Counted> {
    let mut connection = stack.database.connect().await?;
    let counted = usage(&mut connection).await?;
    let verdict = oracle.verdict();
    let lost: u64 = verdict.losses.values().sum();
    let seen = |of: &dyn Fn(&Tally) -> u64| verdict.tallies.values().map(of).sum::<u64>() + of(&verdict.keyless);
    let sums = Counted {
        decided: seen(&|tally| tally.admitted + tally.refused),
        doubtful: seen(&|tally| tally.doubtful),
        counted: counted.requests(),
        keys: verdict.tallies.len() as u64,
        top_ups: book.top_ups.len() as u64,
        log_lines,
    };
    counted.misfits(&verdict).iter().for_each(|misfit| oracle.broken(misfit));
    if sums.counted > sums.decided + sums.doubtful {
        oracle.broken(&format!("{} requests counted, {} seen: counted twice", sums.counted, sums.decided));
    }
    if sums.counted + lost < sums.decided {
        oracle.broken(&format!("{} requests counted, {} seen, {lost} may be lost", sums.counted, sums.decided));
    }
    ledger(&mut connection, oracle, book).await?;
    Ok(sums)
}

/// Checks that each balance is the sum of its ledger, that used credits equal counted costs, and that each confirmed top-up
/// is booked once.
async fn ledger(connection: &mut PgConnection, oracle: &Oracle, book: &Book) -> Result<()> {
    let wrong = "select u.email || ': balance ' || u.balance || ', ledger ' || coalesce(sum(l.amount), 0)
        from user_preferences u left join ledger l on l.owner_id = u.id
        group by u.id having u.balance <> coalesce(sum(l.amount), 0)";
    let wrong: Vec<String> = sqlx::query_scalar(AssertSqlSafe(wrong)).fetch_all(&mut *connection).await?;
    let used = "select coalesce((select -sum(amount) from ledger where kind = 'usage'), 0)::bigint,
        coalesce((select sum(cost) from usage_hourly), 0)::bigint";
    let (used, cost): (i64, i64) = sqlx::query_as(AssertSqlSafe(used)).fetch_one(&mut *connection).await?;
    let booked = "select note, count(*) from ledger where kind = 'top_up' group by note";
    let booked: BTreeMap<String, i64> =
        sqlx::query_as(AssertSqlSafe(booked)).fetch_all(&mut *connection).await?.into_iter().collect();
    for wrong in wrong {
        oracle.broken(&format!("the ledger does not add up: {wrong}"));
    }
    if used != cost {
        oracle.broken(&format!("{used} credits were booked as used, {cost} were counted"));
    }
    for note in &book.top_ups {
        let times = booked.get(note).copied().unwrap_or_default();
        if times != 1 {
            oracle.broken(&format!("the top-up {note} was confirmed and is booked {times} times"));
        }
    }
    // The first one is from before the load.
    ensure!(book.top_ups.len() > 1, "no top-up was confirmed under load");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(keys: &[(&str, u64)], keyless: u64) -> Usage {
        Usage { keys: keys.iter().map(|(key, allowed)| ((*key).to_owned(), (*allowed, 0))).collect(), keyless }
    }

    /// The clients saw 100 requests of each key and 50 without a key. A database was restored, and 5 other requests may be lost.
    fn verdict(restored: Restored) -> Verdict {
        let seen = Tally { admitted: 100, ..Tally::default() };
        let losses = [(Restored::WHY.to_owned(), restored.all()), ("otherwise".to_owned(), 5)];
        Verdict {
            tallies: [("a".to_owned(), seen), ("b".to_owned(), seen)].into(),
            keyless: Tally { refused: 50, doubtful: 0, admitted: 0 },
            losses: losses.into(),
            restored,
            ..Verdict::default()
        }
    }

    #[test]
    fn what_a_restore_loses_is_known_of_each_key_and_excuses_no_other() {
        let lost = usage(&[("a", 10)], 3).lost_of(&usage(&[("a", 70), ("new", 7)], 13));
        assert_eq!((lost.keys["a"], lost.keys["new"], lost.keyless, lost.all()), ((60, 0), (7, 0), 10, 77));
        let misfits = |a, b, keyless| usage(&[("a", a), ("b", b)], keyless).misfits(&verdict(lost.clone())).len();
        assert_eq!(misfits(100, 100, 50), 0);
        assert_eq!(misfits(35, 95, 35), 0);
        assert_eq!(misfits(34, 100, 50), 1);
        assert_eq!(misfits(100, 94, 50), 1);
        assert_eq!(misfits(100, 100, 34), 1);
    }

    #[test]
    fn nothing_may_be_counted_twice() {
        let misfits = |a, keyless| usage(&[("a", a), ("b", 100)], keyless).misfits(&verdict(Restored::default())).len();
        assert_eq!((misfits(100, 50), misfits(101, 50), misfits(100, 51)), (0, 1, 1));
    }
}
