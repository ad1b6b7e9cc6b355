//! Suite `sync`: how soon Envoys have all keys after a cold start, one change under load, a change
//! of a role, and one change among a thousand pollers; and the cost for the syncing thread and the
//! control plane.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use hyper::Method;
use portcullis_harness::dice::Dice;
use portcullis_harness::envoy::until_all;
use portcullis_harness::http::Connection;
use portcullis_harness::output::progress;
use portcullis_harness::paths;
use portcullis_harness::stack::{Stack, wait_for_status};
use serde_json::json;
use sqlx::types::Uuid;
use tokio::task::JoinSet;

use crate::Options;
use crate::load::{Answers, H2load, Took, call, rest_call};
use crate::machine;
use crate::peers::Peer;
use crate::report::{Bound, Report};
use crate::server::Server;
use crate::stats::{Estimate, Samples, Side};
use crate::store::{self, milliseconds};

const COLD: &str = "sync: cold start";
const CHANGE: &str = "sync: one change";
const POLLERS: &str = "sync: many pollers";

/// Most of what filters receive of every key, as columns.
const COPY: &str = "copy (select hash, id, owner_id, generation, scopes, rate_limits, cost, expires_at, disabled, revoked_at \
    from api_keys) to stdout";

pub(crate) async fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let sizes: &[u64] = if options.quick { &[100_000] } else { &[100_000, 1_000_000] };
    for &keys in sizes {
        cold(options, keys, report).await?;
    }
    change(options, report).await?;
    role(options, report).await?;
    pollers(options, report).await
}

/// What one cold start took.
struct Cold {
    from_start: Duration,
    from_live: Duration,
    longest_stall: Duration,
}

async fn cold(options: &Options, keys: u64, report: &mut Report) -> Result<()> {
    let stack = store::start(0).await?;
    store::fill(&stack, keys).await?;
    let rounds = if options.quick { 2 } else { 5 };
    let (mut copies, mut starts, mut syncs, mut stalls) =
        (Samples::default(), Samples::default(), Samples::default(), Samples::default());
    let mut random = Dice::new(keys);
    // One round before those that count: what is read finds no cache full.
    for round in 0..=rounds {
        progress(&format!("suite sync: {keys} keys, round {round} of {rounds}"));
        for side in Side::both(&mut random) {
            match side {
                Side::Theirs => {
                    let took = copy(&stack).await?;
                    if round > 0 {
                        copies.push(took.as_secs_f64());
                    }
                }
                Side::Ours => {
                    let Cold { from_start, from_live, longest_stall } = start_cold(&stack, keys).await?;
                    // Of stalls the worst counts, of the first round too.
                    stalls.push(milliseconds(longest_stall));
                    if round > 0 {
                        starts.push(from_start.as_secs_f64());
                        syncs.push(from_live.as_secs_f64());
                    }
                }
            }
        }
    }
    report.figure(COLD, format!("COPY of {keys} rows to a client"), "s", Estimate::plain(&copies));
    let ratio = Estimate::by_the_round(&syncs, &copies);
    let from_live = format!("Portcullis, {keys} keys, from a live Envoy to all loaded");
    report.compared(COLD, from_live, "s", Estimate::plain(&syncs), Some((ratio, "COPY")));
    let from_start = format!("Portcullis, {keys} keys, from the start of Envoy");
    let compared = Some((Estimate::by_the_round(&starts, &copies), "COPY"));
    report.compared(COLD, from_start, "s", Estimate::plain(&starts), compared);
    let worst = Estimate::worst(&stalls);
    report.figure(COLD, format!("Portcullis, {keys} keys, longest stall of the syncing thread"), "ms", worst);
    if options.quick || keys == 1_000_000 {
        report.target("cold sync ÷ COPY of the same rows to a client", Bound::AtMost(3.0), "", ratio);
        report.target("longest stall while syncing", Bound::AtMost(10.0), "ms", worst);
    }
    Ok(())
}

async fn copy(stack: &Stack) -> Result<Duration> {
    let mut connection = stack.database.connect().await?;
    let start = Instant::now();
    let mut rows = connection.copy_out_raw(COPY).await?;
    let mut bytes = 0;
    while let Some(part) = rows.next().await {
        bytes += part?.len();
    }
    ensure!(bytes > 0, "COPY gave nothing");
    Ok(start.elapsed())
}

