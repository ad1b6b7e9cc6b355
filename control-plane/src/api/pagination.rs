//! Pagination, the same for every list: how many entries a page has, where it starts, and the link to the next one. A cursor
//! is opaque to clients: what the last entry is found by, as JSON in base64url.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::extract::{Json, read_query};
use crate::error::ApiError;

/// Entries of a page unless asked for more or fewer.
const LIMIT: i64 = 100;
/// Most entries of a page. Bounds the memory of a response.
const MOST: i64 = 200;
/// Longest cursor, in bytes.
const CURSOR_BYTES: usize = 4_096;

/// Which page of a list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// `next_cursor` of the page before, with the same query.
    #[param(max_length = 4096)]
    cursor: Option<String>,
    /// Entries of a page; 100 unless given.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
}

/// The query of a list that can be asked for nothing but a page.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct All {}

/// The query of a list: what to list, and which page of it.
#[derive(Debug)]
pub struct List<Q, C> {
    pub query: Q,
    pub page: Page<C>,
}

/// Which page. Its entries are found by a `C`.
#[derive(Debug)]
pub struct Page<C> {
    /// The entry that the page comes after; none for the first page.
    pub after: Option<C>,
    limit: i64,
    path: String,
    /// The query without the page.
    query: Vec<(String, String)>,
}

/// The next page, as a response describes it.
#[derive(Debug, PartialEq, Eq)]
pub struct Next {
    /// `next_cursor`.
    pub cursor: Option<String>,
    /// The link (RFC 8288).
    pub link: Option<HeaderValue>,
}

impl<S: Send + Sync, Q: DeserializeOwned, C: DeserializeOwned> FromRequestParts<S> for List<Q, C> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let pairs = form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()).into_owned();
        let (page, query): (Vec<_>, Vec<_>) = pairs.partition(|(name, _)| ["cursor", "limit"].contains(&name.as_str()));
        let PageQuery { cursor, limit } = read_query(&encoded(&page))?;
        let after = cursor.map(|cursor| {
            let detail = "must be the next_cursor of the page before";
            decoded(&cursor).ok_or_else(|| ApiError::invalid("cursor", detail))
        });
        let (limit, after, path) = (within(limit)?, after.transpose()?, parts.uri.path().to_owned());
        Ok(Self { query: read_query(&encoded(&query))?, page: Page { after, limit, path, query } })
    }
}

impl<C: Serialize> Page<C> {
    /// Entries to read: one more than the page has, which shows whether there is a next page.
    pub const fn read(&self) -> i64 {
        self.limit.saturating_add(1)
    }

    /// Sets a parameter in the link to the next page.
    pub fn set(&mut self, name: &str, value: String) {
        self.query.retain(|(known, _)| known != name);
        self.query.push((name.to_owned(), value));
    }

    /// Cuts what was read down to the page. `cursor` gives what an entry is found by.
    pub fn cut<T>(self, entries: &mut Vec<T>, cursor: impl Fn(&T) -> C) -> Next {
        let shown = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let more = entries.len() > shown;
        entries.truncate(shown);
        let Some(last) = entries.last().filter(|_| more) else { return Next { cursor: None, link: None } };
        let cursor = written(&cursor(last));
        let page = [("cursor".to_owned(), cursor.clone()), ("limit".to_owned(), self.limit.to_string())];
        let query: Vec<_> = self.query.into_iter().chain(page).collect();
        Next { cursor: Some(cursor), link: Some(next_link(&self.path, &query)) }
    }
}

/// Parses the number of entries of a page.
pub fn within(limit: Option<i64>) -> Result<i64, ApiError> {
    let limit = limit.unwrap_or(LIMIT);
    if (1..=MOST).contains(&limit) {
        Ok(limit)
    } else {
        Err(ApiError::invalid("limit", format!("must be a number from 1 to {MOST}")))
    }
}

