//! The places of a key in a request, as the operator configures them in `key_sources`: how to find the key in the value of a
//! header, and how to remove it from there.

use std::borrow::Cow;

use serde::Deserialize;

use super::{cookie, query};

/// Most key sources.
const SOURCES: usize = 8;
/// Most bytes of the name of a query parameter or cookie.
const NAME_BYTES: usize = 64;

/// One place of a key.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A header of this name, in lower case.
    Header(String),
    /// `Authorization: Bearer …` (RFC 6750, section 2.1). In JSON: `true`.
    Bearer(bool),
    /// A parameter of the query.
    Query(String),
    /// A cookie.
    Cookie(String),
}

/// The rest of a header without its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remainder {
    /// Nothing: the header can be removed.
    Nothing,
    /// The value without keys.
    Value(Vec<u8>),
}

impl Source {
    /// The header that has the key.
    #[must_use]
    pub fn header(&self) -> &str {
        match self {
            Self::Header(name) => name,
            Self::Bearer(_) => "authorization",
            Self::Query(_) => ":path",
            Self::Cookie(_) => "cookie",
        }
    }

    /// The place in words, as in "send your API key …".
    fn place(&self) -> String {
        match self {
            Self::Header(name) => format!("in the header {name}"),
            Self::Bearer(_) => "as a bearer token in the header authorization".into(),
            Self::Query(name) => format!("in the query parameter {name}"),
            Self::Cookie(name) => format!("in the cookie {name}"),
        }
    }

    /// Whether the key takes the whole header, so that no other source can use it.
    #[must_use]
    pub const fn is_whole_header(&self) -> bool {
        matches!(self, Self::Header(_) | Self::Bearer(_))
    }

    /// The first key in the value of the header that is not empty.
    #[must_use]
    pub fn find<'a>(&self, value: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        let is_there = |key: &Cow<'a, [u8]>| !key.is_empty();
        match self {
            Self::Header(_) => Some(Cow::Borrowed(value)).filter(is_there),
            Self::Bearer(_) => bearers(value).map(Cow::Borrowed).find(is_there),
            Self::Query(name) => query::values(value, name.as_bytes()).find(is_there),
            Self::Cookie(name) => cookie::values(value, name.as_bytes()).map(Cow::Borrowed).find(is_there),
        }
    }

    /// Whether the value of the header has this key, as the first or a later one.
    #[must_use]
    pub fn holds(&self, value: &[u8], key: &[u8]) -> bool {
        match self {
            Self::Header(_) => value == key,
            Self::Bearer(_) => bearers(value).any(|found| found == key),
            Self::Query(name) => query::values(value, name.as_bytes()).any(|found| *found == *key),
            Self::Cookie(name) => cookie::values(value, name.as_bytes()).any(|found| found == key),
        }
    }

    /// The value of the header without its keys.
    #[must_use]
    pub fn without(&self, value: &[u8]) -> Remainder {
        match self {
            Self::Header(_) => Remainder::Nothing,
            Self::Bearer(_) => without_bearers(value),
            Self::Query(name) => {
                Remainder::Value(query::without(value, name.as_bytes()).unwrap_or_else(|| value.to_vec()))
            }
            Self::Cookie(name) => match cookie::without(value, name.as_bytes()) {
                Some(left) if left.is_empty() => Remainder::Nothing,
                Some(left) => Remainder::Value(left),
                None => Remainder::Value(value.to_vec()),
            },
        }
    }
}

/// The places in words: `in the header x-api-key or in the cookie session_key`.
#[must_use]
pub fn places(sources: &[Source]) -> String {
    let places: Vec<String> = sources.iter().map(Source::place).collect();
    match places.split_last() {
        Some((last, others @ [_, ..])) => format!("{} or {last}", others.join(", ")),
        _ => places.concat(),
    }
}

