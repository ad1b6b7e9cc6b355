//! All at once: messages are late, lost and doubled, Envoys are killed, end and start, their clocks differ, and limits change.

use contract::id::{KeyId, OwnerId};
use contract::record::{Per, RateLimit, Record};
use limits::pool::{Kind, PoolId, Terms};

use crate::envoy::Need;
use crate::judge::Findings;
use crate::world::{Change, Event, MS, Network, S, Settings, World};
use crate::{behind_by, credits, quota, rate};

/// Requests of each kind of pool with each seed.
const STEPS: u64 = 100_000;

/// The second and the third one found an Envoy that became alone and forgot what it had spent since its call, the fourth one an
/// Envoy that took the use of a changed limit for use of the limit before.
const SEEDS: [u64; 4] = [100, 5_050, 5_210, 9_040];

const ENVOYS: usize = 4;

const BAD: Network =
    Network { least_ms: 1, most_ms: 30, lost_per_mille: 10, doubled_per_mille: 30, late_per_mille: 10 };

const SETTINGS: Settings = Settings { skew_ns: 60 * S, record_ms: 300, has_safe_rate: false };

/// A pool, and what may happen to it.
struct Case {
    name: &'static str,
    pool: PoolId,
    terms: Terms,
    /// The highest price.
    price: u64,
    /// The length of a quota's window.
    window_s: Option<u64>,
    /// Terms that a rate limit changes to.
    rates: &'static [(u32, u32)],
    /// Requests in 1,000 seconds that use all of it.
    full: u64,
}

fn pool_of(kind: Kind, per: Per) -> PoolId {
    let record = Record { plan: Some(3), ..Record::plain(KeyId([7; 16]), OwnerId([8; 16])) };
    let limit = RateLimit { name: "a".into(), requests: 1, window_s: 1, burst: 1, shared: true, per };
    match kind {
        Kind::Rate => PoolId::of_limit(&limit, &record),
        Kind::Quota => PoolId::of_quota(per, &record),
        Kind::Credits => PoolId::of_credits(OwnerId([8; 16])),
    }
}

fn cases() -> [Case; 6] {
    let rates = |name, per, rates: &'static [(u32, u32)], full| {
        let terms = Terms::Rate(rate(rates[0].0, rates[0].1));
        Case { name, pool: pool_of(Kind::Rate, per), terms, price: 1, window_s: None, rates, full }
    };
    let stock = |name, kind, per, left, price, window_s| {
        let terms = if kind == Kind::Quota { quota(left).1 } else { credits(left).1 };
        Case { name, pool: pool_of(kind, per), terms, price, window_s, rates: &[], full: 60_000 }
    };
    [
        rates("rate limit of a key, 10/s to 100/s", Per::Key, &[(50, 1), (100, 1), (10, 1)], 50_000),
        rates("rate limit of an owner, 200/s to 1,000/s", Per::Owner, &[(500, 1), (1_000, 1), (200, 1)], 500_000),
        rates("rate limit of a key, 1,000 to 5,000/min", Per::Key, &[(3_000, 60), (5_000, 60), (1_000, 60)], 50_000),
        stock("quota of a key", Kind::Quota, Per::Key, 3_600, 1, Some(60)),
        stock("quota of an owner", Kind::Quota, Per::Owner, 20_000, 1, Some(600)),
        stock("credits, prices 1 to 9", Kind::Credits, Per::Owner, 20_000, 9, None),
    ]
}

#[test]
fn nothing_goes_wrong_with_any_kind_of_pool_while_everything_happens_at_once() {
    for (number, case) in cases().iter().enumerate() {
        for seed in SEEDS {
            let found = run(case, seed + number as u64, SETTINGS);
            print(case.name, &found);
            assert!(found.requests >= STEPS);
            assert_eq!((found.excess, found.worst_excess), (0, 0), "{}", case.name);
            assert!(found.worst_wrong <= permitted(case), "{}: {}", case.name, found.worst_wrong);
            assert!(found.lost > 200 && found.refused > 1_000, "{}", case.name);
        }
    }
}

#[test]
fn beyond_a_limit_only_requests_at_the_safe_rate_are_admitted() {
    for (number, case) in cases().iter().enumerate().take(3) {
        let found = run(case, 200 + number as u64, Settings { has_safe_rate: true, ..SETTINGS });
        print(case.name, &found);
        assert_eq!(found.granted_excess, 0, "{}", case.name);
        assert!(found.safe > 0, "{}", case.name);
    }
}

/// By how many tokens a pool may run behind the exact one. Two calls in a row may fail.
fn permitted(case: &Case) -> i64 {
    let of = |(requests, window_s): &(u32, u32)| behind_by(&Terms::Rate(rate(*requests, *window_s)), 300 + 2 * 250);
    case.rates.iter().map(of).max().unwrap_or_default()
}

