//! Key extraction: finds the key of a request in the configured places, hashes it, and removes it from the request. The key
//! itself stays in this module; everything else gets its hash.

use contract::hash::KeyHash;
use contract::key::PRESENTED_BYTES;

use crate::host::Stream;

pub mod cookie;
pub mod query;
pub mod source;
pub mod strip;

use source::Source;

/// What a request has in the place of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Nothing, or an empty value.
    Missing,
    /// A value longer than any key, which is not hashed.
    Oversized,
    /// A value that may be a key, as its hash.
    Hashed(KeyHash),
}

/// The credential of a request, and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extraction<'a> {
    /// The credential.
    pub credential: Credential,
    /// Its place, and the whole value of the header there. `None` without a credential.
    pub place: Option<(&'a Source, Vec<u8>)>,
}

/// Looks for a key in one source after the other. The first source with a key counts, and only that key is hashed.
pub fn find_and_hash<'a>(sources: &'a [Source], stream: &impl Stream) -> Extraction<'a> {
    for source in sources {
        let Some(value) = value_of(source, stream) else { continue };
        let credential = match source.find(&value) {
            None => continue,
            Some(key) if key.len() > PRESENTED_BYTES => Credential::Oversized,
            Some(key) => Credential::Hashed(KeyHash::of(&key)),
        };
        return Extraction { credential, place: Some((source, value)) };
    }
    Extraction { credential: Credential::Missing, place: None }
}

/// The value of the header that a source is in. `Authorization` and `Cookie` may have lines that are not keys, so all their
/// lines are read; of other headers the first line is read, and all lines are removed.
fn value_of(source: &Source, stream: &impl Stream) -> Option<Vec<u8>> {
    match source {
        Source::Header(_) | Source::Query(_) => stream.header(source.header()),
        Source::Bearer(_) => stream.header_lines(source.header()),
        Source::Cookie(_) => {
            let joined = stream.header_lines(source.header())?;
            // Without a comma there is one line. With a comma there may be several, and `merged` needs the first.
            if !joined.contains(&b',') {
                return Some(joined);
            }
            Some(cookie::merged(&stream.header(source.header()).unwrap_or_default(), &joined))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::MockStream;

    fn read(value: Option<&[u8]>) -> Credential {
        let mut stream = MockStream::default();
        value.into_iter().for_each(|value| stream.push("x-api-key", value));
        find_and_hash(&[Source::Header("x-api-key".into())], &stream).credential
    }

    #[test]
    fn an_absent_and_an_empty_header_are_the_same() {
        assert_eq!(read(None), Credential::Missing);
        assert_eq!(read(Some(b"")), Credential::Missing);
    }

    #[test]
    fn any_bytes_may_be_a_key_up_to_the_bound() {
        assert_eq!(read(Some(b"\xff\xfe")), Credential::Hashed(KeyHash::of(b"\xff\xfe")));
        let longest = vec![b'a'; PRESENTED_BYTES];
        assert_eq!(read(Some(&longest)), Credential::Hashed(KeyHash::of(&longest)));
        assert_eq!(read(Some(&vec![b'a'; PRESENTED_BYTES + 1])), Credential::Oversized);
    }

    #[test]
    fn the_first_source_that_has_a_key_counts() {
        let sources = [Source::Bearer(true), Source::Query("k".into()), Source::Cookie("k".into())];
        let of = |authorization: &str, path: &str, cookie: &str| {
            let stream = MockStream::with([("authorization", authorization), (":path", path), ("cookie", cookie)]);
            let found = find_and_hash(&sources, &stream);
            (found.credential, found.place.map(|(source, _)| source.header().to_owned()))
        };
        let key = |text: &[u8]| Credential::Hashed(KeyHash::of(text));
        assert_eq!(of("Bearer a", "/?k=b", "k=c"), (key(b"a"), Some("authorization".into())));
        assert_eq!(of("Basic a", "/?k=b", "k=c"), (key(b"b"), Some(":path".into())));
        assert_eq!(of("", "/?k=", "k=c"), (key(b"c"), Some("cookie".into())));
        assert_eq!(of("", "/", ""), (Credential::Missing, None));
        let long = "x".repeat(PRESENTED_BYTES + 1);
        assert_eq!(of("", &format!("/?k={long}"), "k=c"), (Credential::Oversized, Some(":path".into())));
    }

    #[test]
    fn a_key_is_found_in_any_line_of_a_header_with_other_uses() {
        let key = Credential::Hashed(KeyHash::of(b"x"));
        let lines = |name: &str, lines: &[&str]| {
            let mut stream = MockStream::default();
            lines.iter().for_each(|line| stream.push(name, line.as_bytes()));
            stream
        };
        let bearer = lines("authorization", &["Basic abc", "Bearer x"]);
        assert_eq!(find_and_hash(&[Source::Bearer(true)], &bearer).credential, key);
        let cookie = lines("cookie", &["a=1,2", "k=x"]);
        assert_eq!(find_and_hash(&[Source::Cookie("k".into())], &cookie).credential, key);
        assert_eq!(cookie.reads(), 2, "all lines, and the first because of the comma");
        let one_line = lines("cookie", &["a=1; k=x"]);
        assert_eq!(find_and_hash(&[Source::Cookie("k".into())], &one_line).credential, key);
        assert_eq!(one_line.reads(), 1);
        // Of a header with no other use, the first line.
        let header = lines("x-api-key", &["x", "y"]);
        assert_eq!(find_and_hash(&[Source::Header("x-api-key".into())], &header).credential, key);
    }
}
