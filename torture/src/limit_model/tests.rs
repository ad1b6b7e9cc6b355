use super::*;
use crate::envoy_model::{BOUND, Disruption};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// A pool, two Envoys, and the time at which it begins.
struct Judged {
    pool: Pool,
    envoys: [EnvoyModel; 2],
    zero: Instant,
}

impl Judged {
    fn new(capacity: Capacity) -> Self {
        let pool = Pool::new("pool", "code", capacity);
        Self { pool, envoys: Default::default(), zero: Instant::now() }
    }

    /// Two a second, and six at once.
    fn rate() -> Self {
        Self::new(Capacity::Rate { interval: MS * 500, burst: 6 })
    }

    /// Filled with so many tokens well before it begins.
    fn stock(tokens: u64) -> Self {
        let mut judged = Self::new(Capacity::Stock);
        judged.fill(tokens, Duration::ZERO);
        judged.zero += BOUND + S;
        judged
    }

    fn fill(&mut self, tokens: u64, at: Duration) {
        let asked = self.zero + at;
        self.pool.fills.push(Fill { tokens, asked, confirmed: Some(asked), lost: None });
    }

    /// A request to an Envoy, with the times at which it was sent and answered, in milliseconds.
    fn used(mut self, envoy: usize, (from, to): (u32, u32), fate: Fate) -> Self {
        let time = Span { from: self.zero + MS * from, to: self.zero + MS * to };
        self.pool.note(Use { envoy, time, fate });
        self
    }

    fn admitted(self, times: impl IntoIterator<Item = (u32, u32)>) -> Self {
        times.into_iter().fold(self, |judged, time| judged.used(0, time, Fate::Admitted))
    }

    fn refused(self, from: u32) -> Self {
        self.used(0, (from, from + 1), Fate::Refused)
    }

    /// A spell of the second Envoy.
    fn held(mut self, (from, to): (u32, u32)) -> Self {
        self.envoys[1].holds.push(Span { from: self.zero + MS * from, to: self.zero + MS * to });
        self
    }

    fn cut_off(mut self, envoy: usize, (start, end): (u32, u32)) -> Self {
        let (start, end) = (self.zero + MS * start, Some(self.zero + MS * end));
        self.envoys[envoy].allowances.push(Disruption { start, end, after: MS * 100 });
        self
    }

    fn verdict(&self) -> (u64, usize) {
        let verdict = self.pool.judge(&self.envoys);
        (verdict.excess, verdict.wrongful.len())
    }
}

#[test]
fn a_rate_limit_admits_its_burst_and_its_rate_and_one_more_is_excess() {
    let at_once = |requests: u32| Judged::rate().admitted((0..requests).map(|number| (number, number + 1)));
    assert_eq!(at_once(6).verdict(), (0, 0));
    assert_eq!(at_once(7).verdict(), (1, 0));
    assert_eq!(at_once(6).admitted([(499, 500)]).verdict(), (0, 0));
    assert_eq!(at_once(6).admitted([(498, 499)]).verdict(), (1, 0));
    // In any span, not only from the start.
    let late = at_once(3).admitted((0..7).map(|number| (9_000 + number, 9_001 + number)));
    assert_eq!(late.verdict(), (1, 0));
    // It may have been decided before or after the others.
    assert_eq!(at_once(6).admitted([(3, 600)]).verdict(), (0, 0));
    assert_eq!(at_once(6).used(1, (3, 9), Fate::Doubtful).verdict(), (0, 0));
}

#[test]
fn a_rate_limit_with_room_may_not_refuse() {
    let used = |requests: u32| Judged::rate().admitted((0..requests).map(|number| (number, number + 1)));
    // Two tokens of tolerance: 0.4 s, and one more.
    assert_eq!(used(4).refused(10).verdict(), (0, 0));
    assert_eq!(used(3).refused(500).verdict(), (0, 1));
    assert_eq!([1_400, 1_401].map(|at| used(6).refused(at).verdict().1), [0, 1]);
    assert_eq!(used(6).refused(700).verdict(), (0, 0));
    // It may have been decided before the refusal.
    let doubtful = |judged: Judged| (0..4).fold(judged, |judged, _| judged.used(1, (490, 9_000), Fate::Doubtful));
    assert_eq!(doubtful(used(3)).refused(500).verdict(), (0, 0));
    // An Envoy that was killed may hold half of a fast limit, an eighth of another one, and two.
    assert_eq!(used(3).refused(500).held((0, 1_000)).verdict(), (0, 0));
    assert_eq!(used(3).refused(500).held((0, 499)).verdict(), (0, 1));
    let wrongful = |interval: Duration, burst: u64, requests: u32| {
        let judged = Judged::new(Capacity::Rate { interval, burst });
        let judged = judged.admitted((0..requests).map(|number| (number, number + 1)));
        judged.refused(500).held((0, 1_000)).verdict().1
    };
    assert_eq!([6, 7].map(|requests| wrongful(MS * 500, 20, requests)), [1, 0]);
    assert_eq!([10, 11].map(|requests| wrongful(S, 16, requests)), [1, 0]);
}

