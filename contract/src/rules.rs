//! Rules that pick the policy of a request whose route names none. A rule is one [`Match`] of a policy.
//!
//! Of all rules that match a request, the one with the more specific host applies, then the one with the more specific path, then
//! the one with a header, then the one with methods. An exact host is more specific than a suffix, and a longer suffix than a
//! shorter one. Paths are compared segment by segment: a text is more specific than `{…}`, which is more specific than the rest of
//! a prefix. An exact value of a header is more specific than a prefix, and a longer prefix than a shorter one.
//!
//! Rules that this order cannot tell apart, and that may match the same request, are [refused](conflict) when they are written.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::policy::{NamedPolicy, PolicyError};

mod path;

pub use path::{AmbiguousTarget, segments};

/// Most rules of one store.
pub const RULES: usize = 1_000;

const HOSTS: usize = 16;
const HOST_BYTES: usize = 253;
/// Longest host and port of a request, in bytes. Names of hosts have no more than 253 bytes (RFC 1035, section 2.3.4).
const LONGEST_AUTHORITY: usize = HOST_BYTES + 1 + 6;
const METHODS: usize = 10;
const METHOD_BYTES: usize = 32;
const HEADER_BYTES: usize = 256;

/// What a request must be like. An empty list and a missing field match every request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// Its host must be one of these, such as `api.example.com`, or have one of these suffixes, such as `*.example.com`.
    pub hosts: Vec<String>,
    /// What its path must be.
    pub path: Option<PathMatch>,
    /// Its method must be one of these.
    pub methods: Vec<String>,
    /// A header that it must have.
    pub header: Option<HeaderMatch>,
}

/// What a path must be. The query is no part of the path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// This path.
    Exact(String),
    /// This path, or one below it: `/orders` is not a prefix of `/orders-old`.
    Prefix(String),
    /// A path such as `/orders/{id}/items`, with any segment in place of `{id}`.
    Template(String),
}

/// A header that a request must have. Of several lines the first counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// Its name, in lower case.
    pub name: String,
    /// Its value. With `*` at the end: what its value begins with.
    pub value: String,
}

impl HeaderMatch {
    fn prefix(&self) -> Option<&str> {
        self.value.strip_suffix('*')
    }

    fn fits(&self, value: &[u8]) -> bool {
        self.prefix().map_or(value == self.value.as_bytes(), |prefix| value.starts_with(prefix.as_bytes()))
    }

    /// Greater for a more specific one.
    fn rank(&self) -> (bool, usize) {
        self.prefix().map_or((true, 0), |prefix| (false, prefix.len()))
    }

    /// Whether a request can have both headers.
    fn meets(&self, other: &Self) -> bool {
        self.name != other.name || self.value == other.value
    }
}

impl PathMatch {
    fn text(&self) -> &str {
        let (Self::Exact(path) | Self::Prefix(path) | Self::Template(path)) = self;
        path
    }
}

