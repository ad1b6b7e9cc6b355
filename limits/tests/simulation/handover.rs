//! An Envoy that is alone decides by itself, and a second Envoy comes while answers are slow or lost.

use limits::pool::{Kind, Terms};
use limits::{ALONE_GRACE_MS, ALONE_MS, LONGEST_WAIT_MS};

use crate::envoy::Need;
use crate::judge::Findings;
use crate::world::{Change, Event, MS, Network, S, Settings, World};
use crate::{NEAR, behind_by, credits, limit, pool, quota};

/// An answer takes up to 240 ms, nearly the time-out of a call.
const SLOW: Network = Network { least_ms: 20, most_ms: 120, doubled_per_mille: 20, ..NEAR };

/// Some messages do not come, or too late.
const LOSSY: Network = Network { lost_per_mille: 20, late_per_mille: 20, ..SLOW };

/// How often a second Envoy comes.
const TIMES: u64 = 40;

/// Requests come to the first Envoy all the time, and to a second one as soon as it is there. Returns what was seen, and how
/// long it took until the second Envoy admitted a request. `percent`: what is asked of a rate limit.
fn hand_over(seed: u64, network: Network, (kind, terms): (Kind, Terms), percent: u64) -> (Findings, u64) {
    let settings = Settings { skew_ns: 60 * S, record_ms: 0, has_safe_rate: false };
    let workers = 1 + usize::try_from(seed % 2).unwrap();
    let mut world = World::with_settings(seed, 1, workers, network, settings);
    let id = pool(kind, 1);
    world.add_pool(id, terms);
    let start_ns = world.now_ns + 2 * S;
    world.run(start_ns);
    let second_ns = start_ns + 3 * S + world.random.below(S);
    let end_ns = second_ns + 5 * S;
    let gap_ns = match terms {
        Terms::Rate(rate) => rate.interval_ns() * 100 / percent,
        Terms::Stock { .. } => 10 * MS,
    };
    let needs = || vec![Need { pool: id, cost: 1, rate: None }];
    let mut at_ns = start_ns;
    while at_ns < end_ns {
        world.at(at_ns, Event::Request { envoy: 0, needs: needs() });
        at_ns += world.random.exponential_ns(gap_ns);
    }
    world.at(second_ns, Event::Change(Change::Start(1)));
    let mut at_ns = second_ns + MS;
    while at_ns < end_ns {
        world.at(at_ns, Event::Request { envoy: 1, needs: needs() });
        at_ns += 20 * MS;
    }
    let mut served_ns = None;
    world.run(second_ns);
    while world.now_ns < end_ns + 2 * S {
        let next_ns = world.now_ns + 5 * MS;
        world.run(next_ns);
        served_ns = served_ns.or((world.envoys[1].admitted > 0).then(|| world.now_ns - second_ns));
    }
    (world.found, served_ns.unwrap_or(u64::MAX))
}

/// Hands over many times. Returns the longest time until a second Envoy admitted a request, in milliseconds.
fn hand_over_often(name: &str, network: Network, pool: (Kind, Terms), percent: u64) -> (Findings, u64) {
    let (mut all, mut longest_ms) = (Findings::default(), 0);
    for seed in 0..TIMES {
        let (found, served_ns) = hand_over(1_000 + seed, network, pool, percent);
        longest_ms = longest_ms.max(served_ns / MS);
        all.requests += found.requests;
        all.waited += found.waited;
        all.unreachable += found.unreachable;
        all.excess += found.excess;
        all.worst_excess = all.worst_excess.max(found.worst_excess);
        all.wrong += found.wrong;
        all.worst_wrong = all.worst_wrong.max(found.worst_wrong);
    }
    println!(
        "{name:<40} {TIMES} times handed over: {} requests, served after {} ms at most, {} without an answer, worst wrongful refusal \
         {} ({} in all), worst excess {} ({} in all), {:.2} % wait",
        all.requests,
        if longest_ms < u64::MAX / MS { longest_ms.to_string() } else { "?".into() },
        all.unreachable,
        all.worst_wrong,
        all.wrong,
        all.worst_excess,
        all.excess,
        100.0 * all.waited as f64 / all.requests as f64,
    );
    (all, longest_ms)
}

#[test]
fn a_second_envoy_is_served_and_nothing_beyond_a_limit_is_admitted_while_answers_are_slow_or_lost() {
    // The first Envoy must stop deciding by itself and report its usage. Then an answer must come, to a call of the next tick
    // at the latest.
    let stops_ms = ALONE_MS + ALONE_GRACE_MS;
    for (net, network, within_ms, between_ms) in [
        ("near", NEAR, LONGEST_WAIT_MS, 300),
        ("slow", SLOW, stops_ms + 2 * 240, 300),
        // Two calls in a row may fail.
        ("lossy", LOSSY, stops_ms + 2 * 240 + 2 * 250, 300 + 2 * 250),
    ] {
        for (name, pool, percent) in [
            ("100/s, half used", limit(100, 1), 50),
            ("100/s, overload", limit(100, 1), 150),
            ("1000/s, overload", limit(1_000, 1), 120),
            ("1000/min, overload", limit(1_000, 60), 500),
            ("quota, nearly used up", quota(450), 0),
            ("quota", quota(5_000), 0),
            ("credits", credits(2_000), 0),
        ] {
            let name = format!("{name}, {net}");
            let (found, served_ms) = hand_over_often(&name, network, pool, percent);
            assert_eq!((found.excess, found.worst_excess), (0, 0), "{name}");
            assert!(found.worst_wrong <= behind_by(&pool.1, between_ms), "{name}: {}", found.worst_wrong);
            if net == "near" {
                assert_eq!(found.unreachable, 0, "{name}");
            }
            assert!(name.contains("used up, ") || served_ms <= within_ms, "{name}: {served_ms}");
        }
    }
}
