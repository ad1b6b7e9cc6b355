//! A flood of keys that nobody has, and how long requests with a good key take meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::http::Connection;

/// Connections that flood.
const CONNECTIONS: u64 = 8;

/// Between two requests with a good key.
const PAUSE: Duration = Duration::from_millis(5);

/// How many keys are sent.
#[derive(Clone, Copy, Debug)]
pub struct Flood {
    /// The number of the first key: other numbers make other keys.
    pub from: u64,
    /// So many in any case, however long a busy machine takes for them.
    pub least: u64,
    /// No more than this.
    pub most: u64,
    /// Beyond the least, keys are sent for so long only.
    pub lasts: Duration,
}

/// A key that nobody has, of the right form or not, different each time (splitmix64).
fn stranger(seed: u64) -> String {
    let mut mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    match mixed % 4 {
        0 => format!("{mixed:x}"),
        1 => format!("sk_test_{mixed:036x}"),
        2 => format!("{mixed:0700}"),
        _ => format!("sk_live_{mixed:036}"),
    }
}

/// Sends the keys to an Envoy, and says how many were refused.
///
/// # Errors
/// If one of them is not refused.
pub async fn flood(address: SocketAddr, flood: Flood) -> Result<u64> {
    let start = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut connections = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let next = Arc::clone(&next);
        connections.spawn(async move {
            let mut connection = Connection::open(address).await?;
            let mut refused = 0;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= flood.most || (number >= flood.least && start.elapsed() >= flood.lasts) {
                    return Ok::<u64, anyhow::Error>(refused);
                }
                let reply = connection.get("/", Some(&stranger(flood.from + number))).await?;
                ensure!(reply.status == 401, "a stranger's key is answered with {}", reply.status);
                refused += 1;
            }
        });
    }
    let mut refused = 0;
    while let Some(done) = connections.join_next().await {
        refused += done??;
    }
    Ok(refused)
}

/// How long requests with a good key take, the shortest first, until there are enough or it is told to stop.
///
/// # Errors
/// If one of them is refused.
pub async fn probe(connection: &mut Connection, key: &str, enough: usize, stop: &AtomicBool) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    while took.len() < enough && !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let reply = connection.get("/", Some(key)).await?;
        took.push(start.elapsed());
        ensure!(reply.status == 200, "a good key is answered with {}", reply.status);
        tokio::time::sleep(PAUSE).await;
    }
    took.sort_unstable();
    Ok(took)
}
