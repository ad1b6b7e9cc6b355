//! The key on a request: the values of headers come in, what was presented goes out, and where it stood. The bytes are
//! hashed here and go no further.

use contract::hash::KeyHash;
use contract::key::PRESENTED_BYTES;

use crate::source::Source;

/// What stands where a key is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Nothing, or nothing but an empty value.
    Missing,
    /// Something that is longer than any key. Not worth a hash.
    Oversized,
    /// A key, or at least something that may be one.
    Presented(KeyHash),
}

/// What was found, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// What it is.
    pub credential: Credential,
    /// Where it stood, and the whole value of the header there. `None` if nothing was found.
    pub at: Option<(&'a Source, Vec<u8>)>,
}

/// Looks for a key in one source after the other; the first that has one counts, and only that is hashed. `value_of`
/// gives the value of the header that a source stands in.
pub fn find<'a>(sources: &'a [Source], value_of: impl Fn(&Source) -> Option<Vec<u8>>) -> Found<'a> {
    for source in sources {
        let Some(value) = value_of(source) else { continue };
        let credential = match source.find(&value) {
            None => continue,
            Some(key) if key.len() > PRESENTED_BYTES => Credential::Oversized,
            Some(key) => Credential::Presented(KeyHash::of(&key)),
        };
        return Found { credential, at: Some((source, value)) };
    }
    Found { credential: Credential::Missing, at: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Option<&[u8]>) -> Credential {
        find(&[Source::Header("x-api-key".into())], |_| value.map(<[u8]>::to_vec)).credential
    }

    #[test]
    fn an_absent_and_an_empty_header_are_the_same() {
        assert_eq!(read(None), Credential::Missing);
        assert_eq!(read(Some(b"")), Credential::Missing);
    }

    #[test]
    fn any_bytes_may_be_a_key_up_to_the_bound() {
        assert_eq!(read(Some(b"\xff\xfe")), Credential::Presented(KeyHash::of(b"\xff\xfe")));
        let longest = vec![b'a'; PRESENTED_BYTES];
        assert_eq!(read(Some(&longest)), Credential::Presented(KeyHash::of(&longest)));
        assert_eq!(read(Some(&vec![b'a'; PRESENTED_BYTES + 1])), Credential::Oversized);
    }

    #[test]
    fn the_first_source_that_has_a_key_counts() {
        let sources = [Source::Bearer(true), Source::Query("k".into()), Source::Cookie("k".into())];
        let of = |authorization: &str, path: &str, cookie: &str| {
            let values = [authorization, path, cookie].map(|value| value.as_bytes().to_vec());
            let [authorization, path, cookie] = values;
            let found = find(&sources, |source| match source.header() {
                "authorization" => Some(authorization.clone()),
                ":path" => Some(path.clone()),
                _ => Some(cookie.clone()),
            });
            (found.credential, found.at.map(|(source, _)| source.header().to_owned()))
        };
        let key = |text: &[u8]| Credential::Presented(KeyHash::of(text));
        assert_eq!(of("Bearer a", "/?k=b", "k=c"), (key(b"a"), Some("authorization".into())));
        assert_eq!(of("Basic a", "/?k=b", "k=c"), (key(b"b"), Some(":path".into())));
        assert_eq!(of("", "/?k=", "k=c"), (key(b"c"), Some("cookie".into())));
        assert_eq!(of("", "/", ""), (Credential::Missing, None));
        let long = "x".repeat(PRESENTED_BYTES + 1);
        assert_eq!(of("", &format!("/?k={long}"), "k=c"), (Credential::Oversized, Some(":path".into())));
    }
}
