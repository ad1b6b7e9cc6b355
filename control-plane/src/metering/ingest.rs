//! The queue of usage reports and the task that commits them. Reports that arrive while a transaction runs are committed
//! together in the next one: a thousand Envoys cost a few commits a second, and a single Envoy waits for no timer.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::id::ReporterId;
use contract::policy::COST;
use contract::time::S_PER_HOUR;
use contract::usage::{Ack, Count, REPORT_COUNTS, Report};
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;
use uuid::Uuid;

use super::apply::{Applied, Submission, apply};
use super::log_keys::LogKeys;

/// Most submissions in the queue. When it is full, filters keep their counts and retry.
const QUEUE: usize = 1_024;

/// Most submissions in one transaction.
const TOGETHER: usize = 256;

/// Most reports in one submission.
pub(super) const REPORTS: usize = 16;

/// Longest plausible age of counts. Older counts are booked at this age, so that forged reports do not fill the tables with
/// rows of past hours.
const OLDEST_HOURS: u32 = 366 * 24;

/// How far the clock of an Envoy may be ahead before the control plane logs a warning.
const AHEAD: Duration = Duration::from_secs(60);

/// Most plausible requests of one count: a million a second for eleven days.
const REQUESTS: u64 = 1_000_000_000_000;

/// Why reports were not applied.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// They are invalid. A retry does not help.
    #[error("{0}")]
    Senseless(String),
    /// Their reporter belongs to another sync key.
    #[error("the reporter belongs to another sync key")]
    Foreign,
    /// Too many new Envoys reported under the sync key within a day.
    #[error("too many new Envoys under this sync key")]
    TooMany,
    /// The queue is full, or the process shuts down.
    #[error("too many reports wait")]
    Full,
    /// The database failed.
    #[error("the database: {0}")]
    Database(Arc<sqlx::Error>),
}

type Answer = Result<Applied, Arc<sqlx::Error>>;

/// Handle of the queue, cloned into every handler. After the last clone is dropped, the committing task commits what is queued
/// and ends.
#[derive(Clone, Debug)]
pub struct Ingest {
    queue: mpsc::Sender<(Submission, oneshot::Sender<Answer>)>,
    log_keys: LogKeys,
}

impl Ingest {
    /// Starts the committing task, which ends once all clones are dropped and the queue is empty.
    #[must_use]
    pub fn start(pool: PgPool) -> (Self, tokio::task::JoinHandle<()>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self { queue: sender, log_keys: LogKeys::new(pool.clone()) }, tokio::spawn(commit(pool, receiver)))
    }

    /// Remembers the secret of an authenticated sync key, to verify the lines that the filter signs in its log.
    pub fn learn(&self, key_id: Uuid, generation: u32, sync_key: &[u8]) {
        self.log_keys.learn(key_id, generation, sync_key);
    }

    /// Queues the reports of one reporter and waits until they are committed.
    ///
    /// # Errors
    /// [`IngestError`]. The reports are then not in the database, or all are, if the answer to the commit was lost.
    pub async fn submit(&self, mut reports: Vec<Report>, sync_key: Uuid) -> Result<Ack, IngestError> {
        let reporter = check(&reports)?;
        no_later_than(&mut reports, now());
        let counts: usize = reports.iter().map(|report| report.counts.len()).sum();
        let (answer, answered) = oneshot::channel();
        let submission = Submission { reporter, sync_key: Some(sync_key), reports };
        let sent = submission.reports.len();
        self.queue.try_send((submission, answer)).map_err(|_| IngestError::Full)?;
        match answered.await.map_err(|_| IngestError::Full)? {
            Ok(Applied::UpTo { seq, fresh }) => {
                metrics::counter!("portcullis_usage_reports_total", "result" => "applied").increment(fresh as u64);
                metrics::counter!("portcullis_usage_reports_total", "result" => "repeated")
                    .increment((sent - fresh) as u64);
                metrics::counter!("portcullis_usage_records_total").increment(counts as u64);
                Ok(Ack { reporter, seq })
            }
            Ok(Applied::Foreign) => Err(IngestError::Foreign),
            Ok(Applied::TooMany) => Err(IngestError::TooMany),
            Err(error) => Err(IngestError::Database(error)),
        }
    }
}

/// Checks what one reporter sends.
pub(super) fn check(reports: &[Report]) -> Result<ReporterId, IngestError> {
    let senseless = |why: String| Err(IngestError::Senseless(why));
    let Some(first) = reports.first() else { return senseless("there is no report in the message".into()) };
    if reports.len() > REPORTS {
        return senseless(format!("more than {REPORTS} reports in one message"));
    }
    if reports.iter().any(|report| report.reporter != first.reporter) {
        return senseless("reporter: one message carries the reports of one reporter".into());
    }
    if !reports.iter().map(|report| report.seq).is_sorted_by(|one, next| one < next) || first.seq == 0 {
        return senseless("seq: numbers start at 1 and ascend".into());
    }
    if reports.iter().any(|report| report.seq > i64::MAX.cast_unsigned()) {
        return senseless("seq: out of range".into());
    }
    for report in reports {
        if report.counts.len() > REPORT_COUNTS {
            return senseless(format!("counts: more than {REPORT_COUNTS} in one report"));
        }
        for Count { of, requests, cost, .. } in &report.counts {
            if *requests > REQUESTS || *cost > REQUESTS.saturating_mul(COST.into()) {
                return senseless(format!("requests: more than {REQUESTS} in one count"));
            }
            if of.key.is_some_and(|key| i32::try_from(key.generation).is_err()) {
                return senseless("generation: out of range".into());
            }
        }
    }
    Ok(first.reporter)
}

