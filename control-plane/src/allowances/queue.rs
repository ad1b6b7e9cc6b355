//! The queue of calls and the task that answers them. Calls that come while a transaction runs are answered together by the
//! next one, so a call waits for two transactions at most, and for no timer, unless the queue has more calls than fit into one
//! transaction.

use std::sync::Arc;
use std::time::Instant;

use limits::message::{Answer, Ask, Call, POOLS};
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;
use uuid::Uuid;

use super::batch::{KeyedCall, answer};

/// Most calls in the queue. When it is full, Envoys call again later.
const QUEUE: usize = 1_024;

/// Most calls in one transaction.
const TOGETHER: usize = 256;

/// Most asks in one transaction.
const TOGETHER_ASKS: usize = 4 * POOLS;

/// Most tokens in a sum of a call, and in a request for tokens.
const TOKENS: u64 = 1 << 60;

/// Why a call was not answered.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It is invalid. A retry does not help.
    #[error("{0}")]
    Senseless(String),
    /// Its Envoy belongs to another sync key.
    #[error("the reporter belongs to another sync key")]
    Foreign,
    /// The queue is full, or the process shuts down.
    #[error("too many calls wait")]
    Full,
    /// The database failed.
    #[error("the database: {0}")]
    Database(Arc<sqlx::Error>),
}

type Answered = Result<Option<Answer>, Arc<sqlx::Error>>;

struct Waiting {
    call: KeyedCall,
    answer: oneshot::Sender<Answered>,
}

impl Waiting {
    /// Whether the Envoy still waits for the answer, or whether the call only reports, as the last calls of an Envoy do.
    fn is_wanted(&self) -> bool {
        is_wanted(&self.call.call, &self.answer)
    }
}

fn is_wanted(call: &Call, answer: &oneshot::Sender<Answered>) -> bool {
    call.is_last || !answer.is_closed()
}

/// Handle of the queue, cloned into every handler. The answering task ends after the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Allowances(mpsc::Sender<Waiting>);

impl Allowances {
    /// Starts the answering task. Give it connections of its own, so that it never waits for other requests.
    #[must_use]
    pub fn start(pool: PgPool) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(answer_all(pool, receiver));
        Self(sender)
    }

    /// Queues a call and waits for its answer.
    ///
    /// # Errors
    /// [`CallError`]. Nothing was granted then. If only the acknowledgement of the commit was lost, the next answer has the
    /// grant.
    pub async fn call(&self, call: Call, sync_key: Uuid) -> Result<Answer, CallError> {
        check(&call)?;
        let (answer, answered) = oneshot::channel();
        let call = KeyedCall { call, sync_key };
        self.0.try_send(Waiting { call, answer }).map_err(|_| CallError::Full)?;
        match answered.await.map_err(|_| CallError::Full)? {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(CallError::Foreign),
            Err(error) => Err(CallError::Database(error)),
        }
    }
}

/// Checks what an Envoy sends.
fn check(call: &Call) -> Result<(), CallError> {
    if call.asks.len() > POOLS {
        return Err(CallError::Senseless(format!("asks: more than {POOLS} in one call")));
    }
    for ask in &call.asks {
        let Ask { session, granted, spent, returned, need, least, want, .. } = *ask;
        let sums = [
            ("session", session),
            ("granted", granted),
            ("spent", spent),
            ("returned", returned),
            ("need", need),
            ("least", least),
            ("want", want),
        ];
        if let Some((field, _)) = sums.iter().find(|(_, sum)| *sum > TOKENS) {
            return Err(CallError::Senseless(format!("{field}: more than {TOKENS}")));
        }
    }
    Ok(())
}

async fn answer_all(pool: PgPool, mut receiver: mpsc::Receiver<Waiting>) {
    let mut received = Vec::with_capacity(TOGETHER);
    while receiver.recv_many(&mut received, TOGETHER).await > 0 {
        let mut rest = received.drain(..).filter(Waiting::is_wanted).peekable();
        while rest.peek().is_some() {
            let mut asks = 0_usize;
            let fits = |waiting: &Waiting| {
                let is_first = asks == 0;
                asks = asks.saturating_add(waiting.call.call.asks.len().max(1));
                is_first || asks <= TOGETHER_ASKS
            };
            answer_batch(&pool, take_while(&mut rest, fits)).await;
        }
    }
}

/// The first elements for which a condition holds. The next one stays.
fn take_while<T>(from: &mut std::iter::Peekable<impl Iterator<Item = T>>, mut fits: impl FnMut(&T) -> bool) -> Vec<T> {
    let mut taken = Vec::new();
    while let Some(next) = from.next_if(&mut fits) {
        taken.push(next);
    }
    taken
}

