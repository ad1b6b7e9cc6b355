//! Suite `request`: the CPU time of the Envoy process for each request, for each way to check a
//! key, and its excess over no filter. The ways alternate in random order, round by round.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use contract::record::Record;
use portcullis_harness::dice::Dice;
use portcullis_harness::log::Log;
use portcullis_harness::output::progress;
use portcullis_harness::process::{Process, Signal};
use portcullis_harness::{compile, paths};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Options;
use crate::feed::{Feed, key};
use crate::load::{Answers, H2load};
use crate::machine::{self, Cores};
use crate::peers::Peer;
use crate::report::Report;
use crate::rows::{FORWARDED_PATH, RULED_PATH, by_rules, limited, limited_by_each, orders, with_credits, with_quota};
use crate::server::{Server, free_port};
use crate::stats::Samples;

mod judge;

use judge::judge;

const SUITE: &str = "request: added CPU, same Envoy, one worker";
const WHOLE: &str = "request: CPU of the whole request";
const UNIT: &str = "µs";

/// Envoys for each row, one after the other. The placement of a process in memory, and so its cache conflicts, is fixed at its
/// start and makes a difference of several microseconds. More processes therefore tell more than more rounds.
const PROCESSES: usize = 12;
/// Rounds of each Envoy, unless `--rounds` is given.
const ROUNDS: usize = 3;

/// Requests in a sample.
const REQUESTS: u64 = 4_000;

/// Names of rows that verdicts use.
const NOTHING: &str = "no filter";
const EMPTY: &str = "empty filter of the Rust SDK";
const NATIVE: &str = "api_key_auth, 1,000 keys, forwarding";
const LUA: &str = "Lua table, 1,000 keys";
const AUTHZ_HTTP: &str = "ext_authz, HTTP, instant answer";
const AUTHZ_GRPC: &str = "ext_authz, gRPC, tonic (its CPU not counted)";
const PLAIN: &str = "Portcullis, 1,000 keys";
/// The same with a thousand keys of about ten requests a second, for which an Envoy asks with every second request.
const ALL_LIMITED: &str = "Portcullis, 1,000 keys, each with a rate limit";
const ENVOY_REMOVES: &str = "Portcullis, 1,000 keys, Envoy removes identity headers";
const PACKED: &str = "Portcullis, 1,000 keys, and one packed identity header";
const POLICY: &str = "Portcullis, 1,000 keys, route policy";
const RULES: &str = "Portcullis, 1,000 keys, one of 1,000 rules";
const RULES_ONLY: &str = "Portcullis, 1,000 keys, one of 1,000 rules, and no other source of policies";
/// Rows with few keys in use, so that nearly every request finds an allowance.
const LOCAL: &str = "Portcullis, 10 keys in use, each with a limit of each Envoy";
const LIMITED: &str = "Portcullis, 10 keys in use, each with a rate limit";
const SHOWN: &str = "Portcullis, 10 keys in use, each with a rate limit that each response shows";
const QUOTA: &str = "Portcullis, 10 keys in use, each with a quota";
const CREDITS: &str = "Portcullis, 10 keys in use, each with credits";
const UNKNOWN: &str = "Portcullis, 1,000 keys, unknown key";
const MILLION: &str = "Portcullis, 1,000,000 keys";
const OF_MILLION: &str = "Portcullis, 1,000,000 keys, of which 1,000 are used";
const NOTHING_UP: &str = "no filter, to an upstream";
const KNOWN_UP: &str = "Portcullis, known key, to an upstream";
const POLICY_UP: &str = "Portcullis, route policy, to an upstream";
const RULES_UP: &str = "Portcullis, one of 1,000 rules, to an upstream";
const UNKNOWN_UP: &str = "Portcullis, unknown key, same route";

/// The rows that the suite `limits` needs.
pub(crate) const OF_LIMITS: [&str; 6] = [PLAIN, LOCAL, LIMITED, QUOTA, CREDITS, ALL_LIMITED];