impl Match {
    /// Checks it.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), PolicyError> {
        let bad = |field: &str, why: String| Err(PolicyError { field: field.to_owned(), why });
        if self == &Self::default() {
            let why = "must have hosts, a path, methods or a header; for all requests, use the policy default";
            return bad("", why.into());
        }
        if self.hosts.len() > HOSTS || !self.hosts.iter().all(|host| is_host(host)) {
            return bad(
                "hosts",
                format!("name at most {HOSTS} hosts in lower case without a port, as api.example.com or *.example.com"),
            );
        }
        if let Some(path) = &self.path {
            path::check(path).or_else(|why| bad("path", why))?;
        }
        let is_method = |text: &String| {
            (1..=METHOD_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_uppercase())
        };
        if self.methods.len() > METHODS || !self.methods.iter().all(is_method) {
            return bad("methods", format!("name at most {METHODS} methods in capitals, as GET"));
        }
        if let Some(HeaderMatch { name, value }) = &self.header {
            let is_token = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
            if !(1..=HEADER_BYTES).contains(&name.len()) || !name.bytes().all(is_token) {
                return bad("header.name", "must be the name of a header in lower case, as x-model".into());
            }
            let text = value.strip_suffix('*').unwrap_or(value);
            let is_visible = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b'*';
            if !(1..=HEADER_BYTES).contains(&value.len()) || text.trim() != text || !text.bytes().all(is_visible) {
                return bad("header.value", "must be visible ASCII characters; a * may stand at the end only".into());
            }
        }
        Ok(())
    }

    /// Its hosts; [`ANY_HOST`] if it is for all.
    fn hosts(&self) -> impl Iterator<Item = &str> {
        let any = if self.hosts.is_empty() { Some(ANY_HOST) } else { None };
        self.hosts.iter().map(String::as_str).chain(any)
    }

    /// Whether some request matches both, and neither is the more specific one. Their hosts and paths are the same.
    fn ties(&self, other: &Self) -> bool {
        let share_method = self.methods.is_empty() || self.methods.iter().any(|method| other.methods.contains(method));
        let same_rank = self.rank() == other.rank();
        let meet = self.header.as_ref().zip(other.header.as_ref()).is_none_or(|(one, other)| one.meets(other));
        same_rank && share_method && meet
    }

    /// Greater for a more specific one, its host and path aside.
    fn rank(&self) -> (Option<(bool, usize)>, bool) {
        (self.header.as_ref().map(HeaderMatch::rank), !self.methods.is_empty())
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.methods.is_empty() {
            parts.push(self.methods.join(" or "));
        }
        if !self.hosts.is_empty() {
            parts.push(format!("host {}", self.hosts.join(" or ")));
        }
        match &self.path {
            Some(PathMatch::Exact(path)) => parts.push(format!("path {path}")),
            Some(PathMatch::Prefix(path)) => parts.push(format!("path {path} and below")),
            Some(PathMatch::Template(path)) => parts.push(format!("path like {path}")),
            None => {}
        }
        if let Some(header) = &self.header {
            parts.push(format!("header {}: {}", header.name, header.value));
        }
        f.write_str(&parts.join(", "))
    }
}

/// The host of rules for all hosts.
const ANY_HOST: &str = "*";

/// Whether this is a host name, or a star and a suffix that begins with a dot.
fn is_host(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let is_label = |label: &str| {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        !label.is_empty() && label.bytes().all(allowed)
    };
    text.len() <= HOST_BYTES && name.split('.').all(is_label)
}

/// A request, as far as rules look at it. Each is asked for only if a rule for the request needs it.
pub trait Target {
    /// The value of `:authority` or `Host`.
    fn host(&self) -> Option<Vec<u8>>;

    /// The path as the client sent it or the host normalised it, with or without the query.
    fn path(&self) -> Option<Vec<u8>>;

    /// The method.
    fn method(&self) -> Option<Vec<u8>>;

    /// The first line of a header.
    fn header(&self, name: &str) -> Option<Vec<u8>>;
}

/// One rule that applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The name of its policy.
    pub policy: String,
    /// What it matches.
    pub matches: Arc<Match>,
}

/// All rules of a store, as a tree of path segments for each host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// By host as rules name it.
    hosts: BTreeMap<String, Node>,
    /// Whether a rule names a host.
    needs_host: bool,
}

/// The rules for paths that have come so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    texts: BTreeMap<Vec<u8>, Node>,
    any: Option<Box<Node>>,
    /// For the path that ends here, and for it and every path below; the most specific rule first.
    exact: Vec<Rule>,
    prefix: Vec<Rule>,
}

impl Rules {
    /// No rules.
    pub const NONE: Self = Self { hosts: BTreeMap::new(), needs_host: false };

    /// The rules of these policies.
    pub fn new<'a>(policies: impl Iterator<Item = &'a NamedPolicy>) -> Self {
        let mut rules = Self::default();
        for policy in policies {
            for matches in &policy.matches {
                rules.insert(&policy.name, matches);
            }
        }
        rules.hosts.values_mut().for_each(Node::sort);
        rules
    }

    fn insert(&mut self, policy: &str, matches: &Match) {
        self.needs_host |= !matches.hosts.is_empty();
        let rule = Rule { policy: policy.to_owned(), matches: Arc::new(matches.clone()) };
        for host in matches.hosts() {
            let node = self.hosts.entry(host.to_owned()).or_default();
            node.leaf(matches.path.as_ref()).push(rule.clone());
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// The rule that applies to a request, if one does.
    ///
    /// # Errors
    /// [`AmbiguousTarget`]: rules cannot be applied to such a request. It must be refused.
    pub fn find(&self, target: &impl Target) -> Result<Option<&Rule>, AmbiguousTarget> {
        if self.is_empty() {
            return Ok(None);
        }
        let path = target.path().unwrap_or_default();
        let segments = segments(&path)?;
        let seen = Seen { target, method: OnceCell::new() };
        let host = if self.needs_host { target.host() } else { None };
        if host.as_ref().is_some_and(|host| host.len() > LONGEST_AUTHORITY) {
            return Err(AmbiguousTarget);
        }
        let host = host.as_deref().map(host_of);
        let of_host = host.iter().flat_map(|host| hosts_for(host)).chain([Cow::Borrowed(ANY_HOST)]);
        Ok(of_host.filter_map(|host| self.hosts.get(&*host)).find_map(|node| node.find(&segments, &seen)))
    }
}

/// What a request has beside its host and path. Each is read once a rule for its host and path needs it.
struct Seen<'a, T> {
    target: &'a T,
    method: OnceCell<Option<Vec<u8>>>,
}

