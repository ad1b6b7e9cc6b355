//! Paths of rules and of requests, as segments.

use std::borrow::Cow;

use super::PathMatch;

const PATH_BYTES: usize = 512;

/// Checks the path of a rule. An error says the remedy.
pub(super) fn check(path: &PathMatch) -> Result<(), String> {
    let text = path.text();
    let allowed = |byte: u8| byte.is_ascii_graphic() && !b"?#%;\\*".contains(&byte);
    if !text.starts_with('/') || text.len() > PATH_BYTES || !text.bytes().all(allowed) {
        return Err(format!(
            "must start with / and have at most {PATH_BYTES} visible ASCII characters without ? # % ; \\ and *"
        ));
    }
    let parts: Vec<&str> = parts(text).collect();
    if text.contains("//") || parts.iter().any(|part| [".", ".."].contains(part)) {
        return Err("must be normalised: without //, /./ and /../".to_owned());
    }
    let is_template = matches!(path, PathMatch::Template(_));
    let has_brace = |part: &&str| part.contains(['{', '}']);
    if is_template != parts.iter().any(has_brace) {
        let why = "write it as {\"template\": …} if it has segments such as {id}, and only then";
        return Err(why.to_owned());
    }
    if parts.iter().filter(|part| has_brace(part)).any(|part| !is_variable(part)) {
        return Err("must have {name} as a whole segment, with a name of a-z, 0-9 and _".to_owned());
    }
    Ok(())
}

/// The segments of a rule's path. A slash at the end makes no difference.
pub(super) fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

/// Whether this segment of a template stands for any.
pub(super) fn is_variable(segment: &str) -> bool {
    let name = segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    name.is_some_and(|name| !name.is_empty() && name.bytes().all(allowed))
}

/// A path that gateways and upstreams may read in different ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmbiguousTarget;

/// The segments of a request's path, without the query. Encoded bytes are decoded once; parameters (RFC 3986, section 3.3) and
/// empty segments are left out.
///
/// # Errors
/// [`AmbiguousTarget`] if a segment is then `.` or `..`, or has a slash, a backslash or a zero byte. Envoy resolves dots and can
/// refuse encoded slashes before the filter sees the path.
pub fn segments(path: &[u8]) -> Result<Vec<Cow<'_, [u8]>>, AmbiguousTarget> {
    let path = path.split(|byte| b"?#".contains(byte)).next().unwrap_or_default();
    let mut segments = Vec::new();
    for segment in path.split(|byte| *byte == b'/') {
        let name = segment.split(|byte| *byte == b';').next().unwrap_or_default();
        let name = decoded(name);
        if [&b"."[..], b".."].contains(&&*name) || name.iter().any(|byte| b"/\\\0".contains(byte)) {
            return Err(AmbiguousTarget);
        }
        if !name.is_empty() {
            segments.push(name);
        }
    }
    Ok(segments)
}

fn decoded(segment: &[u8]) -> Cow<'_, [u8]> {
    if !segment.contains(&b'%') {
        return Cow::Borrowed(segment);
    }
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment;
    while let Some((first, after)) = rest.split_first() {
        let digit = |place: usize| after.get(place).and_then(|byte| char::from(*byte).to_digit(16));
        let code = digit(0).zip(digit(1)).and_then(|(high, low)| u8::try_from(high << 4 | low).ok());
        match code.filter(|_| *first == b'%') {
            Some(code) => {
                bytes.push(code);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    Cow::Owned(bytes)
}