/// A row that is measured, and its process.
struct Subject {
    name: String,
    process: u32,
    /// Addresses of requests before a sample.
    warm_up: PathBuf,
    /// Addresses of the requests of each round. They differ, so that no cache has them from the round before.
    files: Vec<PathBuf>,
    /// Whether its requests are refused.
    refused: bool,
    samples: Vec<Sample>,
}

/// Samples of a row, by process.
struct Row {
    name: String,
    samples: Vec<Vec<Sample>>,
}

struct Sample {
    /// CPU time of a request.
    micros: f64,
    /// Time of the probe of the core before and after.
    probe: Duration,
}

/// The probe of a core, and its fastest time.
struct Speed {
    core: usize,
    fastest: Duration,
}

/// The process and the address of an Envoy.
type Place = (u32, SocketAddr);

/// Everything that runs during measurements.
struct Running<'a> {
    options: &'a Options,
    cores: Cores,
    rounds: usize,
    /// A directory for files.
    home: &'a Path,
    /// An Envoy that answers.
    upstream: SocketAddr,
    subjects: Vec<Subject>,
    servers: Vec<Server>,
    feeds: Vec<Feed>,
    others: Vec<Process>,
}

/// Measures. Also after a failure, later suites have all cores.
pub(crate) async fn measure(options: &Options, cores: Cores, report: &mut Report) -> Result<()> {
    // Compilation may use all cores too.
    let generator = H2load::install()?;
    let empty = compile::empty_filter()?;
    cores.stay_off()?;
    let measured = measure_on(options, cores, &generator, &empty, report).await;
    cores.spread()?;
    measured
}

async fn measure_on(
    options: &Options,
    cores: Cores,
    generator: &H2load,
    empty: &Path,
    report: &mut Report,
) -> Result<()> {
    let (processes, requests) = if options.quick { (1, REQUESTS / 2) } else { (PROCESSES, REQUESTS) };
    let rounds = options.rounds.unwrap_or(ROUNDS * processes).div_ceil(processes);
    let mut rows: Vec<Row> = Vec::new();
    let mut random = Dice::new(1);
    let mut speed = Speed { core: cores.measured, fastest: Duration::MAX };
    for process in 1..=processes {
        let home = TempDir::with_prefix("portcullis-bench-")?;
        let mut running = Running::on(cores, rounds, options, home.path()).await?;
        running.start_others(empty).await?;
        running.start_stores(report).await?;
        running.start_variants().await?;
        ensure!(running.subjects.len() > 1, "--row: no row has one of {:?} in its name", options.row);
        for round in 0..rounds {
            progress(&format!("suite request: Envoys {process} of {processes}, round {} of {rounds}", round + 1));
            let mut order: Vec<usize> = (0..running.subjects.len()).collect();
            random.shuffle(&mut order);
            for place in order {
                let Some(subject) = running.subjects.get_mut(place) else { continue };
                subject.sample(generator, cores.load, &mut speed, round, requests).await?;
            }
        }
        for (place, Subject { name, samples, .. }) in running.subjects.into_iter().enumerate() {
            match rows.get_mut(place) {
                Some(row) => row.samples.push(samples),
                None => rows.push(Row { name, samples: vec![samples] }),
            }
        }
    }
    report.note(format!(
        "Suite request: {processes} Envoys for each row, one after the other, each in {rounds} rounds of {requests} requests, h2load \
         over one HTTP/2 connection; a figure is the mean of what each of them gives on its own, verdicts are from lower \
         quartiles. Each sample is divided by how much slower than ever the core was before and after it."
    ));
    let measured: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.at_full_speed(speed.fastest))).collect();
    judge(&measured, report);
    Ok(())
}

impl Speed {
    fn probe(&mut self) -> Result<Duration> {
        let took = machine::probe(self.core)?;
        self.fastest = self.fastest.min(took);
        Ok(took)
    }
}

