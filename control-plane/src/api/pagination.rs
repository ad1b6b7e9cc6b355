//! Pagination: the number of entries of a page, and the link to the next one.

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
/// 400 for a `limit` out of range.
pub fn limit(asked: Option<i64>) -> Result<i64, ApiError> {
    limit_within(asked, LIMIT, MOST)
}

/// How many entries a page has whose default and maximum are its own.
///
/// # Errors
/// 400 for a `limit` out of range.
pub fn limit_within(asked: Option<i64>, default: i64, most: i64) -> Result<i64, ApiError> {
    let limit = asked.unwrap_or(default);
    if (1..=most).contains(&limit) {
        Ok(limit)
    } else {
        Err(ApiError::invalid("limit", format!("must be a number from 1 to {most}")))
    }
}

/// Cuts a list of one more than `limit` down to the page. Says what the next page starts after, if there is one.
pub fn cut<T, C>(entries: &mut Vec<T>, limit: i64, cursor: impl Fn(&T) -> C) -> Option<C> {
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = entries.len() > shown;
    entries.truncate(shown);
    entries.last().map(cursor).filter(|_| more)
}

/// The link to the next page (RFC 8288), relative to the service: the same query with the next cursor.
#[must_use]
pub fn next_link(path: &str, query: &impl Serialize) -> HeaderValue {
    // A form writes a space as `+`, which not every reader of a URL understands.
    let query = serde_urlencoded::to_string(query).unwrap_or_default().replace('+', "%20");
    HeaderValue::try_from(format!("<{path}?{query}>; rel=\"next\"")).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// A page as a reply, with a link to the next one.
pub fn reply<T: Serialize>(page: T, next: Option<HeaderValue>) -> Response {
    let mut response = Json(page).into_response();
    if let Some(link) = next {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_keeps_what_was_asked_whatever_characters_it_has() {
        let query = [
            ("email", Some("a+b&c@example.com")),
            ("prefix", None),
            ("name", Some("é a")),
            ("cursor", Some("7")),
            ("limit", Some("2")),
        ];
        assert_eq!(
            next_link("/v1/keys", &query),
            "</v1/keys?email=a%2Bb%26c%40example.com&name=%C3%A9%20a&cursor=7&limit=2>; rel=\"next\""
        );
    }

    #[test]
    fn a_page_has_as_many_as_asked_and_says_what_comes_after() {
        let mut entries = vec![3, 2, 1];
        assert_eq!((cut(&mut entries, 2, |entry| *entry), entries.len()), (Some(2), 2));
        assert_eq!((cut(&mut entries, 2, |entry| *entry), entries.len()), (None, 2));
    }
}
