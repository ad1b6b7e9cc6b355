//! Clients that do not read responses: memory of the control plane, its latency for others
//! meanwhile, and the end of all these connections. The figures are printed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portcullis_tests::flood::at;
use portcullis_tests::raw_http2::{Client, RST_STREAM, connect};
use portcullis_tests::stack::Stack;
use portcullis_tests::wait::eventually_within;
use portcullis_torture::envoy_model::BOUND;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

/// Connections that attack, and requests on each.
const CONNECTIONS: usize = 40;
/// Where clients that do not read connect from, so that their connections can be distinguished.
const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const REQUESTS: u32 = 200;

/// The read time-out of the control plane, in seconds.
const PATIENCE: &str = "5s";

/// Long enough for the attack to end on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// By how much memory may grow, in KiB. Without a bound it grows by 700 MiB.
const SHARED_KIB: u64 = 32 << 10;
/// The same where each response is the caller's own: one owner's calls within a read time-out, with 128 KiB each.
const OWN_KIB: u64 = 96 << 10;

/// How the attack is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attack {
    /// HTTP/2 without flow-control windows, PINGs answered.
    NoWindow,
    /// HTTP/1.1 with requests in a row, nothing read.
    NoReading,
}

/// One connection of the attack; returns when the control plane has ended it.
async fn attack(
    address: SocketAddr,
    attack: Attack,
    path: String,
    key: Option<String>,
    (resets, sending): (Arc<AtomicU64>, Arc<AtomicUsize>),
) -> Result<()> {
    match attack {
        Attack::NoWindow => {
            let mut client = Client::open(address, None, 0).await?;
            let headers: Vec<_> = key.iter().map(|key| ("x-api-key", key.as_str())).collect();
            for number in 0..REQUESTS {
                if client.get(2 * number + 1, &path, &headers).await.is_err() {
                    break;
                }
            }
            while let Some(frame) = client.next().await {
                resets.fetch_add(u64::from(frame.kind == RST_STREAM), Ordering::Relaxed);
            }
        }
        Attack::NoReading => {
            let mut stream = connect(address, Some(ATTACKER.into())).await?;
            let key = key.map_or_else(String::new, |key| format!("x-api-key: {key}\r\n"));
            sending.fetch_add(1, Ordering::Relaxed);
            let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n{key}\r\n");
            let _ = stream.write_all(request.repeat(REQUESTS as usize).as_bytes()).await;
            // Watched by `open_connections`, since a client that does not read does not notice.
            tokio::time::sleep(DEADLINE).await;
        }
    }
    Ok(())
}

/// How long `/healthz` takes for somebody else, on a connection each, until told to stop; the shortest first.
async fn probe(address: SocketAddr, stop: Arc<AtomicBool>) -> Result<Vec<Duration>> {
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        let mut stream = connect(address, Some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9)))).await?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        tokio::time::timeout(DEADLINE, stream.read_to_string(&mut answer)).await.context("no answer")??;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        took.push(start.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    took.sort_unstable();
    Ok(took)
}

/// How many connections from [`ATTACKER`] the control plane has not closed, as the kernel says.
fn open_connections(address: SocketAddr) -> Option<usize> {
    const ESTABLISHED: &str = "01";
    const CLOSE_WAIT: &str = "08";
    let attacker = format!("{:08X}:", u32::from_ne_bytes(ATTACKER.octets()));
    let port = format!(":{:04X}", address.port());
    let is_open = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, remote, state) = (fields.next(), fields.next(), fields.next());
        local.is_some_and(|local| local.ends_with(&port))
            && remote.is_some_and(|remote| remote.starts_with(&attacker))
            && state.is_some_and(|state| [ESTABLISHED, CLOSE_WAIT].contains(&state))
    };
    Some(std::fs::read_to_string("/proc/net/tcp").ok()?.lines().filter(is_open).count())
}

/// Attacks, waits until every connection of the attack has ended, and judges memory.
async fn endure(stack: &Stack, kind: Attack, path: &str, key: Option<&str>, growth_kib: u64) -> Result<()> {
    let address = stack.control_plane.address();
    let before = stack.control_plane.resident_kib()?;
    let stop = Arc::new(AtomicBool::new(false));
    let probing = tokio::spawn(probe(address, Arc::clone(&stop)));
    let (start, resets, sending) = (Instant::now(), Arc::<AtomicU64>::default(), Arc::<AtomicUsize>::default());
    let mut attackers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let counters = (Arc::clone(&resets), Arc::clone(&sending));
        attackers.spawn(attack(address, kind, path.to_owned(), key.map(Into::into), counters));
    }
    let mut most = before;
    let ended = eventually_within("the connections of the attack to end", DEADLINE, async || {
        most = most.max(stack.control_plane.resident_kib().ok()?);
        match kind {
            Attack::NoWindow => {
                while attackers.try_join_next().is_some() {}
                attackers.is_empty().then_some(())
            }
            Attack::NoReading if sending.load(Ordering::Relaxed) < CONNECTIONS => None,
            Attack::NoReading => (open_connections(address)? == 0).then_some(()),
        }
    });
    ended.await?;
    let took = start.elapsed();
    attackers.shutdown().await;
    stop.store(true, Ordering::Relaxed);
    let probes = probing.await??;
    println!(
        "responses that are not taken, {kind:?}, {path}: resident memory {before} KiB before, {most} KiB at most, {} KiB after; \
         all {CONNECTIONS} connections ended after {:.1} s, {} streams reset; /healthz p50 {:?}, p99 {:?}, most {:?} ({} requests)",
        stack.control_plane.resident_kib()?,
        took.as_secs_f64(),
        resets.load(Ordering::Relaxed),
        at(&probes, 500),
        at(&probes, 990),
        at(&probes, 1_000),
        probes.len(),
    );
    ensure!(most <= before + growth_kib, "memory grew from {before} to {most} KiB");
    let p99 = at(&probes, 990);
    ensure!(p99 <= BOUND, "/healthz took {p99:?} for somebody else");
    stack.control_plane.must_run()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn responses_that_are_not_taken_fill_no_memory_and_keep_nobody_waiting() -> Result<()> {
    let stack = Stack::builder().envoys(0).control_plane_arguments(&["--read-timeout", PATIENCE]).start().await?;
    let line = |number: u32| {
        json!({"email": format!("user{number}@example.com"), "name": format!("key {number}"), "key": format!("an-imported-key-{number}")})
            .to_string()
    };
    stack.rest().import((0..200).map(|number| line(number) + "\n").collect()).await?;
    let admin = stack.control_plane.settings().admin_key.reveal().to_owned();
    for kind in [Attack::NoWindow, Attack::NoReading] {
        endure(&stack, kind, "/openapi.json", None, SHARED_KIB).await?;
        endure(&stack, kind, "/v1/keys?limit=200", Some(&admin), OWN_KIB).await?;
    }
    Ok(())
}
