//! The policy that a route names: `filter_metadata.portcullis` of the route's metadata, as Envoy serialises it. Asked for one
//! member of it, Envoy's answer is the same for an empty text and for no member at all, so the filter asks for the whole.

/// The only member of that metadata.
const POLICY: &[u8] = b"policy";

/// The policy that a route names; `None` if it names none. What is no `{policy: NAME}` is an empty name, which no policy has.
#[must_use]
pub fn policy(metadata: &[u8]) -> Option<String> {
    match pairs(metadata).as_deref() {
        Some([]) => None,
        Some([(POLICY, name)]) => Some(String::from_utf8_lossy(name).into_owned()),
        _ => Some(String::new()),
    }
}

/// The pairs of a map: their number, the lengths of each pair's parts, then the parts, each with a zero byte behind it.
fn pairs(bytes: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let (number, mut lengths) = length(bytes)?;
    // Each pair has two lengths of four bytes.
    let mut parts = lengths.get(number.checked_mul(8)?..)?;
    let mut part = || {
        let (part_bytes, rest) = length(lengths)?;
        lengths = rest;
        let (part, rest) = parts.split_at_checked(part_bytes)?;
        parts = rest.strip_prefix(b"\0")?;
        Some(part)
    };
    (0..number).map(|_| Some((part()?, part()?))).collect()
}

fn length(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((usize::try_from(u32::from_le_bytes(*number)).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(pairs: &[(&str, &[u8])]) -> Vec<u8> {
        let number = |number: usize| u32::try_from(number).unwrap().to_le_bytes();
        let mut bytes = number(pairs.len()).to_vec();
        for (key, value) in pairs {
            bytes.extend([number(key.len()), number(value.len())].concat());
        }
        for (key, value) in pairs {
            bytes.extend([key.as_bytes(), b"\0", value, b"\0"].concat());
        }
        bytes
    }

    #[test]
    fn a_route_names_a_policy_or_none_and_everything_else_is_a_name_that_no_policy_has() {
        assert_eq!(policy(&map(&[])), None);
        assert_eq!(policy(&map(&[("policy", b"read")])).as_deref(), Some("read"));
        for wrong in [
            map(&[("policy", b"")]),
            map(&[("polciy", b"read")]),
            map(&[("policy", b"read"), ("cost", b"5")]),
            map(&[("policy", b"read")])[..20].to_vec(),
            vec![0xff; 12],
            vec![],
        ] {
            assert_eq!(policy(&wrong).as_deref(), Some(""), "{wrong:?}");
        }
        // A number, as Envoy gives its bytes.
        assert!(policy(&map(&[("policy", &5_f64.to_le_bytes())])).unwrap().contains('\0'));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = policy(&bytes);
        }
    }
}
