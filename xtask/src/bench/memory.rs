//! What a key costs in memory: the resident memory of an Envoy with many keys, less that of the same Envoy with next to
//! none, for one, two and four workers.

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
use super::stats::Estimate;
use crate::output::progress;

const SUITE: &str = "memory: Envoy's resident memory by key";
const WORKERS: [usize; 3] = [1, 2, 4];
const FEW: u64 = 10;

/// Measures.
pub(super) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let keys = if options.quick { 100_000 } else { 1_000_000 };
    let home = TempDir::with_prefix("portcullis-bench-")?;
    let feeds = [Feed::start(FEW, |_| ()).await?, Feed::start(keys, |_| ()).await?];
    let mut most = Vec::new();
    for workers in WORKERS {
        let mut resident = [0; 2];
        for ((feed, keys), resident) in feeds.iter().zip([FEW, keys]).zip(&mut resident) {
            progress(&format!("suite memory: Portcullis, {keys} keys, {workers} workers"));
            let peer = Peer::portcullis(&paths::wasm(), feed.address(), json!({"rate_limit": null}));
            let server = Server::start(&peer.config(), workers, None).await?;
            server.wait_for_keys(keys).await?;
            *resident = machine::resident_bytes(server.pid())?;
        }
        most.push(by_key(report, &format!("Portcullis, {workers} workers, {keys} keys"), resident, keys));
    }
    let file = home.path().join("keys.lua");
    for workers in WORKERS {
        let native = |keys| Ok(Peer::api_key_auth(keys));
        let lua = |keys| Peer::lua(keys, &file);
        as_many("api_key_auth", &native, workers, keys, report).await?;
        as_many("Lua table", &lua, workers, keys, report).await?;
    }
    if let Some(worst) = most.into_iter().max_by(f64::total_cmp) {
        let name = "Envoy memory per key, any number of workers";
        report.target(name, Bound::AtMost(100.0), "bytes", Estimate::once(worst));
    }
    Ok(())
}

/// A peer that holds all keys in its configuration: as many as it starts with.
async fn as_many(
    name: &str,
    peer: &dyn Fn(u64) -> Result<Peer>,
    workers: usize,
    most: u64,
    report: &mut Report,
) -> Result<()> {
    let few = Server::start(&peer(FEW)?.config(), workers, None).await?;
    let little = machine::resident_bytes(few.pid())?;
    drop(few);
    let mut keys = most;
    while keys >= 1_000 {
        progress(&format!("suite memory: {name}, {keys} keys, {workers} workers"));
        match Server::start(&peer(keys)?.config(), workers, None).await {
            Ok(server) => {
                let resident = machine::resident_bytes(server.pid())?;
                by_key(report, &format!("{name}, {workers} workers, {keys} keys"), [little, resident], keys);
                return Ok(());
            }
            Err(error) => {
                report.note(format!("{name} does not start with {keys} keys: {}", first_line(&error)));
                keys /= 4;
            }
        }
    }
    Ok(())
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
