//! Envoys and a control plane without network, database or clock: what each admits is counted, and the stated bounds must
//! hold whatever is late or lost.

use std::collections::BTreeMap;

use contract::budget::Held;
use contract::rate::{Rate, WHOLE, merged_ns};
use contract::record::{Budget, RateLimit};
use uuid::Uuid;

use super::used::Used;
use super::{Heard, Row, elapsed_s, place, rows, share, stock};

const START_MS: i64 = 1_800_000_000_000;
const REPORT_MS: i64 = 250;
const QUIET_MS: i64 = 1_000;
const RESEND_MS: i64 = 600;
/// How long a change takes from the database to an Envoy.
const TOLD_MS: i64 = 100;

/// Numbers that look random and are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// What all of them draw from.
#[derive(Clone)]
enum Of {
    Limit(RateLimit),
    Credits { cost: u64 },
}

#[derive(Clone, Copy, Default, PartialEq)]
struct Counts {
    spent: u64,
    refused: u64,
}

struct Envoy {
    share: u32,
    /// Whether the share is one that it was told.
    has_row: bool,
    arrival_ns: Option<u64>,
    held: Held,
    seq: u64,
    pending: Counts,
    frozen: Option<Counts>,
    send_ms: i64,
    freeze_ms: i64,
    empty_left: u8,
    admitted: u64,
    cut_off: bool,
}

#[derive(Clone, Copy)]
enum Message {
    Report { envoy: usize, seq: u64, counts: Counts },
    Answer { envoy: usize, seq: u64, amount: u64, turn: u32, used_ns: u64 },
}

struct World {
    of: Of,
    envoys: Vec<Envoy>,
    rows: Vec<Row>,
    applied: Vec<(u64, Option<i64>, u64, u32)>,
    used: Used,
    balance: i64,
    budget: Budget,
    /// What Envoys know: the turn and whether all is used up, from when on.
    known: Vec<(i64, u32, u32, bool)>,
    random: Random,
    loss: u64,
    messages: BTreeMap<(i64, u64), Message>,
    sent: u64,
    now_ms: i64,
}

impl World {
    fn new(of: Of, envoys: usize, seed: u64, loss: u64) -> Self {
        let budget = Budget { starter: 0, turn: 0, resets_at_s: None };
        let envoy = |_| Envoy {
            share: WHOLE / envoys as u32,
            has_row: false,
            arrival_ns: None,
            held: Held::default(),
            seq: 0,
            pending: Counts::default(),
            frozen: None,
            send_ms: 0,
            freeze_ms: 0,
            empty_left: 0,
            admitted: 0,
            cut_off: false,
        };
        Self {
            of,
            envoys: (0..envoys).map(envoy).collect(),
            rows: Vec::new(),
            applied: vec![(0, None, 0, 0); envoys],
            used: Used::default(),
            balance: 0,
            budget,
            known: vec![(0, 0, 0, true)],
            random: Random(seed * 2 + 1),
            loss,
            messages: BTreeMap::new(),
            sent: 0,
            now_ms: START_MS,
        }
    }

    fn top_up(&mut self, amount: i64) {
        let before = self.balance;
        self.balance += amount;
        let starter = crate::credits::starter(self.balance);
        self.budget.starter = starter.cast_unsigned();
        self.budget.turn += u32::from(before < starter.into());
        self.tell();
    }

    fn tell(&mut self) {
        self.known.push((self.now_ms + TOLD_MS, self.budget.starter, self.budget.turn, self.balance <= 0));
    }

    fn admitted(&self) -> u64 {
        self.envoys.iter().map(|envoy| envoy.admitted).sum()
    }

