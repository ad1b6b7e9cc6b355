//! The tree of rules against a naive search: every rule is compared with the request, and of those that match, the one of the
//! greatest rank applies.
#![expect(clippy::unwrap_used, clippy::arithmetic_side_effects, reason = "a test")]

use contract::policy::NamedPolicy;
use contract::rules::{HeaderMatch, Match, PathMatch, Rules, Target, conflict};

/// Rules and requests that are compared.
const CASES: usize = 100_000;
/// Requests for each set of rules.
const REQUESTS: usize = 20;

/// SplitMix64: the same cases in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % u64::try_from(sides).unwrap()).unwrap()
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        *all.get(self.roll(all.len())).unwrap()
    }
}

const HOSTS: [&str; 4] = ["a.b.c", "x.b.c", "b.c", "z"];
const RULE_HOSTS: [&str; 5] = ["a.b.c", "b.c", "*.b.c", "*.c", "z"];
const SEGMENTS: [&str; 3] = ["p", "q", "r"];
const METHODS: [&str; 3] = ["GET", "PUT", "POST"];
const VALUES: [&str; 4] = ["m", "mn", "mno", "x"];
const RULE_VALUES: [&str; 5] = ["m", "mn", "m*", "mn*", "*"];

struct Request {
    host: &'static str,
    segments: Vec<&'static str>,
    method: &'static str,
    headers: [Option<&'static str>; 2],
}

impl Target for Request {
    fn host(&self) -> Option<Vec<u8>> {
        Some(self.host.into())
    }

    fn path(&self) -> Option<Vec<u8>> {
        Some(format!("/{}?q", self.segments.join("/")).into_bytes())
    }

    fn method(&self) -> Option<Vec<u8>> {
        Some(self.method.into())
    }

    fn header(&self, name: &str) -> Option<Vec<u8>> {
        let [first, second] = self.headers;
        let value = if name == "h0" { first } else { second };
        value.map(|value| value.as_bytes().to_vec())
    }
}

fn request(dice: &mut Dice) -> Request {
    let length = dice.roll(4);
    let header = |dice: &mut Dice| (dice.roll(2) == 0).then(|| dice.one_of(&VALUES));
    Request {
        host: dice.one_of(&HOSTS),
        segments: (0..length).map(|_| dice.one_of(&SEGMENTS)).collect(),
        method: dice.one_of(&METHODS),
        headers: [header(dice), header(dice)],
    }
}

fn rule(dice: &mut Dice) -> Match {
    let length = 1 + dice.roll(3);
    let mut is_template = false;
    let segments: Vec<&str> = (0..length)
        .map(|_| {
            let variable = dice.roll(3) == 0;
            is_template |= variable;
            if variable { "{v}" } else { dice.one_of(&SEGMENTS) }
        })
        .collect();
    let text = format!("/{}", segments.join("/"));
    let path = match (is_template, dice.roll(3)) {
        (_, 0) if !is_template => None,
        (true, _) => Some(PathMatch::Template(text)),
        (false, 1) => Some(PathMatch::Exact(text)),
        (false, _) => Some(PathMatch::Prefix(text)),
    };
    let hosts = (0..dice.roll(3)).map(|_| dice.one_of(&RULE_HOSTS).to_owned()).collect();
    let methods = (0..dice.roll(3)).map(|_| dice.one_of(&METHODS).to_owned()).collect();
    let header = (dice.roll(3) == 0).then(|| HeaderMatch {
        name: dice.one_of(&["h0", "h1"]).to_owned(),
        value: dice.one_of(&RULE_VALUES).to_owned(),
    });
    Match { hosts, path, methods, header }
}

/// The rank of a rule for a request; `None` if it does not match. Built from the words of the documentation.
type Rank = ((u8, usize), Vec<u8>, (u8, usize), bool);

fn rank(rule: &Match, request: &Request) -> Option<Rank> {
    let host_rank = |host: &String| match host.strip_prefix('*') {
        _ if host == request.host => Some((2, 0)),
        Some(suffix) if request.host.ends_with(suffix) => Some((1, suffix.len())),
        _ => None,
    };
    let host = if rule.hosts.is_empty() { Some((0, 0)) } else { rule.hosts.iter().filter_map(host_rank).max() };
    let header = match &rule.header {
        None => (0, 0),
        Some(HeaderMatch { name, value }) => {
            let place = usize::from(name == "h1");
            let seen = (*request.headers.get(place)?)?;
            match value.strip_suffix('*') {
                Some(prefix) if seen.starts_with(prefix) => (1, prefix.len()),
                None if seen == value => (2, 0),
                _ => return None,
            }
        }
    };
    if !rule.methods.is_empty() && !rule.methods.iter().any(|method| method == request.method) {
        return None;
    }
    Some((host?, path_rank(rule.path.as_ref(), &request.segments)?, header, !rule.methods.is_empty()))
}

/// A number for each segment: 4 a text, 3 a variable, 2 the end of an exact path, 1 the rest of a prefix.
fn path_rank(path: Option<&PathMatch>, segments: &[&str]) -> Option<Vec<u8>> {
    let (text, end) = match path {
        None => return Some(vec![1]),
        Some(PathMatch::Exact(text) | PathMatch::Template(text)) => (text, 2),
        Some(PathMatch::Prefix(text)) => (text, 1),
    };
    let parts: Vec<&str> = text.split('/').skip(1).collect();
    let fits = if end == 2 { parts.len() == segments.len() } else { parts.len() <= segments.len() };
    let score = |(part, segment): (&&str, &&str)| match *part {
        "{v}" => Some(3),
        part if part == *segment => Some(4),
        _ => None,
    };
    let mut scores = parts.iter().zip(segments).map(score).collect::<Option<Vec<u8>>>()?;
    scores.push(end);
    fits.then_some(scores)
}

#[test]
fn the_tree_finds_the_rule_that_a_naive_search_finds() {
    let mut dice = Dice(7);
    let (mut compared, mut found) = (0, 0);
    while compared < CASES {
        let count = 1 + dice.roll(12);
        let mut policies: Vec<NamedPolicy> = Vec::new();
        for number in 0..count {
            let matches = vec![rule(&mut dice)];
            policies.push(NamedPolicy { name: number.to_string(), matches, ..NamedPolicy::default() });
            // The control plane refuses a rule that conflicts with another policy.
            if conflict(&Rules::new(policies.iter())).is_some() {
                policies.pop();
            }
        }
        let rules = Rules::new(policies.iter());
        for _ in 0..REQUESTS {
            let request = request(&mut dice);
            let ranked = policies.iter().flat_map(|policy| {
                policy.matches.iter().filter_map(|rule| Some((rank(rule, &request)?, policy.name.as_str())))
            });
            let mut ranked: Vec<_> = ranked.collect();
            ranked.sort();
            if let [.., (second, _), (first, _)] = &*ranked {
                assert!(second < first, "two rules have the same rank: {ranked:?}");
            }
            let expected = ranked.last().map(|(_, name)| *name);
            assert_eq!(rules.find(&request).unwrap().map(|rule| rule.policy.as_str()), expected, "{policies:?}");
            (compared, found) = (compared + 1, found + usize::from(expected.is_some()));
        }
    }
    assert!(found > CASES / 4);
}
