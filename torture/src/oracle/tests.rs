//! Tests of the oracle's rules.

use super::*;
use crate::limit_model::Capacity;

const LATER: Duration = Duration::from_secs(3);

struct Judged {
    oracle: Oracle,
    key: usize,
    _home: tempfile::TempDir,
}

impl Judged {
    /// One key that must be admitted, at one Envoy.
    fn new(ends_at: Option<SystemTime>) -> Self {
        let home = tempfile::TempDir::new().unwrap();
        let oracle = Oracle::new(1, Journal::create(&home.path().join("journal")).unwrap());
        let key = oracle.add("id", "secret", ends_at, &[], None);
        Self { oracle, key, _home: home }
    }

    fn ticket(&self) -> Ticket {
        let mut dice = Dice::new(0);
        (0..).map(|_| self.oracle.pick(&mut dice, &[])).find(|ticket| ticket.secret == Some(self.key)).unwrap()
    }

    /// What is said of an answer to a request that is sent so much later than now.
    fn judge(&self, later: Duration, ticket: &Ticket, answer: &Answer) -> Vec<String> {
        let before = self.oracle.verdict().broken.len();
        self.oracle.judge(0, ticket, Instant::now() + later, SystemTime::now() + later, answer);
        self.oracle.verdict().broken.split_off(before)
    }

    fn is_fine(&self, later: Duration, answer: &Answer) -> bool {
        self.judge(later, &self.ticket(), answer).is_empty()
    }
}

fn came(status: u16, code: &str) -> Answer {
    Answer::Came(status, (!code.is_empty()).then(|| code.to_owned()))
}

#[test]
fn a_dead_key_may_be_admitted_within_the_bound_and_not_later() {
    let judged = Judged::new(None);
    judged.oracle.settle(judged.key, Standing::Dead, None);
    assert!(judged.is_fine(Duration::ZERO, &came(200, "")));
    assert!(judged.is_fine(LATER, &came(401, "revoked")));
    assert_eq!(judged.oracle.verdict().admitted_wrongly, 0);
    assert!(!judged.is_fine(LATER, &came(200, "")));
    assert_eq!(judged.oracle.verdict().admitted_wrongly, 1);
    // Unknown: no response is wrong.
    judged.oracle.doubt(judged.key);
    assert!(judged.is_fine(LATER, &came(200, "")) && judged.is_fine(LATER, &came(401, "revoked")));
}

#[test]
fn nothing_is_held_against_an_envoy_that_cannot_hear_of_it() {
    let judged = Judged::new(None);
    judged.oracle.settle(judged.key, Standing::Dead, None);
    let disruption = judged.oracle.begin(Hinders::Changes, &[0], Duration::from_secs(10));
    assert!(judged.is_fine(LATER * 100, &came(200, "")));
    judged.oracle.end(&disruption);
    assert!(judged.is_fine(Duration::from_secs(11), &came(200, "")));
    assert!(!judged.is_fine(Duration::from_secs(13), &came(200, "")));
}

#[test]
fn a_good_key_may_not_be_refused_once_it_is_known_everywhere() {
    let judged = Judged::new(None);
    assert!(judged.is_fine(Duration::ZERO, &came(401, "unknown")));
    for refusal in [came(401, "unknown"), came(401, "revoked"), came(401, "disabled"), came(429, "credits_exhausted")] {
        assert!(!judged.is_fine(LATER, &refusal), "{refusal:?}");
    }
    // It was changed while the request was under way.
    let ticket = judged.ticket();
    judged.oracle.doubt(judged.key);
    assert_eq!(judged.judge(LATER, &ticket, &came(401, "revoked")), [""; 0]);
}

#[test]
fn an_end_is_kept_to_the_second_by_the_envoys_own_clock() {
    let judged = Judged::new(Some(SystemTime::now() + LATER));
    // Whatever is broken.
    judged.oracle.begin(Hinders::Changes, &[0], Duration::ZERO);
    assert!(judged.is_fine(LATER, &came(200, "")));
    assert!(!judged.is_fine(LATER * 2, &came(200, "")));
    judged.oracle.clock(0, LATER * 2, Duration::ZERO);
    assert!(judged.is_fine(LATER * 2, &came(200, "")));
}

