//! The clients: a bounded number of connections to each Envoy at a bounded pace, and one for each group of keys with limits.
//! The oracle receives every response, and every request that got none.

use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use portcullis_harness::control_plane::fresh_key;
use portcullis_harness::dice::Dice;
use portcullis_harness::http::Connection;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::limited::Group;
use crate::oracle::{Answer, Oracle};
use crate::stack::TortureStack;

/// Time-out of a request. Without a fault no request takes so long, even on a busy machine.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Connections of the common load to each Envoy.
const CONNECTIONS: usize = 4;

/// Interval between two requests of a connection.
const PERIOD: Duration = Duration::from_millis(40);

#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    pub fn start(stack: &Arc<TortureStack>, oracle: &Arc<Oracle>, seed: u64) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        // Keys that do not exist, well-formed and not.
        let mut unknown: Vec<Arc<str>> = vec!["x".into(), "sk_live_".into(), "k".repeat(300).into()];
        for _ in 0..20 {
            unknown.push(fresh_key()?.reveal().into());
        }
        let unknown: Arc<[Arc<str>]> = unknown.into();
        let mut clients = JoinSet::new();
        let groups = Group::ALL.iter().enumerate().map(|(number, group)| (Some(number), group.period()));
        let kinds: Vec<_> = iter::repeat_n((None, PERIOD), CONNECTIONS).chain(groups).collect();
        for envoy in 0..stack.envoys.len() {
            for (number, (group, period)) in kinds.iter().enumerate() {
                let client = Client {
                    stack: Arc::clone(stack),
                    oracle: Arc::clone(oracle),
                    stop: Arc::clone(&stop),
                    unknown: Arc::clone(&unknown),
                    dice: Dice::new(seed ^ (envoy as u64) << 16 ^ number as u64),
                    envoy,
                    group: *group,
                    period: *period,
                };
                clients.spawn(client.run());
            }
        }
        Ok(Self { stop, clients })
    }

    /// Stops sending and waits for outstanding responses.
    pub async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.join_all().await;
    }
}

struct Client {
    stack: Arc<TortureStack>,
    oracle: Arc<Oracle>,
    stop: Arc<AtomicBool>,
    unknown: Arc<[Arc<str>]>,
    dice: Dice,
    envoy: usize,
    /// The keys that it uses; those of the common load if none.
    group: Option<usize>,
    period: Duration,
}

impl Client {
    async fn run(mut self) {
        // So that clients do not send at the same time.
        tokio::time::sleep(self.dice.between(Duration::ZERO, self.period)).await;
        let mut pace = interval(self.period);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut connection = None;
        while !self.stop.load(Ordering::Relaxed) {
            pace.tick().await;
            let limited = self.group.map(|group| self.oracle.pick_of(group, &mut self.dice));
            let Some(ticket) = limited.unwrap_or_else(|| Some(self.oracle.pick(&mut self.dice, &self.unknown))) else {
                continue;
            };
            let (sent, sent_at) = (Instant::now(), SystemTime::now());
            let answer = self.request(&ticket.text, &mut connection).await;
            self.oracle.judge(self.envoy, &ticket, sent, sent_at, &answer);
        }
    }

    async fn request(&self, key: &str, kept: &mut Option<Connection>) -> Answer {
        // A connection that closed while idle affected no request.
        if kept.as_ref().is_some_and(|connection| !connection.is_open()) {
            *kept = None;
        }
        let connection = match kept {
            Some(connection) => connection,
            None => match self.connect().await {
                Some(connection) => kept.insert(connection),
                None => return Answer::Unsent,
            },
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, connection.get("/", Some(key))).await {
            Ok(Ok(reply)) => {
                let code = serde_json::from_slice::<Value>(&reply.body).ok();
                let code = code.and_then(|body| body["code"].as_str().map(ToOwned::to_owned));
                Answer::Came(reply.status, code)
            }
            Ok(Err(_)) | Err(_) => {
                *kept = None;
                Answer::Lost
            }
        }
    }

    async fn connect(&self) -> Option<Connection> {
        let address = self.stack.envoys.get(self.envoy)?.address();
        tokio::time::timeout(REQUEST_TIMEOUT, Connection::open(address)).await.ok()?.ok()
    }
}
