//! Suite `memory`: resident memory for each key, as the difference between an Envoy with many keys
//! and one with few, for one, two and four workers. Portcullis is also measured after requests,
//! when the cache of each worker is full.

use std::path::Path;

use anyhow::{Result, ensure};
use portcullis_harness::dice::Dice;
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
use crate::stats::{Estimate, Samples};

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
    by_key: Samples,
    mebibytes: Samples,
    /// By key after requests.
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
    let feeds = [(FEW, Feed::start(FEW, |_| (), &[]).await?), (keys, Feed::start(keys, |_| (), &[]).await?)];
    let row = |holder, workers| {
        let (by_key, mebibytes, busy) = (Samples::default(), Samples::default(), Samples::default());
        Row { holder, workers, by_key, mebibytes, busy }
    };
    let generator = H2load::install()?;
    let mut rows: Vec<Row> =
        Holder::ALL.into_iter().flat_map(|holder| WORKERS.map(|workers| row(holder, workers))).collect();
    let mut random = Dice::new(9);
    for round in 1..=rounds {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.retain(|place| rows.get(*place).is_some_and(|row| round <= rounds_of(row.holder)));
        random.shuffle(&mut order);
        for place in order {
            let Some(row) = rows.get_mut(place) else { continue };
            let (holder, workers) = (row.holder, row.workers);
            progress(&format!("suite memory: {}, {workers} workers, round {round} of {rounds}", holder.name()));
            let mut resident = [Resident::default(); 2];
            for ((keys, feed), resident) in feeds.iter().zip(&mut resident) {
                *resident = match holder {
                    Holder::Portcullis => with_requests(feed, *keys, workers, &generator, home.path()).await?,
                    Holder::Native => at_rest(&Peer::api_key_auth(*keys), workers).await?,
                    Holder::Lua => at_rest(&Peer::lua(*keys, &file)?, workers).await?,
                };
            }
            row.push(resident, keys);
        }
    }
    show(&rows, keys, report);
    Ok(())
}

impl Row {
    fn push(&mut self, [few, many]: [Resident; 2], keys: u64) {
        self.by_key.push(by_key(few.before, many.before, keys));
        self.mebibytes.push(many.before as f64 / f64::from(1 << 20));
        self.busy.push(by_key(few.after_requests, many.after_requests, keys));
    }
}

fn by_key(little: u64, much: u64, keys: u64) -> f64 {
    much.saturating_sub(little) as f64 / keys as f64
}

fn show(rows: &[Row], keys: u64, report: &mut Report) {
    for row in rows {
        let (holder, workers, mebibytes) = (row.holder.name(), row.workers, row.mebibytes.median());
        let name = format!("{holder}, {workers} workers, {keys} keys, {mebibytes:.0} MiB in all");
        let native = rows.iter().find(|other| other.holder == Holder::Native && other.workers == workers);
        let compared = |samples: &Samples| {
            native.filter(|_| row.holder != Holder::Native).map(|native| {
                let ratio = Estimate::of([samples, &native.by_key], |[by_key, of_native]| by_key / of_native);
                (ratio, Holder::Native.name())
            })
        };
        report.compared(SUITE, name, "bytes", Estimate::plain(&row.by_key), compared(&row.by_key));
        if row.holder == Holder::Portcullis {
            let name = format!("{holder}, {workers} workers, {keys} keys, after requests");
            report.compared(SUITE, name, "bytes", Estimate::plain(&row.busy), compared(&row.busy));
        }
    }
    // The worst Envoy counts, and the time when it has most.
    let ours = rows.iter().filter(|row| row.holder == Holder::Portcullis).map(|row| Estimate::worst(&row.busy));
    if let Some(worst) = ours.max_by(|a, b| a.judged.total_cmp(&b.judged)) {
        report.target("Envoy memory per key, any number of workers", Bound::AtMost(100.0), "bytes", worst);
    }
}

/// Memory of an Envoy with Portcullis.
async fn with_requests(feed: &Feed, keys: u64, workers: usize, generator: &H2load, home: &Path) -> Result<Resident> {
    let peer = Peer::portcullis(&paths::wasm(), feed.address, json!({"rate_limit": null}));
    let server = Server::start(&peer.config(), workers, None).await?;
    server.wait_for_keys(keys).await?;
    let before = machine::resident_bytes(server.pid())?;
    let mut random = Dice::new(keys);
    let mut address = || {
        let chosen = random.below(usize::try_from(keys).unwrap_or(usize::MAX)) as u64;
        format!("http://{}/?key={}\n", server.address, key(chosen))
    };
    let addresses = home.join("addresses");
    std::fs::write(&addresses, (0..REQUESTS).map(|_| address()).collect::<String>())?;
    let connections = CONNECTIONS * workers;
    let requests = REQUESTS * connections as u64;
    let answers = generator.spread(requests, connections, &addresses).await?;
    ensure!(answers.good == requests, "{answers:?} instead of {requests} that are admitted");
    Ok(Resident { before, after_requests: machine::resident_bytes(server.pid())? })
}

/// Memory of an Envoy whose configuration has the keys.
async fn at_rest(peer: &Peer, workers: usize) -> Result<Resident> {
    let server = Server::start(&peer.config(), workers, None).await?;
    let before = machine::resident_bytes(server.pid())?;
    Ok(Resident { before, after_requests: before })
}