/// Checks the fields `key_header`, one header, and `key_sources`, a list of places. Without either, the header is `x-api-key`.
///
/// # Errors
/// The first mistake, with the field and the remedy.
pub fn check(key_header: Option<String>, listed: Option<Vec<Source>>) -> Result<Vec<Source>, String> {
    let bad = |why: &str| Err(format!("key_sources: {why}"));
    let sources = match (key_header, listed) {
        (Some(_), Some(_)) => {
            return bad(
                "key_header is given too; name the header in the list, as {\"header\": \"x-api-key\"}, and leave key_header out",
            );
        }
        (name, None) => {
            let name = name.unwrap_or_else(|| "x-api-key".into());
            return Ok(vec![Source::Header(header_name("key_header", &name)?)]);
        }
        (None, Some(sources)) => sources,
    };
    if !(1..=SOURCES).contains(&sources.len()) {
        return bad("name 1 to 8 places, or leave it out for the header x-api-key");
    }
    let sources = sources.into_iter().map(check_one).collect::<Result<Vec<_>, _>>()?;
    // A source that takes a whole header leaves nothing to others.
    let same = |one: &Source, other: &Source| {
        one == other || (one.header() == other.header() && (one.is_whole_header() || other.is_whole_header()))
    };
    let later = |place: usize| sources.iter().skip(place.saturating_add(1));
    let twice = sources.iter().enumerate().any(|(place, source)| later(place).any(|other| same(source, other)));
    if twice { bad("names a place twice") } else { Ok(sources) }
}

fn check_one(source: Source) -> Result<Source, String> {
    let bad = |why: &str| Err(format!("key_sources: {why}"));
    match &source {
        Source::Header(name) => header_name("key_sources", name).map(Source::Header),
        Source::Bearer(false) => bad("\"bearer\" can only be true; leave it out for no bearer tokens"),
        Source::Query(name) | Source::Cookie(name) => {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
            if (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed) {
                Ok(source)
            } else {
                bad("the name of a query parameter or cookie must have 1 to 64 characters of a-z, A-Z, 0-9 and _ . -")
            }
        }
        Source::Bearer(true) => Ok(source),
    }
}

/// Checks the name of a header (RFC 9110, section 5.1) that the filter will set or remove. Returns it in lower case.
///
/// # Errors
/// If it is not a header name, or is that of a pseudo-header or of a header that frames the message.
pub fn header_name(field: &str, name: &str) -> Result<String, String> {
    const FRAMING: [&str; 6] = ["host", "content-length", "transfer-encoding", "connection", "te", "upgrade"];
    let lower = name.to_ascii_lowercase();
    let token =
        !lower.is_empty() && lower.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b));
    if token && !FRAMING.contains(&lower.as_str()) {
        Ok(lower)
    } else {
        Err(format!("{field}: {name:?} is not a header name that can be used here; choose one like x-api-key"))
    }
}

/// The bearer tokens in `Authorization`: in the whole value, then in each of the lines that Envoy has joined by commas. A token
/// has no comma (RFC 6750, section 2.1), and a request should have one such header (RFC 9110, section 11.6.2).
fn bearers(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter_map(bearer);
    bearer(value).into_iter().chain(lines)
}

/// The lines of `Authorization` that are not bearer tokens, unless the first line is one.
fn without_bearers(value: &[u8]) -> Remainder {
    let is_bearer = |line: &[u8]| bearer(line.trim_ascii()).is_some();
    if is_bearer(value) {
        return Remainder::Nothing;
    }
    let kept: Vec<&[u8]> = value.split(|byte| *byte == b',').filter(|line| !is_bearer(line)).collect();
    Remainder::Value(kept.join(&b","[..]))
}