/// Moves counts of the future to now, and counts that are too old to the oldest plausible hour. An Envoy sends the same report
/// until it is acknowledged: a refusal would keep back all later reports.
pub(super) fn no_later_than(reports: &mut [Report], now: Duration) {
    let hour = u32::try_from(now.as_secs() / S_PER_HOUR).unwrap_or(u32::MAX);
    let ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let tolerated = now + AHEAD;
    let mut ahead = None;
    for report in reports {
        for Count { of, last_ms, .. } in &mut report.counts {
            if u64::from(of.hour) * S_PER_HOUR > tolerated.as_secs() || u128::from(*last_ms) > tolerated.as_millis() {
                ahead = Some(report.reporter);
            }
            of.hour = of.hour.clamp(hour.saturating_sub(OLDEST_HOURS), hour);
            *last_ms = (*last_ms).min(ms);
        }
    }
    if let Some(reporter) = ahead {
        warn!(%reporter, "usage from the future counts as of now: set the clock of that Envoy, or of this machine");
    }
}

pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

async fn commit(pool: PgPool, mut receiver: mpsc::Receiver<(Submission, oneshot::Sender<Answer>)>) {
    let mut waiting = Vec::with_capacity(TOGETHER);
    while receiver.recv_many(&mut waiting, TOGETHER).await > 0 {
        let (submissions, answers): (Vec<_>, Vec<_>) = waiting.drain(..).unzip();
        match apply(&pool, &submissions).await {
            Ok(applied) => answer(answers, applied.into_iter().map(Ok)),
            Err(error) if submissions.len() > 1 && error.as_database_error().is_some() => {
                // One submission is at fault, or there was a deadlock: apply each on its own.
                warn!(%error, together = submissions.len(), "reports could not be committed together");
                for (submission, to) in submissions.into_iter().zip(answers) {
                    let applied = apply(&pool, &[submission]).await.map_err(Arc::new);
                    answer(
                        [to],
                        applied
                            .map(|applied| applied.into_iter().map(Ok).collect())
                            .unwrap_or_else(|error| vec![Err(error)]),
                    );
                }
            }
            Err(error) => {
                let error = Arc::new(error);
                answer(answers, std::iter::repeat_with(|| Err(Arc::clone(&error))));
            }
        }
    }
}

fn answer(to: impl IntoIterator<Item = oneshot::Sender<Answer>>, answers: impl IntoIterator<Item = Answer>) {
    for (to, answer) in to.into_iter().zip(answers) {
        // The request may have ended; the filter retries.
        let _ = to.send(answer);
    }
}

#[cfg(test)]
mod tests {
    use contract::id::KeyId;
    use contract::usage::{KeyRef, Subject};

    use super::*;

    const NOW: Duration = Duration::from_hours(500_000);

    fn report(reporter: u8, seq: u64, hour: u32, requests: u64) -> Report {
        let key = Some(KeyRef { id: KeyId([1; 16]), generation: 1 });
        let count = Count { of: Subject { key, outcome: 0, hour }, requests, cost: 0, last_ms: 0 };
        Report { reporter: ReporterId([reporter; 16]), seq, counts: vec![count] }
    }

    fn refusal(reports: &[Report]) -> String {
        check(reports).unwrap_err().to_string()
    }

    #[test]
    fn honest_reports_are_taken() {
        let reports = [report(7, 1, 500_000, 10), report(7, 5, 499_000, 10)];
        assert_eq!(check(&reports).unwrap(), ReporterId([7; 16]));
    }

    #[test]
    fn what_was_counted_in_the_future_counts_as_of_now() {
        let mut reports = [report(7, 1, u32::MAX, 10), report(7, 2, 499_999, 10)];
        reports[0].counts[0].last_ms = u64::MAX;
        no_later_than(&mut reports, NOW);
        assert_eq!((reports[0].counts[0].of.hour, reports[0].counts[0].last_ms), (500_000, 500_000 * 3_600_000));
        assert_eq!(reports[1], report(7, 2, 499_999, 10));
        let mut ancient = [report(7, 3, 0, 10)];
        no_later_than(&mut ancient, NOW);
        assert_eq!(ancient[0].counts[0].of.hour, 500_000 - OLDEST_HOURS);
    }

    #[test]
    fn senseless_reports_are_refused_with_the_field() {
        assert!(refusal(&[]).contains("no report"));
        assert!(refusal(&[report(7, 1, 0, 1), report(8, 2, 0, 1)]).starts_with("reporter:"));
        assert!(refusal(&[report(7, 2, 0, 1), report(7, 2, 0, 1)]).starts_with("seq:"));
        assert!(refusal(&[report(7, 0, 0, 1)]).starts_with("seq:"));
        assert!(refusal(&[report(7, u64::MAX, 0, 1)]).starts_with("seq:"));
        assert!(refusal(&[report(7, 1, 500_000, REQUESTS + 1)]).starts_with("requests:"));
        let mut large = report(7, 1, 0, 1);
        large.counts = vec![large.counts[0]; REPORT_COUNTS + 1];
        assert!(refusal(&[large]).starts_with("counts:"));
        let many: Vec<_> = (1..=17).map(|seq| report(7, seq, 0, 1)).collect();
        assert!(refusal(&many).contains("more than 16"));
    }
}
