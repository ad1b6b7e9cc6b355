//! Suite `limits`, first part: how many requests wait for an allowance of a shared limit, and for
//! how long, on one, three and ten Envoys.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use futures_util::{StreamExt, TryStreamExt, stream};
use hyper::Request;
use portcullis_harness::dice::Dice;
use portcullis_harness::http::{Http2Connection, OutgoingBody};
use portcullis_harness::output::progress;
use portcullis_harness::process::Signal;
use portcullis_harness::stack::Stack;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::Options;
use crate::report::{Bound, Report};
use crate::stats::{Estimate, Samples};
use crate::store::{self, milliseconds};

const WAITS: &str = "limits: requests that wait, limit used to 30 %";
const SMALL: &str = "limits: the same, bursts of 16 requests for each Envoy";
const CALLS: &str = "limits: calls of each Envoy to the control plane";
const COLD: &str = "limits: first request of a key on an Envoy";
const TOOK: &str = "limits: time that a request waits";
const FULL: &str = "limits: 100/s used to 90 %, three Envoys";

const WAITS_STAT: &str = "wasmcustom.portcullis.limits.waits_total";
const CALLS_STAT: &str = "wasmcustom.portcullis.limits.calls_total";

/// Numbers of Envoys, in descending order: Envoys are stopped between runs.
const FLEETS: [usize; 3] = [10, 3, 1];

/// The burst for each Envoy from which on the target applies, in requests. It applies at any rate.
const ROOM: f64 = 16.0;

/// The part of a limit that is used: less than a third.
const USED: f64 = 0.3;

/// Time in which Envoys report what they spent, and counters are complete.
const SETTLED: Duration = Duration::from_millis(700);

/// Requests of several keys with the same rate.
struct Traffic {
    /// Requests per second of each key.
    of_key: f64,
    keys: usize,
    lasts: Duration,
}

/// The slower a key is, the more keys there are, so that each row has some hundred requests and more.
fn traffic(quick: bool) -> Vec<Traffic> {
    let (short, long) = if quick { (1, 2) } else { (10, 20) };
    [(0.2, 250, long), (1.0, 50, short), (10.0, 10, short), (100.0, 2, short), (1_000.0, 1, short)]
        .map(|(of_key, keys, seconds)| Traffic { of_key, keys, lasts: Duration::from_secs(seconds) })
        .into()
}

/// What one run found.
struct Run {
    requests: usize,
    /// Requests that were not admitted.
    refused: usize,
    latencies_ms: Vec<f64>,
    counted: Counters,
    seconds: f64,
}

impl Run {
    fn percent_that_waits(&self) -> f64 {
        self.counted.waits as f64 / self.requests.max(1) as f64 * 100.0
    }

    fn calls_per_second(&self, envoys: usize) -> f64 {
        self.counted.calls as f64 / self.seconds / envoys as f64
    }
}

/// Counters of all Envoys together.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    waits: u64,
    calls: u64,
}

impl Counters {
    async fn read(stack: &Stack) -> Result<Self> {
        let mut sum = Self::default();
        for envoy in &stack.envoys {
            sum.waits += envoy.stat(WAITS_STAT).await?;
            sum.calls += envoy.stat(CALLS_STAT).await?;
        }
        Ok(sum)
    }

    const fn since(self, before: Self) -> Self {
        Self { waits: self.waits.saturating_sub(before.waits), calls: self.calls.saturating_sub(before.calls) }
    }
}

/// The control plane's transactions that answer calls.
struct Transactions {
    number: f64,
    seconds: f64,
}

impl Transactions {
    async fn read(stack: &Stack) -> Result<Self> {
        let of = async |part: &str| {
            let metric = format!("portcullis_allowance_batch_duration_seconds_{part}");
            store::read_metric(stack, &metric).await.with_context(|| format!("no metric {metric}"))
        };
        Ok(Self { number: of("count").await?, seconds: of("sum").await? })
    }

    fn mean_ms_since(&self, before: &Self) -> f64 {
        (self.seconds - before.seconds) / (self.number - before.number) * 1_000.0
    }
}

