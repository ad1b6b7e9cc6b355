//! Small limits and first requests: what customers meet first.

use limits::pool::{Kind, PoolId, Terms};

use crate::envoy::Need;
use crate::load::print;
use crate::world::{Change, Event, MS, Network, S, World};
use crate::{NEAR, credits, limit, pool, quota};

/// A world with one pool, two seconds old.
fn world(envoys: usize, (kind, terms): (Kind, Terms)) -> (World, PoolId) {
    let mut world = World::new(5, envoys, 2, NEAR);
    let id = pool(kind, 1);
    world.add_pool(id, terms);
    let start_ns = world.now_ns + 2 * S;
    world.run(start_ns);
    (world, id)
}

/// Sends requests to Envoys in turn, `gap_ms` apart.
fn send(world: &mut World, id: PoolId, terms: &Terms, requests: usize, cost: u64, gap_ms: u64) {
    let rate = match terms {
        Terms::Rate(rate) => Some(*rate),
        Terms::Stock { .. } => None,
    };
    for number in 0..requests {
        let envoy = world.next_envoy();
        let at_ns = world.now_ns + number as u64 * gap_ms * MS;
        world.at(at_ns, Event::Request { envoy, needs: vec![Need { pool: id, cost, rate }] });
    }
    let end_ns = world.now_ns + requests as u64 * gap_ms * MS + S;
    world.run(end_ns);
}

#[test]
fn a_page_with_20_calls_on_a_quota_of_100_passes_again_and_again() {
    for envoys in [1, 2, 5] {
        let terms = quota(100);
        let (mut world, id) = world(envoys, terms);
        for _ in 0..5 {
            send(&mut world, id, &terms.1, 20, 1, 0);
            let later_ns = world.now_ns + 400 * S;
            world.run(later_ns);
        }
        print("20 calls five times on 100", &world.found, 2_000);
        assert_eq!((world.found.admitted, world.found.refused), (100, 0), "{envoys} Envoys");
        send(&mut world, id, &terms.1, 3, 1, 0);
        assert_eq!((world.found.admitted, world.found.refused), (100, 3), "{envoys} Envoys");
    }
}

#[test]
fn one_request_each_1500_ms_on_a_limit_of_one_a_second_passes_on_any_envoy() {
    for envoys in [1, 2, 5] {
        let terms = limit(1, 1);
        let (mut world, id) = world(envoys, terms);
        send(&mut world, id, &terms.1, 60, 1, 1_500);
        print("1/s each 1.5 s", &world.found, 90);
        assert_eq!((world.found.admitted, world.found.refused), (60, 0), "{envoys} Envoys");
    }
}

#[test]
fn the_first_burst_of_10_a_minute_passes_on_two_envoys_and_after_a_restart_nothing_more() {
    let terms = limit(10, 60);
    let (mut world, id) = world(2, terms);
    send(&mut world, id, &terms.1, 10, 1, 0);
    assert_eq!((world.found.admitted, world.found.refused), (10, 0));
    let now_ns = world.now_ns;
    world.at(now_ns, Event::Change(Change::End(0)));
    world.at(now_ns + S, Event::Change(Change::Start(0)));
    world.run(now_ns + 60 * S);
    // Ten more, a minute later.
    send(&mut world, id, &terms.1, 10, 1, 0);
    assert_eq!((world.found.admitted, world.found.refused, world.found.excess), (20, 0, 0));
}

#[test]
fn a_price_of_nearly_all_credits_passes_at_once_and_a_burst_leaves_none() {
    for envoys in [1, 3] {
        let terms = credits(1_000);
        let (mut world, id) = world(envoys, terms);
        send(&mut world, id, &terms.1, 1, 900, 0);
        assert_eq!((world.found.admitted, world.found.refused), (1, 0));
        send(&mut world, id, &terms.1, 10, 10, 0);
        assert_eq!((world.found.admitted, world.found.refused), (11, 0));
        send(&mut world, id, &terms.1, 1, 1, 0);
        assert_eq!((world.found.admitted, world.found.refused, world.found.excess), (11, 1, 0));
    }
}

#[test]
fn a_page_of_38_calls_an_hour_apart_on_1000_a_month_is_never_refused() {
    let terms = quota(1_000);
    let (mut world, id) = world(3, terms);
    for _ in 0..26 {
        send(&mut world, id, &terms.1, 38, 1, 3);
        let later_ns = world.now_ns + 3_600 * S;
        world.run(later_ns);
    }
    print("38 calls an hour", &world.found, 93_600);
    assert_eq!((world.found.admitted, world.found.refused), (26 * 38, 0));
}

#[test]
fn all_that_is_left_can_be_spent_at_one_envoy_after_all_were_busy() {
    for (terms, cost) in [(quota(1_000), 1), (credits(1_000), 3)] {
        let (mut world, id) = world(5, terms);
        send(&mut world, id, &terms.1, 100, cost, 20);
        let rest = (1_000 - 100 * cost) / cost;
        let now_ns = world.now_ns;
        for _ in 0..rest {
            world.at(now_ns, Event::Request { envoy: 0, needs: vec![Need { pool: id, cost, rate: None }] });
        }
        world.run(now_ns + 2 * S);
        print("all that is left at one Envoy", &world.found, 4);
        assert_eq!((world.found.admitted, world.found.refused), (100 + rest, 0));
    }
}

#[test]
fn an_envoy_that_is_alone_knows_its_pools_ahead_and_no_request_waits() {
    for terms in [quota(1_000), credits(1_000), limit(100, 3_600), limit(10, 1)] {
        let (mut world, id) = world(1, terms);
        let rate = if let Terms::Rate(rate) = terms.1 { Some(rate) } else { None };
        world.learn(Need { pool: id, cost: 1, rate });
        let now_ns = world.now_ns;
        world.run(now_ns + S);
        for idle_s in [0, 1, 400, 1_300] {
            let later_ns = world.now_ns + idle_s * S;
            world.run(later_ns);
            send(&mut world, id, &terms.1, 5, 1, 10);
        }
        // The control plane does not answer for a while; afterwards the Envoy asks anew.
        for is_away in [true, false] {
            let now_ns = world.now_ns;
            world.at(now_ns, Event::Change(Change::Away(is_away)));
            world.run(now_ns + 3 * S);
        }
        send(&mut world, id, &terms.1, 5, 1, 10);
        print("alone, known ahead", &world.found, 1_710);
        assert_eq!((world.found.admitted, world.found.waited, world.found.excess), (25, 0, 0));
    }
}

#[test]
fn an_envoy_that_is_alone_spends_no_more_than_there_is_while_answers_are_late() {
    for terms in [quota(300), credits(300), limit(100, 100)] {
        let network =
            Network { least_ms: 20, most_ms: 250, lost_per_mille: 20, doubled_per_mille: 20, late_per_mille: 0 };
        let (mut world, id) = (World::new(5, 1, 2, network), pool(terms.0, 1));
        world.add_pool(id, terms.1);
        send(&mut world, id, &terms.1, 1_000, 1, 50);
        print("alone, answers are late", &world.found, 51);
        assert_eq!(world.found.excess, 0);
    }
}
