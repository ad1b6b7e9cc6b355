//! Pages: how many entries one has, and the address of the next, which keeps all that was asked for.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::extract::Json;
use crate::error::ApiError;

/// Entries of a page unless asked for more or fewer.
const LIMIT: i64 = 50;
/// Most entries of a page.
const MOST: i64 = 200;

/// How many entries the page has.
///
/// # Errors
/// What is wrong with `limit`.
pub fn limit(asked: Option<i64>) -> Result<i64, ApiError> {
    let limit = asked.unwrap_or(LIMIT);
    if (1..=MOST).contains(&limit) {
        Ok(limit)
    } else {
        Err(ApiError::invalid("limit", format!("must be a number from 1 to {MOST}")))
    }
}

/// Cuts a list of one more than `limit` down to the page. Says what the next page starts after, if there is one.
pub fn cut<T, C>(entries: &mut Vec<T>, limit: i64, cursor: impl Fn(&T) -> C) -> Option<C> {
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = entries.len() > shown;
    entries.truncate(shown);
    entries.last().map(cursor).filter(|_| more)
}

/// The address of the next page (RFC 8288), relative to the service.
#[must_use]
pub fn next_link(path: &str, asked: &[(&str, Option<String>)], cursor: &str, limit: i64) -> HeaderValue {
    let mut link = format!("<{path}?");
    for (name, value) in asked {
        if let Some(value) = value {
            link.push_str(&format!("{name}={}&", escaped(value)));
        }
    }
    link.push_str(&format!("cursor={}&limit={limit}>; rel=\"next\"", escaped(cursor)));
    HeaderValue::try_from(link).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// A page as a reply, with a link to the next one.
pub fn reply<T: Serialize>(page: T, next: Option<HeaderValue>) -> Response {
    let mut response = Json(page).into_response();
    if let Some(link) = next {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}

/// Percent-encodes all but the unreserved characters (RFC 3986, section 2.3).
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_keeps_what_was_asked_whatever_characters_it_has() {
        let asked = [("email", Some("a+b&c@example.com".to_owned())), ("prefix", None), ("name", Some("é".to_owned()))];
        assert_eq!(
            next_link("/v1/keys", &asked, "7", 2),
            "</v1/keys?email=a%2Bb%26c%40example.com&name=%C3%A9&cursor=7&limit=2>; rel=\"next\""
        );
    }

    #[test]
    fn a_page_has_as_many_as_asked_and_says_what_comes_after() {
        let mut entries = vec![3, 2, 1];
        assert_eq!((cut(&mut entries, 2, |entry| *entry), entries.len()), (Some(2), 2));
        assert_eq!((cut(&mut entries, 2, |entry| *entry), entries.len()), (None, 2));
    }
}
