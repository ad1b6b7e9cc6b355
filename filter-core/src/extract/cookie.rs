//! Keys in cookies, by RFC 6265, section 4.2.1.

/// One value for several `Cookie` lines. `first` is the first line; `joined` has all lines, joined by commas as Envoy does. A user
/// agent sends one line (RFC 6265, section 5.4). So it is enough for later lines that each comma ends a cookie.
#[must_use]
pub fn merged(first: &[u8], joined: &[u8]) -> Vec<u8> {
    match joined.strip_prefix(first) {
        Some([b',', others @ ..]) => {
            let others = others.iter().map(|byte| if *byte == b',' { b';' } else { *byte });
            first.iter().copied().chain(*b"; ").chain(others).collect()
        }
        _ => joined.to_vec(),
    }
}

/// The values of all cookies of a name, without quotes around them.
pub fn values<'a>(header: &'a [u8], name: &[u8]) -> impl Iterator<Item = &'a [u8]> {
    pairs(header).filter(move |pair| is_named(pair, name)).map(value)
}

/// The header without the cookies of a name, empty if there are no others; `None` if it has none of that name.
#[must_use]
pub fn without(header: &[u8], name: &[u8]) -> Option<Vec<u8>> {
    let kept: Vec<&[u8]> = pairs(header).filter(|pair| !is_named(pair, name)).collect();
    (kept.len() != pairs(header).count()).then(|| kept.join(&b"; "[..]))
}

fn pairs(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    header.split(|byte| *byte == b';').map(<[u8]>::trim_ascii).filter(|pair| !pair.is_empty())
}

fn split(pair: &[u8]) -> (&[u8], &[u8]) {
    let end = pair.iter().position(|byte| *byte == b'=').unwrap_or(pair.len());
    let (name, rest) = pair.split_at_checked(end).unwrap_or((pair, &[]));
    (name.trim_ascii(), rest.split_first().map_or(&[], |(_, value)| value.trim_ascii()))
}

fn is_named(pair: &[u8], name: &[u8]) -> bool {
    split(pair).0 == name
}

fn value(pair: &[u8]) -> &[u8] {
    let (_, value) = split(pair);
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find<'a>(header: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
        values(header, name).find(|value| !value.is_empty())
    }

    #[test]
    fn the_key_is_found_and_removed_and_other_cookies_stay() {
        for (header, key, rest) in [
            ("k=x", Some("x"), ""),
            ("a=1; k=x; b=2", Some("x"), "a=1; b=2"),
            ("a=1;k=\"x\";b", Some("x"), "a=1; b"),
            ("k=; k=x; k=y", Some("x"), ""),
            (" k = x ", Some("x"), ""),
            ("k", None, ""),
            ("k=a=b;;", Some("a=b"), ""),
            ("k=\"", Some("\""), ""),
            ("K=x; kk=x; a=k=x", None, "K=x; kk=x; a=k=x"),
            ("a=\"1; k=x; b=2\"", Some("x"), "a=\"1; b=2\""),
            ("", None, ""),
        ] {
            let found = find(header.as_bytes(), b"k").map(|key| std::str::from_utf8(key).unwrap());
            let stripped = without(header.as_bytes(), b"k").unwrap_or_else(|| header.as_bytes().to_vec());
            assert_eq!((found, std::str::from_utf8(&stripped).unwrap()), (key, rest), "{header}");
        }
        assert_eq!(find(b"k=\xff\xfe", b"k"), Some(&b"\xff\xfe"[..]));
    }

    #[test]
    fn several_lines_are_merged_and_one_line_with_commas_stays_as_it_is() {
        for (first, joined, expected) in [
            ("a=1,2; k=x", "a=1,2; k=x", "a=1,2; k=x"),
            ("a=1,2", "a=1,2,k=x", "a=1,2; k=x"),
            ("a=1", "a=1,b=2,k=x; c=3", "a=1; b=2;k=x; c=3"),
            ("", ",k=x", "; k=x"),
            ("a=1", "b=1,k=x", "b=1,k=x"),
        ] {
            let value = merged(first.as_bytes(), joined.as_bytes());
            assert_eq!(std::str::from_utf8(&value).unwrap(), expected, "{joined}");
        }
    }

    proptest! {
        #[test]
        fn after_removal_no_key_is_left_and_every_other_cookie_is(
            cookies in prop::collection::vec(prop_oneof!["k=[a-z\"= ]{0,4}", "[ a-z=\"]{0,5}", " k ?="], 0..8),
            tail in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut header = cookies.join(";").into_bytes();
            header.extend_from_slice(&tail);
            let Some(rest) = without(&header, b"k") else {
                prop_assert_eq!(find(&header, b"k"), None);
                return Ok(());
            };
            prop_assert_eq!(find(&rest, b"k"), None);
            prop_assert_eq!(without(&rest, b"k"), None);
            let others = |header: &[u8]| -> Vec<Vec<u8>> {
                pairs(header).filter(|pair| !is_named(pair, b"k")).map(<[u8]>::to_vec).collect()
            };
            prop_assert_eq!(others(&header), others(&rest));
        }
    }
}
