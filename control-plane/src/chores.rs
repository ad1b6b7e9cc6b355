//! Work on quotas, credits and leases that no request asks for: books refills, opens keys whose quota is filled anew,
//! forgets what Envoys held that are long gone, keeps the ledger short, and PostgreSQL's plans up to date. Any number of
//! replicas may do it at once.

use std::time::Duration;

use sqlx::PgPool;
use tokio::time::{Interval, MissedTickBehavior};
use tracing::{info, warn};

use crate::sync::{Store, filters};
use crate::usage::lease;
use crate::{credits, quota, statistics};

/// Does it until the future is dropped.
pub async fn run(pool: PgPool, store: Store, ledger_detail_days: i32) {
    // Not before the schema is there.
    if store.positions().wait_for(Option::is_some).await.is_err() {
        return;
    }
    let (mut second, mut seconds, mut minute, mut hour) = (every(1), every(5), every(60), every(3_600));
    loop {
        tokio::select! {
            _ = second.tick() => {
                let refilled = credits::refill::refill(&pool).await;
                let opened = quota::reopen(&pool).await;
                if matches!(refilled, Ok(1..)) || matches!(opened, Ok(1..)) {
                    store.nudge();
                }
                told("credits could not be refilled", refilled);
                told("quotas could not be opened", opened);
            }
            _ = seconds.tick() => {
                told("tables could not be analyzed", statistics::renew(&pool).await);
            }
            _ = minute.tick() => {
                told("leases could not be tidied", lease::tidy(&pool).await);
                told("Envoys that are gone could not be forgotten", filters::trim(&pool).await);
            }
            _ = hour.tick() => loop {
                match credits::rollup::roll_up(&pool, ledger_detail_days).await {
                    Ok(0) => break,
                    Ok(rows) => info!(rows, "usage of a day became one row of the ledger for each owner"),
                    Err(error) => {
                        warn!(%error, "the ledger could not be rolled up; the next hour will do");
                        break;
                    }
                }
            },
        }
    }
}

fn every(seconds: u64) -> Interval {
    let mut interval = tokio::time::interval(Duration::from_secs(seconds));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// What does not succeed now is tried again with the next tick.
fn told<T>(what: &str, result: Result<T, sqlx::Error>) {
    if let Err(error) = result {
        warn!(%error, "{what}");
    }
}
