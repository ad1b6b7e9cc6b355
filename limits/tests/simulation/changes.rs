//! Envoys that come and go, limits that change, and a control plane that does not answer.

use limits::pool::{Kind, Terms};

use crate::envoy::Need;
use crate::load::{Load, Spread, print, schedule};
use crate::world::{Change, Event, S, World};
use crate::{NEAR, credits, limit, pool, quota, rate};

fn busy(world: &mut World, kind: Kind, terms: Terms, per_1000_s: u64, seconds: u64) -> u64 {
    let id = pool(kind, 1);
    world.add_pool(id, terms);
    let load = Load { per_1000_s, burst: 1, spread: Spread::Random, price: (1, 1) };
    schedule(world, id, &terms, load, seconds)
}

#[test]
fn rolling_restarts_never_exceed_a_pool_nor_lose_a_token() {
    for (kind, terms) in [limit(100, 1), limit(1_000, 3_600), quota(3_000), credits(3_000)] {
        let mut world = World::new(21, 3, 2, NEAR);
        let end_ns = busy(&mut world, kind, terms, 80_000, 60);
        for place in 0..3 {
            let at_ns = world.now_ns + (10 + 15 * place as u64) * S;
            world.at(at_ns, Event::Change(Change::End(place)));
            world.at(at_ns + 1, Event::Change(Change::Start(place)));
        }
        world.run(end_ns + 5 * S);
        print(&format!("{kind:?} with rolling restarts"), &world.found, 60);
        assert_eq!(world.found.excess, 0);
        assert!(world.found.worst_wrong <= crate::behind(&terms), "{}", world.found.worst_wrong);
        assert!(world.found.admitted + 30 >= world.found.ideal, "{} {}", world.found.admitted, world.found.ideal);
    }
}

#[test]
fn what_a_killed_envoy_held_comes_back_and_is_not_granted_twice() {
    let (kind, terms) = quota(3_000);
    let mut world = World::new(22, 3, 1, NEAR);
    let end_ns = busy(&mut world, kind, terms, 20_000, 200);
    world.at(world.now_ns + 20 * S, Event::Change(Change::Kill(1)));
    world.at(world.now_ns + 22 * S, Event::Change(Change::Start(1)));
    world.run(end_ns + 5 * S);
    print("quota with a killed Envoy", &world.found, 200);
    // What it spent after its last report is not known.
    let unknown = 20 / 4;
    assert!(world.found.worst_excess <= unknown, "{}", world.found.worst_excess);
    assert!(world.found.admitted >= 3_000, "{}", world.found.admitted);
}

#[test]
fn tokens_of_a_killed_envoy_are_served_although_all_others_were_used_up_before() {
    for (kind, terms) in [quota(100), credits(100)] {
        let mut world = World::new(28, 2, 1, NEAR);
        let id = pool(kind, 1);
        world.add_pool(id, terms);
        let start_ns = world.now_ns + 2 * S;
        world.run(start_ns);
        let send = |world: &mut World, envoy: usize, requests: u64, seconds: u64| {
            let (now_ns, before) = (world.now_ns, world.found.admitted);
            for number in 0..requests {
                let at_ns = now_ns + number * seconds * S / requests;
                world.at(at_ns, Event::Request { envoy, needs: vec![Need { pool: id, cost: 1, rate: None }] });
            }
            world.run(now_ns + seconds * S + S / 100);
            world.found.admitted - before
        };
        assert_eq!(send(&mut world, 1, 10, 2), 10);
        let held = world.held(1, id);
        assert!(held > 0);
        let now_ns = world.now_ns;
        world.at(now_ns, Event::Change(Change::Kill(1)));
        // All other tokens are used up. Those of the killed Envoy come back a minute after its last call.
        assert!(send(&mut world, 0, 200, 20) < 90);
        assert_eq!(send(&mut world, 0, 10, 20), 0);
        send(&mut world, 0, 60, 30);
        assert_eq!((world.found.admitted, world.found.excess), (100, 0));
    }
}

#[test]
fn a_second_envoy_takes_over_from_one_that_was_alone_without_excess() {
    for (kind, terms) in [limit(100, 1), limit(10, 60), quota(500)] {
        let mut world = World::new(23, 1, 2, NEAR);
        let end_ns = busy(&mut world, kind, terms, 150_000, 30);
        let (from_ns, id) = (world.now_ns + 7 * S, pool(kind, 1));
        let rate = if let Terms::Rate(rate) = terms { Some(rate) } else { None };
        // The second Envoy gets requests as soon as it is there.
        world.run(from_ns);
        world.add_envoy();
        for number in 0..2_000 {
            let at_ns = from_ns + number * 10_000_000;
            world.at(at_ns, Event::Request { envoy: 1, needs: vec![Need { pool: id, cost: 1, rate }] });
        }
        world.run(end_ns + 5 * S);
        print(&format!("{kind:?}, a second Envoy comes"), &world.found, 30);
        assert_eq!(world.found.excess, 0);
        assert!(world.found.admitted * 100 >= world.found.ideal * 97, "{} {}", world.found.admitted, world.found.ideal);
    }
}

