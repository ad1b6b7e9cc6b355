//! A load of many requests over several connections, at a given pace. It counts responses by key
//! and status, to the last one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::envoy::Envoy;
use crate::http::Connection;

#[derive(Clone, Debug)]
pub struct Plan {
    /// The Envoys, assigned to connections in turn.
    pub targets: Vec<SocketAddr>,
    /// The keys, assigned to requests in turn.
    pub keys: Vec<String>,
    pub connections: usize,
    /// Number of requests after which it ends.
    pub requests: u64,
    /// Requests per second over all connections; as fast as possible if none.
    pub per_second: Option<u32>,
}

impl Plan {
    /// Requests to these Envoys over eight connections without an end.
    pub fn endless(envoys: &[Envoy], keys: Vec<String>, per_second: Option<u32>) -> Self {
        let targets = envoys.iter().map(Envoy::address).collect();
        Self { targets, keys, connections: 8, requests: u64::MAX, per_second }
    }
}

/// Number of responses by key (its index in the plan) and status. Status 0 stands for no response.
pub type Answers = BTreeMap<(usize, u16), u64>;

#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    connections: JoinSet<Answers>,
}

impl Load {
    pub fn start(plan: Plan) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut connections = JoinSet::new();
        let plan = Arc::new(plan);
        for number in 0..plan.connections {
            let one = One { plan: Arc::clone(&plan), stop: Arc::clone(&stop), sent: Arc::clone(&sent), number };
            connections.spawn(one.run());
        }
        Self { stop, sent, connections }
    }

    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Stops sending, waits for outstanding responses and returns all.
    pub async fn stop(self) -> Answers {
        self.stop.store(true, Ordering::Relaxed);
        self.finish().await
    }

    /// Waits until all requests of the plan have a response.
    pub async fn finish(mut self) -> Answers {
        let mut all = Answers::new();
        while let Some(answers) = self.connections.join_next().await {
            for (of, count) in answers.expect("no task of the load panics") {
                *all.entry(of).or_default() += count;
            }
        }
        all
    }
}

pub fn with_status(answers: &Answers, status: u16) -> u64 {
    answers.iter().filter(|((_, found), _)| *found == status).map(|(_, count)| count).sum()
}

struct One {
    plan: Arc<Plan>,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    number: usize,
}

impl One {
    async fn run(self) -> Answers {
        let mut answers = Answers::new();
        let Some(target) = self.plan.targets.get(self.number % self.plan.targets.len().max(1)) else { return answers };
        let mut pace = self.plan.per_second.map(|per_second| {
            let connections = u32::try_from(self.plan.connections).unwrap_or(u32::MAX);
            let period = Duration::from_secs(1) * connections / per_second.max(1);
            let offset = period * u32::try_from(self.number).unwrap_or_default() / connections.max(1);
            let mut pace = interval_at(Instant::now() + offset, period);
            pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
            pace
        });
        let mut connection = None;
        loop {
            if let Some(pace) = &mut pace {
                pace.tick().await;
            }
            if self.stop.load(Ordering::Relaxed) {
                return answers;
            }
            let turn = self.sent.fetch_add(1, Ordering::Relaxed);
            if turn >= self.plan.requests {
                self.sent.fetch_sub(1, Ordering::Relaxed);
                return answers;
            }
            let key = usize::try_from(turn).unwrap_or_default() % self.plan.keys.len().max(1);
            let status = match self.request(*target, key, &mut connection).await {
                Ok(status) => status,
                Err(_) => {
                    connection = None;
                    0
                }
            };
            *answers.entry((key, status)).or_default() += 1;
        }
    }

    async fn request(&self, target: SocketAddr, key: usize, kept: &mut Option<Connection>) -> Result<u16> {
        let connection = match kept {
            Some(connection) => connection,
            None => kept.insert(Connection::open(target).await?),
        };
        Ok(connection.get("/", self.plan.keys.get(key).map(String::as_str)).await?.status)
    }
}
