//! Loads on one pool, and the table of what was seen.

use limits::pool::{Kind, PoolId, Terms};

use crate::envoy::Need;
use crate::judge::Findings;
use crate::pool;
use crate::world::{Event, MS, Network, S, World};

/// To which Envoys the requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    Sticky,
    RoundRobin,
    Random,
}

/// Requests at random times.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in 1,000 seconds.
    pub per_1000_s: u64,
    /// How many come within some milliseconds.
    pub burst: u64,
    pub spread: Spread,
    /// The least and the highest price.
    pub price: (u64, u64),
}

/// Schedules a load that begins in two seconds. Returns when it ends.
pub fn schedule(world: &mut World, id: PoolId, terms: &Terms, load: Load, seconds: u64) -> u64 {
    let rate = match terms {
        Terms::Rate(rate) => Some(*rate),
        Terms::Stock { .. } => None,
    };
    let mean_ns = 1_000 * S * load.burst / load.per_1000_s;
    let mut at_ns = world.now_ns + 2 * S;
    let end_ns = at_ns + seconds * S;
    let sticky = world.next_envoy();
    while at_ns < end_ns {
        for _ in 0..load.burst {
            let envoy = match load.spread {
                Spread::Sticky => sticky,
                Spread::RoundRobin => world.next_envoy(),
                Spread::Random => usize::try_from(world.random.below(world.envoys.len() as u64)).unwrap(),
            };
            let cost = world.random.between(load.price.0, load.price.1);
            world.at(at_ns, Event::Request { envoy, needs: vec![Need { pool: id, cost, rate }] });
            at_ns += world.random.below(2 * MS);
        }
        at_ns += world.random.exponential_ns(mean_ns);
    }
    end_ns
}

/// Equal Envoys on one network.
#[derive(Clone, Copy, Debug)]
pub struct Fleet {
    pub envoys: usize,
    pub workers: usize,
    pub network: Network,
}

/// Runs a load on one pool and prints what was seen.
pub fn run(name: &str, seed: u64, fleet: Fleet, kind: Kind, terms: &Terms, load: Load, seconds: u64) -> Findings {
    let Fleet { envoys, workers, network } = fleet;
    let mut world = World::new(seed, envoys, workers, network);
    let id = pool(kind, 1);
    world.add_pool(id, *terms);
    let end_ns = schedule(&mut world, id, terms, load, seconds);
    world.run(end_ns + 5 * S);
    world.found.left = world.judge.left(id, world.now_ns);
    print(name, &world.found, end_ns / S - 1_800_000_000);
    world.found
}

/// One line: what was admitted, who waited and how long, calls a second, and what went wrong.
pub fn print(name: &str, found: &Findings, seconds: u64) {
    let mut waits = found.waits_ns.clone();
    waits.sort_unstable();
    let percentile = |percent: usize| waits.get(waits.len() * percent / 100).map_or(0.0, |ns| *ns as f64 / MS as f64);
    println!(
        "{name:<60} {:>7} requests {:>7} admitted (ideal {:>7}) {:>6.2} % wait, p50 {:>5.1} p99 {:>5.1} ms, {:>5.1} calls/s, \
         wrong {} by {} at most, excess {} by {}",
        found.requests,
        found.admitted,
        found.ideal,
        100.0 * found.waited as f64 / found.requests.max(1) as f64,
        percentile(50),
        percentile(99),
        found.calls as f64 / seconds as f64,
        found.wrong,
        found.worst_wrong,
        found.excess,
        found.worst_excess,
    );
}
