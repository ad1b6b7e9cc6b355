//! Where keys are looked for: the operator's `key_sources` come in, the key that stands in a header's value goes out, and
//! what is left of that value without the key.

use std::borrow::Cow;

use serde::Deserialize;

use crate::{cookie, query};

/// One place where a key may stand.
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

/// What is left of a header once the key is out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing that is worth keeping: remove the header.
    Nothing,
    /// The value without the key.
    Value(Vec<u8>),
}

impl Source {
    /// The header in whose value it stands.
    #[must_use]
    pub fn header(&self) -> &str {
        match self {
            Self::Header(name) => name,
            Self::Bearer(_) => "authorization",
            Self::Query(_) => ":path",
            Self::Cookie(_) => "cookie",
        }
    }

    /// Whether the header has no other use than the key.
    #[must_use]
    pub const fn is_whole_header(&self) -> bool {
        matches!(self, Self::Header(_) | Self::Bearer(_))
    }

    /// The key in the value of that header, if there is one that is not empty.
    #[must_use]
    pub fn find<'a>(&self, value: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        match self {
            Self::Header(_) => Some(Cow::Borrowed(value)),
            Self::Bearer(_) => bearer(value).map(Cow::Borrowed),
            Self::Query(name) => query::find(value, name.as_bytes()),
            Self::Cookie(name) => cookie::find(value, name.as_bytes()).map(Cow::Borrowed),
        }
        .filter(|key| !key.is_empty())
    }

    /// What is left of the value of that header without the key.
    #[must_use]
    pub fn without(&self, value: &[u8]) -> Left {
        match self {
            Self::Header(_) | Self::Bearer(_) => Left::Nothing,
            Self::Query(name) => Left::Value(query::without(value, name.as_bytes()).unwrap_or_else(|| value.to_vec())),
            Self::Cookie(name) => match cookie::without(value, name.as_bytes()) {
                Some(left) if left.is_empty() => Left::Nothing,
                Some(left) => Left::Value(left),
                None => Left::Value(value.to_vec()),
            },
        }
    }
}

/// The token of a bearer; the name of the scheme may be in any case (RFC 9110, section 11.1).
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
    fn a_bearer_is_told_from_other_schemes() {
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
        assert_eq!(bearer.without(b"Bearer abc"), Left::Nothing);
    }

    #[test]
    fn each_source_names_its_header_finds_its_key_and_leaves_the_rest() {
        let sources = [
            (Source::Header("x-api-key".into()), "x-api-key", "abc", Left::Nothing),
            (Source::Query("k".into()), ":path", "/a?b=1&k=abc", Left::Value(b"/a?b=1".to_vec())),
            (Source::Cookie("k".into()), "cookie", "b=1; k=abc", Left::Value(b"b=1".to_vec())),
            (Source::Cookie("k".into()), "cookie", "k=abc", Left::Nothing),
        ];
        for (source, header, value, left) in sources {
            assert_eq!(source.header(), header);
            assert_eq!(found(&source, value.as_bytes()).as_deref(), Some(&b"abc"[..]), "{source:?}");
            assert_eq!(source.without(value.as_bytes()), left, "{source:?}");
            assert_eq!(found(&source, b""), None);
        }
    }
}