#[test]
fn an_end_that_a_change_brought_has_to_be_heard_of_first() {
    let judged = Judged::new(None);
    judged.oracle.settle(judged.key, Standing::Good, Some((SystemTime::now() + LATER, Duration::ZERO)));
    let disruption = judged.oracle.begin(Hinders::Changes, &[0], LATER * 10);
    assert!(judged.is_fine(LATER * 5, &came(200, "")));
    judged.oracle.end(&disruption);
    assert!(judged.is_fine(LATER * 5, &came(200, "")));
    assert!(!judged.is_fine(LATER * 20, &came(200, "")));
}

#[test]
fn an_end_that_a_change_brought_may_be_as_much_earlier_as_the_change_took() {
    let refused_at = |earlier| {
        let judged = Judged::new(None);
        let latest = SystemTime::now() + LATER * 10;
        judged.oracle.settle(judged.key, Standing::Good, Some((latest, earlier)));
        judged.is_fine(LATER * 8, &came(401, "expired"))
    };
    assert!(!refused_at(Duration::ZERO));
    assert!(refused_at(LATER * 2));
}

#[test]
fn answers_that_are_missing_or_not_documented_need_a_fault_that_excuses_them() {
    let judged = Judged::new(None);
    for answer in [Answer::Lost, Answer::Unsent, came(503, ""), came(500, "")] {
        assert!(!judged.is_fine(Duration::ZERO, &answer), "{answer:?}");
    }
    let disruption = judged.oracle.begin(Hinders::Requests, &[0], Duration::ZERO);
    assert!(judged.is_fine(Duration::ZERO, &Answer::Lost));
    judged.oracle.end(&disruption);
    // Sent once it was over.
    assert!(judged.judge(Duration::ZERO, &judged.ticket(), &Answer::Lost).len() == 1);
}

#[test]
fn an_envoy_may_not_be_ready_before_its_first_answer_only() {
    let judged = Judged::new(None);
    assert!(judged.is_fine(LATER, &came(503, "not_ready")));
    assert!(judged.is_fine(LATER, &came(200, "")));
    assert!(!judged.is_fine(LATER, &came(503, "not_ready")));
    judged.oracle.unready(0);
    assert!(judged.is_fine(LATER, &came(503, "not_ready")));
}

#[test]
fn keys_go_back_with_the_database_and_what_came_later_is_not_counted() {
    let judged = Judged::new(None);
    let then = judged.oracle.snapshot();
    judged.oracle.settle(judged.key, Standing::Dead, None);
    judged.oracle.add("later", "later's secret", None, &[], None);
    judged.oracle.go_back(&then);
    assert!(!judged.is_fine(LATER, &came(401, "revoked")));
    let later = Ticket { secret: Some(1), standing: Standing::Dead, ..judged.ticket() };
    assert_eq!(judged.judge(LATER, &later, &came(200, "")).len(), 1);
    let verdict = judged.oracle.verdict();
    assert_eq!(verdict.tallies.keys().collect::<Vec<_>>(), ["id"]);
    assert_eq!((verdict.sent, verdict.tallies["id"].refused), (2, 1));
}

#[test]
fn a_steady_key_stands_in_both_databases_and_may_not_be_refused_while_one_is_put_back() {
    let judged = Judged::new(None);
    judged.oracle.all_are_steady();
    let refusal = came(401, "unknown");
    let then = judged.oracle.snapshot();
    let before = judged.ticket();
    judged.oracle.doubt_all();
    let meanwhile = judged.ticket();
    judged.oracle.go_back(&then);
    // As long ago as its key, each of them is due.
    for ticket in [&before, &meanwhile, &judged.ticket()] {
        let long_ago = Ticket { since: ticket.since.checked_sub(LATER).unwrap(), ..ticket.clone() };
        assert_eq!((ticket.standing, ticket.since), (Standing::Good, before.since));
        assert_eq!(judged.judge(Duration::ZERO, &long_ago, &refusal).len(), 1);
    }
    // Others are known again only once the Envoys have the new epoch.
    let judged = Judged::new(None);
    judged.oracle.go_back(&judged.oracle.snapshot());
    assert!(judged.is_fine(Duration::ZERO, &refusal));
}

/// A key with a pool of its own, and the number of the pool.
fn limited(code: &'static str, capacity: Capacity) -> (Judged, usize) {
    let mut judged = Judged::new(None);
    let pool = judged.oracle.add_pool("pool", code, capacity);
    judged.key = judged.oracle.add("limited", "limited secret", None, &[pool], None);
    (judged, pool)
}

