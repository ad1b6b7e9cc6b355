//! Looking at keys: an id or a filter comes in, one key or a page of them goes out, never a secret.

#![allow(unused_qualifications, reason = "what utoipa makes of the handlers' arguments")]

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::quota::QuotaView;
use super::{ById, KeyView, State as KeyState, managed, show, show_all};
use crate::App;
use crate::auth::Caller;
use crate::condition::{Condition, etag};
use crate::credits;
use crate::error::{ApiError, Problem};
use crate::http::extract::{Json, Path, Query};
use crate::http::filters::{AppliedOn, key_applied_on};
use crate::http::paging;
use crate::key::domain::{Email, Timestamp, parse_time};
use crate::key::rotate::{SecretUse, secrets};
use crate::key::search::{Filter, search};

/// Longest text to search for, in characters.
const TEXT_CHARS: usize = 100;

/// Which keys, and how many.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only this user's keys. Callers without the scope `admin` see only their own anyway.
    #[param(example = "user@example.com")]
    email: Option<String>,
    /// Only keys with a secret, present or retired, whose prefix starts so.
    #[param(example = "sk_abc", max_length = 100)]
    prefix: Option<String>,
    /// Only keys whose name contains this, in upper or lower case.
    #[param(example = "production", max_length = 100)]
    name: Option<String>,
    /// Only keys in this state.
    #[param(inline)]
    state: Option<KeyState>,
    /// Only keys that were last used before this time (RFC 3339), or made before it and never used.
    #[param(example = "2026-05-01T00:00:00Z", format = DateTime)]
    last_used_before: Option<String>,
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
#[utoipa::path(
    operation_id = "listKeys",
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
    let limit = paging::limit(query.limit)?;
    let asked = query.email.as_deref().map(Email::parse).transpose()?;
    match &asked {
        Some(email) => caller.require_owner_or_admin(email)?,
        None => caller.require_manager()?,
    }
    let owner = if caller.is_admin() { asked.as_ref().map(Email::as_str) } else { Some(caller.email.as_str()) };
    let filter = Filter {
        email: owner,
        prefix: text("prefix", query.prefix.as_deref())?,
        name: text("name", query.name.as_deref())?,
        state: query.state.map(KeyState::name),
        last_used_before: query.last_used_before.as_deref().map(|t| parse_time("last_used_before", t)).transpose()?,
    };
    // One more than asked for tells whether there is a next page.
    let mut keys = search(&app.pool, &filter, query.cursor, limit + 1).await?;
    let next_cursor = paging::cut(&mut keys, limit, |key| key.id);
    let keys = show_all(&app.pool, keys).await?;
    let next = next_cursor.map(|cursor| {
        let kept = [
            ("email", asked.map(|email| email.to_string())),
            ("prefix", query.prefix.clone()),
            ("name", query.name.clone()),
            ("state", query.state.map(|state| state.name().into())),
            ("last_used_before", query.last_used_before.clone()),
        ];
        paging::next_link("/v1/keys", &kept, &cursor.to_string(), limit)
    });
    Ok(paging::reply(KeyPage { keys, next_cursor }, next))
}

/// A text to search for: a NUL would choke the database.
fn text<'a>(field: &'static str, text: Option<&'a str>) -> Result<Option<&'a str>, ApiError> {
    let Some(text) = text else { return Ok(None) };
    if !(1..=TEXT_CHARS).contains(&text.chars().count()) || text.chars().any(char::is_control) {
        let detail = format!("must have 1 to {TEXT_CHARS} characters, none of them a control character");
        return Err(ApiError::invalid(field, detail));
    }
    Ok(Some(text))
}

/// One secret of a key.
#[derive(Debug, Serialize, ToSchema)]
pub struct SecretView {
    /// Which one, from 1.
    generation: i32,
    /// What people recognise it by; null for keys of a foreign form.
    #[schema(required, example = "sk_abc123")]
    prefix: Option<String>,
    /// Whether it is the present one.
    current: bool,
    /// When it stops working; null for the present one, which works as long as the key.
    #[schema(required)]
    ends_at: Option<Timestamp>,
    /// Requests that were allowed with it.
    usage_count: i64,
    /// When it was last used, as far as filters have reported.
    #[schema(required)]
    last_used_at: Option<Timestamp>,
}

impl From<SecretUse> for SecretView {
    fn from(secret: SecretUse) -> Self {
        Self {
            generation: secret.generation,
            prefix: secret.prefix,
            current: secret.ends_at.is_none(),
            ends_at: secret.ends_at.map(Into::into),
            usage_count: secret.usage_count,
            last_used_at: secret.last_used_at.map(Into::into),
        }
    }
}

/// A key with what belongs to it.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyDetails {
    /// The key.
    #[serde(flatten)]
    view: KeyView,
    /// Its secrets that filters still know, the newest first: how much an old one is still used tells when it is safe to
    /// cut it off.
    secrets: Vec<SecretView>,
    /// What was used of its quota, and what Envoys hold of it; null without one.
    #[schema(required)]
    quota_use: Option<QuotaView>,
    /// What is left of its owner's credits, and what Envoys hold of them; null if the owner is not metered.
    #[schema(required)]
    credits: Option<CreditsView>,
    /// By how many Envoys its last change was applied, as they say themselves.
    applied_on: AppliedOn,
}

/// The credits of a key's owner.
#[derive(Debug, Serialize, ToSchema)]
pub struct CreditsView {
    /// The sum of the ledger.
    balance: i64,
    /// What Envoys hold of it and have not told of.
    leased: i64,
    /// What requests have ever cost.
    spent: i64,
}

impl CreditsView {
    async fn read(app: &App, email: &str) -> Result<Option<Self>, ApiError> {
        let account = credits::account(&app.pool, &Email::parse(email)?).await?;
        let Some(account) = account.filter(|account| account.metered) else { return Ok(None) };
        Ok(Some(Self { balance: account.balance, leased: account.leased, spent: account.spent }))
    }
}

/// Get a key.
///
/// The ETag changes with the settings of the key. It does not change with its usage or with the Envoys that applied it.
#[utoipa::path(
    operation_id = "getKey",
    get, path = "/v1/keys/{id}", tag = "keys", security(("api_key" = [])),
    params(ById, ("If-None-Match" = Option<String>, Header, description = "ETags that the client has already")),
    responses(
        (status = 200, description = "The key", body = KeyDetails,
            headers(("etag" = String, description = "The version of the key"))),
        (status = 304, description = "The client has this version already"),
        (status = 400, description = "Not an id", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No good key presented", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "A filter's key", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such key", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many calls", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The database is away", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    condition: Condition,
    Path(path): Path<ById>,
) -> Result<Response, ApiError> {
    let key = managed(&app, &caller, path.id).await?;
    let tag = [(header::ETAG, etag(key.version))];
    if condition.knows(key.version) {
        return Ok((StatusCode::NOT_MODIFIED, tag).into_response());
    }
    let secrets = secrets(&app.pool, key.id).await?.into_iter().map(Into::into).collect();
    let quota_use = QuotaView::read(&app, key.id).await?;
    let credits = CreditsView::read(&app, &key.email).await?;
    let view = show(&app.pool, key).await?;
    let applied_on = key_applied_on(&app, path.id).await?;
    Ok((tag, Json(KeyDetails { view, secrets, quota_use, credits, applied_on })).into_response())
}
