//! The key on a request: the value of a header comes in, what was presented goes out. The bytes are hashed here and go no
//! further.

use contract::hash::KeyHash;
use contract::key::PRESENTED_BYTES;

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

/// Judges the value of the key header. Of several headers of the name, Envoy gives the first.
#[must_use]
pub fn read(value: Option<&[u8]>) -> Credential {
    match value {
        None | Some([]) => Credential::Missing,
        Some(value) if value.len() > PRESENTED_BYTES => Credential::Oversized,
        Some(value) => Credential::Presented(KeyHash::of(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