#[test]
fn a_stock_is_spent_to_the_last_token_and_one_more_is_excess() {
    let spent = |requests: u32| Judged::stock(10).admitted((0..requests).map(|number| (number, number + 1)));
    assert_eq!(spent(9).refused(20).verdict(), (0, 1));
    assert_eq!(spent(10).refused(20).verdict(), (0, 0));
    assert_eq!(spent(11).verdict(), (1, 0));
    assert_eq!(spent(10).used(1, (5, 9), Fate::Doubtful).verdict(), (0, 0));
    assert_eq!(spent(9).used(1, (5, 9), Fate::Doubtful).refused(20).verdict(), (0, 0));
    // It was admitted before it was asked for.
    let mut judged = spent(11);
    judged.fill(1, MS * 12);
    assert_eq!(judged.verdict(), (1, 0));
}

#[test]
fn a_fill_opens_a_stock_once_every_envoy_must_know_it() {
    let filled = |refused| {
        let mut judged = Judged::stock(1).admitted([(0, 1)]);
        judged.fill(1, S);
        judged.refused(refused).verdict()
    };
    assert_eq!((filled(3_000), filled(3_001)), ((0, 0), (0, 1)));
    // One that is not confirmed may have been carried out.
    let mut judged = Judged::stock(1).admitted([(0, 1)]);
    judged.fill(1, S);
    judged.pool.fills[1].confirmed = None;
    assert_eq!(judged.admitted([(2_000, 2_001)]).refused(9_000).verdict(), (0, 0));
}

#[test]
fn an_envoy_that_ended_holds_an_eighth_at_most_of_what_was_left() {
    let left = |tokens: u64| Judged::stock(80).admitted((0..80 - tokens as u32).map(|number| (number, number + 1)));
    assert_eq!(left(12).refused(100).held((0, 1_000)).verdict(), (0, 0));
    assert_eq!(left(13).refused(100).held((0, 1_000)).verdict(), (0, 1));
    assert_eq!(left(12).refused(1_001).held((0, 1_000)).verdict(), (0, 1));
    assert_eq!(left(12).refused(100).cut_off(1, (0, 100)).verdict(), (0, 0));
}

#[test]
fn an_envoy_that_is_cut_off_is_not_judged_until_it_has_recovered() {
    let judged = |refused| Judged::stock(9).refused(refused).cut_off(0, (100, 200));
    assert_eq!([90, 99, 300, 301].map(|at| judged(at).verdict().1), [1, 0, 0, 1]);
    let counted = |judged: Judged| judged.pool.judge(&judged.envoys).judged;
    assert_eq!([90, 99].map(|at| counted(judged(at))), [1, 0]);
    // What it admits at the safe rate may exceed a rate limit, and no stock.
    let spent = |judged: Judged| judged.admitted((0..7).map(|number| (number, number + 1))).cut_off(0, (0, 9));
    assert_eq!(spent(Judged::rate()).verdict(), (0, 0));
    assert_eq!(spent(Judged::stock(6)).verdict(), (1, 0));
}

#[test]
fn what_was_admitted_and_may_be_uncounted_is_no_excess() {
    let mut judged = Judged::stock(5).admitted((0..7).map(|number| (10 * number, 10 * number + 1)));
    let span = |from, to| Span { from: judged.zero + MS * from, to: judged.zero + MS * to };
    let (one, two) = (span(30, 35), span(30, 40));
    judged.envoys[0].uncounted = vec![one];
    assert_eq!(judged.verdict(), (1, 0));
    judged.envoys[0].uncounted = vec![two];
    assert_eq!(judged.verdict(), (0, 0));
}

#[test]
fn a_restored_database_lacks_later_fills_and_the_administrator_makes_up_for_what_is_overdrawn() {
    let mut pool = Pool::new("pool", "code", Capacity::Stock);
    let confirmed = |pool: &mut Pool, tokens| {
        let fill = pool.ask(tokens);
        pool.confirm(fill);
    };
    confirmed(&mut pool, 10);
    let asked_before = pool.ask(3);
    let copied = Instant::now();
    std::thread::sleep(MS);
    pool.confirm(asked_before);
    confirmed(&mut pool, 20);
    assert_eq!(pool.filled_by(Instant::now()), 33);
    pool.go_back(copied);
    // Envoys may hold an eighth of the one that was lost, and two tokens.
    assert_eq!((pool.filled_by(Instant::now()), pool.fills[1].confirmed), (13 + 4, None));
    assert_eq!(pool.overdrawn(), 0);
    let time = Span { from: copied, to: copied };
    (0..14).for_each(|_| pool.note(Use { envoy: 0, time, fate: Fate::Admitted }));
    assert_eq!(pool.overdrawn(), 4);
}