impl Subject {
    async fn sample(
        &mut self,
        generator: &H2load,
        from: usize,
        speed: &mut Speed,
        round: usize,
        requests: u64,
    ) -> Result<()> {
        let file = self.files.get(round).context("no addresses")?;
        // With other addresses, so that only code and connections are warm.
        generator.send(requests / 5, &self.warm_up, from).await?;
        let before = speed.probe()?;
        let used_before = machine::cpu_ns(self.process)?;
        let answers = generator.send(requests, file, from).await?;
        let used_ns = machine::cpu_ns(self.process)? - used_before;
        let probe = (before + speed.probe()?) / 2;
        let expected = if self.refused {
            Answers { good: 0, refused: requests, failed: 0 }
        } else {
            Answers { good: requests, refused: 0, failed: 0 }
        };
        ensure!(answers == expected, "{}: {answers:?} instead of {expected:?}", self.name);
        self.samples.push(Sample { micros: used_ns as f64 / requests as f64 / 1_000.0, probe });
        Ok(())
    }
}

impl Row {
    /// The samples, scaled to the fastest speed of the core.
    fn at_full_speed(&self, fastest: Duration) -> Samples {
        let slower = |sample: &Sample| sample.probe.as_secs_f64() / fastest.as_secs_f64();
        let of = |samples: &Vec<Sample>| samples.iter().map(|sample| sample.micros / slower(sample)).collect();
        Samples::in_groups(self.samples.iter().map(of))
    }
}

/// The plugin configuration without the rate limit of keys that have none of their own.
fn unlimited_plugin() -> Value {
    json!({"rate_limit": null})
}

impl<'a> Running<'a> {
    async fn on(cores: Cores, rounds: usize, options: &'a Options, home: &'a Path) -> Result<Self> {
        progress("suite request: starting the peers");
        let server = Server::start(&Peer::nothing().config(), 1, Some(cores.load)).await?;
        let (subjects, feeds, others) = (Vec::new(), Vec::new(), Vec::new());
        let (upstream, servers) = (server.address, vec![server]);
        Ok(Self { options, cores, rounds, home, upstream, subjects, servers, feeds, others })
    }

    /// Starts the selected rows that are not Portcullis, and always the row without a filter.
    async fn start_others(&mut self, empty: &Path) -> Result<()> {
        let place = self.serve(&Peer::nothing().with_upstream(self.upstream)).await?;
        self.subject(NOTHING, place, "/", 0..1_000, false)?;
        if self.options.wants(NOTHING_UP) {
            self.subject(NOTHING_UP, place, "/up", 0..1_000, false)?;
        }
        let lua = self.home.join("keys.lua");
        let peers: [(_, &dyn Fn() -> Result<Peer>); 4] = [
            (EMPTY, &|| Ok(Peer::empty(empty))),
            (NATIVE, &|| Ok(Peer::api_key_auth(1_000))),
            (LUA, &|| Peer::lua(1_000, &lua)),
            (AUTHZ_HTTP, &|| Ok(Peer::ext_authz_http(free_port()?))),
        ];
        for (name, peer) in peers {
            if self.options.wants(name) {
                let place = self.serve(&peer()?).await?;
                self.subject(name, place, "/", 0..1_000, false)?;
            }
        }
        if self.options.wants(AUTHZ_GRPC) {
            let (process, address) = authorizer(self.home, self.cores).await?;
            self.others.push(process);
            let place = self.serve(&Peer::ext_authz_grpc(address)).await?;
            self.subject(AUTHZ_GRPC, place, "/", 0..1_000, false)?;
        }
        Ok(())
    }