/// What the end of the run says of limits.
fn limits_broken(judged: &Judged) -> Vec<String> {
    judged.oracle.load_is_over();
    judged.oracle.verdict().broken.into_iter().filter(|broken| broken.starts_with("pool:")).collect()
}

#[test]
fn a_refusal_by_a_limit_is_judged_at_the_end_by_all_requests_of_its_pool() {
    let refusal = came(429, "credits_exhausted");
    let (judged, pool) = limited("credits_exhausted", Capacity::Stock);
    let fill = judged.oracle.ask_to_fill(pool, 2);
    judged.oracle.filled(pool, fill);
    for answer in [came(200, ""), came(200, ""), refusal.clone()] {
        assert!(judged.is_fine(LATER, &answer));
    }
    assert_eq!(limits_broken(&judged), [""; 0]);
    // One of three is left.
    let (judged, pool) = limited("credits_exhausted", Capacity::Stock);
    let fill = judged.oracle.ask_to_fill(pool, 3);
    judged.oracle.filled(pool, fill);
    for answer in [came(200, ""), came(200, ""), refusal.clone()] {
        assert!(judged.is_fine(LATER, &answer));
    }
    assert_eq!(limits_broken(&judged).len(), 1);
    assert_eq!(judged.oracle.verdict().limited[0].wrongful.len(), 1);
    // Another key, and another limit, have none to use up.
    assert!(!Judged::new(None).is_fine(LATER, &refusal));
    assert!(!judged.is_fine(LATER, &came(429, "rate_limited")));
}

#[test]
fn limits_may_be_unavailable_only_where_control_planes_do_not_answer() {
    let (judged, _) = limited("quota_exceeded", Capacity::Stock);
    let refusal = came(503, "limits_unavailable");
    // A busy machine may be late, but not for longer than the bound.
    assert!(judged.is_fine(Duration::ZERO, &refusal));
    assert!(!judged.is_fine(LATER, &refusal));
    assert!(judged.is_fine(LATER, &came(200, "")));
    assert!(judged.is_fine(LATER, &refusal));
    let disruption = judged.oracle.begin(Hinders::Allowances, &[0], LATER);
    assert!(judged.is_fine(LATER * 9, &refusal));
    judged.oracle.end(&disruption);
    assert!(!judged.is_fine(LATER * 9, &refusal));
    // A key without shared limits needs no control plane.
    let judged = Judged::new(None);
    judged.oracle.begin(Hinders::Allowances, &[0], LATER);
    assert!(!judged.is_fine(LATER, &refusal));
}

#[test]
fn a_run_that_judged_no_dead_key_or_served_nobody_who_pays_proves_nothing() {
    let judged = Judged::new(None);
    let broken = || {
        let before = judged.oracle.verdict().broken.len();
        judged.oracle.load_is_over();
        judged.oracle.verdict().broken.len() - before
    };
    assert_eq!(broken(), 1);
    judged.oracle.settle(judged.key, Standing::Dead, None);
    assert!(judged.is_fine(Duration::ZERO, &came(401, "revoked")));
    assert_eq!((judged.oracle.verdict().judged_dead, broken()), (0, 1));
    assert!(judged.is_fine(LATER, &came(401, "revoked")));
    assert_eq!((judged.oracle.verdict().judged_dead, broken()), (1, 0));
    let rate = Capacity::Rate { interval: LATER, burst: 1 };
    let pool = judged.oracle.add_pool("pool", "rate_limited", rate);
    let limited = judged.oracle.add("limited", "limited secret", None, &[pool], None);
    // None was admitted, and none was judged.
    assert_eq!(broken(), 2);
    let ticket = Ticket { secret: Some(limited), standing: Standing::Good, ..judged.ticket() };
    assert!(judged.judge(Duration::ZERO, &ticket, &came(200, "")).is_empty());
    assert_eq!(broken(), 0);
}

#[test]
fn all_obey_once_the_last_of_the_envoys_has_recovered() {
    let home = tempfile::TempDir::new().unwrap();
    let oracle = Oracle::new(2, Journal::create(&home.path().join("journal")).unwrap());
    let by = || oracle.all_obey_by(Instant::now()).map(|at| at.duration_since(Instant::now()));
    assert!(by().is_some_and(|by| by <= BOUND));
    let disruption = oracle.begin(Hinders::Changes, &[1], LATER);
    assert_eq!(by(), None);
    oracle.end(&disruption);
    assert!(by().is_some_and(|by| by > LATER && by <= LATER + BOUND));
}