fn run(case: &Case, seed: u64, settings: Settings) -> Findings {
    let mut world = World::with_settings(seed, ENVOYS, 2, BAD, settings);
    world.add_pool(case.pool, case.terms);
    if let (Some(seconds), Terms::Stock { left, .. }) = (case.window_s, case.terms) {
        world.add_windows(case.pool, left, seconds * S);
    }
    let start_ns = world.now_ns + 2 * S;
    world.run(start_ns);
    let (mut next_fate_ns, mut next_change_ns, mut next_load_ns) = (start_ns, start_ns, start_ns);
    let (mut mean_ns, mut is_low) = (S, false);
    while world.found.requests < STEPS {
        let now_ns = world.now_ns;
        if now_ns >= next_load_ns {
            // From a third of the limit to three times of it, and sometimes hardly any.
            let percent = [30, 60, 100, 300, 2][usize::try_from(world.random.below(5)).unwrap()];
            mean_ns = 1_000 * S * 100 / (case.full * percent);
            next_load_ns = now_ns + world.random.between(2, 20) * S;
        }
        if now_ns >= next_fate_ns {
            come_and_go(&mut world);
            next_fate_ns = now_ns + world.random.between(3, 30) * S;
        }
        if now_ns >= next_change_ns {
            change(&mut world, case, &mut is_low);
            next_change_ns = now_ns + world.random.between(5, 30) * S;
        }
        request(&mut world, case);
        let gap_ns = world.random.exponential_ns(mean_ns).min(5 * S);
        world.run(now_ns + gap_ns);
    }
    let end_ns = world.now_ns + 5 * S;
    world.run(end_ns);
    world.found
}

/// One to eight requests within some milliseconds, at one Envoy.
fn request(world: &mut World, case: &Case) {
    let up = world.up();
    let envoy = up[usize::try_from(world.random.below(up.len() as u64)).unwrap()];
    let burst = if world.random.happens(50) { 8 } else { 1 };
    for number in 0..burst {
        let cost = world.random.between(1, case.price);
        let at_ns = world.now_ns + number * MS;
        world.at(at_ns, Event::Request { envoy, needs: vec![Need { pool: case.pool, cost, rate: None }] });
    }
}

/// Envoys end, are killed or start. One at least stays.
fn come_and_go(world: &mut World) {
    let (now_ns, up) = (world.now_ns, world.up());
    let down = (0..ENVOYS).find(|place| !up.contains(place));
    let one = up[usize::try_from(world.random.below(up.len() as u64)).unwrap()];
    match (world.random.below(4), down) {
        (0 | 1, Some(place)) => world.at(now_ns, Event::Change(Change::Start(place))),
        (2, _) if up.len() > 1 => world.at(now_ns, Event::Change(Change::Kill(one))),
        (3, _) if up.len() > 1 => world.at(now_ns, Event::Change(Change::End(one))),
        // All but one end.
        (0, None) => {
            for place in up.into_iter().filter(|place| *place != one) {
                world.at(now_ns, Event::Change(Change::End(place)));
            }
        }
        _ => {}
    }
}

fn change(world: &mut World, case: &Case, is_low: &mut bool) {
    let now_ns = world.now_ns;
    let change = match case.pool.kind {
        Kind::Rate => {
            let (requests, window_s) =
                case.rates[usize::try_from(world.random.below(case.rates.len() as u64)).unwrap()];
            Change::Terms(case.pool, Terms::Rate(rate(requests, window_s)))
        }
        Kind::Quota if world.random.happens(300) => Change::Reset(case.pool),
        Kind::Quota => {
            // Lowered by three quarters, which is below the use most of the time, and raised again.
            *is_low = !*is_low;
            let Terms::Stock { left, .. } = case.terms else { return };
            Change::Add(case.pool, if *is_low { -left * 3 / 4 } else { left * 3 / 4 })
        }
        Kind::Credits => match world.random.below(5) {
            0 => Change::Add(case.pool, -2_000),
            _ => Change::Add(case.pool, 5_000),
        },
    };
    world.at(now_ns, Event::Change(change));
}

fn print(name: &str, found: &Findings) {
    println!(
        "{name:<45} {:>6} steps, {:>6} admitted ({} at the safe rate), {:>6} refused, {:>5} without an answer, {:>5} messages lost or late: \
         worst wrongful refusal {} ({} in all), worst excess {} ({} in all, {} beyond the safe rate), {:.2} % wait",
        found.requests,
        found.admitted,
        found.safe,
        found.refused,
        found.unreachable,
        found.lost,
        found.worst_wrong,
        found.wrong,
        found.worst_excess,
        found.excess,
        found.granted_excess,
        100.0 * found.waited as f64 / found.requests as f64,
    );
}
