//! Waits for observable conditions, with a deadline and an error that names the condition. Tests
//! never sleep for a fixed time and hope.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Deadline of a wait. It is long, since tests run on busy machines, and only a test that fails waits for all of it.
pub const DEADLINE: Duration = Duration::from_secs(60);

const PAUSE: Duration = Duration::from_millis(10);

/// Waits until the condition gives a value.
pub async fn eventually_within<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if start.elapsed() > deadline {
            bail!("waited {deadline:?} in vain for: {what}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits until the condition gives a value, at most [`DEADLINE`].
pub async fn eventually<T>(what: &str, condition: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    eventually_within(what, DEADLINE, condition).await
}