/// Connections to the Envoys of a stack, one each.
struct Fleet<'a> {
    stack: &'a Stack,
    connections: Vec<Arc<Envoy>>,
}

struct Envoy {
    connection: Http2Connection<OutgoingBody>,
    url: String,
}

impl Envoy {
    /// Sends a request with a key. Returns the latency and whether it was admitted.
    async fn send(&self, key: &str) -> Result<(f64, bool)> {
        let request = Request::get(&self.url).header("x-api-key", key).body(OutgoingBody::default())?;
        let sent = Instant::now();
        let reply = self.connection.send(request).await?;
        ensure!([200, 429].contains(&reply.status), "a request was answered with {}: {:?}", reply.status, reply.body);
        Ok((milliseconds(sent.elapsed()), reply.status == 200))
    }
}

impl<'a> Fleet<'a> {
    async fn connect(stack: &'a Stack) -> Result<Self> {
        let mut connections = Vec::new();
        for envoy in &stack.envoys {
            let (connection, url) =
                (Http2Connection::open(envoy.address()).await?, format!("http://{}/orders", envoy.address()));
            connections.push(Arc::new(Envoy { connection, url }));
        }
        Ok(Self { stack, connections })
    }

    fn any(&self, dice: &mut Dice) -> Result<&Arc<Envoy>> {
        self.connections.get(dice.below(self.connections.len())).context("no Envoy")
    }

    /// Runs requests, and counts what happens meanwhile.
    async fn count(&self, requests: impl Future<Output = Result<Vec<(f64, bool)>>>) -> Result<Run> {
        let (before, start) = (Counters::read(self.stack).await?, Instant::now());
        let answers = requests.await?;
        let seconds = start.elapsed().as_secs_f64();
        tokio::time::sleep(SETTLED).await;
        Ok(Run {
            requests: answers.len(),
            refused: answers.iter().filter(|(_, is_admitted)| !is_admitted).count(),
            latencies_ms: answers.into_iter().map(|(ms, _)| ms).collect(),
            counted: Counters::read(self.stack).await?.since(before),
            seconds,
        })
    }

    /// The first request of each key on each Envoy, one after the other on each.
    async fn warm_up(&self, keys: &[String]) -> Result<Vec<(f64, bool)>> {
        let at =
            async |envoy: &Arc<Envoy>| stream::iter(keys).then(|key| envoy.send(key)).try_collect::<Vec<_>>().await;
        let answers = try_join_all(self.connections.iter().map(at)).await?.concat();
        tokio::time::sleep(SETTLED).await;
        Ok(answers)
    }

    /// Requests at random times, with random keys, at random Envoys. They come whether earlier ones are answered or not.
    async fn load(
        &self,
        keys: &[String],
        per_second: f64,
        lasts: Duration,
        dice: &mut Dice,
    ) -> Result<Vec<(f64, bool)>> {
        let (mut sent, start) = (JoinSet::new(), tokio::time::Instant::now());
        let mut at = gap(dice, per_second);
        while at < lasts {
            tokio::time::sleep_until(start + at).await;
            let (envoy, key) =
                (Arc::clone(self.any(dice)?), keys.get(dice.below(keys.len())).context("no key")?.clone());
            sent.spawn(async move { envoy.send(&key).await });
            at += gap(dice, per_second);
        }
        let mut answers = Vec::new();
        while let Some(answer) = sent.join_next().await {
            answers.push(answer??);
        }
        Ok(answers)
    }

    /// Alternates requests with these keys and requests with a key without limits, one at a time. Returns the answers to both
    /// kinds.
    async fn alternate(
        &self,
        keys: &[String],
        free: &str,
        requests: usize,
        dice: &mut Dice,
    ) -> Result<[Vec<(f64, bool)>; 2]> {
        const PAUSE: Duration = Duration::from_millis(10);
        let (mut limited, mut unlimited) = (Vec::new(), Vec::new());
        for key in keys.iter().cycle().take(requests) {
            tokio::time::sleep(PAUSE).await;
            unlimited.push(self.any(dice)?.send(free).await?);
            tokio::time::sleep(PAUSE).await;
            limited.push(self.any(dice)?.send(key).await?);
        }
        Ok([limited, unlimited])
    }
}

