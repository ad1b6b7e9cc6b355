//! What a key costs in memory: the resident memory of an Envoy with many keys, less that of the same Envoy with next to
//! none, for one, two and four workers.

use std::collections::BTreeMap;

use anyhow::Result;
use portcullis_tests::paths;
use serde_json::json;
use tempfile::TempDir;

use super::Options;
use super::feed::Feed;
use super::machine;
use super::peers::Peer;
use super::report::{Bound, Report};
use super::server::Server;
use super::stats::{Estimate, Random};
use crate::output::progress;

const SUITE: &str = "memory: Envoy's resident memory by key";
const WORKERS: [usize; 3] = [1, 2, 4];
const FEW: u64 = 10;

/// What holds keys.
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

/// Measures, in random order.
pub(super) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let keys = if options.quick { 100_000 } else { 1_000_000 };
    let home = TempDir::with_prefix("portcullis-bench-")?;
    let file = home.path().join("keys.lua");
    let feeds = [Feed::start(FEW, |_| ()).await?, Feed::start(keys, |_| ()).await?];
    let rows: Vec<(Holder, usize)> =
        Holder::ALL.into_iter().flat_map(|holder| WORKERS.map(|workers| (holder, workers))).collect();
    let mut order: Vec<usize> = (0..rows.len()).collect();
    Random::new(9).shuffle(&mut order);
    let mut found = BTreeMap::new();
    for place in order {
        let Some(&(holder, workers)) = rows.get(place) else { continue };
        let native = |keys| Ok(Peer::api_key_auth(keys));
        let lua = |keys| Peer::lua(keys, &file);
        let most = match holder {
            Holder::Portcullis => Some((keys, with_feeds(&feeds, [FEW, keys], workers).await?)),
            Holder::Native => as_many(holder, &native, workers, keys, report).await?,
            Holder::Lua => as_many(holder, &lua, workers, keys, report).await?,
        };
        found.insert(place, most);
    }
    let mut most = Vec::new();
    for (&(holder, workers), found) in rows.iter().zip(found.into_values()) {
        let Some((keys, resident)) = found else { continue };
        let by_key = by_key(report, &format!("{}, {workers} workers, {keys} keys", holder.name()), resident, keys);
        if holder == Holder::Portcullis {
            most.push(by_key);
        }
    }
    if let Some(worst) = most.into_iter().max_by(f64::total_cmp) {
        let name = "Envoy memory per key, any number of workers";
        report.target(name, Bound::AtMost(100.0), "bytes", Estimate::once(worst));
    }
    Ok(())
}

/// What Envoys of ours hold in memory, with each of two feeds.
async fn with_feeds(feeds: &[Feed; 2], keys: [u64; 2], workers: usize) -> Result<[u64; 2]> {
    let mut resident = [0; 2];
    for ((feed, keys), resident) in feeds.iter().zip(keys).zip(&mut resident) {
        progress(&format!("suite memory: Portcullis, {keys} keys, {workers} workers"));
        let peer = Peer::portcullis(&paths::wasm(), feed.address(), json!({"rate_limit": null}));
        let server = Server::start(&peer.config(), workers, None).await?;
        server.wait_for_keys(keys).await?;
        *resident = machine::resident_bytes(server.pid())?;
    }
    Ok(resident)
}

/// A peer that holds all keys in its configuration: as many as it starts with, and what it holds in memory with few and with
/// those.
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
        progress(&format!("suite memory: {name}, {keys} keys, {workers} workers"));
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

fn by_key(report: &mut Report, name: &str, [little, much]: [u64; 2], keys: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let (added, keys, mebibytes) = (much.saturating_sub(little) as f64, keys as f64, much as f64 / f64::from(1 << 20));
    report.figure(SUITE, format!("{name}, {mebibytes:.0} MiB in all"), "bytes", Estimate::once(added / keys));
    added / keys
}

fn first_line(error: &anyhow::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
