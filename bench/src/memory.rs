//! Suite `memory`: resident memory for each key, as the difference between an Envoy with many keys
//! and one with few, for one, two and four workers. Portcullis is also measured after requests,
//! when the cache of each worker is full.

use std::path::Path;

use anyhow::{Result, ensure};
use portcullis_harness::output::progress;
use portcullis_harness::paths;
use serde_json::json;
use tempfile::TempDir;

use crate::Options;
use crate::feed::{Feed, key};
use crate::load::H2load;
use crate::machine;
use crate::peers::Peer;
use crate::report::{Bound, Report};
use crate::server::Server;
use crate::stats::{Estimate, Random, Samples};

const SUITE: &str = "memory: Envoy's resident memory by key";
const WORKERS: [usize; 3] = [1, 2, 4];
const FEW: u64 = 10;

/// Ways to hold keys in Envoy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Portcullis,
    Native,
    Lua,
}

impl Holder {
    const ALL: [Self; 3] = [Self::Portcullis, Self::Native, Self::Lua];

    const fn name(self) -> &'static str {
        match self {
            Self::Portcullis => "Portcullis",
            Self::Native => "api_key_auth",
            Self::Lua => "Lua table",
        }
    }
}

/// Requests over each connection, each with a random key: more than a worker's cache holds.
const REQUESTS: u64 = 6_000;
/// Connections for each worker, so that every worker gets some.
const CONNECTIONS: usize = 8;

/// Memory of the Envoys of one row.
struct Row {
    holder: Holder,
    workers: usize,
    /// Number of keys; none if Envoy does not start with any number that was tried.
    keys: Option<u64>,
    by_key: Samples,
    mebibytes: Samples,
    /// By key after requests; only for Portcullis.
    busy: Samples,
}

/// Resident bytes of an Envoy.
#[derive(Clone, Copy, Debug, Default)]
struct Resident {
    before: u64,
    after_requests: u64,
}

/// Measures, in random order.
pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let (keys, rounds) = if options.quick { (100_000, 1) } else { (1_000_000, 3) };
    // The others take half a minute to start with all keys, and differ little.
    let rounds_of = |holder| if holder == Holder::Portcullis { rounds } else { rounds.min(2) };
    let home = TempDir::with_prefix("portcullis-bench-")?;
    let file = home.path().join("keys.lua");
    let feeds = [Feed::start(FEW, |_| ()).await?, Feed::start(keys, |_| ()).await?];
    let row = |holder, workers| Row {
        holder,
        workers,
        keys: Some(keys),
        by_key: Samples::default(),
        mebibytes: Samples::default(),
        busy: Samples::default(),
    };
    let generator = H2load::install()?;
    let mut rows: Vec<Row> =
        Holder::ALL.into_iter().flat_map(|holder| WORKERS.map(|workers| row(holder, workers))).collect();
    let mut random = Random::new(9);
    for round in 1..=rounds {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.retain(|place| rows.get(*place).is_some_and(|row| round <= rounds_of(row.holder)));
        random.shuffle(&mut order);
        for place in order {
            let Some(row) = rows.get_mut(place) else { continue };
            let Some(most) = row.keys else { continue };
            progress(&format!(
                "suite memory: {}, {} workers, round {round} of {rounds}",
                row.holder.name(),
                row.workers
            ));
            let native = |keys| Ok(Peer::api_key_auth(keys));
            let lua = |keys| Peer::lua(keys, &file);
            let found = match row.holder {
                Holder::Portcullis => {
                    let [few, many] = with_feeds(&feeds, [FEW, keys], row.workers, &generator, home.path()).await?;
                    row.busy.push(by_key(few.after_requests, many.after_requests, keys));
                    Some((keys, [few.before, many.before]))
                }
                Holder::Native => as_many(row.holder, &native, row.workers, most, report).await?,
                Holder::Lua => as_many(row.holder, &lua, row.workers, most, report).await?,
            };
            row.found(found);
        }
    }
    tell(&rows, report);
    Ok(())
}