impl<T: Target> Seen<'_, T> {
    fn fits(&self, matches: &Match) -> bool {
        let has_method = |method: &[u8]| matches.methods.iter().any(|named| named.as_bytes() == method);
        let method = || self.method.get_or_init(|| self.target.method()).as_deref();
        let has_header =
            |header: &HeaderMatch| self.target.header(&header.name).is_some_and(|value| header.fits(&value));
        (matches.methods.is_empty() || method().is_some_and(has_method))
            && matches.header.as_ref().is_none_or(has_header)
    }
}

impl Node {
    /// The rules for a path.
    fn leaf(&mut self, path: Option<&PathMatch>) -> &mut Vec<Rule> {
        let Some(path) = path else { return &mut self.prefix };
        let is_template = matches!(path, PathMatch::Template(_));
        let mut node = self;
        for segment in path::parts(path.text()) {
            node = if is_template && path::is_variable(segment) {
                node.any.get_or_insert_default()
            } else {
                node.texts.entry(segment.as_bytes().to_vec()).or_default()
            };
        }
        if matches!(path, PathMatch::Prefix(_)) { &mut node.prefix } else { &mut node.exact }
    }

    fn sort(&mut self) {
        for rules in [&mut self.exact, &mut self.prefix] {
            rules.sort_by_key(|rule| Reverse(rule.matches.rank()));
        }
        self.texts.values_mut().chain(self.any.as_deref_mut()).for_each(Self::sort);
    }

    fn find(&self, segments: &[Cow<'_, [u8]>], seen: &Seen<'_, impl Target>) -> Option<&Rule> {
        let fitting = |rules: &'_ Vec<Rule>| rules.iter().position(|rule| seen.fits(&rule.matches));
        let deeper = match segments.split_first() {
            None => fitting(&self.exact).and_then(|place| self.exact.get(place)),
            Some((first, rest)) => {
                let text = self.texts.get(&**first).and_then(|node| node.find(rest, seen));
                text.or_else(|| self.any.as_ref().and_then(|node| node.find(rest, seen)))
            }
        };
        deeper.or_else(|| fitting(&self.prefix).and_then(|place| self.prefix.get(place)))
    }

    fn leaves(&self) -> Vec<&[Rule]> {
        let mut all = vec![&*self.exact, &*self.prefix];
        for node in self.texts.values().chain(self.any.as_deref()) {
            all.extend(node.leaves());
        }
        all
    }
}

/// Two rules of different policies that may match the same request although neither is more specific.
#[must_use]
pub fn conflict(rules: &Rules) -> Option<(&Rule, &Rule)> {
    let leaves = rules.hosts.values().flat_map(Node::leaves);
    let mut pairs = leaves.flat_map(|leaf| {
        leaf.iter()
            .enumerate()
            .flat_map(move |(place, one)| leaf.iter().skip(place.saturating_add(1)).map(move |other| (one, other)))
    });
    pairs.find(|(one, other)| one.policy != other.policy && one.matches.ties(&other.matches))
}

/// The name of the host in `:authority`: in lower case, without the port and a dot at the end.
fn host_of(authority: &[u8]) -> String {
    let text = String::from_utf8_lossy(authority).to_ascii_lowercase();
    let name = match text.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => &text,
    };
    name.strip_suffix('.').unwrap_or(name).to_owned()
}

/// The hosts that a rule may name for this one, the most specific first: itself, then `*` and each of its suffixes.
fn hosts_for(host: &str) -> impl Iterator<Item = Cow<'_, str>> {
    let dots = host.match_indices('.').map(|(place, _)| place);
    let suffixes = dots.filter_map(|place| host.get(place..)).map(|suffix| Cow::Owned(format!("*{suffix}")));
    std::iter::once(Cow::Borrowed(host)).chain(suffixes)
}

#[cfg(test)]
mod tests;
