//! A flood of unknown keys, and the latency of requests with a good key meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::dice::Dice;
use crate::http::Connection;

/// Connections that send unknown keys.
const CONNECTIONS: u64 = 8;

/// The pause between two requests with a good key.
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug)]
pub struct Flood {
    /// The number of the first key. Different numbers give different keys.
    pub from: u64,
    /// Minimum number of keys, however long a busy machine takes.
    pub least: u64,
    pub most: u64,
    /// Time after which no key beyond the minimum is sent.
    pub lasts: Duration,
}

/// The unknown key of a number, well-formed or not.
fn stranger(seed: u64) -> String {
    let mixed = Dice::new(seed).number();
    match mixed % 4 {
        0 => format!("{mixed:x}"),
        1 => format!("sk_test_{mixed:036x}"),
        2 => format!("{mixed:0700}"),
        _ => format!("sk_live_{mixed:036}"),
    }
}

/// Sends the keys to an Envoy, and returns how many were refused. All must be.
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
                ensure!(reply.status == 401, "an unknown key is answered with {}", reply.status);
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

/// A flood, and the latencies of requests with a good key meanwhile, in ascending order.
pub async fn flood_and_probe(address: SocketAddr, size: Flood, key: &str) -> Result<(u64, Vec<Duration>)> {
    let (over, mut connection) = (AtomicBool::new(false), Connection::open(address).await?);
    let flooding = async {
        let flooded = flood(address, size).await;
        over.store(true, Ordering::Relaxed);
        flooded
    };
    let (flooded, took) = tokio::join!(flooding, probe(&mut connection, key, usize::MAX, &over));
    Ok((flooded?, took?))
}

/// The latencies of requests with a good key, in ascending order. Ends after `enough` requests or when `stop` is set.
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

/// The latency at this place, in thousandths, of latencies in ascending order.
pub fn at(took: &[Duration], per_mille: usize) -> Duration {
    let place = took.len().saturating_sub(1).saturating_mul(per_mille) / 1_000;
    took.get(place).copied().unwrap_or_default()
}