    /// Runs so many milliseconds, with so many requests a second to each Envoy.
    fn run(&mut self, ms: i64, loads: &[u64]) {
        let mut due = vec![0; loads.len()];
        for _ in 0..ms {
            for (envoy, load) in loads.iter().enumerate() {
                due[envoy] += load;
                while due[envoy] >= 1_000 {
                    due[envoy] -= 1_000;
                    self.request(envoy);
                }
                self.tick(envoy);
            }
            while let Some(entry) = self.messages.first_entry().filter(|entry| entry.key().0 <= self.now_ms) {
                let message = entry.remove();
                self.deliver(message);
            }
            self.now_ms += 1;
        }
    }

    fn request(&mut self, envoy: usize) {
        let (now_ms, of) = (self.now_ms, self.of.clone());
        let known = self.known.iter().rev().find(|(from, ..)| *from <= now_ms).copied().unwrap();
        let envoy = &mut self.envoys[envoy];
        let cost = match of {
            Of::Limit(limit) => {
                let (rate, now_ns) = (Rate::of(&limit, envoy.share), now_ms.cast_unsigned() * 1_000_000);
                let taken = rate.take(envoy.arrival_ns, now_ns);
                // A time that was set under a smaller share is brought within reach, as the filter does.
                let settled = envoy.arrival_ns.map(|arrival| rate.within_reach(arrival, now_ns));
                envoy.arrival_ns = taken.ok().or(settled);
                taken.is_ok().then_some(1)
            }
            Of::Credits { cost } => {
                let (_, starter, turn, used_up) = known;
                let budget = Budget { starter, turn, resets_at_s: None };
                (!used_up && envoy.held.spend(&budget, cost)).then_some(cost)
            }
        };
        match cost {
            Some(cost) => {
                envoy.admitted += cost;
                envoy.pending.spent += cost;
            }
            None => envoy.pending.refused += 1,
        }
        envoy.empty_left = 2;
    }

    /// What the leader of an Envoy does now and then.
    fn tick(&mut self, number: usize) {
        let now_ms = self.now_ms;
        let envoy = &mut self.envoys[number];
        if envoy.frozen.is_none() && now_ms >= envoy.freeze_ms {
            let quiet = envoy.pending == Counts::default();
            if quiet && (envoy.empty_left == 0 || now_ms < envoy.freeze_ms + QUIET_MS - REPORT_MS) {
                return;
            }
            envoy.empty_left -= u8::from(quiet);
            envoy.seq += 1;
            envoy.frozen = Some(std::mem::take(&mut envoy.pending));
            envoy.send_ms = now_ms;
        }
        if let Some(counts) = envoy.frozen.filter(|_| now_ms >= envoy.send_ms) {
            envoy.send_ms = now_ms + RESEND_MS;
            let seq = envoy.seq;
            self.send(Message::Report { envoy: number, seq, counts }, number);
        }
    }