/// The link to the next page (RFC 8288), relative to the service.
pub fn next_link(path: &str, query: &impl Serialize) -> HeaderValue {
    HeaderValue::try_from(format!("<{path}?{}>; rel=\"next\"", encoded(query)))
        .unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Declares a page of a list: its name, its description, its field and what that holds.
macro_rules! page {
    ($name:ident $about:tt { $field:ident: $entry:ty = $of:tt }) => {
        #[doc = $about]
        #[derive(Debug, serde::Serialize, utoipa::ToSchema)]
        pub struct $name {
            #[doc = $of]
            $field: Vec<$entry>,
            /// The `cursor` for the next page; null on the last page.
            #[schema(required)]
            next_cursor: Option<String>,
        }
    };
}
pub(super) use page;

/// A page as a reply, with a link to the next one.
pub fn reply<T: Serialize>(page: T, next: Option<HeaderValue>) -> Response {
    let mut response = Json(page).into_response();
    if let Some(link) = next {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}

fn encoded(query: &impl Serialize) -> String {
    // A form writes a space as `+`, which not every reader of a URL understands.
    serde_urlencoded::to_string(query).unwrap_or_default().replace('+', "%20")
}

fn written(cursor: &impl Serialize) -> String {
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(cursor).unwrap_or_default())
}

fn decoded<C: DeserializeOwned>(cursor: &str) -> Option<C> {
    let json = URL_SAFE_NO_PAD.decode(Some(cursor).filter(|cursor| cursor.len() <= CURSOR_BYTES)?).ok()?;
    // PostgreSQL refuses NUL.
    let text = std::str::from_utf8(&json).ok().filter(|text| !text.contains("\\u0000"))?;
    serde_json::from_str(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Search {
        email: Option<String>,
        name: Option<String>,
    }

    async fn list(uri: &str) -> Result<List<Search, String>, ApiError> {
        let (mut parts, ()) = axum::http::Request::get(uri).body(()).unwrap().into_parts();
        List::from_request_parts(&mut parts, &()).await
    }

    #[tokio::test]
    async fn the_link_keeps_what_was_asked_whatever_characters_it_has() {
        let List { query, page } = list("/v1/keys?limit=2&email=a%2Bb%26c%40example.com&name=%C3%A9+a").await.unwrap();
        let expected = Search { email: Some("a+b&c@example.com".into()), name: Some("é a".into()) };
        assert_eq!((query, &page.after, page.read()), (expected, &None, 3));
        let mut entries = vec!["c", "b", "a"];
        let next = page.cut(&mut entries, |entry| (*entry).to_owned());
        assert_eq!(entries, ["c", "b"]);
        let uri = "/v1/keys?email=a%2Bb%26c%40example.com&name=%C3%A9%20a&cursor=ImIi&limit=2";
        let link = HeaderValue::try_from(format!("<{uri}>; rel=\"next\"")).unwrap();
        assert_eq!(next, Next { cursor: Some("ImIi".into()), link: Some(link) });

        let mut page = list(uri).await.unwrap().page;
        assert_eq!(page.after.as_deref(), Some("b"));
        page.set("name", "x".into());
        let last = page.cut(&mut vec!["a"], |entry| (*entry).to_owned());
        assert_eq!(last, Next { cursor: None, link: None });
    }

    #[tokio::test]
    async fn a_page_that_cannot_be_is_refused_by_its_field() {
        let nul = written(&"a\0b");
        let long = written(&"a".repeat(CURSOR_BYTES));
        for (query, expected) in [
            ("limit=0", "limit"),
            ("limit=201", "limit"),
            ("limit=x", "limit"),
            ("limit=1&limit=2", "limit"),
            ("cursor=x", "cursor"),
            ("cursor=NQ", "cursor"),
            (&format!("cursor={nul}"), "cursor"),
            (&format!("cursor={long}"), "cursor"),
            ("colour=red", "colour"),
        ] {
            assert_eq!(list(&format!("/v1/keys?{query}")).await.unwrap_err().field(), Some(expected), "{query}");
        }
    }
}