impl Row {
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    fn found(&mut self, found: Option<(u64, [u64; 2])>) {
        let keys = found.map(|(keys, _)| keys);
        // Earlier samples had another number of keys.
        if keys != self.keys {
            (self.by_key, self.mebibytes) = (Samples::default(), Samples::default());
        }
        self.keys = keys;
        if let Some((keys, [little, much])) = found {
            self.by_key.push(by_key(little, much, keys));
            self.mebibytes.push(much as f64 / f64::from(1 << 20));
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn by_key(little: u64, much: u64, keys: u64) -> f64 {
    much.saturating_sub(little) as f64 / keys as f64
}

fn tell(rows: &[Row], report: &mut Report) {
    for row in rows {
        let Some(keys) = row.keys else { continue };
        let (holder, workers, mebibytes) = (row.holder.name(), row.workers, row.mebibytes.median());
        let name = format!("{holder}, {workers} workers, {keys} keys, {mebibytes:.0} MiB in all");
        let native = rows.iter().find(|other| other.holder == Holder::Native && other.workers == workers);
        let compared = |samples: &Samples| {
            native.filter(|_| row.holder != Holder::Native).map(|native| {
                let ratio = Estimate::of([samples, &native.by_key], |[by_key, of_native]| by_key / of_native);
                (ratio, Holder::Native.name())
            })
        };
        let plain = |samples: &Samples| Estimate::of([samples], |[by_key]| by_key);
        report.compared(SUITE, name, "bytes", plain(&row.by_key), compared(&row.by_key));
        if row.holder == Holder::Portcullis {
            let name = format!("{holder}, {workers} workers, {keys} keys, after requests");
            report.compared(SUITE, name, "bytes", plain(&row.busy), compared(&row.busy));
        }
    }
    // The worst Envoy counts, and the time when it has most.
    let ours = rows.iter().filter(|row| row.holder == Holder::Portcullis).map(|row| Estimate::worst(&row.busy));
    if let Some(worst) = ours.max_by(|a, b| a.judged.total_cmp(&b.judged)) {
        report.target("Envoy memory per key, any number of workers", Bound::AtMost(100.0), "bytes", worst);
    }
}

/// Memory of Envoys with Portcullis, with each of two feeds.
async fn with_feeds(
    feeds: &[Feed; 2],
    keys: [u64; 2],
    workers: usize,
    generator: &H2load,
    home: &Path,
) -> Result<[Resident; 2]> {
    let mut resident = [Resident::default(); 2];
    for ((feed, keys), resident) in feeds.iter().zip(keys).zip(&mut resident) {
        let peer = Peer::portcullis(&paths::wasm(), feed.address(), json!({"rate_limit": null}));
        let server = Server::start(&peer.config(), workers, None).await?;
        server.wait_for_keys(keys).await?;
        resident.before = machine::resident_bytes(server.pid())?;
        let mut random = Random::new(keys);
        let mut address = || {
            let chosen = random.below(usize::try_from(keys).unwrap_or(usize::MAX)) as u64;
            format!("http://{}/?key={}\n", server.address(), key(chosen))
        };
        let addresses = home.join("addresses");
        std::fs::write(&addresses, (0..REQUESTS).map(|_| address()).collect::<String>())?;
        let connections = CONNECTIONS * workers;
        let requests = REQUESTS * connections as u64;
        let answers = generator.spread(requests, connections, &addresses).await?;
        ensure!(answers.good == requests, "{answers:?} instead of {requests} that are admitted");
        resident.after_requests = machine::resident_bytes(server.pid())?;
    }
    Ok(resident)
}

/// Measures the memory of a peer whose configuration holds the keys: with few keys, and with the most that it can start with.
async fn as_many(
    holder: Holder,
    peer: &dyn Fn(u64) -> Result<Peer>,
    workers: usize,
    most: u64,
    report: &mut Report,
) -> Result<Option<(u64, [u64; 2])>> {
    let name = holder.name();
    let few = Server::start(&peer(FEW)?.config(), workers, None).await?;
    let little = machine::resident_bytes(few.pid())?;
    drop(few);
    let mut keys = most;
    while keys >= 1_000 {
        match Server::start(&peer(keys)?.config(), workers, None).await {
            Ok(server) => return Ok(Some((keys, [little, machine::resident_bytes(server.pid())?]))),
            Err(error) => {
                report.note(format!("{name} does not start with {keys} keys: {}", first_line(&error)));
                keys /= 4;
            }
        }
    }
    Ok(None)
}

fn first_line(error: &anyhow::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