    fn send(&mut self, message: Message, envoy: usize) {
        if self.envoys[envoy].cut_off || self.random.below(100) < self.loss {
            return;
        }
        self.sent += 1;
        let delay = 2 + self.random.below(60).cast_signed();
        self.messages.insert((self.now_ms + delay, self.sent), message);
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Report { envoy, seq, counts } => {
                let (amount, turn) = self.apply(envoy, seq, counts);
                let used = self.used.grants(Uuid::nil(), self.now_ms);
                let used_ns = used.first().map_or(0, |used| u64::from(used.turn) * 10_000_000);
                self.send(Message::Answer { envoy, seq, amount, turn, used_ns }, envoy);
            }
            Message::Answer { envoy: number, seq, amount, turn, used_ns } => {
                let (even, now_ns) = (WHOLE / self.envoys.len() as u32, self.now_ms.cast_unsigned() * 1_000_000);
                let envoy = &mut self.envoys[number];
                if envoy.frozen.is_none() || seq != envoy.seq {
                    return;
                }
                envoy.frozen = None;
                envoy.freeze_ms = self.now_ms + REPORT_MS;
                envoy.has_row = amount > 0;
                match self.of {
                    Of::Limit(_) => {
                        let share = if amount > 0 { u32::try_from(amount).unwrap() } else { even };
                        if share > envoy.share && used_ns > 0 {
                            let own_ns = envoy.arrival_ns.map_or(0, |arrival| arrival.saturating_sub(now_ns));
                            envoy.arrival_ns = Some(now_ns + merged_ns(own_ns, envoy.share, used_ns, share));
                        }
                        envoy.share = share;
                    }
                    Of::Credits { .. } => envoy.held.grant(amount, turn),
                }
                let really: u64 =
                    self.envoys.iter().filter(|envoy| envoy.has_row).map(|envoy| u64::from(envoy.share)).sum();
                if matches!(self.of, Of::Limit(_)) && self.envoys.iter().all(|envoy| !envoy.cut_off) {
                    assert!(really <= u64::from(WHOLE) + self.envoys.len() as u64, "{really}");
                }
            }
        }
    }

    fn apply(&mut self, envoy: usize, seq: u64, counts: Counts) -> (u64, u32) {
        let (last, at, amount, turn) = self.applied[envoy];
        if seq <= last {
            return (amount, turn);
        }
        let report = Heard {
            seq,
            now_ms: self.now_ms,
            elapsed_s: elapsed_s(at.map(|at| (self.now_ms - at) as f64 / 1_000.0)),
            quiet: counts == Counts::default(),
            spent: counts.spent,
            refused: counts.refused,
            least: 1,
        };
        let me = place(&mut self.rows, Uuid::from_u128(envoy as u128 + 1));
        let (amount, turn) = match &self.of {
            Of::Limit(limit) => {
                self.used.count([limit], counts.spent, self.now_ms);
                share::answer(&mut self.rows, me, &report);
                (rows::grant((0, Uuid::nil()), &self.rows[me], 0).amount, 0)
            }
            Of::Credits { .. } => {
                let before = self.balance;
                self.balance -= counts.spent.cast_signed();
                if before > 0 && self.balance <= 0 {
                    self.tell();
                }
                stock::spend(&mut self.rows[me], &report, &self.budget);
                (stock::answer(&mut self.rows, me, &report, self.balance, &self.budget), self.budget.turn)
            }
        };
        if matches!(self.of, Of::Limit(_)) {
            let now_ms = self.now_ms;
            let held: u64 = self.rows.iter().filter(|row| row.is_live(now_ms)).map(|row| row.held).sum();
            assert!(held <= u64::from(WHOLE), "{held}");
        }
        self.applied[envoy] = (seq, Some(self.now_ms), amount, turn);
        (amount, turn)
    }
}

fn hundred() -> Of {
    Of::Limit(RateLimit { name: "a".into(), requests: 100, window_s: 1, burst: 100 })
}

#[test]
fn even_load_admits_the_limit_within_five_percent() {
    for seed in 0..8 {
        for (envoys, loss) in [(1, 0), (2, 2), (3, 0), (3, 5), (8, 2)] {
            let mut world = World::new(hundred(), envoys, seed, loss);
            world.run(60_000, &vec![100; envoys]);
            let admitted = world.admitted();
            assert!((5_700..=6_300).contains(&admitted), "{envoys} Envoys, loss {loss} %, seed {seed}: {admitted}");
        }
    }
}

#[test]
fn uneven_load_never_admits_more_than_the_limit_its_burst_and_first_shares() {
    for seed in 0..20 {
        for loss in [0, 10] {
            let mut world = World::new(hundred(), 3, seed, loss);
            for turn in 0..12 {
                let mut loads = [3, 0, 40];
                loads.rotate_left(turn % 3);
                loads[turn % 3] += if turn % 4 == 3 { 0 } else { 400 };
                world.run(5_000, &loads);
            }
            let admitted = world.admitted();
            // The burst, first shares, and an even share of the burst and of half a second whenever an Envoy begins again.
            assert!(admitted <= 6_000 + 100 + 100 + 12 * 50, "loss {loss} %, seed {seed}: {admitted}");
            assert!(admitted >= 3_000, "loss {loss} %, seed {seed}: {admitted}");
        }
    }
}

