//! Looking at keys: an id or a filter comes in, one key or a page of them goes out, never a secret.

#![allow(unused_qualifications, reason = "what utoipa makes of the handlers' arguments")]

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{ById, KeyView, managed};
use crate::App;
use crate::auth::Caller;
use crate::error::{ApiError, Problem};
use crate::http::extract::{Json, Path, Query};
use crate::key::domain::Email;
use crate::key::store;

const LIMIT: i64 = 50;
const MOST: i64 = 200;

/// Which keys, and how many.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only this user's keys. Callers without the scope `admin` see only their own anyway.
    #[param(example = "user@example.com")]
    email: Option<String>,
    /// `next_cursor` of the page before.
    cursor: Option<Uuid>,
    /// How many keys; 50 unless given.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
}

/// A page of keys, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyPage {
    /// The keys.
    keys: Vec<KeyView>,
    /// What to send as `cursor` for the next page; null on the last one.
    #[schema(required)]
    next_cursor: Option<Uuid>,
}

/// List keys, the newest first.
///
/// # Errors
/// 400, 401, 403, 429, 503.
#[utoipa::path(
    get, path = "/v1/keys", tag = "keys", params(ListQuery), security(("api_key" = [])),
    responses(
        (status = 200, description = "A page of keys", body = KeyPage,
            headers(("link" = String, description = "The next page, if there is one (RFC 8288)"))),
        (status = 400, description = "A parameter is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "Another user's keys", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let limit = query.limit.unwrap_or(LIMIT);
    if !(1..=MOST).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("must be a number from 1 to {MOST}")));
    }
    let asked = query.email.as_deref().map(Email::parse).transpose()?;
    match &asked {
        Some(email) => caller.require_owner_or_admin(email)?,
        None => caller.require_manager()?,
    }
    let owner = if caller.is_admin() { asked.as_ref().map(Email::as_str) } else { Some(caller.email.as_str()) };
    // One more than asked for tells whether there is a next page.
    let mut keys = store::list(&app.pool, owner, query.cursor, limit + 1).await?;
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = keys.len() > shown;
    keys.truncate(shown);
    let next_cursor = keys.last().map(|key| key.id).filter(|_| more);
    let now = OffsetDateTime::now_utc();
    let keys = keys.into_iter().map(|key| KeyView::of(key, now)).collect();
    let mut response = Json(KeyPage { keys, next_cursor }).into_response();
    if let Some(cursor) = next_cursor {
        let link = next_link(asked.as_ref(), cursor, limit);
        response.headers_mut().insert(header::LINK, link);
    }
    Ok(response)
}

/// Get a key.
///
/// # Errors
/// 400, 401, 403, 404, 429, 503.
#[utoipa::path(
    get, path = "/v1/keys/{id}", tag = "keys", params(ById), security(("api_key" = [])),
    responses(
        (status = 200, description = "The key", body = KeyView),
        (status = 400, description = "Not an id", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn get(State(app): State<App>, caller: Caller, Path(path): Path<ById>) -> Result<Json<KeyView>, ApiError> {
    let key = managed(&app, &caller, path.id).await?;
    Ok(Json(KeyView::of(key, OffsetDateTime::now_utc())))
}

/// The address of the next page (RFC 8288), relative to the service.
fn next_link(email: Option<&Email>, cursor: Uuid, limit: i64) -> HeaderValue {
    let email = email.map(|email| format!("email={}&", escaped(email.as_str()))).unwrap_or_default();
    let link = format!("</v1/keys?{email}cursor={cursor}&limit={limit}>; rel=\"next\"");
    HeaderValue::try_from(link).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// Percent-encodes all but the unreserved characters (RFC 3986, section 2.3).
fn escaped(text: &str) -> String {
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
    fn the_link_survives_every_character_of_an_address() {
        let email = Email::parse("a+b&c@example.com").unwrap();
        assert_eq!(
            next_link(Some(&email), Uuid::nil(), 2),
            "</v1/keys?email=a%2Bb%26c%40example.com&cursor=00000000-0000-0000-0000-000000000000&limit=2>; rel=\"next\""
        );
    }
}