#[test]
fn a_raised_limit_admits_the_difference_and_a_lowered_one_refuses() {
    let (kind, terms) = limit(5, 86_400);
    let mut world = World::new(24, 2, 1, NEAR);
    let id = pool(kind, 1);
    world.add_pool(id, terms);
    let start_ns = world.now_ns + 2 * S;
    world.run(start_ns);
    let burst = |world: &mut World, requests: usize, rate| {
        let (now_ns, before) = (world.now_ns, world.found.admitted);
        for _ in 0..requests {
            let envoy = world.next_envoy();
            world.at(now_ns, Event::Request { envoy, needs: vec![Need { pool: id, cost: 1, rate: Some(rate) }] });
        }
        world.run(now_ns + 2 * S);
        world.found.admitted - before
    };
    assert_eq!(burst(&mut world, 8, rate(5, 86_400)), 5);
    let change = |world: &mut World, to| {
        let now_ns = world.now_ns;
        world.at(now_ns, Event::Change(Change::Terms(id, Terms::Rate(to))));
        world.run(now_ns + S);
    };
    change(&mut world, rate(100, 86_400));
    assert_eq!(burst(&mut world, 120, rate(100, 86_400)), 95);
    change(&mut world, rate(50, 86_400));
    assert_eq!(burst(&mut world, 10, rate(50, 86_400)), 0);
    assert_eq!((world.found.excess, world.found.wrong), (0, 0));
}

#[test]
fn a_lowered_quota_or_limit_refuses_although_envoys_hold_allowances() {
    for (kind, terms, low, high) in [
        (Kind::Quota, quota(8_000).1, 0, None),
        (Kind::Rate, limit(8_000, 86_400).1, 0, Some((rate(8_000, 86_400), rate(10, 86_400)))),
    ] {
        let mut world = World::new(29, 2, 1, NEAR);
        let id = pool(kind, 1);
        world.add_pool(id, terms);
        let start_ns = world.now_ns + 2 * S;
        world.run(start_ns);
        let send = |world: &mut World, requests: u64, rate| {
            let (now_ns, before) = (world.now_ns, world.found.admitted);
            for number in 0..requests {
                let needs = vec![Need { pool: id, cost: 1, rate }];
                world.at(now_ns + number * S / 100, Event::Request { envoy: 0, needs });
            }
            world.run(now_ns + requests * S / 100 + S / 100);
            world.found.admitted - before
        };
        assert_eq!(send(&mut world, 400, high.map(|of| of.0)), 400);
        assert!(world.held(0, id) > 10, "{}", world.held(0, id));
        let now_ns = world.now_ns;
        let change = match high {
            Some((_, lowered)) => Change::Terms(id, Terms::Rate(lowered)),
            None => Change::Add(id, -8_000),
        };
        world.at(now_ns, Event::Change(change));
        world.run(now_ns + S);
        assert_eq!(send(&mut world, 50, high.map(|of| of.1)), low);
    }
}

#[test]
fn a_topped_up_balance_admits_requests_at_once() {
    let (kind, terms) = credits(10);
    let mut world = World::new(25, 2, 1, NEAR);
    let end_ns = busy(&mut world, kind, terms, 20_000, 20);
    let id = pool(kind, 1);
    world.at(world.now_ns + 10 * S, Event::Change(Change::Add(id, 100)));
    world.run(end_ns);
    assert_eq!((world.found.admitted, world.found.excess, world.found.wrong), (110, 0, 0));
}

#[test]
fn without_the_control_plane_rate_limits_go_on_at_the_safe_rate_and_quotas_spend_what_is_held() {
    for (kind, terms) in [limit(100, 1), quota(100_000)] {
        let mut world = World::new(26, 4, 1, NEAR);
        let end_ns = busy(&mut world, kind, terms, 60_000, 60);
        let start_ns = world.now_ns;
        world.at(start_ns + 20 * S, Event::Change(Change::Away(true)));
        world.at(start_ns + 40 * S, Event::Change(Change::Away(false)));
        world.run(start_ns + 19 * S);
        assert_eq!((world.found.unreachable, world.found.wrong), (0, 0));
        world.run(start_ns + 41 * S);
        let (unreachable, admitted) = (world.found.unreachable, world.found.admitted);
        match kind {
            // 60 requests a second are below the safe rate of all four Envoys together.
            Kind::Rate => assert!(unreachable < 200, "{unreachable}"),
            _ => assert!(unreachable > 500, "{unreachable}"),
        }
        world.run(end_ns + 5 * S);
        print(&format!("{kind:?}, the control plane is away for 20 s"), &world.found, 60);
        assert!(world.found.unreachable - unreachable < 10, "{} {unreachable}", world.found.unreachable);
        assert!(world.found.admitted > admitted + 1_000);
        assert!(world.found.worst_excess <= 2, "{}", world.found.worst_excess);
    }
}

#[test]
fn requests_with_several_pools_take_from_all_or_none() {
    let mut world = World::new(27, 3, 2, NEAR);
    let (second, day, money) = (pool(Kind::Rate, 1), pool(Kind::Quota, 1), pool(Kind::Credits, 2));
    let fast = rate(50, 1);
    world.add_pool(second, Terms::Rate(fast));
    world.add_pool(day, quota(1_500).1);
    world.add_pool(money, credits(4_000).1);
    let start_ns = world.now_ns + 2 * S;
    for number in 0..4_000 {
        let envoy = usize::try_from(world.random.below(3)).unwrap();
        let needs = vec![
            Need { pool: second, cost: 1, rate: Some(fast) },
            Need { pool: day, cost: 1, rate: None },
            Need { pool: money, cost: world.random.between(1, 4), rate: None },
        ];
        world.at(start_ns + number * 15_000_000, Event::Request { envoy, needs });
    }
    world.run(start_ns + 70 * S);
    print("50/s, 1,500 a day and 4,000 credits", &world.found, 70);
    assert_eq!(world.found.excess, 0);
    assert!(world.found.admitted * 100 >= world.found.ideal * 99, "{} {}", world.found.admitted, world.found.ideal);
    assert!(world.found.admitted <= 1_500);
}