#[test]
fn a_key_that_rests_between_bursts_is_not_refused_what_its_limit_has() {
    for seed in 0..5 {
        for (envoys, burst) in [(1, 200), (3, 60)] {
            let hour = RateLimit { name: "hour".into(), requests: 1_000, window_s: 3_600, burst: 1_000 };
            let mut world = World::new(Of::Limit(hour), envoys, seed, 5);
            // A tenth of a second of requests at one of the Envoys, then five seconds of rest: 120 times.
            let mut asked = 0;
            for turn in 0..120 {
                let mut loads = vec![0; envoys];
                loads[turn % envoys] = burst;
                let each = burst / 10;
                // As much as the limit has for long: below its rate and its burst together.
                if asked + each > 900 + turn as u64 {
                    continue;
                }
                world.run(100, &loads);
                asked += each;
                world.run(5_000, &vec![0; envoys]);
            }
            assert_eq!(world.admitted(), asked, "{envoys} Envoys, seed {seed}");
        }
    }
}

#[test]
fn a_long_limit_is_not_used_anew_wherever_the_load_moves_to() {
    for seed in 0..5 {
        for loss in [0, 10] {
            let hour = RateLimit { name: "hour".into(), requests: 1_000, window_s: 3_600, burst: 1_000 };
            let mut world = World::new(Of::Limit(hour), 3, seed, loss);
            for turn in 0..36 {
                let mut loads = [0; 3];
                loads[turn % 3] = 100;
                world.run(10_000, &loads);
            }
            // The burst, six minutes of the rate, and a third of the burst of each Envoy once.
            let (admitted, bound) = (world.admitted(), 1_000 + 100 + 1_000);
            assert!((1_000..=bound).contains(&admitted), "loss {loss} %, seed {seed}: {admitted} of {bound}");
        }
    }
}

#[test]
fn one_envoy_after_the_others_has_nearly_the_whole_limit() {
    let mut world = World::new(hundred(), 3, 7, 0);
    world.run(10_000, &[100, 100, 100]);
    world.run(5_000, &[200, 0, 0]);
    let before = world.admitted();
    world.run(20_000, &[200, 0, 0]);
    let admitted = world.admitted() - before;
    assert!((1_900..=2_050).contains(&admitted), "{admitted}");
}

#[test]
fn an_envoy_that_is_cut_off_keeps_its_share_and_the_others_have_the_rest_and_after_a_minute_all() {
    let mut world = World::new(hundred(), 3, 7, 0);
    world.run(10_000, &[100, 100, 100]);
    world.envoys[2].cut_off = true;
    let before = world.admitted();
    world.run(50_000, &[100, 100, 100]);
    let admitted = world.admitted() - before;
    assert!((4_750..=5_100).contains(&admitted), "{admitted}");
    world.run(15_000, &[100, 100, 100]);
    let before = world.admitted();
    world.run(20_000, &[100, 100, 100]);
    let admitted = world.admitted() - before;
    // The limit, and the third that the one that is cut off still has.
    assert!((2_500..=2_000 + 700).contains(&admitted), "{admitted}");
}

#[test]
fn credits_are_spent_to_the_last_and_beyond_by_no_more_than_a_starter_for_each_envoy() {
    for seed in 0..10 {
        for (envoys, loss, loads) in [
            (3, 0, vec![1_000, 1_000, 1_000]),
            (3, 10, vec![1_000, 1_000, 1_000]),
            (3, 5, vec![900, 30, 1]),
            (8, 5, vec![200; 8]),
            (1, 0, vec![50]),
        ] {
            for cost in [1, 7] {
                let mut world = World::new(Of::Credits { cost }, envoys, seed, loss);
                world.top_up(1_000);
                world.run(60_000, &loads);
                let (admitted, starters) = (world.admitted(), 62 * envoys as u64);
                let case = format!("{envoys} Envoys, loss {loss} %, loads {loads:?}, cost {cost}, seed {seed}");
                assert!(admitted <= 1_000 + starters, "{case}: {admitted}");
                assert!(admitted > 1_000 - cost, "{case}: {admitted}");
                assert_eq!(world.balance, 1_000 - admitted.cast_signed(), "{case}");
            }
        }
    }
}