/// Starts an Envoy and asks its admin interface over and over. The main thread answers there, and it is the main thread
/// that syncs: whatever it does in one piece keeps an answer waiting.
async fn start_cold(stack: &Stack, keys: u64) -> Result<Cold> {
    let peer = Peer::portcullis(&paths::wasm(), stack.control_plane.address(), json!({"rate_limit": null}));
    let sync_key = stack.control_plane.settings().sync_key;
    let start = Instant::now();
    let server = Server::start_with_key(&peer.config(), 2, None, &sync_key).await?;
    let live = Instant::now();
    let mut admin = Connection::open(server.admin).await?;
    let mut longest_stall = Duration::ZERO;
    loop {
        let asked = Instant::now();
        let stats = admin.get("/stats?format=json&filter=wasmcustom.portcullis.store.keys", None).await?.json()?;
        longest_stall = longest_stall.max(asked.elapsed());
        if stats["stats"].as_array().into_iter().flatten().any(|stat| stat["value"].as_u64() >= Some(keys)) {
            break;
        }
        ensure!(start.elapsed() < Duration::from_secs(120), "the keys do not arrive");
        // Other work of the main thread gets its turn.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(Cold { from_start: start.elapsed(), from_live: live.elapsed(), longest_stall })
}

const PER_SECOND: u32 = 2_000;
/// Of that, what must have flowed for the figures to be of an Envoy under load.
const LEAST_FLOW: f64 = 0.95;
/// Changes before those that count.
const WARM_UP: u32 = 10;

/// Callers that create keys at once, beside other changes.
const CREATE_AT_ONCE: usize = 8;

async fn change(options: &Options, report: &mut Report) -> Result<()> {
    let stack = store::start(1).await?;
    let lasts = Duration::from_secs(if options.quick { 4 } else { 20 });
    progress(&format!("suite sync: changes while requests flow, for {} s", lasts.as_secs()));
    let (to, key) = (stack.envoy().address(), stack.working_key("flow@example.com").await?);
    let generator = H2load::install()?;
    // Whatever happens here, it ends with this.
    let mut flowing = JoinSet::new();
    flowing.spawn(async move { generator.flow(to, &key, PER_SECOND, lasts).await });
    let (took, counted, Answers { good, refused, failed }) = revocations(&stack, "user", &mut flowing).await?;
    ensure!(refused + failed == 0, "a key that nobody revoked was refused {refused} times, {failed} requests failed");
    let rate = good as f64 / lasts.as_secs_f64();
    let least = f64::from(PER_SECOND) * LEAST_FLOW;
    ensure!(rate >= least, "only {rate:.0} requests/s flowed instead of {PER_SECOND}");
    report.note(format!("Suite sync: {rate:.0} requests/s by h2load flowed beside {counted} changes that count."));
    report.figure(CHANGE, "Portcullis, change → refused by all workers, p50", "ms", Estimate::at(&took, 0.5));
    let p99 = Estimate::at(&took, 0.99);
    report.figure(CHANGE, "Portcullis, change → refused by all workers, p99", "ms", p99);
    report.target("change → refused on all workers, p99, with load", Bound::AtMost(10.0), "ms", p99);

    let number = if options.quick { 1_500 } else { 10_000 };
    progress(&format!("suite sync: changes while {number} keys are created"));
    let create = |n| {
        let body = json!({"email": format!("many-{n}@example.com"), "name": "Bench"});
        rest_call(&stack, Method::POST, "/v1/keys", Some(&body))
    };
    let calls = (0..number).map(create).collect::<Result<_>>()?;
    let mut creating = JoinSet::new();
    creating.spawn(call(stack.control_plane.address(), CREATE_AT_ONCE, calls));
    let (took, counted, Took { seconds, .. }) = revocations(&stack, "other", &mut creating).await?;
    let rate = f64::from(number) / seconds;
    report.note(format!("Suite sync: {rate:.0} keys a second were created beside {counted} changes that count."));
    report.figure(CHANGE, "Portcullis, the same while eight callers create keys, p50", "ms", Estimate::at(&took, 0.5));
    report.figure(CHANGE, "Portcullis, the same while eight callers create keys, p99", "ms", Estimate::at(&took, 0.99));
    Ok(())
}

/// Makes keys and revokes them, one after the other, until what happens beside ends; gives how long it took from the answer to
/// the revocation until every worker refused, for how many, and what came of the other.
async fn revocations<T: 'static>(
    stack: &Stack,
    whose: &str,
    beside: &mut JoinSet<Result<T>>,
) -> Result<(Samples, u32, T)> {
    let (rest, envoy) = (stack.rest(), stack.envoy());
    let mut workers = envoy.connection_per_worker().await?;
    let mut took = Samples::default();
    let mut tries = 0;
    loop {
        let email = format!("{whose}{tries}@example.com");
        let key = rest.generate(&email).await?;
        wait_for_status(envoy, Some(&key), 200).await?;
        rest.revoke(&email).await?;
        let refused = until_all(&mut workers, "/", &key, 401).await?;
        // What the end of the other fell into does not count.
        if let Some(done) = beside.try_join_next() {
            ensure!(tries > 2 * WARM_UP, "only {tries} changes beside it");
            return Ok((took, tries - WARM_UP, done??));
        }
        tries += 1;
        if tries > WARM_UP {
            took.push(milliseconds(refused));
        }
    }
}

/// Keys that have the role.
const HAVE_ROLE: usize = 200;