/// The token after the scheme `Bearer`, which may be in any case (RFC 9110, section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(6)?;
    let token = rest.strip_prefix(b" ")?.trim_ascii();
    scheme.eq_ignore_ascii_case(b"bearer").then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found<'a>(source: &Source, value: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        source.find(value)
    }

    #[test]
    fn bearer_tokens_are_found_and_other_schemes_are_not() {
        let bearer = Source::Bearer(true);
        for (value, key) in [
            ("Bearer abc", Some("abc")),
            ("bEARER   abc ", Some("abc")),
            ("Bearer", None),
            ("Bearer ", None),
            ("Bearerabc", None),
            ("Basic abc", None),
            ("", None),
        ] {
            let found = found(&bearer, value.as_bytes());
            assert_eq!(found.as_deref(), key.map(str::as_bytes), "{value}");
        }
        assert_eq!(bearer.without(b"Bearer abc"), Remainder::Nothing);
    }

    #[test]
    fn a_bearer_token_is_found_in_a_later_line_and_two_joined_tokens_are_no_key() {
        let bearer = Source::Bearer(true);
        let value = |text: &str| Remainder::Value(text.as_bytes().to_vec());
        for (joined, key, left) in [
            ("Basic x,Bearer abc", "abc", value("Basic x")),
            ("Basic x, bearer  abc ,Basic y", "abc", value("Basic x,Basic y")),
            ("Bearer,Bearer abc", "abc", value("Bearer")),
            ("Bearer abc,Basic x", "abc,Basic x", Remainder::Nothing),
            ("Bearer x,Bearer abc", "x,Bearer abc", Remainder::Nothing),
        ] {
            assert_eq!(found(&bearer, joined.as_bytes()).as_deref(), Some(key.as_bytes()), "{joined}");
            assert!(bearer.holds(joined.as_bytes(), b"abc"), "{joined}");
            assert_eq!(bearer.without(joined.as_bytes()), left, "{joined}");
        }
        assert!(!bearer.holds(b"Basic abc,Digest abc", b"abc"));
    }

    #[test]
    fn each_source_names_its_header_finds_its_key_and_leaves_the_rest() {
        let sources = [
            (Source::Header("x-api-key".into()), "x-api-key", "abc", Remainder::Nothing),
            (Source::Query("k".into()), ":path", "/a?b=1&k=abc", Remainder::Value(b"/a?b=1".to_vec())),
            (Source::Cookie("k".into()), "cookie", "b=1; k=abc", Remainder::Value(b"b=1".to_vec())),
            (Source::Cookie("k".into()), "cookie", "k=abc", Remainder::Nothing),
        ];
        for (source, header, value, left) in sources {
            assert_eq!(source.header(), header);
            assert_eq!(found(&source, value.as_bytes()).as_deref(), Some(&b"abc"[..]), "{source:?}");
            assert_eq!(source.without(value.as_bytes()), left, "{source:?}");
            assert_eq!(found(&source, b""), None);
            assert!(source.holds(value.as_bytes(), b"abc") && !source.holds(value.as_bytes(), b"b"));
        }
        assert_eq!(Source::Cookie("k".into()).without(b"b=1"), Remainder::Value(b"b=1".to_vec()));
        // Behind another of its name.
        assert!(Source::Query("k".into()).holds(b"/?k=x&k=%61bc", b"abc"));
        assert!(Source::Cookie("k".into()).holds(b"k=x; k=\"abc\"", b"abc"));
    }

    #[test]
    fn a_wrong_list_of_sources_is_refused_with_the_remedy() {
        let of = |json: &str| check(None, Some(serde_json::from_str(json).unwrap()));
        let all = r#"[{"header": "X-Api-Key"}, {"bearer": true}, {"query": "api_key"}, {"cookie": "session_key"}]"#;
        let headers: Vec<String> = of(all).unwrap().iter().map(|source| source.header().to_owned()).collect();
        assert_eq!(headers, ["x-api-key", "authorization", ":path", "cookie"]);
        assert_eq!(check(None, None).unwrap(), [Source::Header("x-api-key".into())]);
        for (json, why) in [
            ("[]", "key_sources: name 1 to 8"),
            (r#"[{"bearer": false}]"#, "\"bearer\" can only be true"),
            (r#"[{"query": "a&b"}]"#, "name of a query parameter"),
            (r#"[{"cookie": ""}]"#, "name of a query parameter or cookie"),
            (r#"[{"header": ":path"}]"#, "key_sources: \":path\" is not"),
            (r#"[{"header": "a"}, {"header": "A"}]"#, "a place twice"),
            (r#"[{"bearer": true}, {"header": "authorization"}]"#, "a place twice"),
            (r#"[{"cookie": "a"}, {"cookie": "a"}]"#, "a place twice"),
        ] {
            let error = of(json).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
