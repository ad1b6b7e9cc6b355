//! Keys in the query of a path, such as `/orders?page=2&api_key=…`. Names and values are compared percent-decoded (RFC 3986,
//! section 2.1). The rest of the path stays as it is, byte by byte.

use std::borrow::Cow;

use percent_encoding::percent_decode;

/// The values of all parameters of a name, percent-decoded.
pub fn values<'a>(path: &'a [u8], name: &[u8]) -> impl Iterator<Item = Cow<'a, [u8]>> {
    let query = parts(path).map(|(_, query, _)| query);
    query.into_iter().flat_map(parameters).filter(move |parameter| is_named(parameter, name)).map(value)
}

/// The path without the parameters of a name; `None` if it has none.
#[must_use]
pub fn without(path: &[u8], name: &[u8]) -> Option<Vec<u8>> {
    let (before, query, after) = parts(path)?;
    let kept: Vec<&[u8]> = parameters(query).filter(|parameter| !is_named(parameter, name)).collect();
    if kept.len() == parameters(query).count() {
        return None;
    }
    let kept = kept.join(&b'&');
    let mut path = before.to_vec();
    if !kept.is_empty() {
        path.push(b'?');
        path.extend_from_slice(&kept);
    }
    path.extend_from_slice(after);
    Some(path)
}

/// The part before the query, the query, and the fragment, which some clients send.
fn parts(path: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let end = path.iter().position(|byte| *byte == b'#').unwrap_or(path.len());
    let (path, fragment) = path.split_at_checked(end)?;
    let (before, query) = cut(path, b'?')?;
    Some((before, query, fragment))
}

fn cut(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let place = bytes.iter().position(|byte| *byte == at)?;
    let (before, rest) = bytes.split_at_checked(place)?;
    rest.split_first().map(|(_, after)| (before, after))
}

fn parameters(query: &[u8]) -> impl Iterator<Item = &[u8]> {
    query.split(|byte| *byte == b'&')
}

fn is_named(parameter: &[u8], name: &[u8]) -> bool {
    let found = cut(parameter, b'=').map_or(parameter, |(name, _)| name);
    *decoded(found) == *name
}

fn value(parameter: &[u8]) -> Cow<'_, [u8]> {
    decoded(cut(parameter, b'=').map_or(&[], |(_, value)| value))
}

/// A percent sign without two hexadecimal digits after it stays as it is.
fn decoded(text: &[u8]) -> Cow<'_, [u8]> {
    percent_decode(text).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find<'a>(path: &'a [u8], name: &[u8]) -> Option<Cow<'a, [u8]>> {
        values(path, name).find(|value| !value.is_empty())
    }

    fn found(path: &str) -> Option<String> {
        find(path.as_bytes(), b"api_key").map(|value| String::from_utf8(value.into_owned()).unwrap())
    }

    fn stripped(path: &str) -> String {
        let path = without(path.as_bytes(), b"api_key").unwrap_or_else(|| path.as_bytes().to_vec());
        String::from_utf8(path).unwrap()
    }

    #[test]
    fn the_key_is_found_and_removed_and_the_rest_stays_as_it_was() {
        for (path, key, rest) in [
            ("/a?api_key=x", Some("x"), "/a"),
            ("/a?b=1&api_key=x&c=%20", Some("x"), "/a?b=1&c=%20"),
            ("/a?api_key=x&b", Some("x"), "/a?b"),
            ("/a?b&api_key=x", Some("x"), "/a?b"),
            // All of the name, whichever counts.
            ("/?a&api_key=&api_key=x", Some("x"), "/?a"),
            ("/?api_key=x&api_key=y", Some("x"), "/"),
            ("/?api_key", None, "/"),
            ("/?api_key=", None, "/"),
            // Encoded in part or in full.
            ("/?%61pi%5Fkey=x%2By%3d", Some("x+y="), "/"),
            ("/?api_key=a+b", Some("a+b"), "/"),
            ("/?api_key=50%&api_key=%zz", Some("50%"), "/"),
            ("/?api_key=a=b", Some("a=b"), "/"),
            ("/?api_key=x?api_key=y", Some("x?api_key=y"), "/"),
            // Other names, other places.
            ("/?API_KEY=x&my_api_key=x&api_key2=x", None, "/?API_KEY=x&my_api_key=x&api_key2=x"),
            ("/api_key=x", None, "/api_key=x"),
            ("/a#?api_key=x", None, "/a#?api_key=x"),
            ("/?api_key=x#f&api_key=y", Some("x"), "/#f&api_key=y"),
            ("/?&&api_key=x&", Some("x"), "/?&&"),
            ("/?", None, "/?"),
            ("", None, ""),
            ("*", None, "*"),
        ] {
            assert_eq!((found(path).as_deref(), stripped(path).as_str()), (key, rest), "{path}");
        }
    }

    #[test]
    fn a_key_may_have_bytes_that_are_not_utf_8() {
        let path = b"/?api_key=%ff\xfe&b=\xff";
        assert_eq!(find(path, b"api_key").as_deref(), Some(&b"\xff\xfe"[..]));
        assert_eq!(without(path, b"api_key").as_deref(), Some(&b"/?b=\xff"[..]));
    }

    proptest! {
        #[test]
        fn after_removal_no_key_is_left_and_everything_else_is(
            path in "[/a?&=#%]{0,4}",
            pairs in prop::collection::vec(
                prop_oneof!["api_key=[a-z%&?]{0,5}", "%61pi_key=[^#]{0,3}", "[a-z%=]{0,6}", Just("api%5fkey".to_owned())], 0..8),
            tail in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut path = format!("/{path}?{}", pairs.join("&")).into_bytes();
            path.extend_from_slice(&tail);
            let Some(rest) = without(&path, b"api_key") else {
                prop_assert_eq!(find(&path, b"api_key"), None);
                return Ok(());
            };
            prop_assert_eq!(find(&rest, b"api_key"), None);
            prop_assert_eq!(without(&rest, b"api_key"), None);
            // What is left stood there before, in the same order.
            let mut before = path.iter();
            prop_assert!(rest.iter().all(|byte| before.any(|other| other == byte)));
            let others = |path: &[u8]| {
                let Some((_, query, _)) = parts(path) else { return Vec::new() };
                let others = parameters(query).filter(|parameter| !is_named(parameter, b"api_key"));
                others.map(<[u8]>::to_vec).collect::<Vec<_>>()
            };
            let (kept, left) = (others(&path), others(&rest));
            prop_assert!(kept == left || (left.is_empty() && kept.concat().is_empty()));
        }

        #[test]
        fn an_encoded_value_is_the_key_that_was_meant(key in prop::collection::vec(any::<u8>(), 1..60)) {
            let encoded: String = key.iter().map(|byte| format!("%{byte:02X}")).collect();
            let path = format!("/?a=1&api_key={encoded}&b=2");
            let found = find(path.as_bytes(), b"api_key");
            prop_assert_eq!(found.as_deref(), Some(&key[..]));
        }
    }
}