    /// Starts Portcullis with different numbers of keys.
    async fn start_stores(&mut self, report: &mut Report) -> Result<()> {
        // Name, number of keys, number of used keys.
        let stores = [
            ("Portcullis, 10 keys", 10, 10),
            (PLAIN, 1_000, 1_000),
            ("Portcullis, 100,000 keys", 100_000, 100_000),
            (MILLION, 1_000_000, 1_000_000),
            (OF_MILLION, 1_000_000, 1_000),
        ];
        for (name, keys, used) in stores {
            let unknown = 10_000_000..11_000_000;
            let mut rows = vec![(name, "/", 0..used, false)];
            if keys == 1_000 {
                rows.push((UNKNOWN, "/", unknown.clone(), true));
                rows.push((KNOWN_UP, "/up", 0..keys, false));
                rows.push((UNKNOWN_UP, "/up", unknown, true));
            }
            rows.retain(|(name, ..)| self.options.wants(name));
            if rows.is_empty() {
                continue;
            }
            if self.options.quick && keys > 100_000 {
                report.note(format!("A quick run leaves out: {name}."));
                continue;
            }
            progress(&format!("suite request: {name}"));
            let place = self.portcullis(&paths::wasm(), keys, |_| (), unlimited_plugin()).await?;
            for (name, path, keys, refused) in rows {
                self.subject(name, place, path, keys, refused)?;
            }
        }
        Ok(())
    }

    /// Starts Portcullis with other records and settings, and other builds of it.
    async fn start_variants(&mut self) -> Result<()> {
        let filter = paths::wasm();
        let limits: [(_, fn(&mut Record), _); 5] = [
            (LOCAL, limited_by_each, 10),
            (LIMITED, limited, 10),
            (QUOTA, with_quota, 10),
            (CREDITS, with_credits, 10),
            (ALL_LIMITED, limited, 1_000),
        ];
        for (name, change, used) in limits {
            self.variant(name, &filter, change, unlimited_plugin(), used).await?;
        }
        let mut showing = unlimited_plugin();
        showing["rate_limit_state"] = true.into();
        self.variant(SHOWN, &filter, limited, showing, 10).await?;
        for filter in &self.options.beside {
            self.start_beside(filter).await?;
        }
        let mut plugin = unlimited_plugin();
        plugin["envoy_removes_identity_headers"] = true.into();
        self.variant(ENVOY_REMOVES, &filter, |_| (), plugin.clone(), 1_000).await?;
        plugin["identity_headers"] = json!({"packed": "x-identity"});
        self.variant(PACKED, &filter, |_| (), plugin, 1_000).await?;
        let scope = |record: &mut Record| record.scopes = vec!["orders:read".into()];
        for (name, path) in [(POLICY, "/"), (POLICY_UP, "/up")] {
            if self.options.wants(name) {
                let feed = Feed::start(1_000, scope, &[orders()]).await?;
                let place = self.on_feed(&filter, 1_000, feed, unlimited_plugin(), Some("orders")).await?;
                self.subject(name, place, path, 0..1_000, false)?;
            }
        }
        for (name, path) in [(RULES, RULED_PATH), (RULES_UP, FORWARDED_PATH)] {
            if self.options.wants(name) {
                let feed = Feed::start(1_000, |_| (), &by_rules()).await?;
                let place = self.on_feed(&filter, 1_000, feed, unlimited_plugin(), None).await?;
                self.subject(name, place, path, 0..1_000, false)?;
            }
        }
        if self.options.wants(RULES_ONLY) {
            let feed = Feed::start(1_000, |_| (), &by_rules()).await?;
            let mut plugin = unlimited_plugin();
            plugin["policy_sources"] = json!(["rules"]);
            let place = self.on_feed(&filter, 1_000, feed, plugin, None).await?;
            self.subject(RULES_ONLY, place, RULED_PATH, 0..1_000, false)?;
        }
        Ok(())
    }

