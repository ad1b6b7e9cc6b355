//! Quotas whose window ends: what was held in the old window counts in the new one, and the new one has no more than its quota.

use limits::pool::Kind;

use crate::envoy::Need;
use crate::judge::Findings;
use crate::world::{Event, MS, Network, S, Settings, World};
use crate::{NEAR, pool, quota};

const LENGTH_NS: u64 = 10 * S;

const QUOTA: i64 = 400;

/// A quota of 400 in 10 s, asked for by all Envoys at random, and how many were admitted in each window.
fn run(seed: u64, envoys: usize, network: Network, skew_ns: u64, percent: u64, windows: u64) -> (Findings, Vec<u64>) {
    let settings = Settings { skew_ns, record_ms: 0, has_safe_rate: false };
    let mut world = World::with_settings(seed, envoys, 2, network, settings);
    let id = pool(Kind::Quota, 1);
    world.add_pool(id, quota(QUOTA).1);
    let start_ns = world.now_ns + 2 * S;
    world.run(start_ns);
    world.add_windows(id, QUOTA, LENGTH_NS);
    let mean_ns = LENGTH_NS * 100 / (QUOTA.unsigned_abs() * percent);
    let mut admitted = Vec::new();
    for number in 1..=windows {
        let (before, end_ns) = (world.found.admitted, start_ns + number * LENGTH_NS);
        let mut at_ns = end_ns - LENGTH_NS;
        while at_ns < end_ns {
            let envoy = usize::try_from(world.random.below(envoys as u64)).unwrap();
            // In the last tick of each window and in the first of the next, requests come five times as fast.
            let is_change = at_ns + S / 4 > end_ns || at_ns < end_ns - LENGTH_NS + S / 4;
            world.at(at_ns, Event::Request { envoy, needs: vec![Need { pool: id, cost: 1, rate: None }] });
            at_ns += world.random.exponential_ns(if is_change { mean_ns / 5 } else { mean_ns });
        }
        world.run(end_ns - 1);
        admitted.push(world.found.admitted - before);
    }
    (world.found, admitted)
}

fn print(name: &str, found: &Findings, admitted: &[u64]) {
    println!(
        "{name:<60} {} windows of {QUOTA}: {} to {} admitted, at most {} of the window before are counted, {} refused, {} without an \
         answer, worst wrongful refusal {} ({} in all), worst excess {}, {:.2} % wait",
        admitted.len(),
        admitted.iter().min().unwrap(),
        admitted.iter().max().unwrap(),
        found.worst_late,
        found.refused,
        found.unreachable,
        found.worst_wrong,
        found.wrong,
        found.worst_excess,
        100.0 * found.waited as f64 / found.requests as f64,
    );
}

#[test]
fn a_new_window_has_its_quota_and_no_more() {
    let bad = Network { least_ms: 1, most_ms: 30, lost_per_mille: 10, doubled_per_mille: 30, late_per_mille: 10 };
    for envoys in [1, 2, 5] {
        for (clocks, skew_ns) in [("equal clocks", 0), ("clocks an hour apart", 3_600 * S)] {
            for percent in [50, 95, 300] {
                for (net, network) in [("", NEAR), (", messages lost, late, doubled", bad)] {
                    let name = format!("{percent} % asked of {envoys} Envoys, {clocks}{net}");
                    let (found, admitted) = run(percent, envoys, network, skew_ns, percent, 30);
                    print(&name, &found, &admitted);
                    assert_eq!((found.excess, found.wrong), (0, 0), "{name}");
                    assert!(admitted.iter().all(|admitted| *admitted <= QUOTA.unsigned_abs()), "{name}");
                    if net.is_empty() {
                        // Each tick reports what was spent.
                        assert!(found.worst_late < 50, "{name}: {}", found.worst_late);
                    }
                    if percent == 50 {
                        assert_eq!(found.refused, 0, "{name}");
                    }
                    if percent == 300 && net.is_empty() {
                        // All is used, but for what was reported late.
                        let least = QUOTA.unsigned_abs() - found.worst_late;
                        assert!(admitted.iter().all(|admitted| *admitted >= least), "{name}: {admitted:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_request_that_comes_with_the_new_window_is_admitted_although_the_old_one_was_used_up() {
    for envoys in [1, 3] {
        for skew_ns in [0, 3_600 * S] {
            let settings = Settings { skew_ns, record_ms: 0, has_safe_rate: false };
            let mut world = World::with_settings(7, envoys, 2, NEAR, settings);
            let id = pool(Kind::Quota, 1);
            world.add_pool(id, quota(20).1);
            let start_ns = world.now_ns + 2 * S;
            world.run(start_ns);
            world.add_windows(id, 20, LENGTH_NS);
            let send = |world: &mut World, at_ns: u64, requests: u64| {
                let before = world.found.admitted;
                for number in 0..requests {
                    let envoy = world.next_envoy();
                    world.at(
                        at_ns + number * MS,
                        Event::Request { envoy, needs: vec![Need { pool: id, cost: 1, rate: None }] },
                    );
                }
                world.run(at_ns + S);
                world.found.admitted - before
            };
            assert_eq!(send(&mut world, start_ns + S, 30), 20);
            assert_eq!(send(&mut world, start_ns + 8 * S, 10), 0);
            // What an Envoy knows is at most 20 ms old.
            assert_eq!(send(&mut world, start_ns + LENGTH_NS + 20 * MS, 30), 20, "{envoys} {skew_ns}");
            assert_eq!(world.found.excess, 0);
        }
    }
}
