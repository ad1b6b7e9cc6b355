//! Background jobs. Every replica runs all of them; a job that must not run twice at a time takes a lock, see
//! [`crate::job_lock`], or skips locked rows.

pub mod statistics;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use crate::api::idempotency;
use crate::api::rate_limit::CallerRateLimiter;
use crate::config::Serve;
use crate::credits::{refill, rollup};
use crate::keys::{purge, unknown};
use crate::metering::events;
use crate::metering::retention::{self, Retention};
use crate::sync::{Store, filters};
use crate::{allowances, audit, quota};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);

/// What jobs work with.
#[derive(Clone, Debug)]
pub struct Context {
    pool: PgPool,
    rate_limiter: Arc<CallerRateLimiter>,
    usage_event_interval: Duration,
    revoked_days: i32,
    ended_key_days: Option<i32>,
    audit_days: Option<i32>,
    ledger_detail_days: i32,
    retention: Retention,
}

/// A job: its name in the log, its interval, and its function, which returns the number of changed rows.
pub struct Job {
    name: &'static str,
    interval: Duration,
    run: Box<dyn Fn(Context) -> BoxFuture<'static, Changed> + Send + Sync>,
    /// Whether filters see what it changes.
    wakes_feed: bool,
    /// Whether a run is one batch of several, the last of which changes nothing.
    is_batched: bool,
}

impl Job {
    fn new<F>(name: &'static str, interval: Duration, run: fn(Context) -> F) -> Self
    where
        F: Future<Output = Changed> + Send + 'static,
    {
        Self {
            name,
            interval,
            run: Box::new(move |context| Box::pin(run(context))),
            wakes_feed: false,
            is_batched: false,
        }
    }

    fn waking_the_feed(self) -> Self {
        Self { wakes_feed: true, ..self }
    }

    fn batched(self) -> Self {
        Self { is_batched: true, ..self }
    }

    async fn run(&self, context: &Context) -> Changed {
        let mut all = 0;
        loop {
            let changed = (self.run)(context.clone()).await?;
            all += changed;
            if changed == 0 || !self.is_batched {
                return Ok(all);
            }
        }
    }
}

/// The table of jobs.
fn all(usage_event_interval: Duration) -> Vec<Job> {
    vec![
        Job::new("refill credits", SECOND, refill_credits).waking_the_feed(),
        Job::new("reset expired quotas", SECOND, |c| async move { quota::reopen(&c.pool).await }).waking_the_feed(),
        Job::new("renew statistics", SECOND * 5, |c| async move { Ok(statistics::renew(&c.pool).await?.into()) }),
        Job::new("export usage events", usage_event_interval, |c| async move { events::export_all(&c.pool).await }),
        Job::new("tidy allowances", MINUTE, |c| async move { allowances::tidy(&c.pool).await }),
        Job::new("trim filters", MINUTE, |c| async move { filters::trim(&c.pool).await }),
        Job::new("forget filters", HOUR, |c| async move { filters::forget(&c.pool).await }),
        Job::new("forget unknown keys", HOUR, |c| async move { unknown::forget_old(&c.pool).await }),
        Job::new("delete idempotent responses", HOUR, |c| async move { idempotency::tidy(&c.pool).await }),
        Job::new("forget ended keys", HOUR, |c| async move { purge::forget_old(&c.pool, c.revoked_days).await })
            .batched(),
        Job::new("delete ended keys", HOUR, delete_ended_keys).batched(),
        Job::new("delete old audit entries", HOUR, delete_old_audit_entries).batched(),
        Job::new("roll up the ledger", HOUR, |c| async move { rollup::roll_up(&c.pool, c.ledger_detail_days).await })
            .batched(),
        Job::new("roll up and forget usage", HOUR, |c| async move { retention::tidy(&c.pool, c.retention).await }),
    ]
}

type Changed = Result<u64, sqlx::Error>;

async fn refill_credits(context: Context) -> Changed {
    Ok(u64::try_from(refill::refill(&context.pool).await?).unwrap_or(u64::MAX))
}

async fn delete_ended_keys(context: Context) -> Changed {
    let Some(days) = context.ended_key_days else { return Ok(0) };
    purge::delete_ended(&context.pool, days).await
}

async fn delete_old_audit_entries(context: Context) -> Changed {
    let Some(days) = context.audit_days else { return Ok(0) };
    audit::delete_old(&context.pool, days).await
}

impl Context {
    pub fn new(settings: &Serve, pool: PgPool, rate_limiter: Arc<CallerRateLimiter>) -> Self {
        Self {
            pool,
            rate_limiter,
            usage_event_interval: settings.usage_event_interval,
            revoked_days: settings.revoked_retention,
            ended_key_days: settings.ended_key_retention.days(),
            audit_days: settings.audit_retention.days(),
            ledger_detail_days: settings.ledger_detail_retention,
            retention: Retention {
                hourly_days: settings.usage_hourly_retention,
                daily_days: settings.usage_daily_retention.days(),
                event_days: settings.usage_event_retention,
            },
        }
    }
}

/// Runs all jobs until the future is dropped, or until one of them panics.
pub async fn run(context: Context, store: Store) {
    let mut running = JoinSet::new();
    // Callers without a key are limited before the database answers, too.
    running.spawn(tidy_rate_limits(Arc::clone(&context.rate_limiter)));
    // Not before the schema is up to date.
    if store.positions().wait_for(Option::is_some).await.is_err() {
        return;
    }
    // At most three jobs use the database at a time, so that requests find connections.
    let (hourly, frequent) = (Arc::new(Semaphore::new(1)), Arc::new(Semaphore::new(2)));
    for job in all(context.usage_event_interval) {
        let turns = if job.interval >= HOUR { &hourly } else { &frequent };
        running.spawn(repeat(job, context.clone(), store.clone(), Arc::clone(turns)));
    }
    if let Some(Err(panic)) = running.join_next().await
        && let Ok(panic) = panic.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}

async fn tidy_rate_limits(rate_limiter: Arc<CallerRateLimiter>) {
    let mut ticks = tokio::time::interval(MINUTE);
    loop {
        ticks.tick().await;
        rate_limiter.tidy();
    }
}

async fn repeat(job: Job, context: Context, store: Store, turns: Arc<Semaphore>) {
    let mut ticks = tokio::time::interval(job.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // The semaphore is never closed.
        let _turn = turns.acquire().await;
        match job.run(&context).await {
            Ok(0) => {}
            Ok(changed) => {
                if job.wakes_feed {
                    store.waker().wake();
                }
                if job.interval >= HOUR {
                    info!(job = job.name, changed, "a background job changed rows");
                } else {
                    debug!(job = job.name, changed, "a background job changed rows");
                }
            }
            Err(error) => warn!(job = job.name, %error, "a background job failed; it runs again after its interval"),
        }
    }
}