async fn answer_batch(pool: &PgPool, batch: Vec<Waiting>) {
    let began = Instant::now();
    let (calls, to): (Vec<_>, Vec<_>) = batch.into_iter().map(|waiting| (waiting.call, waiting.answer)).unzip();
    metrics::histogram!("portcullis_allowance_batch_calls").record(calls.len() as f64);
    match answer(pool, &calls).await {
        Ok(answers) => {
            metrics::histogram!("portcullis_allowance_batch_duration_seconds").record(began.elapsed().as_secs_f64());
            for ((call, answer), to) in calls.iter().zip(answers).zip(to) {
                count(&call.call, answer.as_ref());
                send(to, Ok(answer));
            }
        }
        // One call may be at fault: answer each on its own.
        Err(error) if calls.len() > 1 && error.as_database_error().is_some() => {
            warn!(%error, together = calls.len(), "calls for allowances could not be answered together");
            // Some may have given up while the others were answered.
            for (call, to) in calls.into_iter().zip(to).filter(|(call, to)| is_wanted(&call.call, to)) {
                let answered = answer(pool, std::slice::from_ref(&call)).await;
                match answered {
                    Ok(mut answers) => {
                        let answer = answers.pop().flatten();
                        count(&call.call, answer.as_ref());
                        send(to, Ok(answer));
                    }
                    Err(error) => fail([to], error),
                }
            }
        }
        Err(error) => fail(to, error),
    }
}

fn fail(to: impl IntoIterator<Item = oneshot::Sender<Answered>>, error: sqlx::Error) {
    let error = Arc::new(error);
    for to in to {
        metrics::counter!("portcullis_allowance_calls_total", "result" => "failed").increment(1);
        send(to, Err(Arc::clone(&error)));
    }
}

fn send(to: oneshot::Sender<Answered>, answer: Answered) {
    // The request may have ended; the Envoy calls again.
    let _ = to.send(answer);
}

fn count(call: &Call, answer: Option<&Answer>) {
    let Some(answer) = answer else {
        metrics::counter!("portcullis_allowance_calls_total", "result" => "rejected").increment(1);
        return;
    };
    metrics::counter!("portcullis_allowance_calls_total", "result" => "answered").increment(1);
    metrics::counter!("portcullis_allowance_asks_total").increment(call.asks.len() as u64);
    let granted = call.asks.iter().zip(&answer.grants).filter(|(ask, grant)| grant.granted > ask.granted).count();
    metrics::counter!("portcullis_allowance_grants_total").increment(granted as u64);
    metrics::counter!("portcullis_allowance_recalls_total").increment(answer.recalls.len() as u64);
}

#[cfg(test)]
mod tests {
    use contract::id::{KeyId, ReporterId};
    use limits::pool::{Kind, PoolId};

    use super::*;

    fn ask() -> Ask {
        let pool = PoolId { kind: Kind::Quota, subject: KeyId([1; 16]).into(), tag: 0 };
        Ask { need: 1, least: 1, want: 1, ..Ask::new(pool, 1) }
    }

    #[test]
    fn calls_beyond_the_bounds_are_refused_with_the_field() {
        let call = |asks| Call { reporter: ReporterId([7; 16]), is_last: false, asks };
        assert!(check(&call(vec![ask(); POOLS])).is_ok());
        let refusal = |asks| check(&call(asks)).unwrap_err().to_string();
        assert_eq!(refusal(vec![ask(); POOLS + 1]), "asks: more than 500 in one call");
        assert!(refusal(vec![Ask { spent: TOKENS + 1, ..ask() }]).starts_with("spent:"));
        assert!(refusal(vec![Ask { session: u64::MAX, ..ask() }]).starts_with("session:"));
    }

    #[test]
    fn calls_of_envoys_that_are_gone_are_left_out_but_for_the_last_ones() {
        let is_wanted = |is_last, is_gone: bool| {
            let (answer, answered) = oneshot::channel();
            let _answered = (!is_gone).then_some(answered);
            is_wanted(&Call { reporter: ReporterId([7; 16]), is_last, asks: vec![ask()] }, &answer)
        };
        assert_eq!(
            [(false, false), (true, false), (false, true), (true, true)].map(|(last, gone)| is_wanted(last, gone)),
            [true, true, false, true]
        );
    }

    #[test]
    fn a_batch_ends_before_the_element_that_does_not_fit() {
        let mut sum = 0;
        let mut from = [3, 4, 5].into_iter().peekable();
        let fits = |next: &i32| {
            sum += next;
            sum <= 7
        };
        assert_eq!(take_while(&mut from, fits), [3, 4]);
        assert_eq!(from.next(), Some(5));
    }
}
