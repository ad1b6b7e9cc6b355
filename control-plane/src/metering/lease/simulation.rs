//! Envoys and a control plane without network, database or clock: what each admits is counted, and the stated bounds must
//! hold whatever is late or lost.

mod bounds;

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
        envoy.empty_left = 4;
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
            price: 1,
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
                stock::answer(&mut self.rows, me, &report, self.balance, &self.budget);
                (rows::grant((2, Uuid::nil()), &self.rows[me], self.budget.turn).amount, self.budget.turn)
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