#[test]
fn an_envoy_that_begins_when_all_is_leased_spends_its_starter_beyond_and_no_more() {
    let mut most = 0;
    for seed in 0..10 {
        let mut world = World::new(Of::Credits { cost: 1 }, 3, seed, 5);
        world.top_up(1_000);
        while world.balance > 30 {
            world.run(10, &[1_000, 1_000, 0]);
        }
        world.run(10_000, &[1_000, 1_000, 1_000]);
        assert!(world.admitted() <= 1_000 + 3 * 62, "{}", world.admitted());
        most = most.max(world.admitted());
    }
    assert!(most > 1_000, "nothing was ever spent beyond: is the bound tested at all?");
}

#[test]
fn a_top_up_lets_every_envoy_begin_anew() {
    for seed in 0..20 {
        let mut world = World::new(Of::Credits { cost: 1 }, 3, seed, 5);
        world.top_up(1_000);
        world.run(20_000, &[500, 500, 500]);
        let before = world.admitted();
        world.top_up(2_000);
        world.run(TOLD_MS + 10, &[500, 500, 500]);
        let after = world.admitted() - before;
        assert!(after >= 3, "nobody was let in as soon as they knew");
        world.run(20_000, &[500, 500, 500]);
        assert!(world.admitted() <= 3_000 + 3 * (62 + 125), "{}", world.admitted());
        assert!(world.balance <= 0);
    }
}

#[test]
fn what_a_busy_envoy_leaves_behind_when_it_falls_quiet_is_spent_by_another() {
    for seed in 0..20 {
        let mut world = World::new(Of::Credits { cost: 1 }, 3, seed, 5);
        world.top_up(10_000);
        world.run(2_000, &[1_000, 0, 0]);
        assert!(world.balance > 5_000);
        world.run(60_000, &[0, 300, 0]);
        assert!(world.balance <= 0, "{}", world.balance);
        assert!(world.admitted() <= 10_000 + 3 * 625);
    }
}

#[test]
fn requests_that_come_seldom_are_not_refused_while_there_are_credits() {
    for seed in 0..5 {
        for (envoys, loss) in [(1, 0), (1, 5), (3, 0), (3, 5)] {
            for rest_ms in [1_300, 2_000, 5_000, 20_000] {
                let mut world = World::new(Of::Credits { cost: 5 }, envoys, seed, loss);
                world.top_up(1_000);
                world.run(2 * TOLD_MS, &vec![0; envoys]);
                for turn in 0..100 {
                    world.request(turn % envoys);
                    world.run(rest_ms, &vec![0; envoys]);
                }
                assert_eq!(world.admitted(), 500, "{envoys} Envoys, loss {loss} %, rests of {rest_ms} ms, seed {seed}");
            }
        }
    }
}

#[test]
fn envoys_that_rest_spend_no_more_beyond_than_a_starter_each() {
    for seed in 0..20 {
        let mut world = World::new(Of::Credits { cost: 1 }, 3, seed, 5);
        world.top_up(1_000);
        for turn in 0..200 {
            let mut loads = [0; 3];
            loads[turn % 3] = 200;
            world.run(300, &loads);
            world.run(2_500, &[0; 3]);
        }
        let admitted = world.admitted();
        assert!((1_000..=1_000 + 3 * 62).contains(&admitted), "seed {seed}: {admitted}");
    }
}
