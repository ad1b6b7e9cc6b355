//! Metadata of routes and virtual hosts, as Envoy encodes it for filters: the number of pairs, the lengths of each key and value,
//! then each key and value with a zero byte after it. Numbers have four bytes, little-endian.

/// A member of metadata, or what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Member<'a> {
    /// The metadata is empty.
    NoMetadata,
    /// The metadata has other members only, or is not readable.
    Missing,
    /// The value of the member.
    Value(&'a [u8]),
}

/// Finds a member by its name.
#[must_use]
pub fn member<'a>(metadata: &'a [u8], name: &str) -> Member<'a> {
    if metadata.iter().all(|byte| *byte == 0) {
        return Member::NoMetadata;
    }
    find(metadata, name).map_or(Member::Missing, Member::Value)
}

fn find<'a>(metadata: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let (pairs, rest) = number(metadata)?;
    let (mut lengths, mut texts) = rest.split_at_checked(pairs.checked_mul(8)?)?;
    for _ in 0..pairs {
        let (key_bytes, after) = number(lengths)?;
        let (value_bytes, after) = number(after)?;
        let (key, after_key) = text(texts, key_bytes)?;
        let (value, after_value) = text(after_key, value_bytes)?;
        if key == name.as_bytes() {
            return Some(value);
        }
        (lengths, texts) = (after, after_value);
    }
    None
}

fn number(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((usize::try_from(u32::from_le_bytes(*number)).ok()?, rest))
}

/// A text of this length, and what follows its zero byte.
fn text(bytes: &[u8], length: usize) -> Option<(&[u8], &[u8])> {
    let (text, rest) = bytes.split_at_checked(length)?;
    Some((text, rest.get(1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(pairs: &[(&str, &[u8])]) -> Vec<u8> {
        let length = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
        let mut bytes = length(pairs.len()).to_vec();
        for (key, value) in pairs {
            bytes.extend(length(key.len()));
            bytes.extend(length(value.len()));
        }
        for (key, value) in pairs {
            bytes.extend([key.as_bytes(), b"\0", value, b"\0"].concat());
        }
        bytes
    }

    #[test]
    fn a_member_is_found_among_others() {
        let metadata = encoded(&[("a", b"1"), ("policy", b"orders"), ("z", b"")]);
        assert_eq!(member(&metadata, "policy"), Member::Value(b"orders"));
        assert_eq!(member(&metadata, "z"), Member::Value(b""));
        assert_eq!(member(&metadata, "polic"), Member::Missing);
        assert_eq!(member(&encoded(&[]), "policy"), Member::NoMetadata);
        assert_eq!(member(&[], "policy"), Member::NoMetadata);
    }

    #[test]
    fn bytes_that_are_cut_short_have_no_member() {
        let metadata = encoded(&[("policy", b"orders")]);
        for length in 1..metadata.len() {
            let found = member(&metadata[..length], "policy");
            assert_eq!(found, Member::Missing, "{length}");
        }
        assert_eq!(member(&[0xff; 12], "policy"), Member::Missing);
    }
}