/// The time from a role's loss of the scope that a route requires until every worker refuses one of its keys.
async fn role(options: &Options, report: &mut Report) -> Result<()> {
    store::build()?;
    let policies = json!({"orders-read": {"scopes": {"all": ["orders:read"]}}});
    let plugin = json!({"rate_limit": null});
    let stack = Stack::builder().own_postgres().route("/orders", "orders-read").plugin(&plugin).policies(&policies);
    let stack = stack.start().await?;
    let (rest, envoy) = (stack.rest(), stack.envoy());
    let changes = if options.quick { 10 } else { 200 };
    progress(&format!("suite sync: {changes} changes of a role"));
    let grant = async |scope: &str| {
        let reply = rest.call(Method::PUT, "/v1/roles/bench", Some(&json!({"scopes": [scope]}))).await?;
        ensure!([200, 201].contains(&reply.status), "a role: {} {:?}", reply.status, reply.body);
        stack.in_step().await
    };
    grant("orders:read").await?;
    let mut keys = Vec::new();
    for number in 0..HAVE_ROLE {
        let body = json!({"email": format!("role{number}@example.com"), "name": "Bench", "roles": ["bench"]});
        let made = rest.expect(Method::POST, "/v1/keys", Some(&body), 201).await?;
        keys.push(made["secret"].as_str().context("no key")?.to_owned());
    }
    stack.in_step().await?;
    let mut workers = envoy.connection_per_worker().await?;
    let mut took = Samples::default();
    for number in 0..WARM_UP + changes {
        let key = keys.get(number as usize % HAVE_ROLE).context("no keys")?;
        ensure!(workers[0].get("/orders", Some(key)).await?.status == 200, "the role does not open the route");
        let body = json!({"scopes": ["users:read"]});
        rest.expect(Method::PUT, "/v1/roles/bench", Some(&body), 200).await?;
        let refused = until_all(&mut workers, "/orders", key, 403).await?;
        if number >= WARM_UP {
            took.push(milliseconds(refused));
        }
        grant("orders:read").await?;
    }
    let p99 = Estimate::at(&took, 0.99);
    report.figure(CHANGE, "Portcullis, role changed → refused by all workers, p50", "ms", Estimate::at(&took, 0.5));
    report.figure(CHANGE, "Portcullis, role changed → refused by all workers, p99", "ms", p99);
    report.target("role changed → refused on all workers, p99", Bound::AtMost(50.0), "ms", p99);
    Ok(())
}

/// Polls that are held at once, each on a connection of its own.
const MANY: usize = 1_000;

async fn pollers(options: &Options, report: &mut Report) -> Result<()> {
    let stack = store::start(0).await?;
    let process = store::control_plane_pid(&stack)?;
    let sync_key = stack.control_plane.settings().sync_key;
    let changes = if options.quick { 3 } else { 10 };
    progress(&format!("suite sync: {changes} changes with {MANY} pollers"));
    let few = machine::resident_bytes(process)?;
    let mut connections = Vec::new();
    for _ in 0..MANY {
        connections.push(Connection::open(stack.control_plane.address()).await?);
    }
    let (mut last, mut cpu, mut memory) = (Samples::default(), Samples::default(), Samples::default());
    // One change before those that count.
    for number in 0..=changes {
        let position = stack.database.text("select epoch || ' ' || revision from store_state").await?;
        let (epoch, revision) = position.split_once(' ').context("the store has no state")?;
        let mut polls = JoinSet::new();
        for (place, mut connection) in connections.drain(..).enumerate() {
            // Each is an Envoy of its own to the control plane, which keeps account of them.
            let reporter = Uuid::from_u128(place as u128);
            let of = format!("reporter={reporter}&version={}&pending=0", env!("CARGO_PKG_VERSION"));
            let path = format!("/sync/v1/keys?epoch={epoch}&revision={revision}&{of}");
            let key = sync_key.reveal().to_owned();
            polls.spawn(async move {
                let reply = connection.get(&path, Some(&key)).await?;
                ensure!(reply.status == 200, "a poll was answered with {}", reply.status);
                Ok((connection, Instant::now()))
            });
        }
        store::reaches(&stack, "portcullis_sync_polls_in_flight", MANY as f64).await?;
        let held = machine::resident_bytes(process)?.saturating_sub(few);
        let before = machine::cpu_ns(process)?;
        stack.rest().generate(&format!("change{number}@example.com")).await?;
        let answered = Instant::now();
        let mut latest = answered;
        while let Some(done) = polls.join_next().await {
            let (connection, at) = done??;
            latest = latest.max(at);
            connections.push(connection);
        }
        if number > 0 {
            last.push(milliseconds(latest - answered));
            cpu.push(by_one(machine::cpu_ns(process)?.saturating_sub(before)) / 1_000.0);
            memory.push(by_one(held) / 1_024.0);
        }
    }
    report.figure(
        POLLERS,
        format!("Portcullis, {MANY} pollers, change → the last has it"),
        "ms",
        Estimate::plain(&last),
    );
    report.figure(POLLERS, "Portcullis, CPU of the control plane by poller and change", "µs", Estimate::plain(&cpu));
    report.figure(POLLERS, "Portcullis, memory of the control plane by held poll", "KiB", Estimate::plain(&memory));
    report.target("1,000 pollers: change at the last one", Bound::AtMost(250.0), "ms", Estimate::plain(&last));
    Ok(())
}

fn by_one(sum: u64) -> f64 {
    sum as f64 / MANY as f64
}
