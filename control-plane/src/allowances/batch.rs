//! Answers calls in one transaction, in their order.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use contract::id::ReporterId;
use limits::ledger::{Holder, Pool};
use limits::message::{Answer, Ask, Call, Grant};
use limits::pool::PoolId;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::callers::{Caller, Standing, note};
use super::rows::{Changes, Locked, read, take_recalls, write};
use super::terms;
use crate::change::transact;

/// A call under a sync key.
#[derive(Clone, Debug)]
pub(super) struct KeyedCall {
    pub(super) call: Call,
    pub(super) sync_key: Uuid,
}

/// The answer to each call; `None` if its Envoy belongs to another sync key.
pub(super) async fn answer(pool: &PgPool, calls: &[KeyedCall]) -> Result<Vec<Option<Answer>>, sqlx::Error> {
    transact(pool, async |connection| answer_in(connection, calls).await).await
}

async fn answer_in(connection: &mut PgConnection, calls: &[KeyedCall]) -> Result<Vec<Option<Answer>>, sqlx::Error> {
    let standing = note(connection, &callers(calls)).await?;
    let admitted = |keyed: &KeyedCall| standing.admits(keyed.call.reporter.into(), keyed.sync_key);
    let asks = calls.iter().filter(|keyed| admitted(keyed)).flat_map(|keyed| &keyed.call.asks);
    let asked: BTreeSet<PoolId> = asks.map(|ask| ask.pool).collect();
    let allowed = if asked.is_empty() { BTreeMap::new() } else { terms::read(connection, &asked).await? };
    let mut locked = if allowed.is_empty() {
        Locked { pools: BTreeMap::new(), now_ns: 0 }
    } else {
        read(connection, &allowed).await?
    };
    let before = locked.pools.clone();
    let mut answers: Vec<Option<Answer>> =
        calls.iter().map(|keyed| admitted(keyed).then(|| answer_call(&keyed.call, &mut locked, &standing))).collect();
    let changes = changes(calls, &before, &locked.pools);
    let reporters: BTreeSet<Uuid> =
        calls.iter().filter(|keyed| admitted(keyed)).map(|keyed| keyed.call.reporter.into()).collect();
    let recalls_some = |holder: &Holder| holder.is_recalled && reporters.contains(&holder.reporter.into());
    let has_recalls = standing.has_recalls || locked.pools.values().flat_map(|pool| &pool.holders).any(recalls_some);
    write(connection, &changes).await?;
    if has_recalls {
        let reporters: Vec<Uuid> = reporters.into_iter().collect();
        give_recalls(calls, &mut answers, take_recalls(connection, &reporters).await?);
    }
    Ok(answers)
}

/// The Envoys that call, each once.
fn callers(calls: &[KeyedCall]) -> BTreeMap<Uuid, Caller> {
    let mut callers = BTreeMap::new();
    for KeyedCall { call, sync_key } in calls {
        let first = Caller { sync_key: *sync_key, is_last: false };
        let caller: &mut Caller = callers.entry(call.reporter.into()).or_insert(first);
        caller.is_last |= call.is_last && caller.sync_key == *sync_key;
    }
    callers
}

fn answer_call(call: &Call, locked: &mut Locked, standing: &Standing) -> Answer {
    let reporter: Uuid = call.reporter.into();
    let company = standing.company(reporter);
    let now_ns = locked.now_ns;
    let grants = call.asks.iter().map(|ask| match locked.pools.get_mut(&ask.pool) {
        Some(pool) => pool.answer(call.reporter, ask, company, now_ns),
        None => unlimited(ask),
    });
    Answer { live: standing.live, alone_ms: standing.alone_ms(reporter), grants: grants.collect(), recalls: Vec::new() }
}

/// The answer if the limit, the quota or the user no longer exists: all that was asked for. The Envoy learns of the change
/// soon.
const fn unlimited(ask: &Ask) -> Grant {
    let used = ask.spent.saturating_add(ask.returned);
    let granted = if ask.granted > used { ask.granted } else { used };
    Grant {
        session: ask.session,
        granted: granted.saturating_add(ask.need).saturating_add(ask.want),
        spent: ask.spent,
        held: 0,
        left: u64::MAX / 2,
        others: 0,
        empty_ms: 0,
        known_ms: 0,
        ahead_ns: 0,
        interval_ns: ask.interval_ns,
        users: 1,
    }
}

/// The rows that have changed: rate limits, the allowances of Envoys that asked, and recalls of other Envoys.
fn changes<'a>(calls: &[KeyedCall], before: &BTreeMap<PoolId, Pool>, after: &'a BTreeMap<PoolId, Pool>) -> Changes<'a> {
    let asked: BTreeSet<(PoolId, ReporterId)> =
        calls.iter().flat_map(|keyed| keyed.call.asks.iter().map(|ask| (ask.pool, keyed.call.reporter))).collect();
    let mut changes = Changes::default();
    for (id, pool) in after {
        let old = before.get(id);
        let is_moved = |old: &Pool| (old.arrival_ns, old.interval_ns) != (pool.arrival_ns, pool.interval_ns);
        if old.is_none_or(is_moved) {
            changes.rates.push((*id, pool));
        }
        let known: HashMap<ReporterId, bool> = old
            .map(|old| old.holders.iter().map(|holder| (holder.reporter, holder.is_recalled)).collect())
            .unwrap_or_default();
        for holder in &pool.holders {
            if asked.contains(&(*id, holder.reporter)) {
                changes.askers.push((*id, holder));
            } else if holder.is_recalled && known.get(&holder.reporter) == Some(&false) {
                changes.recalled.push((*id, holder.reporter));
            }
        }
    }
    changes
}

/// Puts recalls into the first answer of each Envoy.
fn give_recalls(calls: &[KeyedCall], answers: &mut [Option<Answer>], mut recalls: BTreeMap<Uuid, Vec<PoolId>>) {
    for (keyed, answer) in calls.iter().zip(answers) {
        if let Some(answer) = answer
            && let Some(pools) = recalls.remove(&keyed.call.reporter.into())
        {
            answer.recalls = pools;
        }
    }
}