    /// Starts another build of the filter.
    async fn start_beside(&mut self, filter: &Path) -> Result<()> {
        // Envoy runs in a directory of its own.
        let file = filter.canonicalize().with_context(|| format!("--beside: {} cannot be read", filter.display()))?;
        let name = |keys: &str| format!("{}, {keys} keys", filter.display());
        // A few keys of many that are used repeatedly are cached like those of a small store.
        let stores = [
            (1_000, vec![("1,000", 1_000)]),
            (1_000_000, vec![("1,000,000", 1_000_000), ("1,000 of 1,000,000", 1_000)]),
        ];
        for (keys, mut rows) in stores {
            rows.retain(|(asked, _)| self.options.wants(&name(asked)));
            if !rows.is_empty() {
                let place = self.portcullis(&file, keys, |_| (), unlimited_plugin()).await?;
                for (asked, keys) in rows {
                    self.subject(&name(asked), place, "/", 0..keys, false)?;
                }
            }
        }
        let limited_name = format!("{}, each with a rate limit", name("1,000"));
        self.variant(&limited_name, &file, limited, unlimited_plugin(), 1_000).await
    }

    /// Starts a row with 1,000 keys, if it is selected. Its requests use the first `used` keys.
    async fn variant(
        &mut self,
        name: &str,
        filter: &Path,
        change: fn(&mut Record),
        plugin: Value,
        used: u64,
    ) -> Result<()> {
        if !self.options.wants(name) {
            return Ok(());
        }
        let place = self.portcullis(filter, 1_000, change, plugin).await?;
        self.subject(name, place, "/", 0..used, false)
    }

    /// Starts an Envoy on the core for what is measured.
    async fn serve(&mut self, peer: &Peer) -> Result<Place> {
        let server = Server::start(&peer.config(), 1, Some(self.cores.measured)).await?;
        let place = (server.pid(), server.address);
        self.servers.push(server);
        Ok(place)
    }

    async fn portcullis(
        &mut self,
        filter: &Path,
        keys: u64,
        change: impl Fn(&mut Record),
        plugin: Value,
    ) -> Result<Place> {
        let feed = Feed::start(keys, change, &[]).await?;
        self.on_feed(filter, keys, feed, plugin, None).await
    }

    /// Starts Portcullis with the keys and policies of a feed.
    async fn on_feed(
        &mut self,
        filter: &Path,
        keys: u64,
        feed: Feed,
        plugin: Value,
        policy: Option<&str>,
    ) -> Result<Place> {
        let mut peer = Peer::portcullis(filter, feed.address, plugin).with_upstream(self.upstream);
        if let Some(policy) = policy {
            peer = peer.with_policy(policy);
        }
        let place = self.serve(&peer).await?;
        self.servers.last().context("no server")?.wait_for_keys(keys).await?;
        self.feeds.push(feed);
        Ok(place)
    }

    fn subject(
        &mut self,
        name: &str,
        place: Place,
        path: &str,
        keys: std::ops::Range<u64>,
        refused: bool,
    ) -> Result<()> {
        let file = |number: usize| -> Result<PathBuf> {
            let file = self.home.join(format!("{}-{number}.urls", self.subjects.len()));
            let mut random = Dice::new(number as u64);
            let width = usize::try_from(keys.end - keys.start)?;
            let line = |_| {
                let chosen = keys.start + random.below(width) as u64;
                format!("http://{}{path}?key={}\n", place.1, key(chosen))
            };
            std::fs::write(&file, (0..REQUESTS).map(line).collect::<String>())?;
            Ok(file)
        };
        let files = (0..self.rounds).map(file).collect::<Result<_>>()?;
        let (name, process, warm_up) = (name.to_owned(), place.0, file(self.rounds)?);
        self.subjects.push(Subject { name, process, warm_up, files, refused, samples: Vec::new() });
        Ok(())
    }
}

/// Starts the gRPC authorizer on the core of the load generator.
async fn authorizer(home: &Path, cores: Cores) -> Result<(Process, SocketAddr)> {
    let file = home.join("authorizer.address");
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("authorizer").arg("--address-file").arg(&file);
    machine::pin(&mut command, cores.load)?;
    let log = Log::create(&home.join("authorizer.log"))?;
    let process = Process::spawn("the authorizer", command, &log, Signal::SIGKILL)?;
    let address = process.address_in(&file).await?;
    Ok((process, address))
}