/// The time to the next of requests that come independently of each other.
fn gap(dice: &mut Dice, per_second: f64) -> Duration {
    // 53 bits, above 0 and up to 1.
    let uniform = ((dice.number() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
    Duration::from_secs_f64(-uniform.ln() / per_second)
}

/// A limit of which this rate uses [`USED`], with [`ROOM`] for each Envoy. Its window is a second or more.
fn limit(per_second: f64, envoys: usize) -> Value {
    let allowed = per_second / USED;
    // Slow limits have long windows, since requests and seconds are whole numbers.
    let window_s = (ROOM * envoys as f64 / allowed).ceil().max(1.0);
    let requests = (allowed * window_s).ceil();
    json!({"name": "limit", "requests": requests as u64, "window_seconds": window_s as u64})
}

/// The same, with bursts of no more than [`ROOM`] for each Envoy.
fn small_limit(per_second: f64, envoys: usize) -> Value {
    let mut limit = limit(per_second, envoys);
    limit["burst"] = json!(ROOM as usize * envoys);
    limit
}

/// Creates keys with these limits; none: without a limit.
async fn keys(stack: &Stack, number: usize, limits: &[Value]) -> Result<Vec<String>> {
    let rest = stack.rest();
    let create = async |number: usize| {
        let email = format!("limits-{number}@example.com");
        let body = json!({"email": email, "name": "of the bench", "rate_limits": limits});
        rest.create_with(body).await.map(|(_, secret)| secret)
    };
    stream::iter(0..number).map(create).buffer_unordered(8).try_collect().await
}

pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let most = FLEETS.into_iter().max().unwrap_or_default();
    progress(&format!("suite limits: starting {most} Envoys"));
    let mut stack = store::builder(most)?.durable_postgres().workers(1).start().await?;
    let mut dice = Dice::new(5);
    // The percentages of requests that wait on one Envoy, and on several; times of waits.
    let (mut alone, mut several, mut took) = (Samples::default(), Samples::default(), Vec::new());
    for envoys in FLEETS {
        leave(&mut stack, envoys).await?;
        let fleet = Fleet::connect(&stack).await?;
        let mut cold = Vec::new();
        for traffic in traffic(options.quick) {
            let percentages = if envoys == 1 { &mut alone } else { &mut several };
            let run = requests_that_wait(&fleet, &traffic, &mut cold, &mut dice, report).await?;
            percentages.push(run.percent_that_waits());
        }
        let waited: u64 = cold.iter().map(|run: &Run| run.counted.waits).sum();
        let firsts: usize = cold.iter().map(|run| run.requests).sum();
        let percent = waited as f64 / firsts.max(1) as f64 * 100.0;
        if envoys == 1 {
            alone.push(percent);
        }
        report.figure(COLD, format!("{}, that wait", on(envoys)), "%", Estimate::exact(percent));
        let cold = Samples::in_groups([cold.into_iter().flat_map(|run| run.latencies_ms).collect()]);
        for (name, quantile) in [("p50", 0.5), ("p99", 0.99)] {
            report.figure(COLD, format!("{}, latency, {name}", on(envoys)), "ms", Estimate::at(&cold, quantile));
        }
        if envoys > 1 {
            small_bursts(&fleet, options.quick, &mut several, &mut dice, report).await?;
            took.push(waits(&fleet, if options.quick { 50 } else { 500 }, &mut dice, report).await?);
        }
        if envoys == 3 {
            nearly_full(&fleet, options.quick, &mut dice, report).await?;
        }
    }
    report.target(
        "requests that wait on one Envoy, the first of a key too",
        Bound::AtMost(0.0),
        "%",
        Estimate::worst(&alone),
    );
    let worst = Estimate::worst(&several);
    report.target("requests that wait on three and ten Envoys, worst", Bound::AtMost(2.5), "%", worst);
    let slowest = took.into_iter().max_by(|a, b| a.judged.total_cmp(&b.judged));
    report.target("time that a request waits, p99, worst of both", Bound::AtMost(20.0), "ms", slowest);
    Ok(())
}

/// Stops Envoys until this number is left.
async fn leave(stack: &mut Stack, envoys: usize) -> Result<()> {
    let stopped = stack.envoys.split_off(envoys.min(stack.envoys.len()));
    for envoy in &stopped {
        envoy.stop(Signal::SIGTERM).await?;
    }
    if !stopped.is_empty() {
        // An Envoy may end before its last call is sent. It counts as live until then.
        tokio::time::sleep(Duration::from_millis(limits::LIVE_MS) + SETTLED).await;
    }
    Ok(())
}

fn on(envoys: usize) -> String {
    if envoys == 1 { "1 Envoy".into() } else { format!("{envoys} Envoys") }
}

/// Warms the Envoys up, and sends the traffic. Returns what happened to the first requests, and to the others.
async fn run(fleet: &Fleet<'_>, traffic: &Traffic, limit: Value, dice: &mut Dice) -> Result<[Run; 2]> {
    let keys = keys(fleet.stack, traffic.keys, &[limit]).await?;
    fleet.stack.in_step().await?;
    // An Envoy that is alone asks for the limits of new keys on its next tick.
    tokio::time::sleep(SETTLED).await;
    let first = fleet.count(fleet.warm_up(&keys)).await?;
    let per_second = traffic.of_key * traffic.keys as f64;
    Ok([first, fleet.count(fleet.load(&keys, per_second, traffic.lasts, dice)).await?])
}

/// Measures how many requests wait if their key uses less than a third of its limit.
async fn requests_that_wait(
    fleet: &Fleet<'_>,
    traffic: &Traffic,
    cold: &mut Vec<Run>,
    dice: &mut Dice,
    report: &mut Report,
) -> Result<Run> {
    let envoys = fleet.connections.len();
    let name = format!("{}, {} requests/s of a key", on(envoys), traffic.of_key);
    progress(&format!("suite limits: {name}"));
    let [first, run] = run(fleet, traffic, limit(traffic.of_key, envoys), dice).await?;
    for (run, which) in [(&first, "first requests"), (&run, "requests")] {
        if run.refused > 0 {
            report.note(format!("Suite limits: {name}: {} of {} {which} were refused.", run.refused, run.requests));
        }
    }
    cold.push(first);
    report.figure(WAITS, name.as_str(), "%", Estimate::exact(run.percent_that_waits()));
    report.figure(CALLS, name.as_str(), "calls/s", Estimate::exact(run.calls_per_second(envoys)));
    Ok(run)
}

/// The same for keys whose bursts are small: an Envoy spends many of the tokens during one call. Adds the percentages of requests
/// that wait.
async fn small_bursts(
    fleet: &Fleet<'_>,
    quick: bool,
    several: &mut Samples,
    dice: &mut Dice,
    report: &mut Report,
) -> Result<()> {
    let envoys = fleet.connections.len();
    for traffic in traffic(quick).iter().filter(|traffic| traffic.of_key >= 10.0) {
        let name = format!("{}, {} requests/s of a key", on(envoys), traffic.of_key);
        progress(&format!("suite limits: {name}, small bursts"));
        let [_, run] = run(fleet, traffic, small_limit(traffic.of_key, envoys), dice).await?;
        report.figure(SMALL, name.as_str(), "%", Estimate::exact(run.percent_that_waits()));
        several.push(run.percent_that_waits());
        let refused = run.refused as f64 / run.requests.max(1) as f64 * 100.0;
        report.figure(SMALL, format!("{name}, refused"), "%", Estimate::exact(refused));
    }
    Ok(())
}

/// Requests that all wait, since their limits are too small for an allowance. Returns the p99 of the time.
async fn waits(fleet: &Fleet<'_>, requests: usize, dice: &mut Dice, report: &mut Report) -> Result<Estimate> {
    let envoys = fleet.connections.len();
    progress(&format!("suite limits: {}, each request waits", on(envoys)));
    let small = [json!({"name": "limit", "requests": 4, "window_seconds": 1})];
    let keys = keys(fleet.stack, 20, &small).await?;
    let free = self::keys(fleet.stack, 1, &[]).await?.pop().context("no key")?;
    fleet.stack.in_step().await?;
    let mut unlimited = Vec::new();
    let both = async {
        let [limited, others] = fleet.alternate(&keys, &free, requests, dice).await?;
        unlimited = others.into_iter().map(|(ms, _)| ms).collect();
        Ok(limited)
    };
    let before = Transactions::read(fleet.stack).await?;
    let run = fleet.count(both).await?;
    let transaction_ms = Transactions::read(fleet.stack).await?.mean_ms_since(&before);
    let unlimited = Samples::in_groups([unlimited]);
    let usual = unlimited.median();
    let waits = Samples::in_groups([run.latencies_ms.iter().map(|ms| (ms - usual).max(0.0)).collect()]);
    let p99 = Estimate::at(&waits, 0.99);
    report.figure(TOOK, format!("{}, p50", on(envoys)), "ms", Estimate::at(&waits, 0.5));
    report.figure(TOOK, format!("{}, p99", on(envoys)), "ms", p99);
    let name = format!("{}, mean time of one transaction", on(envoys));
    report.figure(TOOK, name, "ms", Estimate::exact(transaction_ms));
    report.note(format!(
        "Suite limits: on {}, {:.1} % of {} requests with a limit of 4/s waited, {} were refused; without a limit, a request \
         took {usual:.2} ms (median), {:.2} (p99).",
        on(envoys),
        run.percent_that_waits(),
        run.requests,
        run.refused,
        Estimate::at(&unlimited, 0.99).judged
    ));
    Ok(p99)
}

/// A limit that is used nearly to its end.
async fn nearly_full(fleet: &Fleet<'_>, quick: bool, dice: &mut Dice, report: &mut Report) -> Result<()> {
    progress("suite limits: a limit that is nearly used up");
    let keys = keys(fleet.stack, 1, &[json!({"name": "limit", "requests": 100, "window_seconds": 1})]).await?;
    fleet.stack.in_step().await?;
    fleet.warm_up(&keys).await?;
    let run = fleet.count(fleet.load(&keys, 90.0, Duration::from_secs(if quick { 2 } else { 20 }), dice)).await?;
    let refused = run.refused as f64 / run.requests.max(1) as f64 * 100.0;
    report.figure(FULL, "requests that wait", "%", Estimate::exact(run.percent_that_waits()));
    report.figure(FULL, "requests that are refused", "%", Estimate::exact(refused));
    let latencies = Samples::in_groups([run.latencies_ms.clone()]);
    report.figure(FULL, "latency of all requests, p50", "ms", Estimate::at(&latencies, 0.5));
    report.figure(FULL, "latency of all requests, p99", "ms", Estimate::at(&latencies, 0.99));
    report.figure(
        FULL,
        "calls of each Envoy",
        "calls/s",
        Estimate::exact(run.calls_per_second(fleet.connections.len())),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_the_room_of_the_promise_and_is_used_to_less_than_a_third() {
        for of_key in [0.2, 1.0, 10.0, 100.0, 1_000.0] {
            for envoys in FLEETS {
                let limit = limit(of_key, envoys);
                let number = |field: &str| limit[field].as_f64().unwrap();
                let used = of_key / (number("requests") / number("window_seconds"));
                assert!((0.25..USED + 1e-9).contains(&used), "{used}");
                assert!(number("requests") >= ROOM * envoys as f64);
                assert_eq!(small_limit(of_key, envoys)["burst"], 16 * envoys);
            }
        }
    }

    #[test]
    fn requests_come_at_the_rate_that_is_asked_for() {
        let mut dice = Dice::new(1);
        let sum: Duration = (0..10_000).map(|_| gap(&mut dice, 100.0)).sum();
        assert!((95.0..105.0).contains(&sum.as_secs_f64()), "{sum:?}");
    }

    #[test]
    fn each_row_has_hundreds_of_requests() {
        for Traffic { of_key, keys, lasts } in traffic(false) {
            assert!(of_key * keys as f64 * lasts.as_secs_f64() >= 500.0);
        }
    }
}
