//! Suite `flood`: the latency of requests with a good key during a flood of unknown keys.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Result;
use portcullis_harness::flood::{Flood, flood_and_probe, probe};
use portcullis_harness::http::Connection;
use portcullis_harness::output::progress;

use crate::Options;
use crate::report::{Bound, Report};
use crate::stats::{Estimate, Samples};
use crate::store::{self, milliseconds};

const FLOOD: &str = "flood of unknown keys";

/// Requests with a good key before the flood.
const CALM: usize = 500;

pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let stack = store::start(1).await?;
    let lasts = Duration::from_secs(if options.quick { 4 } else { 30 });
    progress(&format!("suite flood: unknown keys for {} s", lasts.as_secs()));
    let key = stack.working_key("ada@example.com").await?;
    let address = stack.envoy().address();
    let calm = probe(&mut Connection::open(address).await?, &key, CALM, &AtomicBool::new(false)).await?;
    let start = Instant::now();
    let size = Flood { from: 0, least: 0, most: u64::MAX, lasts };
    let (flooded, pressed) = flood_and_probe(address, size, &key).await?;
    let took = start.elapsed().as_secs_f64();
    let (calm, pressed) = (samples(&calm), samples(&pressed));
    let rate = flooded as f64 / took;
    report.note(format!("Suite flood: {rate:.0} unknown keys/s were refused beside."));
    report.figure(FLOOD, "Portcullis, a good key without the flood, p99", "ms", Estimate::at(&calm, 0.99));
    report.figure(FLOOD, "Portcullis, a good key with the flood, p50", "ms", Estimate::at(&pressed, 0.5));
    let p99 = Estimate::at(&pressed, 0.99);
    report.figure(FLOOD, "Portcullis, a good key with the flood, p99", "ms", p99);
    report.target("a good key during a flood of unknown keys, p99", Bound::AtMost(50.0), "ms", p99);
    Ok(())
}

fn samples(took: &[Duration]) -> Samples {
    Samples::in_groups([took.iter().copied().map(milliseconds).collect()])
}
